"""Debian's Chromium driven as a hand would: pages opened, links clicked, pictures taken.

It speaks the browser's own DevTools protocol (https://chromedevtools.github.io/devtools-protocol)
over a socket on loopback.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")
PATIENCE_SECONDS = 90.0
WIDTH, HEIGHT = 1400, 900
WORDS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0",
    f"--window-size={WIDTH},{HEIGHT}",
]  # fmt: skip
# the innermost visible element that says so, or whose label does; then its middle
FIND = """
(() => {
  const wanted = %s, first = %s;
  const said = (e) => [e.innerText, e.getAttribute('aria-label'), e.title]
    .map((s) => (s || '').trim());
  const shown = (e) => { const r = e.getBoundingClientRect(); return r.width && r.height; };
  const all = [...document.querySelectorAll(first || 'body *')]
    .filter((e) => shown(e) && (!wanted || said(e).includes(wanted)));
  const found = all.filter((e) => !all.some((o) => o !== e && e.contains(o)))[0];
  if (!found) return null;
  found.scrollIntoView({block: 'center'});
  const r = found.getBoundingClientRect();
  return [r.left + r.width / 2, r.top + r.height / 2];
})()
"""


class Browser:
    """One tab."""

    def __init__(self, line: Any) -> None:
        self._line, self._number = line, 0
        self.ask("Page.enable")

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        """Send a command of the protocol; return its answer."""
        self._number += 1
        self._line.send(json.dumps({"id": self._number, "method": method, "params": given}))
        while True:
            answer = json.loads(self._line.recv(timeout=PATIENCE_SECONDS))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def js(self, expression: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def text(self) -> str:
        """What can be read on the page."""
        return str(self.js("document.body ? document.body.innerText : ''"))

    def open(self, address: str, *wanted: str) -> str:
        """Open a page; return its text once it says what is wanted."""
        self.ask("Page.navigate", url="about:blank")  # '#' alone would not load it anew
        self.ask("Page.navigate", url=address)
        return self.until(*wanted)

    def until(self, *wanted: str) -> str:
        """Wait until the page says all of it; return its text."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            text = self.text
            missing = [each for each in wanted if each not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"the page never said {missing}: {text[:3000]}"
            time.sleep(0.2)

    def show(self, wanted: str) -> None:
        """Scroll to what says so."""
        text = json.dumps(wanted)
        found = f"[...document.querySelectorAll('body *')].filter((e) => e.innerText == {text})"
        self.js(f"{found}.pop().scrollIntoView({{block: 'center'}})")

    def until_js(self, claim: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.js(f"Boolean({claim})"):
            assert time.monotonic() < deadline, f"never so: {claim}"
            time.sleep(0.2)

    def link(self, wanted: str) -> str:
        """Return where the link of this text leads: a click may open a tab of its own."""
        text = json.dumps(wanted)
        return str(self.js(f"[...document.links].find((a) => a.innerText.trim() == {text}).href"))

    def lines(self) -> list[str]:
        """What can be read on the page, line by line."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    def click(self, wanted: str = "", *, inside: str = "") -> None:
        """Click what says `wanted` (its text or label); `inside`: a CSS selector it must match."""
        expression = FIND % (json.dumps(wanted), json.dumps(inside))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.js(expression) is None:
            assert time.monotonic() < deadline, f"nothing to click: {wanted or inside}"
            time.sleep(0.2)
        time.sleep(0.3)  # until it has been scrolled to
        x, y = self.js(expression)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, wanted: str, *, inside: str) -> None:
        """Open a list to choose from, type and press Enter."""
        self.click(inside=inside)
        self.ask("Input.insertText", text=wanted)
        time.sleep(0.5)
        for kind in ("rawKeyDown", "char", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                     windowsVirtualKeyCode=13)  # fmt: skip
        self.ask("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape",
                 windowsVirtualKeyCode=27)  # fmt: skip

    def picture(self, place: Path) -> Path:
        """Keep what is to be seen as PNG, in 256 colours: a half of its bytes."""
        from PIL import Image  # comes with matplotlib

        time.sleep(1.0)  # plots are drawn after their text
        seen = base64.b64decode(self.ask("Page.captureScreenshot")["data"])
        with Image.open(BytesIO(seen)) as image:
            few = image.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
            few.save(place, optimize=True)
        return place


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Hold a browser open with a profile of its own."""
    from websockets.sync.client import connect  # comes with Prefect

    process = subprocess.Popen(
        [str(PROGRAM), *WORDS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (told.is_file() and told.read_text().strip()):
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.1)
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            page = next(each for each in json.load(answer) if each["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as line:
            yield Browser(line)
    finally:
        process.terminate()
        process.wait(30)
