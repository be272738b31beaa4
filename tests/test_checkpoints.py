"""Published checkpoints by name: what they are, and that only they are ever taken for them."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM
from typer.testing import CliRunner

from conftest import planted_cells
from endoprint import backbones, curated, jobs, tokens
from endoprint.cli import app
from endoprint.cli import fitting as _fitting  # noqa: F401 -- adds `pretrain`
from endoprint.config import Refusal
from endoprint.dictionaries import REVISION
from endoprint.encoder import backbone, checkpoints
from endoprint.encoder.checkpoints import CHECKPOINTS, Checkpoint, fetch
from endoprint.encoder.pretrain import PretrainConfig, pretrain
from endoprint.jobs.materials import backbone_folder, resources
from endoprint.models.geneformer import Geneformer
from endoprint.models.logistic import Logistic
from endoprint.vocabulary import Vocabulary
from endoprint.workspace import Workspace

NAME = "V2-104M"


class Hub:
    """A hub on this machine that serves one file, as wholly and as rightly as a test wants."""

    def __init__(self) -> None:
        self.body = b""
        self.breaks_off_at: int | None = None
        self.knows_ranges = self.says_length = True
        self.asked: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range", "")
                hub.asked.append((self.path, wanted))
                if not self.path.endswith(f"/Geneformer-{NAME}/model.safetensors"):
                    self.send_error(404)
                    return
                start = int(wanted[6:-1]) if wanted and hub.knows_ranges else 0
                if start > len(hub.body):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-/{len(hub.body)}")
                if hub.says_length:
                    self.send_header("Content-Length", str(len(hub.body) - start))
                self.end_headers()
                with suppress(ConnectionError):  # one who has read enough hangs up
                    self.wfile.write(hub.body[start : hub.breaks_off_at])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Vocabulary]:
    """A tiny backbone of V2's kind, as upstream would have published it, and its vocabulary."""
    cells = planted_cells(n_units=1, n_cells=4, n_genes=30)
    fitted = Vocabulary.fit(cells, max_length=4096)
    folder = tmp_path_factory.mktemp("small")
    shape = backbone.shape_of(
        layers=1, hidden=8, heads=2, ffn=8, vocabulary_size=len(fitted), max_length=4096
    )
    backbone.write(folder, backbone.build(shape, seed=0, dropout=0.1))
    return folder, fitted


