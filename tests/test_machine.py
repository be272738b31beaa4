"""What pays is asked of the machine, with a clock that can be watched."""

from __future__ import annotations

import json

import pytest
import torch

from endoprint.encoder import machine
from endoprint.encoder.machine import Way, candidates, choose, named, remembered
from test_encoder import RECIPE, loop, silent, weights

CPU = torch.device("cpu")


class Clock:
    """A clock that only the steps move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, *seconds: float):
        """A step that takes the first of these seconds, then the next, the last for ever."""
        left = list(seconds)

        def step() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return step


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"fp32": (1.0,), "bf16": (0.5,)}, "bf16"),
        ({"fp32": (1.0,), "bf16": (10.0,)}, "fp32"),  # a processor that emulates it
        ({"fp32": (1.0,), "bf16": (0.9,)}, "fp32"),  # no more than noise
        ({"fp32": (9.0, 1.0), "bf16": (9.0, 0.5)}, "bf16"),  # the first warms up
        ({"fp32": (1.0,), "compiled": (28.5, 0.5)}, "compiled"),  # earned back in 57 steps
        ({"fp32": (1.0,), "compiled": (80.0, 0.5)}, "fp32"),  # not within 100
        ({"fp32": (1.0,), "bf16": (0.5,), "compiled": (5.0, 0.2)}, "compiled"),
        ({"fp32": (1.0,), "bf16": (0.5,), "compiled": (5.0, 0.45)}, "bf16"),
    ],
)
def test_a_way_must_pay_within_the_steps_to_come(seconds, way):
    clock = Clock()
    found = choose({name: clock.step(*each) for name, each in seconds.items()}, clock, n_steps=100)
    assert found["way"] == way
    assert {name: found[name] for name in seconds} == pytest.approx(
        {name: each[-1] for name, each in seconds.items()}
    )


def test_a_way_that_does_not_run_here_is_said_and_left_out(caplog):
    clock = Clock()

    def broken() -> None:
        raise RuntimeError("no C compiler")

    found = choose({"fp32": clock.step(1.0), "compiled": broken}, clock, n_steps=100)
    assert found == {"way": "fp32", "fp32": 1.0}
    assert "no C compiler" in caplog.text


def test_the_machine_is_asked_once_and_a_damaged_answer_is_asked_again(tmp_path, monkeypatch):
    asked = []

    def find():
        asked.append(1)
        return {"way": "bf16", "bf16": 0.5}

    path, key = tmp_path / "machine.json", {"device": "some", "width": 64}
    for _ in range(2):
        monkeypatch.setattr(machine, "_FOUND", {})  # another process
        assert remembered(path, key, find)["way"] == "bf16"
    assert len(asked) == 1
    assert list(json.loads(path.read_text()).values()) == [{"way": "bf16", "bf16": 0.5}]
    remembered(path, key | {"width": 128}, find)
    assert len(asked) == 2
    path.write_text("{")
    monkeypatch.setattr(machine, "_FOUND", {})
    remembered(path, key, find)
    assert len(asked) == 3
    remembered(None, key | {"width": 256}, find)
    remembered(None, key | {"width": 256}, find)
    assert len(asked) == 4


@pytest.mark.parametrize("instructions", [True, False])
def test_a_processor_is_asked_about_bf16_only_if_it_has_instructions_for_it(
    instructions, monkeypatch
):
    monkeypatch.setattr(machine, "has_bf16", lambda device: instructions)
    ways = [named(way) for way in candidates("auto", "auto", CPU)]
    assert ways == (["fp32", "bf16"] if instructions else ["fp32"])


def test_what_is_chosen_in_the_recipe_is_not_asked():
    assert candidates("fp32", "off", CPU) == [Way(False, False)]
    assert candidates("bf16", "off", CPU) == [Way(True, False)]
    assert candidates("fp32", "on", CPU) == [Way(False, True)]


def test_a_gpu_is_asked_about_compiled_code_too(monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    ways = [named(way) for way in candidates("auto", "auto", torch.device("cuda"))]
    assert ways == ["fp32", "bf16", "bf16 compiled"]


def test_steps_go_the_way_that_pays_and_answers_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    monkeypatch.setattr(machine, "_FOUND", {})
    asked = []

    def bf16_pays(ways, clock, *, n_steps, start):
        asked.append((sorted(ways), n_steps))
        for step in ways.values():
            step()
        return {"way": "bf16"}

    monkeypatch.setattr("endoprint.encoder.loop.choose", bf16_pays)

    def run(path):
        made = loop(RECIPE.model_copy(update={"precision": "auto"}), machine=path)
        read, pool = [], made.network.pool

        def watched(minibatch):
            read.append((made.network.training, made.network.uses_bf16))
            return pool(minibatch)

        made.network.pool = watched
        before = weights(made)
        made._choose_way()
        assert all(torch.equal(tensor, before[key]) for key, tensor in weights(made).items())
        read.clear()
        made.run(silent)
        assert set(read) == {(True, True), (False, False)}
        return made.progress.history

    path = tmp_path / "machine.json"
    first = run(path)
    monkeypatch.setattr(machine, "_FOUND", {})
    assert run(path) == first
    assert asked == [(["bf16", "fp32"], 12)]  # once for both, over 3 epochs of 4 steps
