"""The replayed search: what it counts, on tables small enough to count by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, RandomSampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module; its folder is no package."""
    import importlib.util

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("search_benchmark", BENCHMARKS / "search.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "search_benchmark", module)
    spec.loader.exec_module(module)
    return module


def table(module: Any, *rows: tuple[float, list[float], float]) -> dict[int, Any]:
    """Make a table of lr, macro-F1 by epoch (one second each), macro-F1 at the end."""
    return {
        n: module.Recorded(
            {"lr": lr, "vector_dropout": 0.5, "votes_lr": 3e-3},
            [(epoch, valid, float(epoch)) for epoch, valid in enumerate(curve, start=1)],
            quality,
        )
        for n, (lr, curve, quality) in enumerate(rows)
    }


class Always(BaseSampler):
    """Ask for one point, whatever was found."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {"lr": 1e-5, "vector_dropout": 0.5, "votes_lr": 3e-3}

    def sample_independent(self, *asked: Any) -> Any:
        raise AssertionError("all are known")


def test_the_nearest_untried_comes_next_and_compute_is_counted_up_to_the_first_good_one(
    replayed: Any,
) -> None:
    rows = (
        (1e-2, [0.5] * 4, 0.5),
        (1e-4, [0.5] * 3, 0.796),  # within 1 % of the best
        (1e-3, [0.5] * 2, 0.80),
        (2e-5, [0.5] * 1, 0.7),
    )
    told = table(replayed, *rows) | {60: None}
    # tried by distance from 1e-5: 2e-5 (1 s), then 1e-4 (3 s), of 10 s in all
    assert replayed.replay(told, Always(), NopPruner(), defaults=False) == pytest.approx(0.4)


def test_where_the_good_one_is_given_up_nothing_is_found(replayed: Any) -> None:
    rows = (
        (1e-5, [0.5] * 3, 0.5),
        (1e-4, [0.1] * 3, 0.8),  # looks bad at half of the epochs
    )
    told = table(replayed, *rows) | {60: None}
    pruner = replayed.pruner()
    assert replayed.replay(told, Always(), pruner, defaults=False) == float("inf")


def test_the_recorded_tables_hold_sixty_configurations_each(replayed: Any) -> None:
    for atlas in replayed.ATLASES:
        recorded = replayed.read(atlas)
        assert set(recorded) == set(range(replayed.N_CONFIGURATIONS + 1))
        drawn = replayed.configurations(atlas)
        for number, one in recorded.items():
            assert one.values == pytest.approx(drawn[number], rel=1e-5)
            spent = [seconds for _, _, seconds in one.epochs]
            assert spent == sorted(spent)
        share = replayed.replay(recorded, RandomSampler(0), NopPruner(), defaults=False)
        assert 0 < share <= 1