@pytest.fixture
def hub(small, monkeypatch) -> Iterator[Hub]:
    """A hub with that backbone; its shape, size and sha256 stand in the published table."""
    folder, vocabulary = small
    hub = Hub()
    hub.body = (folder / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(hub.body).hexdigest()
    row = Checkpoint(
        "v2", 1, 8, 2, 8, 0.1, len(hub.body), sha256, f"Geneformer-{NAME}", len(vocabulary)
    )
    monkeypatch.setitem(CHECKPOINTS, NAME, row)
    monkeypatch.setitem(backbone.PUBLISHED, sha256, f"Geneformer {NAME}")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {".lock"}


# -- what is published --------------------------------------------------------------------------
def safetensors_bytes(sizes: dict[str, tuple[str, list[int], int]]) -> int:
    """The size of a file of such tensors: a length, a padded JSON header, and the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0

    def of_width(each: tuple[str, tuple[str, list[int], int]]) -> tuple[bool, str]:
        return each[1][0] != "I64", each[0]  # wider numbers first, then by name

    for key, (kind, shape, n_bytes) in sorted(sizes.items(), key=of_width):
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    n_header = len(json.dumps(header, separators=(",", ":")))
    return 8 + n_header + -n_header % 8 + end


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [  # as counted by others, from the published configurations
        ("V1-10M", 10_288_722),
        ("V2-104M", 104_386_867),
        ("V2-104M_CLcancer", 104_386_867),
        ("V2-316M", 316_354_867),
        ("gf-12L-95M", 37_997_363),
        ("gf-12L-95M_CLcancer", 37_997_363),
        ("gf-20L-95M", 151_313_459),
    ],
)
def test_a_published_shape_has_the_published_parameters_and_bytes(name, n_parameters):
    row = CHECKPOINTS[name]
    with torch.device("meta"):
        model = BertForMaskedLM(row.shape())
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    # the header names every tensor, so that one other name or shape would change the size
    sizes = {key: ("F32", list(p.shape), 4 * p.numel()) for key, p in model.named_parameters()}
    if row.series == "v1":  # written when transformers still kept this buffer, which is ignored
        sizes = {"bert.embeddings.position_ids": ("I64", [1, 2048], 8 * 2048)} | sizes
        assert "bert.embeddings.position_ids" in backbone.IGNORED_BUFFERS
    assert safetensors_bytes(sizes) == row.n_bytes
    assert backbone.PUBLISHED[row.sha256] == f"Geneformer {name}"


def test_the_published_sha256_are_the_official_pointers():
    assert {name: CHECKPOINTS[name].sha256[:12] for name in ("V1-10M", "V2-104M", "V2-316M")} == {
        "V1-10M": "a5e33a757431",
        "V2-104M": "fff5cba29ddd",
        "V2-316M": "965ceccea819",
    }
    assert len({row.sha256 for row in CHECKPOINTS.values()}) == len(CHECKPOINTS)


@pytest.mark.parametrize("series", ["v1", "v2"])
def test_a_series_goes_with_its_published_vocabulary(series, shared):
    found = Vocabulary.load(series, shared / "data/geneformer")
    rows = [row for row in CHECKPOINTS.values() if row.series == series]
    assert {row.n_tokens for row in rows} == {len(found)}
    assert {row.shape().max_position_embeddings for row in rows} == {found.max_length}
    assert checkpoints.series_of(len(found)) == series


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_published_shape_is_upstreams_configuration(version, shared):
    golden = json.loads((shared / f"golden/geneformer_tiny/{version}/config.json").read_text())
    own = CHECKPOINTS["V1-10M" if version == "v1" else NAME].shape().to_dict()
    sizes = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"}
    # "absolute" is the only kind of positions that transformers 5 knows
    of_software = {"architectures", "dtype", "transformers_version", "position_embedding_type"}
    other = {key for key in golden if key not in own or golden[key] != own[key]}
    assert other <= sizes | of_software


# -- fetching -----------------------------------------------------------------------------------
def test_a_published_checkpoint_is_fetched_once_and_says_what_it_is(hub, small, tmp_path):
    folder, vocabulary = small
    told = []
    found = fetch(
        NAME, tmp_path, vocabulary, base=hub.base, watch=lambda here, n: told.append((here, n))
    )
    assert found == tmp_path / NAME
    assert hub.asked == [
        (f"/ctheodoris/Geneformer/resolve/{REVISION}/Geneformer-{NAME}/model.safetensors", "")
    ]
    assert told[-1] == (len(hub.body), len(hub.body))
    assert files(found) == {
        "config.json", "model.safetensors", "vocabulary.json", "backbone.json"
    }  # fmt: skip
    origin = backbone.origin_of(found)
    assert (origin.origin, origin.label) == ("published", f"Geneformer {NAME}, published weights")
    assert origin.vocabulary_sha256 == vocabulary.sha256
    own, theirs = backbone.read(found), backbone.read(folder)
    backbone.refuse_mismatch(origin, own, Vocabulary.read(found / "vocabulary.json"))
    for key, value in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[key], value)

    fetch(NAME, tmp_path, vocabulary, base=hub.base)
    assert len(hub.asked) == 1


def test_a_spoilt_file_is_fetched_again(hub, small, tmp_path):
    found = fetch(NAME, tmp_path, small[1], base=hub.base) / "model.safetensors"
    found.write_bytes(hub.body[:-1] + b"?")
    fetch(NAME, tmp_path, small[1], base=hub.base)
    assert found.read_bytes() == hub.body
    assert len(hub.asked) == 2


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_download_that_broke_off_goes_on(hub, small, tmp_path, knows_ranges, says_length):
    hub.knows_ranges, hub.says_length = knows_ranges, says_length
    hub.breaks_off_at = 1000
    with pytest.raises(Refusal, match="1,000 of .* run it again"):
        fetch(NAME, tmp_path, small[1], base=hub.base)
    assert not (tmp_path / NAME / "model.safetensors").exists()
    hub.breaks_off_at = None
    found = fetch(NAME, tmp_path, small[1], base=hub.base)
    assert hub.asked[-1][1] == "bytes=1000-"
    assert (found / "model.safetensors").read_bytes() == hub.body
    assert not list(found.glob("*.part"))
    assert not list(found.glob(".*.part"))


def test_two_who_want_the_same_weights_fetch_them_once(hub, small, tmp_path):
    threads = [
        threading.Thread(target=fetch, args=(NAME, tmp_path, small[1]), kwargs={"base": hub.base})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.asked) == 1
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == hub.body


def test_the_hubs_address_may_come_from_the_environment(hub, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.base + "/")
    assert (fetch(NAME, tmp_path, small[1]) / "model.safetensors").read_bytes() == hub.body


# -- refused, in one line, with nothing left behind ---------------------------------------------
def refused(match: str, **over) -> str:
    with pytest.raises(Refusal, match=match) as found:
        fetch(**over)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_weights_with_another_sha256_are_refused_and_not_kept(hub, small, tmp_path):
    right = hub.body
    hub.body = right[:-1] + b"?"
    over = {"name": NAME, "into": tmp_path, "vocabulary": small[1], "base": hub.base}
    refused("published sha256", **over)
    assert files(tmp_path) == set()
    hub.body = right
    assert (fetch(**over) / "model.safetensors").read_bytes() == right


@pytest.mark.parametrize("says_length", [True, False])
def test_weights_longer_than_published_are_refused_before_they_fill_the_disk(
    hub, small, tmp_path, says_length
):
    hub.says_length = says_length
    hub.body += bytes(2**22)
    refused("published .* bytes", name=NAME, into=tmp_path, vocabulary=small[1], base=hub.base)
    assert files(tmp_path) == set()


def test_a_remainder_that_can_not_become_the_file_is_thrown_away(hub, small, tmp_path):
    right = hub.body
    hub.breaks_off_at = 1000
    over = {"name": NAME, "into": tmp_path, "vocabulary": small[1], "base": hub.base}
    refused("come whole", **over)
    hub.body, hub.breaks_off_at = b"short", None  # the hub has another file by now: error 416
    refused("416", **over)
    assert files(tmp_path) == set()
    hub.body = right
    assert (fetch(**over) / "model.safetensors").read_bytes() == right


@pytest.mark.parametrize("kind", ["absent", "nobody there", "no address", "unknown", "older"])
def test_what_can_not_be_fetched_is_said_in_one_line(hub, small, tmp_path, kind, monkeypatch):
    over = {"name": NAME, "into": tmp_path, "vocabulary": small[1], "base": hub.base}
    said = ""
    if kind == "absent":
        monkeypatch.setitem(CHECKPOINTS, NAME, replace(CHECKPOINTS[NAME], folder="elsewhere"))
        said = "404"
    elif kind == "nobody there":
        hub.server.shutdown()
        hub.server.server_close()
        said = "fetched from the hub"
    elif kind == "no address":
        over["base"], said = "file:///etc", "http"
    elif kind == "unknown":
        over["name"], said = "V9-1T", "published are V1-10M"
    else:
        over["name"], said = "gf-12L-95M", "give a folder"
    refused(said, **over)
    assert files(tmp_path) == set()


def test_another_vocabulary_is_refused_before_anything_is_fetched(hub, tmp_path):
    other = Vocabulary.fit(planted_cells(n_units=1, n_cells=4, n_genes=20), max_length=4096)
    refused("goes with vocabulary v2", name=NAME, into=tmp_path, vocabulary=other, base=hub.base)
    assert hub.asked == []
    assert files(tmp_path) == set()


def test_a_backbone_is_refused_another_vocabulary_of_its_size(hub, small, tmp_path):
    found = fetch(NAME, tmp_path, small[1], base=hub.base)
    other = replace(small[1], medians=small[1].medians * 2)
    with pytest.raises(Refusal, match="vocabulary of the backbone"):
        backbone.refuse_mismatch(backbone.origin_of(found), backbone.read(found), other)


def test_a_disk_without_room_is_said_before_it_is_full(hub, small, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    refused("make room", name=NAME, into=tmp_path, vocabulary=small[1], base=hub.base)
    assert hub.asked == []


def test_a_disk_that_fills_up_is_one_line(hub, small, tmp_path):
    def full(here: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    refused(
        "No space left", name=NAME, into=tmp_path, vocabulary=small[1], base=hub.base, watch=full
    )
    assert not (tmp_path / NAME / "model.safetensors").exists()


# -- from a workspace ---------------------------------------------------------------------------
@pytest.fixture
def named(hub, small, tmp_path, monkeypatch) -> Workspace:
    """A workspace whose params.yaml names a published checkpoint."""
    monkeypatch.setenv("HF_ENDPOINT", hub.base)
    monkeypatch.setattr("endoprint.jobs.materials.load_vocabulary", lambda *_: small[1])
    root = tmp_path / "space"
    root.mkdir()
    (root / "params.yaml").write_text(f"task: toy\ncheckpoint: {NAME}\n")
    return Workspace.at(root)


def test_params_may_name_a_published_checkpoint(named, small):
    found = resources(named, Geneformer).backbone
    assert found == named.local / "checkpoints" / NAME
    assert backbone.origin_of(found).origin == "published"
    # and a fit starts from it, in its own vocabulary
    cells = planted_cells(n_units=2, n_cells=4, n_genes=30)
    config = Geneformer.Config(epochs=1, min_steps=1, has_votes=False)
    fitted = Geneformer(config, resources=resources(named, Geneformer))
    is_train = (cells.obs["unit"] == "u0").to_numpy()
    fitted.fit(cells[is_train].copy(), cells[~is_train].copy())
    assert fitted.provenance["backbone"]["label"] == f"Geneformer {NAME}, published weights"
    assert fitted.provenance["vocabulary"]["sha256"] == small[1].sha256


def test_a_folder_goes_before_a_name(named, small, hub):
    shutil.copytree(small[0], named.root / NAME)
    assert backbone_folder(named, NAME) == named.root / NAME
    assert hub.asked == []


def test_a_checkpoint_that_is_neither_folder_nor_name_is_one_line(named):
    with pytest.raises(Refusal, match=r"config\.json and model\.safetensors, or a published name"):
        backbone_folder(named, "nowhere/to/be/found")


def test_masked_learning_goes_on_from_a_published_checkpoint(hub, small, tmp_path):
    start = fetch(NAME, tmp_path, small[1], base=hub.base)
    cells = planted_cells(n_units=1, n_cells=8, n_genes=30, seed=5)
    config = PretrainConfig(epochs=1, lr=1e-3, layers=3)
    label = pretrain(
        tokens.of(cells, small[1]), small[1], config, tmp_path / "on", units=["q"], start=start
    )
    assert f"continued from Geneformer {NAME}, published weights" in label["label"]
    assert backbone.origin_of(tmp_path / "on").origin == "pretrained here"
    assert np.isfinite(label["loss_after"])
    assert backbone.read(tmp_path / "on").config.num_hidden_layers == 1


@pytest.fixture
def pooled(space, hub, small, tmp_path, monkeypatch) -> Workspace:
    """A workspace with a pool of other units, in the vocabulary of the small backbone."""
    monkeypatch.setenv("HF_ENDPOINT", hub.base)
    monkeypatch.setattr("endoprint.jobs.materials.load_vocabulary", lambda *_: small[1])
    pool = planted_cells(n_units=1, n_cells=8, n_genes=30, seed=5)
    pool.obs["unit"] = "pooled"
    curated.write(pool, space.pool)
    space.vocabulary.parent.mkdir(parents=True, exist_ok=True)
    small[1].write(space.vocabulary)
    (space.root / "params.yaml").write_text(
        "task: toy\npretrain: {layers: 1, hidden: 8, ffn: 8, epochs: 1}\n"
    )
    return Workspace.at(space.root)


def test_the_command_goes_on_from_a_published_name_and_a_fit_may_start_there(
    pooled, hub, monkeypatch
):
    monkeypatch.chdir(pooled.root)
    done = CliRunner().invoke(app, ["pretrain", "--start", NAME, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    made = backbones.folder(pooled, said["checkpoint"])
    label = json.loads((made / "backbone.json").read_text())
    assert f"continued from Geneformer {NAME}, published weights" in label["label"]
    assert label["units"] == ["pooled"]
    assert label["config"]["lr"] == pytest.approx(2e-4)  # a tenth of what begins from scratch
    # once is enough, from scratch is another run, and so are other weights
    shutil.rmtree(made)
    again = jobs.pretrain(".", start=NAME)
    assert (again, len(hub.asked)) == (said["run_id"], 1)
    assert backbones.folder(pooled, said["checkpoint"]) == made  # brought again
    assert jobs.pretrain(".") != again != jobs.pretrain(".", start=said["checkpoint"])
    with (pooled.root / "params.yaml").open("a") as params:
        params.write(f"checkpoint: {said['checkpoint']}\n")
    assert resources(Workspace.at(pooled.root), Geneformer).backbone == made
    assert resources(Workspace.at(pooled.root), Logistic).backbone is None
    # what frozen layers say is kept in the workspace, for all its fits
    assert resources(Workspace.at(pooled.root), Geneformer).activations == (
        pooled.local / "activations"
    )


def test_going_on_keeps_a_learning_rate_that_was_chosen(pooled):
    params = pooled.root / "params.yaml"
    params.write_text(params.read_text().replace("epochs: 1", "epochs: 1, lr: 0.001"))
    run = jobs.pretrain(str(pooled.root), start=NAME)
    made = backbones.folder(pooled, jobs.backbone_of(str(pooled.root), run)["address"])
    label = json.loads((made / "backbone.json").read_text())
    assert label["config"]["lr"] == pytest.approx(1e-3)


def test_going_on_in_another_vocabulary_is_refused_and_tracks_nothing(pooled):
    other = Vocabulary.fit(planted_cells(n_units=1, n_cells=8, n_genes=20), max_length=64)
    other.write(pooled.vocabulary)
    with pytest.raises(Refusal, match="vocabulary of the backbone"):
        jobs.pretrain(str(pooled.root), start=NAME)
    assert not (pooled.local / "work").exists()


def test_a_backbone_that_has_seen_a_judged_unit_is_refused(pooled):
    run = jobs.pretrain(str(pooled.root), start=NAME)
    made = jobs.backbone_of(str(pooled.root), run)["address"]
    cells = planted_cells(n_units=2, n_cells=4, n_genes=30)
    cells.obs["unit"] = cells.obs["unit"].replace("u1", "pooled")
    curated.write(cells, pooled.cells)
    with (pooled.root / "params.yaml").open("a") as params:
        params.write(f"checkpoint: {made}\n")
    with pytest.raises(Refusal, match="'pooled' among those"):
        resources(Workspace.at(pooled.root), Geneformer)
    with pytest.raises(Refusal, match="'pooled' among those"):
        jobs.pretrain(str(pooled.root), start=made)


# -- one's own, registered ------------------------------------------------------------------------
def test_a_backbone_is_registered_with_its_vocabulary_and_units_and_listed(pooled, monkeypatch):
    assert jobs.backbones(str(pooled.root)) == []
    monkeypatch.chdir(pooled.root)
    done = CliRunner().invoke(app, ["pretrain", "--json"])
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)["run_id"]
    assert jobs.pretrain(".") == first, "once is enough"
    jobs.pretrain(".", start=NAME)
    newest, oldest = jobs.backbones(".")
    assert oldest["address"] == "models:/endoprint-toy-backbone/1"
    assert newest["address"] == "models:/endoprint-toy-backbone/2"
    assert oldest["run_id"] == first
    assert oldest["units"] == ["pooled"]
    assert oldest["vocabulary_sha256"] == Vocabulary.read(pooled.vocabulary).sha256
    folder = backbones.folder(pooled, oldest["address"])
    assert oldest["weights_sha256"] == backbone.digest(folder / backbone.WEIGHTS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "backbone.json", "config.json", "model.safetensors", "vocabulary.json"
    ]  # fmt: skip
    shown = CliRunner().invoke(app, ["backbones"])
    assert shown.exit_code == 0
    assert "units seen: pooled" in shown.stdout
    assert "not the published Geneformer" in shown.stdout


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("models:/endoprint-toy-backbone/7", "leads to one that was registered"),
        ("models:/endoprint-toy/1", "leads to one that was registered"),
        ("models:/endoprint-toy-backbone@newest", "means the same for ever"),
        ("models:/endoprint-toy-backbone", "means the same for ever"),
    ],
)
def test_an_address_of_no_backbone_is_refused(pooled, address, rule):
    jobs.pretrain(str(pooled.root))
    with pytest.raises(Refusal, match=rule):
        backbones.folder(pooled, address)


def test_a_registered_backbone_whose_bytes_were_changed_is_refused(pooled):
    run = jobs.pretrain(str(pooled.root))
    address = jobs.backbone_of(str(pooled.root), run)["address"]
    (stored,) = (pooled.local / "artifacts").rglob("model.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    shutil.rmtree(pooled.local / "models", ignore_errors=True)
    with pytest.raises(Refusal, match="bytes are those that were registered"):
        backbones.folder(pooled, address)
