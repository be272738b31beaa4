"""Two processes that train together take the steps of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from children import environment
from conftest import TINY, a_workspace
from endoprint import jobs, runs
from endoprint.config import Refusal
from endoprint.encoder.minibatches import Layout, assemble
from endoprint.encoder.team import Team, here
from endoprint.workspace import Workspace
from teammate import UNEVEN
from test_encoder import loop, random_tokens, silent, weights

HERE = Path(__file__).parent


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes on this machine."""
    own = environment()
    own["PYTHONPATH"] = os.pathsep.join([str(HERE), own["PYTHONPATH"]])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launch, *words], capture_output=True, text=True, cwd=cwd, env=own,
        check=False, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_with_unequal_numbers_of_cells_take_the_steps_of_one(tmp_path):
    done = torchrun(str(HERE / "teammate.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one = loop(UNEVEN)
    one.run(silent)
    told = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert told["history-0"] == told["history-1"], "all hear the lead's figures"
    for name in ("history-0", "short-0", "short-1"):  # short: memory ran out on one of them
        for ours, alone in zip(told[name], one.progress.history, strict=True):
            assert ours["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-4), name
            assert ours["valid_loss"] == pytest.approx(alone["valid_loss"], abs=1e-3), name
    first, second = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1))
    for key, tensor in weights(one).items():
        assert torch.equal(first[key], second[key]), f"{key}: processes drift apart"
        if key != "bert.encoder.layer.1.output.LayerNorm.bias":
            # standardising takes a shift out again: its gradient is rounding, which Adam magnifies
            assert torch.allclose(first[key], tensor, atol=2e-3), key


def test_alone_a_process_is_a_team_of_one():
    team = here()
    assert (team.is_lead, team.size) == (True, 1)
    figures = {"loss": 0.5}
    assert team.told(figures) is figures
    tensor = torch.ones(2)
    team.add_up([tensor])
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize("is_found", [True, False])
def test_processes_that_do_not_see_the_same_checkpoint_are_refused(is_found):
    class Apart(Team):
        """Two processes, of which the other finds nothing, or something."""

        def add_up(self, tensors):
            tensors[0] += 0.0 if is_found else 1.0

    with pytest.raises(Refusal, match="1 of 2 find the checkpoint"):
        Apart(0, 2).refuse_unless_alike(is_found)
    Team().refuse_unless_alike(is_found)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_cell_of_a_minibatch_is_one_processs_own(size):
    own = [Team(rank, size).mine(7) for rank in range(size)]
    assert sorted(np.concatenate(own)) == list(range(7))
    assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize("block", [0, 7])
def test_cells_taken_out_of_a_minibatch_are_laid_out_as_if_alone(block):
    cells = random_tokens(np.random.default_rng(5), 9, 40)
    layout = Layout(block, "rank", False)
    for chosen in (np.array([0]), np.array([1, 4, 8]), np.arange(9)):
        taken = assemble(cells, np.arange(9), layout).take(chosen)
        alone = assemble(cells, chosen, layout)
        for name, wanted in vars(alone).items():
            found = getattr(taken, name)
            assert (found is None) == (wanted is None), name
            if wanted is not None:
                assert np.array_equal(found, wanted), name


@pytest.mark.slow
def test_the_command_under_torchrun_is_one_run_with_the_figures_of_one_process(
    tmp_path: Path,
) -> None:
    values = TINY["models"]["geneformer"] | {"epochs": 3, "vector_dropout": 0.0}
    params = {k: v for k, v in TINY.items() if k != "pretrain"} | {
        "models": {"geneformer": values}
    }
    space = Workspace.open(a_workspace(tmp_path / "space", params=params))
    jobs.prepare(str(space.root))
    done = torchrun("-m", "endoprint", "train", "geneformer", cwd=space.root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("macro-F1") == 1, "the lead says it, once"
    (together,) = runs.finished(space, "train", {})
    assert not runs.unneeded(space)
    assert not list((space.local / "work").glob("[!.]*"))
    alone = jobs.train(str(space.root), model="geneformer")
    found, wanted = (runs.final_metrics(space, run_id) for run_id in (together, alone))
    assert found.keys() == wanted.keys()
    for name in ("train_loss", "valid_loss"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-3)
    assert found["macro_f1"] == pytest.approx(wanted["macro_f1"], abs=0.02)
