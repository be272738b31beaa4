"""What `endoprint up` keeps running, killed at random moments of its work: each kind in turn.

A trial of a search, the worker, Prefect's server, MLflow's, and PostgreSQL, which holds all
three stores: `kill -9` at a moment drawn over the work's length, then nothing is touched. The work
has to come to its end, each model fitted once, each trial counted once, and nothing left open.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from backends import Postgres, postgres, postgres_folder
from conftest import TINY, a_workspace
from standing import Standing, kill
from test_schedule import free_port

KINDS = ("trial", "worker", "prefect", "mlflow", "database")
PARAMS = {
    **{key: value for key, value in TINY.items() if key != "pretrain"},
    "models": {"logistic": {}, "signature": {}},
}
TRIALS = 6  # more for each search: finished ones are not made again
MOST_TELLINGS = 4  # for each kill: work that ended before it counts for nothing
FITS = """select count(*) from runs join tags using (run_uuid)
where key = 'kind' and value = 'train' and status = 'FINISHED'"""
OPEN = "select count(*) from runs where status = 'RUNNING'"
COUNTED = "select count(*) from trials where state in ('COMPLETE', 'PRUNED')"
UNFINISHED = "select count(*) from trials where state = 'RUNNING'"


@dataclass
class Site:
    """An `endoprint up` on PostgreSQL, and how long its work took so far."""

    up: Standing
    database: Postgres
    seconds: dict[str, float] = field(default_factory=dict)  # of the work, by its deployment
    n_trials: int = 0

    def count(self, statement: str, database: str = "mlflow") -> int:
        return int(self.database.psql(statement, database))

    def begin(self, kind: str) -> tuple[str, str]:
        """Ask for the work in which a kind of victim is killed; return deployment and run id."""
        space = str(self.up.space)
        if kind != "trial":
            return "nightly", self.up.begin("nightly", workspace=space, force=True)
        self.n_trials += TRIALS
        asked = {"model": "logistic", "trials": self.n_trials, "budget": ""}
        return "weekly-search", self.up.begin("weekly-search", workspace=space, **asked)

    def strike(self, kind: str, run_id: str) -> bool:
        """Kill the victim; False where the work has no process yet, or none any more."""
        if kind == "database":
            self.database.stop(at_once=True)  # as a power cut would
            self.database.start()
            return True
        if kind == "trial":
            pid = self.up.run(run_id)["infrastructure_pid"]
            if not pid:
                return False
            try:
                kill(int(str(pid).rpartition(":")[2]))
            except ProcessLookupError:
                return False
            return True
        kill(self.up.service(kind))
        return True

    def wrong(self, kind: str, run_id: str, n_fits: int) -> list[str]:
        """Wait for the end of the work; return what is not as if nothing had been killed."""
        ended = self.up.finished(run_id)
        found = []
        if ended["state_name"] != "Completed":
            found.append(f"it ended as {ended['state_name']}: {ended['state'].get('message')}")
        fitted = self.count(FITS) - n_fits
        if fitted != (0 if kind == "trial" else len(PARAMS["models"])):
            found.append(f"{fitted} fits were finished")
        if kind == "trial" and self.count(COUNTED, "optuna") != self.n_trials:
            found.append(f"{self.count(COUNTED, 'optuna')} trials of {self.n_trials}")
        if left := self.count(OPEN):
            found.append(f"{left} runs left RUNNING")
        if left := self.count(UNFINISHED, "optuna"):
            found.append(f"{left} trials left RUNNING")
        return found


def torture(site: Site, n_kills: int, *, seed: int, say: Callable[[str], object]) -> list[str]:
    """Kill `n_kills` times, each kind in turn; return what went wrong."""
    rng = np.random.default_rng(seed)
    for kind in ("trial", "database")[: min(n_kills, 2)]:  # once in peace, to know how long
        began, (name, run_id) = time.monotonic(), site.begin(kind)
        site.up.finished(run_id)
        site.seconds[name] = time.monotonic() - began
    wrong: list[str] = []
    for number in range(n_kills):
        kind = KINDS[number % len(KINDS)]
        for _ in range(MOST_TELLINGS):
            n_fits, began = site.count(FITS), time.monotonic()
            name, run_id = site.begin(kind)
            moment = float(rng.random()) * site.seconds[name]
            time.sleep(max(0.0, began + moment - time.monotonic()))
            is_over = site.up.run(run_id)["state_type"] == "COMPLETED"
            was_struck = not is_over and site.strike(kind, run_id)
            found = site.wrong(kind, run_id, n_fits)
            if was_struck:
                break
            if is_over:
                site.seconds[name] = min(site.seconds[name], moment)
            wrong += found
        else:
            found = ["every time the work was over, or not begun, when it was to be killed"]
        wrong += [f"{kind}, killed after {moment:.1f} s: {each}" for each in found]
        took = time.monotonic() - began
        say(
            f"{number + 1}/{n_kills} {kind} killed after {moment:.1f} of {site.seconds[name]:.0f}"
            f" s: {found or 'recovered'}, {took:.0f} s in all"
        )
    return wrong


def main() -> int:
    """Torture an `up` of our own on a PostgreSQL of our own; exit status 1 where it went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    programs = postgres_folder()
    if programs is None:
        sys.stdout.write("Debian's postgresql is not installed: nothing was killed\n")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, postgres(programs) as database:
        space = a_workspace(Path(folder) / "space", params=PARAMS)
        leading = {
            "MLFLOW_TRACKING_URI": database.url("mlflow", "psycopg"),
            "PREFECT_API_DATABASE_CONNECTION_URL": database.url("prefect", "asyncpg"),
            "OPTUNA_STORAGE": database.url("optuna", "psycopg"),
        }
        ports = ("--mlflow-port", str(free_port()), "--prefect-port", str(free_port()))
        up = Standing(space, *ports, extra=leading)
        try:
            site = Site(up, database)
            wrong = torture(
                site, asked.kills, seed=asked.seed, say=lambda line: sys.stderr.write(f"{line}\n")
            )
        finally:
            up.stop()
        wrong += [f"left behind: {each}" for each in up.family]
    sys.stdout.write("\n".join(wrong) + "\n" if wrong else "")
    sys.stdout.write(
        f"{asked.kills} kills over {', '.join(KINDS)}: {len(wrong)} wrong; "
        f"{(time.monotonic() - began) / 60:.1f} minutes, seed {asked.seed}\n"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
