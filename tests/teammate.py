"""One process of a team that trains the loop of test_encoder; `test_team` starts two of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from endoprint.encoder import team
from test_encoder import CPU_ERROR, RECIPE, Small, loop, silent, weights

UNEVEN = RECIPE.model_copy(update={"minibatch_cells": 11})  # 6 and 5 cells of two processes


def main(folder: Path) -> None:
    with team.joined() as here:
        made = loop(UNEVEN)
        made.run(silent)
        save_file(weights(made), folder / f"weights-{here.rank}.safetensors")
        (folder / f"history-{here.rank}.json").write_text(json.dumps(made.progress.history))
        short = loop(UNEVEN)
        if not here.is_lead:  # memory runs out here only
            Small(short, 2, CPU_ERROR, on_the_way_back=False)
        short.run(silent)
        (folder / f"short-{here.rank}.json").write_text(json.dumps(short.progress.history))
        kept = folder / f"work-{here.rank}"  # not shared: only the lead's has a checkpoint
        loop(UNEVEN, work=kept).run(silent)
        assert (kept / "training.safetensors").exists() == here.is_lead


if __name__ == "__main__":
    main(Path(sys.argv[1]))
