"""Everything at once, in the foreground: started in order, watched, restarted, and stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from endoprint import progress
from endoprint.alive import is_alive
from endoprint.config import Refusal
from endoprint.services import grants, processes
from endoprint.services.plan import Plan, Service, runs_page
from endoprint.services.prefect_api import Prefect, asking
from endoprint.spelled import without_secrets
from endoprint.workspace import Workspace

PATIENCE_SECONDS = 600.0  # for a service to answer; a busy machine is slow, not wrong
SILENT_SECONDS = 120.0  # of a service that answered before: it hangs, and is started again
LOOK_SECONDS, CARE_SECONDS = 0.5, 10.0  # between looks at processes, and at what they answer
PLANNING_SECONDS = 10.0  # for Prefect to plan the first runs, which the screen shows
CLOSING_SECONDS = 60.0  # for the runs of what was stopped to be closed
LONGEST_PAUSE_SECONDS = 30.0  # between two starts of a service that keeps dying
RECOVER = [sys.executable, "-c", "from endoprint.cli import main; main()", "recover", "--json"]
INBOX, SCORING = "inbox", "hourly-score"  # as in prefect.yaml
Say = Callable[[str], None]
Lying = tuple[str, int, int]  # a file in the inbox: name, size, time of its last change


@dataclass
class Kept:
    """A service that runs, and how it has been."""

    service: Service
    process: subprocess.Popen[bytes]
    started: float
    answered: float = 0.0  # seconds since the epoch; 0: not yet
    deaths: list[float] = field(default_factory=list)
    pause_until: float = 0.0


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or a closed terminal: no error, so no `except Exception` may hold it up."""


