"""Killed at any moment, a story told again ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoters import contest
from torture import STORIES, Story, torture

KILLS = 5


@pytest.mark.slow
@pytest.mark.parametrize("story", STORIES, ids=[story.name for story in STORIES])
def test_a_story_killed_at_random_moments_ends_as_if_it_had_not_been(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert torture(story, KILLS, seed=1, folder=tmp_path) == []


@pytest.mark.slow
def test_of_promoters_at_once_exactly_one_wins_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wrong, _ = contest(tmp_path / "space", n_promoters=4, n_rounds=5)
    assert wrong == []
