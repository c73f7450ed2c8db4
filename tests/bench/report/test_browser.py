"""The report in a real browser, offline: everything is in the rendered page, and it is drawn."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from mla.bench import results
from mla.bench.report import page
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


# Put into a page without its policy: tells the page around it what does not fit and which labels meet.
PROBE = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const said = [];
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) said.push("page is " + root.scrollWidth + " wide");
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest(".scroll, svg") || one.getBoundingClientRect().right <= innerWidth + 1) continue;
    said.push(one.tagName + " " + one.className + " sticks out");
  }
  for (const chart of document.querySelectorAll("#roofline svg[role]")) {
    const boxes = [...chart.querySelectorAll("text")].map((one) => one.getBoundingClientRect());
    for (const [place, a] of boxes.entries()) for (const b of boxes.slice(place + 1))
      if (Math.max(a.left, b.left) < Math.min(a.right, b.right)
          && Math.max(a.top, b.top) < Math.min(a.bottom, b.bottom)) said.push("labels meet");
  }
  parent.postMessage(said.join("; ") || "fits " + innerWidth, "*");
});
</script></body>"""
AROUND = """<!doctype html>
<script>addEventListener("message", (e) => {{ document.title = e.data; }});</script>
<iframe src="{name}" style="border: 0; width: {width}px; height: 844px"></iframe>"""

LONG = "x" * 200


def lengthen(run: results.Run) -> None:
    """Give everything in a run a name that is wider than any screen."""
    run.backend.device, run.config["name"], run.environment[LONG] = f"card {LONG}", f"/p/{LONG}.json", LONG
    for case in run.cases:
        case.scenario, case.base = f"{case.scenario} {LONG}", f"{case.base} {LONG}"
        case.implementation = f"{case.implementation}[{'role=an_op,' * 20}]"
        case.check.reason = case.repro = LONG
        case.roofline.doubt = LONG if case.mode == "decode" else ""
    for ceiling in run.ceilings:
        ceiling.source = ceiling.dtype = LONG


@pytest.mark.parametrize(("long", "width"), [(False, 390), (True, 390), (True, 1280)])
def test_nothing_scrolls_sideways_and_labels_do_not_meet(
    browser: Browser, rich: Sequence[results.Run], tmp_path: Path, long: bool, width: int
) -> None:
    for run in rich if long else ():
        lengthen(run)
    text = page.render([f"/tmp/{LONG}.json", "two.json"], rich)
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", PROBE)
    (tmp_path / "inner.html").write_text(text, encoding="utf-8")
    around = tmp_path / "around.html"
    around.write_text(AROUND.format(name="inner.html", width=width), encoding="utf-8")
    done = browser(around, "--dump-dom", "--virtual-time-budget=20000", "--window-size=1400,900")
    found = re.search("<title>(.*?)</title>", done.stdout)
    assert found is not None
    assert found[1] == f"fits {width}"
