"""Stories killed at a random moment and told again: `make torture`, or a few of them in CI.

A story is added to `STORIES`: a workspace to begin in, the work, and what has to be the same
however often the work was killed on its way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
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
from searching_story import before_a_search, search_the_neighbours, searched

MOST_TELLINGS = 4  # for each kill that is asked for
COST = "score_seconds_per_1000_cells"  # no two tellings measure the same


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
        told["metrics"].pop(COST)
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
    Story("search", before_a_search, search_the_neighbours, searched),
)


# -- the torture ----------------------------------------------------------------------------------
def torture(story: Story, n_kills: int, *, seed: int, folder: Path) -> list[str]:
    """Kill a story `n_kills` times at moments drawn over its length; return what went wrong.

    A telling that ends before its kill counts for nothing but the length: machines' loads change.
    """
    context = multiprocessing.get_context("forkserver")  # a kill at once, not in the imports
    context.set_forkserver_preload(["torture", "endoprint.report", "endoprint.smoke"])
    begun = story.begin(folder / "begun")
    quiet = moved_copy(begun, folder / "quiet")
    _told(context, story, quiet)
    wanted = story.ended(quiet)
    seconds = _told(context, story, moved_copy(begun, folder / "warm"))  # the machine is, by now
    rng = np.random.default_rng(seed)
    wrong: list[str] = []
    n_killed = n_told = 0
    while n_killed < n_kills and n_told < MOST_TELLINGS * n_kills:
        n_told += 1
        space = moved_copy(begun, folder / f"telling{n_told}")
        moment = float(rng.random()) * seconds
        process, began = context.Process(target=story.work, args=(str(space.root),)), _now()
        process.start()
        process.join(moment)
        if not process.is_alive():
            process.join()
            seconds = min(seconds, _now() - began)
            continue
        process.kill()
        process.join()
        n_killed += 1
        _told(context, story, space)
        found = _complaints(space)
        if story.ended(space) != wanted:
            found.append("the result differs from the uninterrupted one")
        wrong += [f"{story.name}, killed after {moment:.2f} s: {said}" for said in found]
        said = f"killed after {moment:.2f} of {seconds:.2f} s: {found or 'recovered'}"
        sys.stderr.write(f"{story.name} {n_killed}/{n_kills}: {said}\n")
        shutil.rmtree(space.root)
    if n_killed < n_kills:
        wrong.append(f"{story.name}: killed only {n_killed} of {n_kills} times")
    return wrong


def _told(context: Any, story: Story, space: Workspace) -> float:
    """Tell a story to its end in a process of its own; return the seconds it took."""
    began = _now()
    process = context.Process(target=story.work, args=(str(space.root),))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{story.name} ended with {process.exitcode}"
    return _now() - began


def _now() -> float:
    return time.perf_counter()


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
