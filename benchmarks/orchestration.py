"""What Prefect, MLflow and DVC cost a story, beside the same story's bare computation.

One story (simulate, prepare, fit three models in every fold and once more, leaderboard with its
control, register, promote, score) is told three times in fresh workspaces, same values and seed:

- `flow`: `python -m flows.story`, with Prefect's own server, MLflow and DVC;
- `command`: `endoprint demo`, without Prefect;
- `bare`: one process that calls the same simulation, curation, split and tokeniser, fits and
  judges the same models as often, draws the same figures of each and the leaderboard's page, and
  scores the test units and the new cells. No Prefect, MLflow or DVC; no card and no report of
  scores either: what those cost counts as orchestration, so that its share is an upper bound.

Processor seconds of every process that took part (children that outlive their parents too), then
wall. The difference hardly depends on how long the fits take; its share is told for this story and
for one of ten minutes.

    python benchmarks/orchestration.py [--cells 1800] [--steps 150] [--seed 0] [--stories flow]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import yaml

from endoprint import blueprint
from endoprint.workspace import Workspace, settings

ROOT = Path(__file__).resolve().parents[1]
TEN_MINUTES = 600.0
FOREIGN = ("MLFLOW_", "PREFECT_", "DVC_", "ENDOPRINT_")
PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans become ours, and so do their seconds
STORIES = {
    "flow": ["-m", "flows.story"],
    "command": ["-c", "from endoprint.cli import main; main()", "demo"],
}


def main() -> None:
    """Tell the three stories and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=150, help="fewest steps of a Geneformer fit")
    parser.add_argument("--cells", type=int, default=1800, help="labelled cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", nargs="+", choices=list(STORIES), default=list(STORIES))
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.bare:
        bare(str(asked.bare))
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    print(f"{asked.cells} cells, {asked.steps} steps; load before: {os.getloadavg()[0]:.1f}")
    print(f"{'story':8s} {'processor s':>12s} {'wall s':>8s}")
    cost: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*asked.stories, "bare"):
            space = a_workspace(Path(folder) / name, asked=asked)
            words = STORIES.get(name, [__file__, "--bare", str(space)])
            cost[name] = spent(words, cwd=space)
            print(f"{name:8s} {cost[name][0]:12.1f} {cost[name][1]:8.1f}", flush=True)
    for name in asked.stories:
        for what, one, other in zip(("processor", "wall"), cost[name], cost["bare"]):
            more = one - other
            print(
                f"{name} over bare: {more:.1f} {what} s, {more / one:.1%} of this story, "
                f"{more / (TEN_MINUTES + more):.1%} of one whose bare part takes ten minutes"
            )
    print(f"load after: {os.getloadavg()[0]:.1f}")


def a_workspace(folder: Path, *, asked: argparse.Namespace) -> Path:
    """Make the demo's workspace without pre-training and search, whose parts tell nothing more."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name in ("pretrain", "search"):
        params.pop(name)
    params["seed"], params["simulate"]["cells"] = asked.seed, asked.cells
    params["models"]["geneformer"] = {"min_steps": asked.steps}
    files = {
        "params.yaml": yaml.safe_dump(params, sort_keys=False),
        "dvc.yaml": blueprint.dvc_yaml(has_pool=True),
        ".dvc/config": blueprint.DVC_CONFIG,
        ".dvcignore": ".endoprint\n",
        "registry/policy.yaml": (ROOT / "registry/policy.yaml").read_text(),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def spent(words: Sequence[str], *, cwd: Path) -> tuple[float, float]:
    """Run a Python to its end; return processor and wall seconds, of all that it started too."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    environment = {**settings(), **kept, "PYTHONPATH": str(ROOT)}
    before, began = _processor_seconds(), time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    wall = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    while True:
        try:
            os.wait()  # what the story left to end by itself
        except ChildProcessError:
            return _processor_seconds() - before, wall


def _processor_seconds() -> float:
    found = os.times()
    return found.children_user + found.children_system


def bare(workspace: str) -> None:
    """Compute what the story computes, and record nothing."""
    from endoprint import cells, jobs, judge, negatives, report
    from endoprint.design import Split
    from endoprint.latent import Latent
    from endoprint.model import Resources, model_class

    space = Workspace.open(workspace)
    jobs.simulate(workspace)
    for stage in (jobs.check, jobs.curate, jobs.audit, jobs.split, jobs.tokenise):
        stage(workspace)
    known, split = cells.load(space.cells), Split.read(space.split)
    offered = Resources(vocabulary=space.vocabulary, tokens=space.tokens)
    seed = space.params.seed
    found: dict[str, judge.Judgement] = {}
    control = str(known.uns["endoprint"]["control"])
    for name, values in space.params.models.items():
        cls = model_class(name)
        build = partial(cls, cls.Config.of(values, where=name), seed=seed, resources=offered)
        judged = judge.cross_fit(build, known, split, seed=seed)
        found[name] = judged
        made = [
            report.confusion(judged.predictions),
            report.roc(judged.predictions, control=control),
            report.precision_recall(judged.predictions, control=control),
            report.reliability(judged.predictions),
            report.per_unit(judged.by_unit[["macro_f1"]], chance=1 / 15),
        ]
        for figure in made:
            report.png(figure)
        parts = split.parts(known.obs, None)
        final = build().fit(known[parts.train].copy(), known[parts.valid].copy())
        final.save(space.local / name)
        final.predict_proba(known[parts.held_out].copy())
        if name == "logistic":  # the control that stands on the leaderboard
            negatives.shuffled_control(build, known, split, seed=seed)
            new = cells.CellsConfig.of(space.params.cells, where="cells").located(space.root)
            read = cells.read(space.root / str(space.params.score), new)
            final.predict_proba(cells.curate(read, new, labelled=False)[0])
    told = pd.DataFrame({name: judged.metrics for name, judged in found.items()}).T
    by_unit = pd.DataFrame({name: judged.by_unit["macro_f1"] for name, judged in found.items()})
    board = report.Board(
        task="bare", table=told, by_unit=by_unit, audit=json.loads(space.audit.read_text())
    )
    leader = str(board.ranked.index[0])
    shown = known[known.obs_names.isin(found[leader].predictions.index)]
    place = pd.DataFrame(Latent.fit(shown, width=20).transform(shown), index=shown.obs_names)
    page = report.leaderboard_page(
        board, predictions={leader: found[leader].predictions}, control=control, vectors=place
    )
    (space.local / "leaderboard.html").write_text(page)
    print(told["macro_f1"].to_json())


if __name__ == "__main__":
    main()
