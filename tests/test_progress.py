import io
from functools import partial

import pytest
from rich.console import Console

from endoprint import progress


@pytest.fixture
def terminal(monkeypatch):
    stream = io.StringIO()
    console = partial(Console, file=stream, force_terminal=True, width=100, _environ={})
    monkeypatch.setattr(progress, "Console", lambda stderr: console())
    return stream


@pytest.fixture
def log(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=stream, _environ={}))
    return stream


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_short_step_leaves_nothing_in_a_log(log):
    with progress.task("simulate", 3) as step:
        step()
        step.watch(1, {"loss": 0.5})
        step.reach(3, 3)
    assert log.getvalue() == ""


def test_a_long_step_leaves_one_line_in_a_log(log, clock):
    with progress.task("simulate [cells]", 3) as step:
        step.reach(3, 3)
        clock[0] += 12
    assert log.getvalue() == "simulate [cells]  3  12 s\n"


def test_a_failed_step_never_says_how_long_it_took(log, clock):
    def fails() -> None:
        with progress.task("simulate"):
            clock[0] += 12
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert log.getvalue() == ""


def test_a_terminal_shows_steps_nested_and_one_after_another(terminal):
    with progress.task("outer", 2) as outer:
        with progress.task("first"):
            outer()
        with progress.task("second", 4) as second:
            second(note="[bold]a note")
    with progress.task("later"):
        pass
    seen = terminal.getvalue()
    assert all(name in seen for name in ("outer", "later"))
    assert seen.rstrip().endswith("\x1b[?25h")  # the cursor is given back


def test_the_terminal_is_given_back_after_an_error(terminal):
    with pytest.raises(ZeroDivisionError), progress.task("breaks"):
        raise ZeroDivisionError
    with progress.task("works after it", 1) as step:
        step()
    assert "works after it" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 2


@pytest.mark.parametrize("first", [0, 1])
def test_epochs_are_counted_from_zero_or_one(log, first):
    with progress.task("fit", 5) as step:
        for epoch in range(first, first + 5):
            step.watch(epoch, {"loss": 1.0})
        assert step.completed == 5


def test_a_resumed_fit_starts_where_it_stopped(log):
    with progress.task("fit", 10) as step:
        step.watch(7, {})
        assert step.completed == 7
