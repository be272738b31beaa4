from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import planted_cells
from endoprint import dictionaries
from endoprint.config import Refusal
from endoprint.dictionaries import SERIES, Series, read_pickled_dictionary
from endoprint.vocabulary import Vocabulary, fetch, strip_version

GENES = [f"ENSG{i:011d}" for i in range(1, 6)]


# -- the official dictionaries ----------------------------------------------------------------
def test_v1_is_as_published(shared):
    v1 = Vocabulary.load("v1", shared / "data/geneformer")

    assert len(v1) == 25_426
    assert (v1.pad_id, v1.mask_id, v1.cls_id, v1.eos_id, v1.max_length) == (0, 1, None, None, 2048)
    assert (v1.medians.min(), v1.medians.max()) == pytest.approx((0.0947, 634.3), rel=1e-3)
    assert v1.identify(["ENSG00000000003"]).tokens.tolist() == [2]


def test_v2_is_as_published(shared):
    v2 = Vocabulary.load("v2", shared / "data/geneformer")

    assert len(v2) == 20_275
    assert (v2.pad_id, v2.mask_id, v2.cls_id, v2.eos_id, v2.max_length) == (0, 1, 2, 3, 4096)
    assert (v2.medians.min(), v2.medians.max()) == pytest.approx((7.158e-07, 255.6), rel=1e-3)
    assert int((v2.medians < 0.05).sum()) == 106
    assert v2.identify(["ENSG00000000003"]).tokens.tolist() == [4]


def test_each_token_id_is_the_dictionary_s(shared):
    for name, series in SERIES.items():
        found = Vocabulary.load(name, shared / "data/geneformer")
        path = shared / f"data/geneformer/token_dictionary_{series.tag}.json"
        published = {k: v for k, v in json.loads(path.read_text()).items() if k[0] != "<"}
        assert found.identify(list(published)).tokens.tolist() == list(published.values())


def test_nuclear_receptors_and_their_targets_are_found_by_symbol_in_both(shared):
    receptors = ["AR", "ESR1", "NR3C1", "THRB", "RARA", "PPARG", "NR1H3", "AHR"]
    symbols = [*receptors, "CYP26A1", "FKBP5", "TSC22D3", "KLF9", "ABCA1", "TFF1"]
    v1, v2 = (Vocabulary.load(name, shared / "data/geneformer") for name in SERIES)

    assert v1.identify(symbols).n_known == v2.identify(symbols).n_known == len(symbols)
    assert v1.identify(["XIST", "MALAT1"]).n_known == v2.identify(["XIST", "MALAT1"]).n_known == 0


def test_retired_ensembl_ids_move_as_upstream_moves_them(shared):
    v2 = Vocabulary.load("v2", shared / "data/geneformer")
    mapping = json.loads((shared / "data/geneformer/ensembl_mapping_dict_gc104M.json").read_text())
    known = set(v2.genes)
    moved = {k: v for k, v in mapping.items() if k.startswith("ENSG") and k != v and v in known}

    assert len(moved) == 3423
    assert np.array_equal(
        v2.identify(list(moved)).tokens, v2.identify(list(moved.values())).tokens
    )


@pytest.fixture
def official(shared, tmp_path) -> Path:
    """A folder of V2's dictionaries that a test may spoil."""
    for stem, _, _ in SERIES["v2"].files.values():
        shutil.copyfile(shared / f"data/geneformer/{stem}.json", tmp_path / f"{stem}.json")
    return tmp_path


def test_a_folder_of_one_series_needs_no_name(official):
    assert Vocabulary.load(official).sha256 == Vocabulary.load("V2", official).sha256


def test_a_folder_of_both_series_needs_a_name(shared):
    with pytest.raises(Refusal, match="v1 and v2"):
        Vocabulary.load(shared / "data/geneformer")


def test_a_changed_dictionary_is_refused(official):
    path = official / "gene_median_dictionary_gc104M.json"
    path.write_text(path.read_text().replace("1.7629", "1.7630", 1))

    with pytest.raises(Refusal, match=r"published sha256 e2ec227f16cc; got"):
        Vocabulary.load("v2", official)


def test_a_missing_dictionary_is_named(official):
    (official / "ensembl_mapping_dict_gc104M.json").unlink()

    with pytest.raises(Refusal, match="needs ensembl_mapping_dict_gc104M"):
        Vocabulary.load("v2", official)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("v2",), "no folder of dictionaries"),
        (("v3",), "v3 with neither"),
        (("elsewhere", "folder"), "it goes with elsewhere"),
    ],
)
def test_an_unknown_vocabulary_is_one_line(arguments, said):
    with pytest.raises(Refusal, match=said) as refused:
        Vocabulary.load(*arguments)
    assert "\n" not in str(refused.value)


