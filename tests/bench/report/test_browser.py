"""The report in a real browser, offline: everything is in the rendered page, and it is drawn."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mla.bench.report.style import COLOURS, DARK

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Browser = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    """Return a function that opens a file in headless Chromium; it may be missing, but not in CI."""
    program = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on PATH, and CHROME names none")

    def browser(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [str(program), *FLAGS, profile, *flags, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return browser


@pytest.fixture
def report(rich_page: str, tmp_path: Path) -> Path:
    """Write the report of the rich runs."""
    path = tmp_path / "report.html"
    path.write_text(rich_page, encoding="utf-8")
    return path


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what the page's console said."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def painted(picture: Path) -> int:
    """Return how many pixels have a colour of the palette; near-black, which text has too, does not count."""
    wanted = {tuple(bytes.fromhex(one[1:])) for one in COLOURS if one != DARK}
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(1 << 24) or []
    return sum(count for count, colour in found if colour in wanted)


def test_everything_is_in_the_rendered_page(browser: Browser, report: Path) -> None:
    done = browser(report, "--dump-dom")
    written = report.read_text(encoding="utf-8")
    for mark in ('<section id="', "<figure ", '<svg viewBox="', "<path ", "<text ", "<td"):
        assert done.stdout.count(mark) == written.count(mark) > 0, mark
    assert done.stdout.rstrip().endswith("</html>")
    assert not complaints(done)


def test_the_console_is_heard_and_the_policy_holds(browser: Browser, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    script = "<script>document.title = 'ran'</script></main>"
    report.write_text(text.replace("</main>", script), encoding="utf-8")
    done = browser(report, "--dump-dom")
    assert "Content Security Policy" in " ".join(complaints(done))
    assert "<title>ran</title>" not in done.stdout


@pytest.mark.parametrize("width", [1280, 500])
def test_the_pictures_are_drawn(browser: Browser, report: Path, tmp_path: Path, width: int) -> None:
    drawn, bare = tmp_path / "drawn.png", tmp_path / "bare.png"
    done = browser(report, f"--screenshot={drawn}", f"--window-size={width},6000")
    assert not complaints(done)
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("</style>", ".drawings { visibility: hidden }</style>"), encoding="utf-8")
    browser(report, f"--screenshot={bare}", f"--window-size={width},6000")
    assert painted(drawn) > 3 * painted(bare) > 0  # legends have these colours too
