"""Stories killed at a random moment and told again: `make torture`, or a few of them in CI.

A story is added to `STORIES`: a workspace to begin in, the work, and what has to be the same
however often the work was killed on its way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conftest import planted_cells
from endoprint import audited, curated, jobs, promotion, registry, runs, tracking
from endoprint.design import Split
from endoprint.workspace import Workspace
from lab import bare_workspace, fit_and_track, furnish, misled, moved_copy
from scoring_story import before_a_scoring, score_the_new_cells, scored

COSTS = ("score_seconds_per_1000_cells", "peak_memory_gib")  # no two tellings measure the same


@dataclass(frozen=True)
class Story:
    """Work that may be killed anywhere. All three are functions of a module: they are pickled."""

    name: str
    begin: Callable[[Path], Workspace]  # makes the workspace in a folder that is not there yet
    work: Callable[[str], object]  # does the whole work in a workspace, as a command would
    ended: Callable[[Workspace], Any]  # what has to be the same as without a kill


# -- promote --------------------------------------------------------------------------------------
def before_a_promotion(folder: Path) -> Workspace:
    """A workspace with a weak champion and a better fit that is not registered yet."""
    made = furnish(bare_workspace(folder), planted_cells(n_units=6, n_cells=8))
    root = str(made.root)
    weak = fit_and_track(made, cells=misled(curated.load(made.cells)))
    jobs.promote(root, version=jobs.register(root, run_id=weak))
    fit_and_track(made)
    return made


def promote_the_newest(workspace: str) -> object:
    newest = str(tracking.runs_table(Workspace.at(workspace)).index[0])
    return jobs.promote(workspace, version=jobs.register(workspace, run_id=newest))


def promoted(space: Workspace) -> Any:
    found = promotion.promote(space, "candidate").to_json()
    for told in found["figures"].values():
        for cost in COSTS:
            told["metrics"].pop(cost)
    costs = ("seconds to score", "peak memory")
    card = jobs.card(str(space.root), version="champion").splitlines()
    return {
        "aliases": registry.aliases(space),
        "promotion": found,
        "moves": audited.plan(space),
        "openings": promotion.openings(space, Split.read(space.split).hash),
        "n_runs": len(runs.finished(space, "promote", {"version": "2"})),
        "card": [line for line in card if not any(cost in line for cost in costs)],
    }


STORIES = (
    Story("promote", before_a_promotion, promote_the_newest, promoted),
    Story("score", before_a_scoring, score_the_new_cells, scored),
)


# -- the torture ----------------------------------------------------------------------------------
def torture(story: Story, n_kills: int, *, seed: int, folder: Path) -> list[str]:
    """Kill a story `n_kills` times at moments drawn over its length; return what went wrong."""
    context = multiprocessing.get_context("forkserver")  # a kill at once, not in the imports
    context.set_forkserver_preload(["torture", "endoprint.report", "endoprint.smoke"])
    begun = story.begin(folder / "begun")
    quiet = moved_copy(begun, folder / "quiet")
    seconds = [_told(context, story, quiet)]
    wanted = story.ended(quiet)
    seconds.append(_told(context, story, moved_copy(begun, folder / "warm")))
    rng = np.random.default_rng(seed)
    wrong = []
    for number, share in enumerate(rng.random(n_kills), start=1):
        space = moved_copy(begun, folder / f"kill{number}")
        moment = float(share) * seconds[-1]  # the first telling warmed the machine up
        process = context.Process(target=story.work, args=(str(space.root),))
        process.start()
        process.join(moment)
        was_killed = process.is_alive()
        process.kill()
        process.join()
        _told(context, story, space)
        found = _complaints(space)
        if story.ended(space) != wanted:
            found.append("the result differs from the uninterrupted one")
        wrong += [f"{story.name}, killed after {moment:.2f} s: {said}" for said in found]
        said = f"killed after {moment:.2f} s" if was_killed else f"done before {moment:.2f} s"
        sys.stderr.write(f"{story.name} {number}/{n_kills}: {said}: {found or 'recovered'}\n")
    return wrong


def _told(context: Any, story: Story, space: Workspace) -> float:
    """Tell a story to its end in a process of its own; return the seconds it took."""
    began = time.perf_counter()
    process = context.Process(target=story.work, args=(str(space.root),))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{story.name} ended with {process.exitcode}"
    return time.perf_counter() - began


def _complaints(space: Workspace) -> list[str]:
    left = tracking.client(space).search_runs(
        [tracking.experiment(space, tracking.client(space))],
        filter_string="attributes.status = 'RUNNING'",
    )
    return [f"run {run.info.run_id} left RUNNING" for run in left] + registry.verify(space)


def main() -> int:
    """Torture every story; exit status 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="over all stories together")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began, wrong = time.perf_counter(), []
    shares = [len(part) for part in np.array_split(np.arange(asked.kills), len(STORIES))]
    for story, n_kills in zip(STORIES, shares):
        with tempfile.TemporaryDirectory() as folder:
            wrong += torture(story, n_kills, seed=asked.seed, folder=Path(folder))
    minutes = (time.perf_counter() - began) / 60
    sys.stdout.write("\n".join(wrong) + "\n" if wrong else "")
    sys.stdout.write(
        f"{asked.kills} kills over {', '.join(each.name for each in STORIES)}: "
        f"{len(wrong)} wrong; {minutes:.1f} minutes, seed {asked.seed}\n"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