# -- fitted -----------------------------------------------------------------------------------
def test_fitted_medians_are_those_over_the_cells_that_express_the_gene():
    cells = planted_cells(n_cells=5)
    cells.obs["n_counts"] *= 3  # a panel: the true library is larger than the sum
    counts = cells.X.toarray().astype(float)
    scaled = counts / cells.obs["n_counts"].to_numpy()[:, None] * 10_000
    scaled[counts == 0] = np.nan
    expected = {
        gene: np.nanmedian(scaled[:, i])
        for i, gene in enumerate(cells.var_names)
        if counts[:, i].any()
    }

    fitted = Vocabulary.fit(cells, max_length=100)

    assert list(fitted.genes) == sorted(expected)
    assert fitted.medians == pytest.approx([expected[gene] for gene in fitted.genes], rel=1e-14)
    assert (fitted.pad_id, fitted.mask_id, fitted.cls_id, fitted.eos_id) == (0, 1, 2, 3)
    assert fitted.max_length == 100
    assert fitted.provenance == {"n_cells": cells.n_obs, "units": ["u0", "u1", "u2", "u3"]}


def test_a_gene_never_seen_is_not_in_the_vocabulary():
    cells = planted_cells(n_cells=2)
    cells.X.data[cells.X.indices == 3] = 0  # stored zeros
    assert cells.var_names[3] not in Vocabulary.fit(cells).genes


def test_the_order_of_cells_and_genes_does_not_change_a_fit(planted):
    rng = np.random.default_rng(0)
    other = planted[rng.permutation(planted.n_obs), rng.permutation(planted.n_vars)]

    assert Vocabulary.fit(other).sha256 == Vocabulary.fit(planted).sha256


@pytest.mark.parametrize("kind", ["all zero", "infinite", "double genes", "too short"])
def test_what_can_not_be_fitted_is_refused(planted, kind):
    cells, max_length = planted.copy(), 2048
    if kind == "all zero":
        cells.X.data[:] = 0
    elif kind == "infinite":
        cells.X.data[:] = np.inf
    elif kind == "double genes":
        cells.var_names = [cells.var_names[1] + ".2", *cells.var_names[1:]]
    else:
        max_length = 2
    with pytest.raises(Refusal):
        Vocabulary.fit(cells, max_length=max_length)


def test_the_cells_are_not_modified_by_a_fit(planted):
    before = planted.X.copy()
    Vocabulary.fit(planted)

    assert np.array_equal(planted.X.data, before.data)


# -- identity ---------------------------------------------------------------------------------
def test_the_sha256_tells_apart_all_that_decides_a_token_and_nothing_else():
    def made(**change: object) -> str:
        values: dict[str, object] = {
            "name": "one",
            "genes": tuple(GENES),
            "medians": np.arange(1.0, 6.0),
            "specials": ("<pad>", "<mask>"),
            "max_length": 8,
            "aliases": {"TP53": GENES[0]},
            "provenance": {},
        }
        return Vocabulary(**(values | change)).sha256

    changes = [
        {"genes": tuple(GENES[::-1])},
        {"medians": np.array([1.0, 2.0, 3.0, 4.0, np.nextafter(5.0, 6.0)])},
        {"specials": ("<pad>", "<mask>", "<cls>", "<eos>")},
        {"max_length": 9},
        {"aliases": {}},
    ]
    assert len({made(), *(made(**change) for change in changes)}) == 6
    assert made(name="two", provenance={"n_cells": 5}) == made()


def test_writing_and_reading_is_the_identity(planted, tmp_path):
    fitted = Vocabulary.fit(planted, max_length=77)
    fitted.write(tmp_path / "deep/vocabulary.json")
    for source in (tmp_path / "deep/vocabulary.json", tmp_path / "deep"):
        found = Vocabulary.load(source)
        assert found.sha256 == fitted.sha256
        assert found.genes == fitted.genes
        assert found.medians.tobytes() == fitted.medians.tobytes()
        assert found.provenance == fitted.provenance
    assert os.listdir(tmp_path / "deep") == ["vocabulary.json"]


