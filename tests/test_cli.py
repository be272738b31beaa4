"""The command line: quick to answer, polite about mistakes, whole without Prefect."""

from __future__ import annotations

import errno
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import anndata
import pandas as pd
import pytest

from children import MAIN, cpu_seconds, endoprint, environment, python
from endoprint import jobs
from endoprint.cli import main
from endoprint.vocabulary import Vocabulary
from endoprint.workspace import Workspace
from lab import moved_copy

COMMANDS = [
    "demo", "init", "run", "simulate", "check", "audit", "curate", "split", "tokenize", "embed",
    "pretrain", "search", "train", "models", "leaderboard", "promote", "score", "ui", "gc",
    "up", "status", "recover", "pull", "score-inbox", "evaluate-scores", "registry",
]  # fmt: skip
SIMULATED = ("--cells", "200", "--genes", "120", "--seed", "3")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An h5ad that `endoprint simulate` wrote, where Prefect cannot be imported."""
    path = tmp_path_factory.mktemp("simulated") / "atlas.h5ad"
    done = endoprint("simulate", str(path), *SIMULATED, "--json", block="prefect")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"out": str(path)}
    return path


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a user's mistake comes to."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("endoprint: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys; from endoprint.cli import main; sys.argv = ['endoprint', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'mlflow', 'pandas', 'anndata', 'optuna')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]"
    # half a second is promised
    assert min(cpu_seconds(lambda: endoprint("--help")) for _ in range(3)) < 0.5


def test_every_command_stands_in_the_help() -> None:
    text = endoprint("--help").stdout
    assert [name for name in COMMANDS if f" {name} " not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_prefect(command: str) -> None:
    done = endoprint(command, "--help", block="prefect")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("train", "logistic"),
        ("leaderboard",),
        ("promote",),
        ("score", "none.h5ad", "out"),
        ("check",),
        ("split",),
        ("run",),
        ("ui",),
        ("gc",),
    ],
)
def test_outside_a_workspace_every_command_says_so_in_one_line_and_at_once(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    lines = []
    seconds = cpu_seconds(lambda: lines.append(refusal(endoprint(*words, cwd=tmp_path))))
    assert "params.yaml" in lines[0]
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    assert seconds < 1.2  # MLflow or torch take longer to import


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("init", "absent.h5ad", "space"), "absent.h5ad"),
        (("simulate", "out.h5ad", "--cells", "3"), "cells"),
        (("simulate", "out.h5ad", "--difficulty", "hopeless"), "difficulty"),
        (("simulate", "out.h5ad", "--as-published", "--confounding", "partial"), "as_published"),
        (("audit", "absent.h5ad", "--exposure", "condition"), "absent.h5ad"),
        (("audit", "ATLAS", "--exposure", "dose", "--unit", "line"), "dose"),
        (("audit", "ATLAS", "--unit", "line"), "--exposure"),
        (("tokenize", "ATLAS"), "OUT"),
        (("tokenize", "ATLAS", "out.parquet", "--vocabulary", "absent"), "absent"),
        (("train", "oracle", "--workspace", "nowhere"), "params.yaml"),
        (("train", "logistic", "--deeply"), "--deeply"),
        (("trian", "logistic"), "endoprint --help"),
        (("score",), "endoprint score --help"),
        (("simulate", "out.h5ad", "--cells", "many"), "--cells"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(
    words: tuple[str, ...], named: str, atlas: Path, tmp_path: Path
) -> None:
    typed = [str(atlas) if word == "ATLAS" else word for word in words]
    assert named in refusal(endoprint(*typed, cwd=tmp_path, block="prefect"))
    assert list(tmp_path.iterdir()) == []


# -- commands on files, without a workspace and without Prefect -----------------------------------
def test_a_simulated_atlas_has_the_columns_of_the_source(atlas: Path) -> None:
    cells = anndata.read_h5ad(atlas)
    assert cells.shape == (200, 120)
    assert {"condition", "line", "replicate", "run", "cell_type"} <= set(cells.obs)


def test_the_same_seed_simulates_the_same_atlas(atlas: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.h5ad"
    done = endoprint("simulate", str(again), *SIMULATED)
    assert (done.returncode, done.stdout) == (0, f"out: {again}\n")
    one, other = anndata.read_h5ad(atlas), anndata.read_h5ad(again)
    assert (one.X != other.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, other.obs)


@pytest.mark.parametrize(("confounding", "is_confounded"), [("none", False), ("complete", True)])
def test_an_audit_of_a_file_tells_confounded_from_crossed(
    confounding: str, is_confounded: bool, tmp_path: Path
) -> None:
    path = str(tmp_path / "atlas.h5ad")
    endoprint("simulate", path, *SIMULATED, "--confounding", confounding)
    keys = ("--exposure", "condition", "--unit", "line", "--unit", "replicate", "--batch", "run")
    for option in ((), ("--json",)):
        done = endoprint("audit", path, *keys, *option, block="prefect")
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["confounded"] is is_confounded
        assert found["replicated"] is True


def test_a_file_is_tokenized_in_input_order_with_a_vocabulary_of_ones_own(
    atlas: Path, tmp_path: Path
) -> None:
    cells = anndata.read_h5ad(atlas)
    cells.var_names = cells.var["gene_ids"].astype(str)
    folder, out = tmp_path / "vocabulary", tmp_path / "tokens.parquet"
    folder.mkdir()
    Vocabulary.fit(cells).write(folder / "vocabulary.json")
    words = ("tokenize", str(atlas), str(out), "--vocabulary", str(folder), "--json")
    done = endoprint(*words, block="prefect", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["n_cells"] == 200
    tokens = pd.read_parquet(out)
    assert list(tokens.columns) == ["cell_id", "tokens", "n_tokens"]
    assert list(tokens["cell_id"]) == list(cells.obs_names)
    assert list(tokens["n_tokens"]) == [len(each) for each in tokens["tokens"]]
    assert tokens["n_tokens"].min() > 2


def test_a_users_file_becomes_a_workspace_that_can_be_prepared(
    atlas: Path, tmp_path: Path
) -> None:
    done = endoprint("init", str(atlas), "mine", "--json", cwd=tmp_path, block="prefect")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert made["check"]
    assert made["params"]["cells"]["exposure_key"] == "condition"
    assert (tmp_path / "mine" / made["params"]["cells"]["source"]).resolve() == atlas
    for command in ("check", "curate", "audit", "split"):
        done = endoprint(command, "--workspace", "mine", "--json", cwd=tmp_path, block="prefect")
        assert (done.returncode, done.stderr) == (0, ""), command
        assert json.loads(done.stdout)
    assert "already" in refusal(endoprint("init", str(atlas), "mine", cwd=tmp_path))


def test_the_table_of_models_is_readable_by_machines() -> None:
    rows = json.loads(endoprint("models", "--json").stdout)
    assert {"logistic", "signature", "geneformer"} <= set(rows)
    assert all({"line", "cost", "licence", "citation", "needs"} <= set(r) for r in rows.values())


# -- commands in a workspace, without Prefect -----------------------------------------------------
def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "score", full)
    monkeypatch.setattr(sys, "argv", ["endoprint", "score", "a.h5ad", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left on device; make room" in said


@pytest.mark.slow
def test_without_prefect_every_command_works_and_json_is_pure(
    plain_story: Path, tmp_path: Path
) -> None:
    space = moved_copy(Workspace.at(plain_story), tmp_path / "space")
    commands = [
        "check", "curate", "audit", "split", "tokenize", "pretrain", "search logistic --trials 1",
        "train logistic", "train geneformer --tuned", "leaderboard", "promote",
        "score data/raw/new.h5ad again", "gc", "gc --delete",
    ]  # fmt: skip
    for line in commands:
        done = endoprint(*line.split(), "--json", cwd=space.root, block="prefect")
        assert done.returncode == 0, (line, done.stderr[-2000:])
        assert json.loads(done.stdout) is not None, line
        assert "Traceback" not in done.stderr
    assert (space.root / "again/report.html").is_file()
    there = moved_copy(space, tmp_path / "there")
    # paths are those of the one who types, not of the workspace
    words = ("score", "space/data/raw/new.h5ad", "out", "--workspace", "there")
    done = endoprint(*words, cwd=there.root.parent, block="prefect")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "60 cells scored: out"
    assert len([line for line in lines if line.startswith("Sample ")]) == 48
    assert (tmp_path / "out/scores.parquet").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train", "oracle"), "oracle"),
        (("search", "signature", "--trials", "0"), "trials"),
        (("train", "signature", "--tuned"), "signature"),
        (("promote", "99"), "99"),
        (("score", "data/raw/new.h5ad", "out", "--model", "models:/other@champion"), "other"),
        (("score", "data/raw/new.truth.csv", "out"), "csv"),
        (("run", "--file", "absent.h5ad"), "absent.h5ad"),
    ],
)
def test_a_mistake_in_a_workspace_is_one_line(
    words: tuple[str, ...], named: str, plain_story: Path
) -> None:
    assert named in refusal(endoprint(*words, cwd=plain_story, block="prefect"))
    assert not (plain_story / "out").exists()


@pytest.mark.slow
@pytest.mark.service
def test_mlflows_pages_open_on_this_machine_only_and_ctrl_c_closes_them(
    plain_story: Path, tmp_path: Path
) -> None:
    space = moved_copy(Workspace.at(plain_story), tmp_path / "space")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", MAIN, "ui", "--port", str(port)]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=space.root, stdout=log, stderr=log, start_new_session=True,
            env=environment(block="prefect", network=tmp_path / "network.txt"),
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    assert "MLflow" in page.read().decode()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert "refused" not in (tmp_path / "network.txt").read_text()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
