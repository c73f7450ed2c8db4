"""A headless Chromium that is spoken to through two pipes (the DevTools protocol): one start, many pages."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The browser reads commands from file descriptor 3 and writes answers to 4.
THEIRS = (3, 4)


def program() -> str | None:
    """Return the browser to run: what CHROME names, or one on PATH."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


class ChromiumError(Exception):
    """The browser refused a command, or ended."""


class Chromium:
    """A running browser with one page. Close it, or the process stays."""

    def __init__(self, path: str, profile: Path, *flags: str) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        command = [path, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            close_fds=False,  # it would close what was moved; Python's own files are not inherited anyway
            preexec_fn=_moved(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.console: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result. Raises `ChromiumError`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == number)
        if "error" in answer:
            raise ChromiumError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, page: Path | str) -> None:
        """Load a file or an address, wait until it has loaded, and forget what earlier pages said."""
        self.console.clear()
        self("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def width(self, pixels: int, height: int = 900) -> None:
        """Lay the page out as on a screen of this width in CSS pixels."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=pixels,
            height=height,
            deviceScaleFactor=1,
            mobile=pixels < 600,
        )

    def media(self, scheme: str = "light", medium: str = "") -> None:
        """Prefer "light" or "dark"; `medium` "print" styles the page as on paper."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", media=medium, features=features)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page; its own policy does not apply."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise ChromiumError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        answer = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        answer = self("Page.printToPDF", printBackground=False, preferCSSPageSize=True, **size)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)  # it ends when the pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the next message that is wanted, keeping what the console said on the way."""
        while True:
            message = self._message()
            if message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled"):
                self.console.append(json.dumps(message["params"]))
            if wanted(message):
                return message

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise ChromiumError(f"the browser ended with {self._process.poll()}")
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))


def _moved(commands: int, answers: int) -> Callable[[], None]:
    """Return what puts both pipes where the browser looks for them."""

    def move() -> None:
        kept = [os.dup(descriptor) for descriptor in (commands, answers)]  # either may already be 3 or 4
        for ours, theirs in zip(kept, THEIRS, strict=True):
            os.dup2(ours, theirs, inheritable=True)

    return move