def test_a_published_vocabulary_survives_writing_with_its_aliases(shared, tmp_path):
    v2 = Vocabulary.load("v2", shared / "data/geneformer")
    v2.write(tmp_path / "v2.json")
    found = Vocabulary.read(tmp_path / "v2.json")

    assert found.sha256 == v2.sha256
    assert found.identify(["NR3C1"]).tokens.tolist() == v2.identify(["NR3C1"]).tokens.tolist()


@pytest.mark.parametrize("kind", ["changed", "truncated", "another JSON", "a list", "absent"])
def test_a_damaged_vocabulary_is_refused(planted, tmp_path, kind):
    path = tmp_path / "vocabulary.json"
    Vocabulary.fit(planted).write(path)
    text = path.read_text()
    spoiled = {
        "changed": text.replace('"max_length": 2048', '"max_length": 2047'),
        "truncated": text[:-40],
        "another JSON": "{}",
        "a list": "[1]",
    }
    if kind == "absent":
        path.unlink()
    else:
        assert spoiled[kind] != text
        path.write_text(spoiled[kind])
    with pytest.raises(Refusal) as refused:
        Vocabulary.read(path)
    assert "\n" not in str(refused.value)


def test_a_vocabulary_that_does_not_match_is_one_clear_error(planted):
    fitted = Vocabulary.fit(planted)
    fitted.require(fitted.sha256, "the backbone")

    with pytest.raises(Refusal, match="the vocabulary of the backbone must be the one in use"):
        fitted.require("0" * 64, "the backbone")


@pytest.mark.parametrize(
    ("given_id", "expected"),
    [
        ("ENSG00000141510.17", "ENSG00000141510"),
        ("ENSG00000002586.20_PAR_Y", "ENSG00000002586"),
        ("ENSMUSG00000059552.14", "ENSMUSG00000059552"),
        ("ENSG00000141510", "ENSG00000141510"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("HLA-A", "HLA-A"),
    ],
)
def test_only_ensembl_ids_lose_their_version(given_id, expected):
    assert strip_version(given_id) == expected


# -- the restricted reader --------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=20),
        st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=300)),
        max_size=40,
    ),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_a_dictionary_of_strings_and_numbers_is_read_as_pickle_reads_it(values, protocol):
    found = read_pickled_dictionary(pickle.dumps(values, protocol), "it")

    assert found == values
    assert list(found) == list(values)
    assert [type(value) for value in found.values()] == [type(v) for v in values.values()]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_numbers_are_read_as_plain_ones(protocol):
    values = {"a": np.int16(-3), "b": np.float64(0.1), "c": np.float32(0.1), "d": np.uint8(200)}
    values |= {str(i): np.float64(i) / 7 for i in range(300)}  # past the short memo opcodes
    values["big"] = np.array([1.5], dtype=">f8")[0]
    found = read_pickled_dictionary(pickle.dumps(values, protocol), "it")

    assert found == {key: value.item() for key, value in values.items()}


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_evil_pickle_is_refused_before_it_runs(tmp_path, protocol):
    target = tmp_path / "harm"
    raw = pickle.dumps({"ENSG1": 1.0, "ENSG2": Evil(target)}, protocol)

    with pytest.raises(Refusal, match="mkdir") as refused:
        read_pickled_dictionary(raw, "it")
    assert not target.exists()
    assert "\n" not in str(refused.value)

    pickle.loads(raw)  # the test can fail: the pickle does harm where it is loaded
    assert target.is_dir()


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        "text",
        {"a": [1]},
        {"a": {"b": 1}},
        {"a": None},
        {"a": True},
        {1: 2},
        {"a": np.zeros(2)},
        {"a": np.datetime64("2020-01-01")},
        {"a": AnnData},
        {"a": b"bytes"},
    ],
    ids=repr,
)
def test_anything_else_than_strings_and_numbers_is_refused(values):
    for protocol in (2, 4):
        with pytest.raises(Refusal, match="pickled dictionary of strings and numbers"):
            read_pickled_dictionary(pickle.dumps(values, protocol), "it")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_refused_or_read_never_another_error(data):
    raw = bytearray(pickle.dumps({"a": 1, "b": np.float64(2.5), "c": "x"}, 4))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_pickled_dictionary(bytes(raw), "it")
    except Refusal:
        return
    assert all(type(key) is str for key in found)


