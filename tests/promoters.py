"""Persistent promoters at once, each with a verdict that stands: one champion every round."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conftest import planted_cells
from endoprint import approvals, audited, gates, history, registry
from endoprint.config import Refusal
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.registry import champion, find, register
from endoprint.workspace import Workspace
from lab import bare_workspace, fit_and_track, furnish

LOST = {  # what those say who come too late, and the one who is live already
    "a decision holds against the champion it was made against",
    "a decision changes who is live",
}


def with_verdicts(folder: Path, n_versions: int) -> Workspace:
    """A workspace whose versions all carry a stored verdict to promote them."""
    made = furnish(bare_workspace(folder), planted_cells(n_units=4, n_cells=4))
    for number in range(n_versions):
        model = Logistic(LogisticConfig(penalty=0.1 + number, latent_width=4))
        version = register(made, fit_and_track(made, model=model))
        verdict = gates.Verdict("promote", [f"{version.label} is due"], [])
        said = {"version": version.version, "key": version.sha256, "champion": None}
        registry.tell(made, "verdict", {**said, "verdict": verdict.to_json(), "figures": {}})
    return made


def promoter(root: str, version: str, barrier: Any, told: Any, n_rounds: int) -> None:
    """Stay, and in every round try to carry out the verdict against the champion of its start."""
    space = Workspace.at(root)
    mine = find(space, version)
    for _ in range(n_rounds):
        barrier.wait()  # the champion stands
        live = champion(space)
        barrier.wait()  # everybody has seen it
        made = approvals.verdict_of(space, version)
        assert made is not None
        try:
            registry.go_live(space, mine, against=live, why=made["verdict"]["reasons"][0])
            told.put((version, "won"))
        except Refusal as refusal:
            told.put((version, refusal.rule))


def contest(folder: Path, *, n_promoters: int, n_rounds: int) -> tuple[list[str], float]:
    """Let promoters contend; return what went wrong and the seconds of all rounds together."""
    space = with_verdicts(folder, n_promoters)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["promoters"])
    barrier, told = context.Barrier(n_promoters + 1), context.Queue()
    known = [version.version for version in registry.versions(space)]
    processes = [
        context.Process(target=promoter, args=(str(space.root), version, barrier, told, n_rounds))
        for version in known
    ]
    for process in processes:
        process.start()
    wrong = []
    barrier.wait()
    began = time.perf_counter()
    for number in range(1, n_rounds + 1):
        barrier.wait()
        outcomes = [told.get(timeout=300) for _ in processes]
        winners = [version for version, outcome in outcomes if outcome == "won"]
        rules = {outcome for _, outcome in outcomes if outcome != "won"}
        live = champion(space)
        if len(winners) != 1 or live is None or live.version != winners[0]:
            wrong.append(f"round {number}: {winners} won, {live.version if live else None} live")
        if rules - LOST:
            wrong.append(f"round {number}: {rules}")
        if number < n_rounds:
            barrier.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    flips = [line for line in history.read(space) if line["what"] == "done"]
    if len(flips) != n_rounds:
        wrong.append(f"{len(flips)} flips in {n_rounds} rounds")
    wrong += audited.verify(space) + [move.sentence() for move in audited.plan(space)]
    return wrong, seconds


def main() -> int:
    """Hold the contest of the figure; exit status 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--promoters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong, seconds = contest(
            Path(folder) / "space", n_promoters=asked.promoters, n_rounds=asked.rounds
        )
    sys.stdout.write("\n".join(wrong) + "\n" if wrong else "")
    sys.stdout.write(
        f"{asked.promoters} promoters, {asked.rounds} rounds: {len(wrong)} wrong; "
        f"{seconds / asked.rounds:.2f} s a round\n"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
