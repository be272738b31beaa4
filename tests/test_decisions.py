"""What people ask of the registry, and the person whom a promotion may wait for."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from conftest import planted_cells
from endoprint import (
    approvals,
    audited,
    blueprint,
    curated,
    history,
    identity,
    jobs,
    registry,
    tracking,
)
from endoprint.config import Refusal
from endoprint.models.logistic import Logistic, LogisticConfig
from endoprint.promotion import promote
from endoprint.registry import champion, find, register
from endoprint.workspace import Workspace
from lab import POLICY, bare_workspace, fit_and_track, furnish, misled, moved_copy

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which a weak and then a better model were promoted, with their cards."""
    made = furnish(
        bare_workspace(tmp_path_factory.mktemp("decided") / "space"),
        planted_cells(n_units=6, n_cells=8),
    )
    root = str(made.root)
    cells = curated.load(made.cells)
    for shown in (misled(cells), cells):
        run_id = fit_and_track(made, cells=shown, trainer="tom")
        jobs.promote(root, version=jobs.register(root, run_id=run_id))
    return made


@pytest.fixture
def lab(decided: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return moved_copy(decided, tmp_path / "space")


# -- the card -----------------------------------------------------------------------------------
def test_every_version_shows_its_card_as_description_and_keeps_it_with_its_run(
    lab: Workspace,
) -> None:
    text = jobs.card(str(lab.root), version="champion")
    assert text.startswith("# endoprint-toy version 2 (logistic)")
    for said in (
        "**Promoted: it went live",
        "Test units, scored at the promotion: u",
        "replicated: true. confounded: false.",
        "md5 of data/cells/cells.h5ad",
        "seconds to score 1,000 cells",
        "training units",
        "cannot name an exposure it was never",
    ):
        assert said in text, said
    shown = tracking.client(lab).get_model_version("endoprint-toy", "2").description
    assert shown == text
    assert (lab.local / "card.md").is_file() is False or (
        lab.local / "card.md"
    ).read_text() == text


def test_a_version_not_judged_yet_says_so_and_registering_again_keeps_a_verdicts_card(
    lab: Workspace,
) -> None:
    root = str(lab.root)
    run_id = fit_and_track(lab, model=Logistic(LogisticConfig(penalty=1.0, latent_width=4)))
    assert jobs.register(root, run_id=run_id) == "3"
    text = jobs.card(root, version="3")
    assert "Not judged yet" in text
    assert "the test units were not opened" in text
    judged = jobs.card(root, version="2")
    jobs.register(root, run_id=find(lab, "2").run_id)
    assert jobs.card(root, version="2") == judged


def test_a_card_longer_than_the_store_takes_is_whole_with_the_run(lab: Workspace) -> None:
    version = find(lab, "2")
    registry.describe(lab, version, "a line\n" * 2000)
    shown = tracking.client(lab).get_model_version(version.name, "2").description
    assert len(shown) <= 5000
    assert "The rest is in cards/version-2.md" in shown
    assert len(jobs.card(str(lab.root), version="2")) == 14000


def test_the_repositorys_card_and_schema_are_those_that_every_new_workspace_gets() -> None:
    assert (ROOT / "registry/cards/model.md").read_text() == blueprint.model_card()
    assert (ROOT / "registry/schemas/policy.json").read_text() == blueprint.policy_schema()


def test_a_workspaces_own_card_template_is_used(lab: Workspace) -> None:
    own = lab.policy.parent / "cards/model.md"
    own.parent.mkdir()
    own.write_text("# ours: $name\n")
    assert jobs.deciding.card_of(lab, find(lab, "1")).startswith("# ours: endoprint-toy version 1")


# -- who, verify, plan, export --------------------------------------------------------------------
def test_who_was_live_at_any_time_is_answered_by_the_history(lab: Workspace) -> None:
    root = str(lab.root)
    first, second = [line for line in history.read(lab) if line["what"] == "done"]
    assert jobs.who(root, at="2000-01-01")["version"] is None
    assert jobs.who(root, at=first["at"])["version"] == "1"
    between = jobs.who(root, at=second["at"][:-6])  # without its offset: UTC
    assert between["version"] == "2"
    now = jobs.who(root)
    assert (now["version"], now["until"]) == ("2", None)
    assert "and is now" in now["sentence"]
    registry.retire(lab, why="a recall")
    assert "nothing was live, since" in jobs.who(root)["sentence"]
    with pytest.raises(Refusal, match="ISO 8601"):
        jobs.who(root, at="yesterday")
    with pytest.raises(Refusal, match="yet to come"):
        jobs.who(root, at="2999-01-01")


def test_reigns_follow_each_other_without_gap_or_overlap(lab: Workspace) -> None:
    registry.rollback(lab)
    spans = audited.reigns(lab)
    assert [each.version for each in spans] == [None, "1", "2", "1"]
    assert all(a.until == b.since for a, b in zip(spans, spans[1:]))


def test_the_plan_is_empty_until_something_moves_behind_the_histories_back(lab: Workspace) -> None:
    root, store = str(lab.root), tracking.client(lab)
    assert jobs.plan(root) == {"moves": []}
    store.set_registered_model_alias("endoprint-toy", "champion", "1")
    store.delete_registered_model_alias("endoprint-toy", "candidate")
    store.set_model_version_tag("endoprint-toy", "2", "model_sha256", "0" * 64)
    moves = {move["what"]: (move["told"], move["found"]) for move in jobs.plan(root)["moves"]}
    assert moves["@champion"] == ("2", "1")
    assert moves["@candidate"] == ("2", None)
    assert moves["digest of version 2"][1] == "0" * 64
    assert len(moves) == 3


def test_the_plan_knows_a_version_made_by_other_hands(lab: Workspace) -> None:
    store = tracking.client(lab)
    made = store.create_model_version(
        "endoprint-toy", source="file:///nowhere", run_id=find(lab, "1").run_id,
        tags={**find(lab, "1").tags},
    )  # fmt: skip
    (move,) = jobs.plan(str(lab.root))["moves"]
    assert (move["what"], move["told"]) == (f"digest of version {made.version}", None)


def test_an_exported_history_must_stay_the_beginning_of_the_live_one(lab: Workspace) -> None:
    root = str(lab.root)
    place = lab.root / jobs.history(root, export=True)["exported"]
    assert place == lab.root / "registry/history/endoprint-toy.jsonl"
    assert place.read_text() == history.text(lab)
    registry.rollback(lab)
    assert jobs.verify(root)["wrong"] == []
    place.write_text(place.read_text().replace('"version": "1"', '"version": "7"', 1))
    assert "no beginning of this history" in jobs.verify(root)["wrong"][0]
    with pytest.raises(Refusal, match="is whole"):
        jobs.history(root, export=True)


def test_every_line_of_the_history_reads_as_a_sentence(lab: Workspace) -> None:
    registry.retire(lab, why="a recall")
    said = [line["said"] for line in jobs.history(str(lab.root))["lines"]]
    assert not any("{" in sentence or sentence in ("open", "done") for sentence in said)
    assert "@champion moved from 2 to none: a recall" in said


@pytest.mark.slow
def test_the_commands_answer_in_json_and_exit_3_where_something_is_wrong(lab: Workspace) -> None:
    def asked(*words: str) -> tuple[int, dict[str, object]]:
        code = "from endoprint.cli import main; main()"
        command = [sys.executable, "-c", code, "registry", *words, "-w", str(lab.root), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    assert asked("verify") == (0, {"wrong": [], "n_lines": len(history.read(lab))})
    assert asked("who", "--at", "2000-01-01")[1]["version"] is None
    assert asked("history")[0] == 0
    assert asked("lineage", "2")[1]["model"] == "logistic"
    assert asked("plan") == (0, {"moves": []})
    tracking.client(lab).set_registered_model_alias("endoprint-toy", "champion", "1")
    status, found = asked("plan")
    assert (status, len(found["moves"])) == (3, 1)
    path = history.path(lab)
    path.write_text(path.read_text().replace('"version": "1"', '"version": "7"', 1))
    assert asked("verify")[0] == 3


# -- where models come from ---------------------------------------------------------------------
def test_the_models_that_saw_a_unit_are_named_with_what_they_did(lab: Workspace) -> None:
    root = str(lab.root)
    told = json.loads(find(lab, "2").tags["lineage"])
    trained = jobs.seen(root, unit=told["units"]["training"][0])["models"]
    assert {row["version"] for row in trained} == {"1", "2"}
    assert all("fitted on it" in row["how"] for row in trained)
    judged = jobs.seen(root, unit=told["units"]["test"][0])["models"]
    assert [row["how"] for row in judged] == [["judged on it"]] * 2
    assert jobs.seen(root, unit="nobody")["models"] == []


def test_the_models_made_from_a_file_are_found_by_its_md5(lab: Workspace) -> None:
    root = str(lab.root)
    md5 = jobs.lineage(root, version="2")["lineage"]["inputs"]["data/cells/cells.h5ad"]
    rows = jobs.seen(root, md5=md5)["models"]
    assert {row["version"] for row in rows} == {"1", "2"}
    assert rows[0]["how"] == ["made from data/cells/cells.h5ad"]
    assert jobs.seen(root, md5="0" * 32)["models"] == []
    with pytest.raises(Refusal, match="one question at a time"):
        jobs.seen(root)
    with pytest.raises(Refusal, match="one question at a time"):
        jobs.seen(root, unit="u0", md5=md5)


# -- a person's word ----------------------------------------------------------------------------
class Guarded(BaseHTTPRequestHandler):
    """MLflow's basic-auth answer to "who am I": a name for known credentials, else 401."""

    known = {"ann": "apple", "tom": "tulip"}
    asks_for_none = False

    def do_GET(self) -> None:
        sent = self.headers.get("Authorization", "Basic ").partition(" ")[2]
        name, _, password = base64.b64decode(sent).decode().partition(":")
        is_known = self.known.get(name) == password and bool(name)
        answer = json.dumps({"user": {"username": name or "anybody"}}).encode()
        self.send_response(200 if is_known or self.asks_for_none else 401)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    served = HTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_a_server_vouches_for_whoever_knows_the_password(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert identity.authenticated(f"http://ann:apple@{server}") == "ann"
    assert identity.authenticated(f"http://ann:pear@{server}") is None
    assert identity.authenticated(f"http://{server}") is None
    assert identity.authenticated("sqlite:///mlflow.db") is None
    assert identity.authenticated("http://ann:apple@127.0.0.1:9") is None
    assert identity.known_as("sqlite:///mlflow.db") == identity.login()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "apple")
    assert identity.authenticated(f"http://{server}/") == "ann"


def test_a_server_that_asks_nobody_for_a_password_is_no_witness(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "asks_for_none", True)
    assert identity.authenticated(f"http://ann:apple@{server}") is None


@pytest.fixture
def waiting(lab: Workspace) -> Workspace:
    """A workspace whose version 2 passed every gate and waits for a person."""
    registry.rollback(lab)  # version 1 is live again
    lab.policy.write_text(POLICY + "approval: human\n")
    return lab


def test_where_the_policy_asks_for_a_person_the_champion_stays_until_one_approves(
    waiting: Workspace,
) -> None:
    root = str(waiting.root)
    path = jobs.promote(root, version="2")
    held = json.loads(Path(path).read_text())
    assert (held["decision"], held["champion"]) == ("hold", "1")
    said = "every gate is passed: a person approves it with `endoprint registry approve`"
    assert held["reasons"][0].endswith(said)
    assert jobs.waits_for_approval(root, verdict=path)
    assert not held["was_opened"]  # who has to agree is no other question to the units
    done = json.loads(
        Path(jobs.approve(root, version="2", why="figures read", vouched="ann")).read_text()
    )
    assert (done["decision"], done["champion"]) == ("promote", "2")
    assert done["reasons"][0] == "approved by ann: figures read"
    assert champion(waiting).version == "2"
    assert find(waiting, "2").tags["reasons"].startswith("approved by ann")
    (line,) = [line for line in history.read(waiting) if line["what"] == "approval"]
    assert (line["approver"], line["version"], line["why"]) == ("ann", "2", "figures read")
    assert registry.verify(waiting) == []


def test_without_authentication_human_approval_is_refused(waiting: Workspace) -> None:
    root = str(waiting.root)
    jobs.promote(root, version="2")
    with pytest.raises(Refusal, match="an authenticated person's"):
        jobs.approve(root, version="2", why="trust me")
    assert champion(waiting).version == "1"


@pytest.mark.parametrize("name", ["tom", "Tom"])
def test_whoever_trained_a_version_does_not_approve_it(waiting: Workspace, name: str) -> None:
    root = str(waiting.root)
    jobs.promote(root, version="2")
    with pytest.raises(Refusal, match="trained by tom"):
        jobs.approve(root, version="2", why="mine", vouched=name)
    assert champion(waiting).version == "1"


def test_a_decision_without_a_reason_is_not_taken(waiting: Workspace) -> None:
    root = str(waiting.root)
    jobs.promote(root, version="2")
    with pytest.raises(Refusal, match="with its reason"):
        jobs.approve(root, version="2", why=" ", vouched="ann")
    with pytest.raises(Refusal, match="with its reason"):
        jobs.retire(root, why="")
    assert champion(waiting).version == "1"


def test_a_version_of_unknown_trainer_is_not_approved(waiting: Workspace) -> None:
    jobs.promote(str(waiting.root), version="2")
    tracking.client(waiting).delete_model_version_tag("endoprint-toy", "2", "trainer")
    with pytest.raises(Refusal, match="nobody known"):
        jobs.approve(str(waiting.root), version="2", why="fine", vouched="ann")


def test_a_declined_version_is_rejected(waiting: Workspace) -> None:
    root = str(waiting.root)
    jobs.promote(root, version="2")
    path = jobs.approve(root, version="2", why="one donor is odd", declined=True, vouched="ann")
    assert json.loads(Path(path).read_text())["decision"] == "reject"
    assert champion(waiting).version == "1"


def test_only_what_waits_is_approved(lab: Workspace) -> None:
    with pytest.raises(Refusal, match="waits for nobody"):  # live already, and nobody is asked
        jobs.approve(str(lab.root), version="2", why="fine", vouched="ann")
    lab.policy.write_text(POLICY + "approval: human\n")
    with pytest.raises(Refusal, match="waits for nobody"):
        jobs.approve(str(lab.root), version="1", why="fine", vouched="ann")


def test_an_approval_is_of_one_question_and_not_of_the_next(waiting: Workspace) -> None:
    root = str(waiting.root)
    jobs.promote(root, version="2")
    approvals.approve(waiting, "2", approver="ann", why="fine")
    waiting.policy.write_text(POLICY + "approval: human\nat_least: {macro_f1: 0.1}\n")
    held = promote(waiting, "2")
    assert held.verdict.decision == "hold"
    assert "registry approve" in held.verdict.reasons[0]


# -- going back ---------------------------------------------------------------------------------
def test_a_rollback_to_a_version_that_loads_but_gives_no_answer_is_refused(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Logistic, "evidence", lambda self, cells: self.nothing)
    with pytest.raises(Refusal, match="loads and answers with probabilities"):
        registry.rollback(lab)
    monkeypatch.undo()
    assert champion(lab).version == "2"


def was_taken_down(space: Workspace, version: str, how: str) -> None:
    """The version is held because of people, and the test units are not asked again."""
    held = promote(space, version)
    assert (held.verdict.decision, held.was_opened) == ("hold", False)
    assert f"version {version} (logistic) was {how} on 20" in held.verdict.reasons[0]


def test_a_rollback_is_not_undone_by_the_verdict_and_the_approval_that_came_before_it(
    waiting: Workspace,
) -> None:
    root = str(waiting.root)
    jobs.promote(root, version="2")
    jobs.approve(root, version="2", why="figures read", vouched="ann")
    assert champion(waiting).version == "2"
    registry.rollback(waiting)
    was_taken_down(waiting, "2", "rolled back")
    assert champion(waiting).version == "1"
    jobs.approve(root, version="2", why="it was the plate", vouched="ann")
    assert champion(waiting).version == "2"


def test_a_rollback_is_asked_about_where_the_policy_asks_nobody(lab: Workspace) -> None:
    registry.rollback(lab)
    was_taken_down(lab, "2", "rolled back")
    (lab.root / "params.yaml").write_text("task: toy\nseed: 0\n")  # another lineage, equal bytes
    assert register(lab, fit_and_track(lab)).version == "3"
    was_taken_down(lab, "3", "rolled back")
    assert champion(lab).version == "1"
    registry.rollback(lab, "2")  # whoever took it down, or another, thinks better of it
    assert promote(lab, "2").verdict.decision == "promote"
    registry.rollback(lab)
    jobs.approve(str(lab.root), version="2", why="it was the plate", vouched="ann")
    assert champion(lab).version == "2"


def test_a_retired_version_does_not_come_back_by_the_verdict_that_made_it_live(
    lab: Workspace,
) -> None:
    registry.rollback(lab)
    registry.retire(lab, why="a recall")
    was_taken_down(lab, "1", "retired")
    assert champion(lab) is None


def test_a_champion_that_was_only_replaced_was_not_taken_down(lab: Workspace) -> None:
    registry.retire(lab, why="a recall")
    assert promote(lab, "1").verdict.decision == "promote"
    assert champion(lab).version == "1"


def test_a_verdict_asked_for_again_is_the_one_that_was_given(lab: Workspace) -> None:
    before = history.read(lab)
    again = promote(lab, "2")
    (made,) = [x for x in before if x["what"] == "verdict" and x["version"] == "2"]
    assert again.verdict.to_json() == made["verdict"]
    assert history.read(lab) == before


@pytest.mark.parametrize("at", ["intent", "previous"])
def test_a_flip_cut_short_leaves_every_alias_as_the_history_tells(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    run_id = fit_and_track(lab, model=Logistic(LogisticConfig(penalty=2.0, latent_width=4)))
    third = register(lab, run_id)
    store = type(tracking.client(lab))
    whole = store.set_registered_model_alias

    def dies(client: object, name: str, alias: str, version: str) -> None:
        if at == "previous":
            whole(client, name, alias, version)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "set_registered_model_alias", dies)
    with pytest.raises(KeyboardInterrupt):
        registry.go_live(lab, third, against=champion(lab), why="better")
    monkeypatch.undo()
    assert jobs.plan(str(lab.root)) == {"moves": []}  # which closes what was left open
    assert history.read(lab)[-1]["what"] == "abandoned"
    assert registry.aliases(lab) == {"champion": "2", "previous": "1", "candidate": "3"}
    registry.go_live(lab, third, against=champion(lab), why="better")
    assert registry.aliases(lab) == {"champion": "3", "previous": "2", "candidate": "3"}


def test_registering_tells_what_a_crash_left_untold(
    lab: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = fit_and_track(lab, model=Logistic(LogisticConfig(penalty=2.0, latent_width=4)))

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "tell", dies)
    with pytest.raises(KeyboardInterrupt):
        register(lab, run_id)
    monkeypatch.undo()
    assert register(lab, run_id).version == "3"
    assert jobs.plan(str(lab.root)) == {"moves": []}