# -- fetching ---------------------------------------------------------------------------------
class Hub:
    """A hub on this machine that serves pickles, or what a test puts in their place."""

    def __init__(self) -> None:
        self.served: dict[str, bytes] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                body = hub.served.get(self.path.rpartition("/")[2])
                self.send_response(200 if body is not None else 404)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A hub with a small V2 of five genes; its sha256 stand in the table of published ones."""
    hub = Hub()
    specials = SERIES["v2"].specials
    contents = {
        "tokens": {token: i for i, token in enumerate([*specials, *GENES])},
        "medians": {gene: np.float64(i + 0.5) for i, gene in enumerate([*GENES, "ENSG9"])},
        "aliases": {"TP53": GENES[0], "GONE": "ENSG9", **{gene: gene for gene in GENES}},
    }
    files = {}
    for role, (stem, _, _) in SERIES["v2"].files.items():
        raw = pickle.dumps(contents[role])
        plain = json.dumps(
            {k: getattr(v, "item", lambda v=v: v)() for k, v in contents[role].items()}
        )
        hub.served[f"{stem}.pkl"] = raw
        sha256 = [hashlib.sha256(part).hexdigest() for part in (raw, plain.encode())]
        files[role] = (stem, *sha256)
    small = Series("gc104M", SERIES["v2"].folder, specials, 4096, files)
    monkeypatch.setitem(dictionaries.SERIES, "v2", small)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_published_vocabulary_is_fetched_once(hub, tmp_path):
    found = Vocabulary.load("v2", fetch("v2", tmp_path / "cache", base=hub.base))

    assert found.genes == tuple(GENES)
    assert found.identify(["tp53", "GONE"]).tokens.tolist() == [4, -1]
    assert hub.asked[0] == (
        "/ctheodoris/Geneformer/resolve/04c2b2e84da7c0f385c3f9ad8f3ec24bab6650e5"
        "/geneformer/token_dictionary_gc104M.pkl"
    )
    assert len(hub.asked) == 3
    assert all(
        name.endswith(".json") for name in os.listdir(tmp_path / "cache")
    )  # no pickle stays

    fetch("v2", tmp_path / "cache", base=hub.base)
    assert len(hub.asked) == 3


def test_a_spoiled_cache_is_fetched_again(hub, tmp_path):
    fetch("v2", tmp_path, base=hub.base)
    path = tmp_path / "token_dictionary_gc104M.json"
    right = path.read_bytes()
    path.write_bytes(right[:-5])
    fetch("v2", tmp_path, base=hub.base)

    assert path.read_bytes() == right
    assert len(hub.asked) == 4


def test_the_hub_s_address_may_come_from_the_environment(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.base + "/")

    assert Vocabulary.load("v2", fetch("v2", tmp_path)).genes == tuple(GENES)


def test_a_corrupted_download_is_refused_and_not_kept(hub, tmp_path):
    hub.served["token_dictionary_gc104M.pkl"] += b" "

    with pytest.raises(Refusal, match="published sha256"):
        fetch("v2", tmp_path, base=hub.base)
    assert os.listdir(tmp_path) == []


def test_an_evil_download_is_refused_before_it_runs(hub, tmp_path):
    hub.served["token_dictionary_gc104M.pkl"] = pickle.dumps({"a": Evil(tmp_path / "harm")})

    with pytest.raises(Refusal, match="published sha256"):
        fetch("v2", tmp_path, base=hub.base)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["absent", "nobody there", "no address", "v3"])
def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path, kind):
    name, base = "v2", hub.base
    if kind == "absent":
        hub.served.clear()
    elif kind == "nobody there":
        hub.server.shutdown()
        hub.server.server_close()
    elif kind == "no address":
        base = "file:///etc"
    else:
        name = "v3"
    with pytest.raises(Refusal) as refused:
        fetch(name, tmp_path, base=base)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


def test_published_pickles_in_a_folder_are_read_through_the_restricted_reader(hub, tmp_path):
    for name, raw in hub.served.items():
        (tmp_path / name).write_bytes(raw)
    by_pickle = Vocabulary.load("v2", tmp_path)
    by_json = Vocabulary.load("v2", fetch("v2", tmp_path / "json", base=hub.base))

    assert by_pickle.sha256 == by_json.sha256


def test_a_pickle_with_another_sha256_is_refused_before_it_is_read(hub, tmp_path):
    for name, raw in hub.served.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "token_dictionary_gc104M.pkl").write_bytes(
        pickle.dumps({"a": Evil(tmp_path / "harm")})
    )
    with pytest.raises(Refusal, match="published sha256"):
        Vocabulary.load("v2", tmp_path)
    assert not (tmp_path / "harm").exists()
