"""Processes that belong together: started in sessions of their own, found again, stopped for sure.

Everything started here, and all that it starts in turn, carries one mark in its environment. A
flow run leaves its worker's process group, so that groups alone would let it escape.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from endoprint.config import Refusal
from endoprint.workspace import Workspace

MARK = "ENDOPRINT_UP"  # names the workspace whose `endoprint up` started a process
PATIENCE_SECONDS = 20.0  # for a flow run to say that it was stopped, before it is killed


def mark_of(space: Workspace) -> str:
    """Return what the processes of this workspace's services carry in their environment."""
    return str(space.root)


def start(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to the end of a file; Ctrl-C here does not reach it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def marked(mark: str) -> list[psutil.Process]:
    """Return every living process of this user that carries the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):  # gone meanwhile, or somebody else's
            continue
    return found


def stop(processes: Sequence[psutil.Process], *, patience: float = PATIENCE_SECONDS) -> None:
    """Ask processes to end, and kill those that have not after `patience` seconds."""
    for process in processes:
        _signalled(process, kill=False)
    _, stubborn = psutil.wait_procs(processes, timeout=patience)
    for process in stubborn:
        _signalled(process, kill=True)
    psutil.wait_procs(stubborn, timeout=5)


def stop_marked(mark: str, *, patience: float = PATIENCE_SECONDS) -> int:
    """Stop all that carries the mark, workers and runs before the servers they report to.

    Returns how many processes that were.
    """
    everything = marked(mark)
    servers = [each for each in everything if _is_server(each)]
    stop([each for each in everything if each not in servers], patience=patience)
    stop(servers, patience=patience)
    late = marked(mark)  # started while the others were ending
    stop(late, patience=1)
    return len(everything) + len(late)


def free_port(preferred: int, *, host: str = "127.0.0.1", taken: Sequence[int] = ()) -> int:
    """Return the preferred port, or the next one above it that nobody listens on."""
    for port in range(preferred, min(preferred + 200, 65536)):
        if port in taken:
            continue
        with socket.socket() as probe:
            # as a server binds: a port that was only just left is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise Refusal(
                    "services listen on an address of this machine",
                    f"{host}: {error.strerror}",
                    "leave --host out, or name one that `ip address` shows",
                ) from None
            return port
    raise Refusal("a port is free", f"none from {preferred} on", "name a lower one")


def warden(mark: str) -> subprocess.Popen[bytes]:
    """Start the process that stops all that is marked when this one is gone, however it went.

    It waits for its standard input to end, which the kernel sees to even after `kill -9`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "endoprint.services.processes", mark],
        env={key: value for key, value in os.environ.items() if key != MARK},
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def _is_server(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except (psutil.Error, OSError):
        return False
    return "uvicorn" in words or "mlflow server" in words


def _signalled(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.Error:
        return  # gone already


if __name__ == "__main__":
    sys.stdin.buffer.read()  # ends when whoever started us does
    stop_marked(sys.argv[1], patience=5)
