"""What a process may not reach; in force in every Python that has this folder on PYTHONPATH.

`TESTS_BLOCK`: a package that cannot be imported, in any child either. `TESTS_NETWORK`: a file in
which each process says that it is watched, and each attempt to leave this machine is written
before it is refused. An audit hook sees what a patched `socket` would not.
"""

import os
import socket
import sys

LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")
CALLS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def _watch(log: str) -> None:
    own = socket.gethostname()

    def say(line: str) -> None:
        with open(log, "a") as file:
            file.write(f"{line} | {' '.join(sys.argv)[:200]}\n".replace("\0", " "))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in CALLS:
            address = arguments[1]
            host = address[0] if isinstance(address, tuple) and address else None
        elif event in LOOKUPS:
            host = arguments[0]
            if host == own:
                return
        else:
            return
        if isinstance(host, bytes):
            host = host.decode(errors="replace")
        # a path is a Unix socket's, a number a kernel's
        if isinstance(host, str) and host and not host.startswith(LOCAL):
            say(f"refused {event} {host}")
            raise OSError(f"no network in this test: {event} {host}")

    say("watched")
    sys.addaudithook(hook)


if os.environ.get("TESTS_BLOCK"):
    sys.modules[os.environ["TESTS_BLOCK"]] = None  # type: ignore[assignment]
if os.environ.get("TESTS_NETWORK"):
    _watch(os.environ["TESTS_NETWORK"])
