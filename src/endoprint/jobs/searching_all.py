"""The job that tunes the whole field under one budget, so that tuned models are compared."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Away, Refusal
from endoprint.jobs.materials import cells_and_split
from endoprint.jobs.searching import Tuning, news_of, report
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from endoprint.tracking import Run


@dataclass
class _Entry:
    """One model of the field: its study, its run, and how far it has come."""

    tuning: Tuning
    run: Run
    allotted: float = 0.0  # seconds, over all rungs so far
    rungs: int = 0
    error: str = ""


@dataclass
class _Field:
    entries: dict[str, _Entry] = field(default_factory=dict)

    def figures(self) -> dict[str, float | None]:
        """Return each model's best macro-F1 within the time it was given; None: none."""
        from endoprint import search as optuna_search

        said: dict[str, float | None] = {}
        for name, entry in self.entries.items():
            found = optuna_search.best_within(entry.tuning.study, entry.allotted)
            said[name] = None if found is None else float(found.values[0])
        return said


def refuse_more_than_a_budget(*more: object) -> None:
    """Refuse whatever else was told to a search of all."""
    if any(more):
        raise Refusal("a search of all has a budget alone", "more", "say a budget such as 2h")


def search_all(workspace: str, *, budget: str) -> str:
    """Tune every model of the field under one budget; return the run id.

    By successive halving: every rung gives each model left in it the same time, then the worse
    half stops being tuned and keeps its best values. Time that a model's study has had before
    counts, so that a search that was cut short is gone on with.
    """
    space = Workspace.open(workspace)
    from endoprint import search as optuna_search
    from endoprint import tracking

    if not budget:
        raise Refusal("a search of all has a budget", "none", "say --budget 2h")
    limits = optuna_search.Limits.of(trials=0, budget=budget, target=0.0, default=1)
    seconds = limits.seconds or 0.0
    cells_and_split(space)  # refuses before anything is tracked
    models = list(space.params.models)
    with (
        ExitStack() as open_runs,
        progress.task("search all", int(seconds)) as step,
        tracking.run(space, name="search all", kind="search") as parent,
    ):
        field_ = _Field()
        for model in models:
            run = open_runs.enter_context(
                tracking.run(
                    space, name=f"search {model}", kind="search", model=model, parent=parent.run_id
                )
            )
            field_.entries[model] = _Entry(Tuning.of(space, model), run)
        _halve(field_, seconds, step)
        for entry in field_.entries.values():
            best = optuna_search.best_within(entry.tuning.study, entry.allotted)
            if best is not None:  # else no trial came to its end
                report(space, entry.tuning, entry.run, best=best)
            if entry.error:
                entry.run.tags({"error": entry.error[:500]})
        result = _result(space, field_, budget)
        parent.record("winners", result)
        parent.text("proposal.diff", result["diff"] and result["diff"] + "\n")
        parent.params({"budget": budget})
        first = result["models"][0]
        if first["macro_f1"] is not None:
            parent.metrics({"best_macro_f1": first["macro_f1"]})
        parent.description(_described(result))
    return parent.run_id


def _halve(field_: _Field, seconds: float, step: progress.Task) -> None:
    from endoprint.search import Limits, seconds_spent
    from endoprint.search.field import n_rungs, share, survivors

    going = list(field_.entries)
    n_models = len(going)
    for _ in range(n_rungs(n_models)):
        for model in going:
            entry = field_.entries[model]
            entry.allotted += share(seconds, n_models, len(going))
            entry.rungs += 1
            try:
                entry.tuning.run(Limits(seconds=entry.allotted), entry.run.run_id)
            except Away:
                raise
            except Refusal as refused:  # of this model: the field goes on without it
                entry.error = str(refused)
            spent = sum(min(seconds_spent(e.tuning.study), e.allotted)
                        for e in field_.entries.values())  # fmt: skip
            step.reach(min(int(spent), int(seconds)), int(seconds))
        going = survivors(field_.figures(), going)


def _result(space: Workspace, field_: _Field, budget: str) -> dict[str, Any]:
    from endoprint import search as optuna_search

    figures = field_.figures()
    rows, winners = [], {}
    for model, entry in field_.entries.items():
        study = entry.tuning.study
        best = optuna_search.best_within(study, entry.allotted)
        if best is not None:
            winners[model] = news_of(space, model, dict(best.params))
        rows.append(
            {
                "model": model,
                "macro_f1": figures[model],
                "rungs": entry.rungs,
                "trials": optuna_search.n_finished(study),
                "seconds": round(optuna_search.seconds_spent(study), 1),
                "values": dict(best.params) if best is not None else {},
                "error": entry.error,
            }
        )
    rows.sort(key=lambda row: figures[str(row["model"])] or -1.0, reverse=True)
    diff = optuna_search.proposal(space.root / "params.yaml", winners)
    text = "\n".join([_table(rows), "", diff or "params.yaml has these values"])
    return {"budget": budget, "models": rows, "diff": diff, "text": text}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["model        macro-F1  rungs  trials  seconds"]
    for row in rows:
        figure = "–" if row["macro_f1"] is None else f"{row['macro_f1']:.3f}"
        lines.append(
            f"{row['model']:12} {figure:>8}  {row['rungs']:5}  {row['trials']:6}  "
            f"{row['seconds']:7.0f}{'  ' + row['error'] if row['error'] else ''}"
        )
    return "\n".join(lines)


def _described(result: dict[str, Any]) -> str:
    first = result["models"][0]
    best = "no model" if first["macro_f1"] is None else f"macro-F1 {first['macro_f1']:.3f}"
    lines = [
        f"**{best}**, {first['model']}, the best of {len(result['models'])} models tuned within "
        f"{result['budget']}, on held-out development units. Test units were not opened.",
        "",
        "| model | macro-F1 | rungs | trials | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["models"]:
        figure = row["error"] if row["macro_f1"] is None else f"{row['macro_f1']:.3f}"
        lines.append(
            f"| {row['model']} | {figure} | {row['rungs']} | {row['trials']} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join([*lines, "", "```diff", result["diff"], "```"])


def search_all_result(workspace: str, run_id: str) -> dict[str, Any]:
    """Return what a search of the field came to: a row per model, best first, and one diff."""
    from endoprint import runs

    return dict(runs.read_record(Workspace.at(workspace), run_id, "winners"))
