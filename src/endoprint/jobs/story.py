"""The job list of a whole story: what `endoprint demo`, `run` and the Prefect flow walk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from endoprint.config import Params
from endoprint.jobs import data, deciding, fitting, pretraining, scoring, searching
from endoprint.jobs.data import write_json
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

SCORES = "scores"  # where a story scores to, in the workspace


@dataclass(frozen=True)
class Step:
    """One job of a story: its name, the function, and what it is told beside the workspace."""

    name: str
    job: Callable[..., str]
    arguments: dict[str, str | int] = field(default_factory=dict)


def story_steps(workspace: str) -> list[Step]:
    """Return the jobs that this workspace's values ask for, in order.

    Every value is checked first: a mistake in the last step's is not found after the others'.
    """
    space = Workspace.at(workspace)
    params = space.params
    _check(space)
    searched, trials = _search(params)
    steps = [Step("simulate", data.simulate)] if params.simulate else []
    steps += [Step("prepare", data.prepare)]
    steps += [Step("pretrain", pretraining.pretrain)] if params.pretrain else []
    if searched:
        told: dict[str, str | int] = {"model": searched, "trials": trials}
        steps += [Step(f"search {searched}", searching.search, told)]
    steps += [
        Step(
            f"train {model}",
            fitting.train,
            {"model": model, "tuned": "yes" if model == searched else ""},
        )
        for model in params.models
    ]
    steps += [
        Step("leaderboard", fitting.leaderboard),
        Step("register", deciding.register),
        Step("promote", deciding.promote),
    ]
    if params.score:
        steps += [Step("score", scoring.score_if_live, {"file": params.score, "out": SCORES})]
    return steps


def _search(params: Params) -> tuple[str, int]:
    """Return the model that is tuned before it is trained ("": none), and the trials."""
    if not params.search:
        return "", 0
    from endoprint.search import SearchConfig

    config = params.section("search", SearchConfig)
    return config.model or "", config.trials


def _check(space: Workspace) -> None:
    """Refuse a mistake in any section of the values, or in the rules."""
    from endoprint.cells import CellsConfig
    from endoprint.design import DesignConfig
    from endoprint.encoder.pretrain import PretrainConfig
    from endoprint.model import model_class
    from endoprint.policy import read_policy
    from endoprint.search import SearchConfig
    from endoprint.simulate import SimulateConfig
    from endoprint.tokens import TokensConfig

    params = space.params
    params.section("cells", CellsConfig)
    params.section("design", DesignConfig)
    params.section("tokens", TokensConfig)
    params.section("simulate", SimulateConfig)
    params.section("pretrain", PretrainConfig)
    searched = params.section("search", SearchConfig).model
    for name in [*params.models, *([searched] if searched else [])]:
        model_class(name).Config.of(params.models.get(name, {}), where=f"models.{name}")
    read_policy(space.policy)


def model_names(workspace: str) -> list[str]:
    """Return the field that this workspace compares, in the order of its values."""
    return list(Workspace.at(workspace).params.models)


def tell(
    workspace: str, *, told: Mapping[str, str], flow_run_id: str = "", began: float = 0.0
) -> str:
    """Write what a story came to as `.endoprint/story.json`; return its path.

    `told`: step name -> what the step returned. `began`: seconds since the epoch; 0: unknown.
    """
    space = Workspace.at(workspace)
    verdict = json.loads(Path(told["promote"]).read_text())
    scored = json.loads(Path(told["score"]).read_text()) if told.get("score") else {}
    board = json.loads(Path(told["leaderboard"]).read_text())
    return write_json(
        space.local / "story.json",
        {
            "champion": {"version": verdict["champion"], "model": verdict["champion_model"]},
            "decision": verdict["decision"],
            "reasons": verdict["reasons"],
            "flow_run_id": flow_run_id,
            "scores": str(Path(told["score"]).parent) if scored else None,
            "n_scored": scored.get("n_cells", 0),
            "leaderboard": board["models"],
            "replicated": board["replicated"],
            "confounded": board["confounded"],
            "steps": dict(told),
            "minutes": (time.time() - began) / 60 if began else None,
        },
    )


def leaderboard_screen(workspace: str, *, by: str = "") -> RenderableType:
    """Draw the leaderboard for the terminal; `by`: that of whole lines or batches."""
    from endoprint.report import Board, leaderboard

    name = f"leaderboard-{by}.json" if by else "leaderboard.json"
    board = json.loads((Workspace.at(workspace).local / name).read_text())
    return leaderboard(Board.of(board))


def last_screen(workspace: str) -> RenderableType:
    """Draw the last screen: who leads, who is live and why, where things are, what next."""
    from endoprint.report import Board, Outcome, story_screen

    space = Workspace.at(workspace)
    told = json.loads((space.local / "story.json").read_text())
    verdict = json.loads((space.local / "verdict.json").read_text())
    board = Board.of(json.loads((space.local / "leaderboard.json").read_text()))
    champion = told["champion"]
    option = "" if space.root == Path.cwd() else f" --workspace {_near(space.root)}"
    places = {"leaderboard": _near(space.local / "leaderboard.html")}
    following = [(f"endoprint ui{option}", "compare the runs in MLflow, on this machine")]
    samples: list[str] = []
    if told["scores"]:
        scores = Path(told["scores"])
        places |= {
            "report": _near(scores / "report.html"),
            "scores": _near(scores / "scores.parquet"),
        }
        calls = json.loads((scores / "samples.json").read_text())
        samples = [row["sentence"] for row in calls.values()]
    asked = "what were these cells exposed to?"
    if not champion["version"]:
        asked += f" (nothing is live: add --model models:/{space.experiment}/{verdict['version']})"
    following += [
        (f"endoprint score CELLS.h5ad OUT{option}", asked),
        ("endoprint init CELLS.h5ad DIR", "the same story on cells of your own"),
    ]
    if told["flow_run_id"]:
        places["flow run"] = told["flow_run_id"]
    outcome = Outcome(
        decision=verdict["decision"],
        version=f"version {verdict['version']} ({verdict['model']})",
        reasons=verdict["reasons"],
        champion=f"version {champion['version']} ({champion['model']})"
        if champion["version"]
        else "",
    )
    return story_screen(
        board,
        outcome,
        places=places,
        next_commands=following,
        n_scored=told["n_scored"],
        samples=samples,
        minutes=told["minutes"],
    )


def _near(path: Path) -> str:
    """Spell a path as short as it can be typed from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