class Up:
    """The services of one workspace, kept running until told otherwise."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan, self.say = plan, say
        self.kept: list[Kept] = []
        # what lay in the inbox when it was last scored, and at the last look
        self._inbox: list[Lying] = []
        self._seen: list[Lying] = []
        self._recovery: subprocess.Popen[bytes] | None = None  # now running, beside keep()
        self._is_recovery_due = False
        self.runs_page = ""  # MLflow's, of this task
        self.seconds = 0.0  # from the start until all of it answered

    # -- start ----------------------------------------------------------------------------------
    def begin(self) -> None:
        """Start the servers, close what dead processes left open, register, start the worker."""
        plan, began = self.plan, time.monotonic()
        *servers, worker = plan.services
        (plan.space.local / "prefect").mkdir(parents=True, exist_ok=True)
        with progress.task("start", 4) as step:
            # two first users of a new SQLite store would both make its tables
            with FileLock(plan.space.local / "mlflow.lock"):
                for service in servers:
                    self._start(service)
                self._await(servers)
            if plan.has_auth:
                made = grants.grant(plan.mlflow_url, plan.space.experiment)
                self.say(f"MLflow knows: {', '.join(made) or 'its administrator only'}")
            step(note="servers answer")
            with asking(plan.prefect_url):
                self._hand_over(worker, step)
        self.seconds = time.monotonic() - began
        self._write()

    def _hand_over(self, worker: Service, step: progress.Task) -> None:
        """Let the worker take work, once nothing of a crash stands in its way."""
        plan, prefect = self.plan, Prefect(self.plan.prefect_url)
        known = prefect.deployments()  # first: another machine's server may not be there at all
        with ThreadPoolExecutor(1) as beside:
            cleared = beside.submit(self._child, "recover", RECOVER)
            self._register(known)
            step(note="deployments registered")
            found = json.loads(cleared.result())
        self.runs_page = runs_page(without_secrets(plan.mlflow_url), found["experiment"])
        step(note="crashes cleared up")
        self._reap(worker_started=time.time())
        self._start(worker)
        self._await([worker])
        step(note="a worker is ready")
        planned = time.monotonic() + PLANNING_SECONDS
        with suppress(OSError, ValueError):  # only the screen waits for it
            while not prefect.has_planned() and time.monotonic() < planned:
                time.sleep(0.2)

    def _start(self, service: Service) -> Kept:
        log = self.plan.space.local / "logs" / f"{service.name}.txt"
        process = processes.start(
            service.command, environment=service.environment, cwd=self.plan.space.local, log=log
        )
        kept = Kept(service, process, time.time())
        self.kept = [*(each for each in self.kept if each.service.name != service.name), kept]
        return kept

    def _await(self, services: list[Service]) -> None:
        names = {service.name for service in services}
        deadline = time.monotonic() + PATIENCE_SECONDS
        waiting = [kept for kept in self.kept if kept.service.name in names]
        while waiting:
            for kept in list(waiting):
                if kept.process.poll() is not None or time.monotonic() > deadline:
                    raise self._failed(kept)
                if kept.service.is_healthy(kept.started):
                    kept.answered = time.time()
                    waiting.remove(kept)
            time.sleep(0.2)

    def _failed(self, kept: Kept) -> Refusal:
        name = kept.service.name
        log = self.plan.space.local / "logs" / f"{name}.txt"
        got = f"none; its last words: {_last_words(log)}"
        return Refusal(f"{name} starts and answers", got, f"see {log}")

    def _child(self, name: str, command: Sequence[str], cwd: Path | None = None) -> str:
        """Run a short process with a worker's environment; return what it printed, or refuse."""
        done = subprocess.run(
            command, env=self.plan.of_worker(), cwd=cwd or self.plan.space.root,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        log = self.plan.space.local / "logs" / f"{name}.txt"
        log.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise _unsuccessful(name, log)
        return done.stdout

    def _register(self, known: dict[str, str]) -> None:
        """Register prefect.yaml once: again only when it changed, so that a pause is kept."""
        plan = self.plan
        text = (plan.home / "prefect.yaml").read_text()
        said = json.dumps([text, str(plan.home), str(plan.space.root), plan.prefect_url])
        now = hashlib.sha256(said.encode()).hexdigest()
        kept = plan.space.local / "deployments.txt"
        if known and kept.is_file() and kept.read_text() == now:
            return
        Prefect(plan.prefect_url).make_pool()
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        self._child("deploy", command, cwd=plan.home)
        kept.write_text(now)

    # -- keep -----------------------------------------------------------------------------------
    def keep(self) -> None:
        """Start again what dies or hangs, and close what a dead flow run left, until stopped."""
        cared = time.time()
        while True:
            time.sleep(LOOK_SECONDS)
            for kept in list(self.kept):
                self._look(kept)
            if time.time() - cared >= CARE_SECONDS:
                self._care()
                cared = time.time()

    def _look(self, kept: Kept) -> None:
        name, code = kept.service.name, kept.process.poll()
        if code is None:
            return
        if not kept.pause_until:
            now = time.time()
            kept.deaths = [*(at for at in kept.deaths if now - at < 600), now]
            pause = min(2.0 ** (len(kept.deaths) - 1) - 1.0, LONGEST_PAUSE_SECONDS)
            kept.pause_until = now + pause
            self.say(f"{name} died (exit status {code}); it is started again")
        if time.time() >= kept.pause_until:
            again = self._start(kept.service)
            again.deaths = kept.deaths
            self._write()

    def _care(self) -> None:
        for kept in self.kept:
            if kept.process.poll() is None and kept.service.is_healthy(kept.started):
                kept.answered = time.time()
            elif kept.process.poll() is None:
                silent_since = max(kept.answered, kept.started)
                if time.time() - silent_since > SILENT_SECONDS:
                    self.say(f"{kept.service.name} has not answered for long; it is killed")
                    processes.stop([psutil.Process(kept.process.pid)], patience=5)
        worker = next(kept for kept in self.kept if kept.service.name == "worker")
        try:
            if self._reap(worker_started=worker.started):
                self._is_recovery_due = True
            self._recover_beside()
            self._look_at_inbox()
        except Refusal as refusal:
            self.say(str(refusal))
        except (OSError, ValueError):
            return  # the server is being started again

    def _recover_beside(self) -> None:
        """Close what dead processes left open in MLflow, one `recover` at a time.

        Nobody waits for it: it may itself wait for the very server that is to be started again.
        """
        log = self.plan.space.local / "logs" / "recover.txt"
        if self._recovery is not None:
            code = self._recovery.poll()
            if code is None:
                return
            self._recovery = None
            if code:
                self.say(str(_unsuccessful("recover", log)))
        if self._is_recovery_due:
            log.unlink(missing_ok=True)  # its last words shall be its own
            self._recovery = processes.start(
                RECOVER, environment=self.plan.of_worker(), cwd=self.plan.space.root, log=log
            )
            self._is_recovery_due = False

    def _look_at_inbox(self) -> None:
        """Ask for a run of the scoring deployment when a file came and is no longer growing."""
        now = _lying_in(self.plan.space.root / INBOX)
        has_come = bool(set(now) - set(self._inbox))
        if now and now == self._seen and has_come:
            api = Prefect(self.plan.prefect_url)
            # one under way may have listed the inbox before: what came is asked for when it ends,
            # since until then Prefect would cancel another
            if not api.is_open(SCORING):
                if api.begin(SCORING):
                    self.say(f"{INBOX}/ has files; what is new among them is scored")
                self._inbox = now
        elif not has_come:
            self._inbox = now
        self._seen = now

    def _reap(self, *, worker_started: float) -> int:
        api = Prefect(self.plan.prefect_url)
        reaped = api.reap(self.plan.worker_name, worker_started=worker_started)
        for run in reaped:
            ending = "it goes on from there" if run.is_repeated else "it is given up"
            self.say(f"{run.deployment} ({run.name}) crashed; {ending}")
        return len(reaped)

    # -- what others read -----------------------------------------------------------------------
    def _write(self) -> None:
        plan = self.plan
        # a file and a screen are read by more people than an environment is
        mlflow, prefect = without_secrets(plan.mlflow_url), without_secrets(plan.prefect_url)
        told = {
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "workspace": str(plan.space.root),
            "mlflow": mlflow,
            "seconds_to_start": self.seconds,
            "prefect": prefect.removesuffix("/api"),
            "prefect_api": prefect,
            "services": [
                {
                    "name": kept.service.name,
                    "pid": kept.process.pid,
                    "url": self.runs_page if kept.service.name == "mlflow" else kept.service.url,
                    "started": kept.started,
                }
                for kept in self.kept
            ],
        }
        beside = plan.space.local / ".up.json.part"
        beside.write_text(json.dumps(told, indent=1) + "\n")
        os.replace(beside, plan.space.local / "up.json")


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return without_secrets(" | ".join(lines[-2:]))[-300:] or "nothing"


def _unsuccessful(name: str, log: Path) -> Refusal:
    return Refusal(f"{name} succeeds", _last_words(log), f"see {log}")


def _lying_in(folder: Path) -> list[Lying]:
    """Return what lies in a folder; not what cannot be looked at, such as a link to nothing."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):
            looked = path.stat()
            found.append((path.name, looked.st_size, looked.st_mtime_ns))
    return sorted(each for each in found if not each[0].startswith("."))


def state_of(space: Workspace) -> dict[str, Any]:
    """Return what `endoprint up` wrote of itself, with `is_running` as it is now."""
    try:
        told: dict[str, Any] = json.loads((space.local / "up.json").read_text())
    except (OSError, ValueError):
        return {"is_running": False, "services": []}
    told["is_running"] = is_alive(told["pid"], born=told["born"])
    for service in told["services"]:
        service["is_alive"] = is_alive(service["pid"], born=service["started"])
    return told


@contextmanager
def running(plan: Plan, say: Say) -> Iterator[Up]:
    """Hold a workspace's services up while the block runs; nothing of them is left afterwards.

    One at a time for each workspace. What an earlier one that was killed left is stopped first.
    """
    space = plan.space
    lock = FileLock(space.local / "up.lock", timeout=0)
    try:
        space.local.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        at = state_of(space)
        one = f"process {at['pid']}, {at['mlflow']}" if at["is_running"] else "it is starting"
        raise Refusal(
            "one `endoprint up` for a workspace",
            f"one here already ({one})",
            "use that, or stop it with Ctrl-C",
        ) from None
    except OSError as error:
        raise Refusal(
            f"{space.local.name}/ is a folder that can be written to",
            f"{error.strerror}: {error.filename or space.local}",
            "mend what is in its way there",
        ) from None
    mark = processes.mark_of(space)
    before = {each: signal.signal(each, _stopped) for each in SIGNALS}
    warden = None
    try:
        processes.stop_marked(mark)
        warden = processes.warden(mark)
        yield Up(_with_free_ports(plan), say)
    finally:
        for each in SIGNALS:  # a second Ctrl-C does not leave the rest running
            signal.signal(each, signal.SIG_IGN)
        if processes.stop_marked(mark) and warden is not None:
            _close_runs(space)
        if warden is not None:
            warden.kill()
            warden.wait()
        (space.local / "up.json").unlink(missing_ok=True)
        lock.release()
        for each, handler in before.items():
            signal.signal(each, handler)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _close_runs(space: Workspace) -> None:
    """Mark the runs of what was just stopped KILLED, in the store itself: its server is gone."""
    with suppress(subprocess.TimeoutExpired):  # a store that is away: the next start does it
        subprocess.run(
            RECOVER, cwd=space.root, env=space.environment(), capture_output=True, check=False,
            timeout=CLOSING_SECONDS,
        )  # fmt: skip


def _stopped(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


def _with_free_ports(plan: Plan) -> Plan:
    mlflow = processes.free_port(plan.mlflow_port, host=plan.host)
    prefect = processes.free_port(plan.prefect_port, host=plan.host, taken=[mlflow])
    return replace(plan, mlflow_port=mlflow, prefect_port=prefect)
