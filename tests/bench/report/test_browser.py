"""The report in a real browser, offline: everything is there, can be seen, read aloud, and printed."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import chromium
import pytest
from PIL import Image

from mla.bench import results
from mla.bench.report import page, pictures
from mla.bench.report.draw import theme

MODES = ("light", "dark")
# CSS pixels of A4 without the margins of the style sheet.
A4_WIDTH, A4_HEIGHT = 703, 1016
Show = Callable[[str], chromium.Chromium]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """Start Chromium once; it may be missing, but not in CI."""
    program = chromium.program()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on PATH, and CHROME names none")
    started = chromium.Chromium(str(program), tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def show(browser: chromium.Chromium, tmp_path: Path) -> Show:
    """Return a function that opens text as a page, 1280 pixels wide and light at first."""

    def show(text: str) -> chromium.Chromium:
        path = tmp_path / ("page.svg" if text.startswith(pictures.START) else "page.html")
        path.write_text(text, encoding="utf-8")
        browser.media("light")
        browser.width(1280)
        browser.open(path)
        return browser

    return show


def test_everything_is_in_the_rendered_page(show: Show, rich_page: str) -> None:
    seen = show(rich_page)
    for selector, mark in {
        "section[id]": '<section id="',
        "figure": "<figure ",
        "svg[role]": 'role="img"',
        "path": "<path ",
        "svg text": "<text ",
        "td": "<td",
    }.items():
        count = seen.run(f"document.querySelectorAll('{selector}').length")
        assert count == rich_page.count(mark) > 0, mark
    assert not seen.console


def test_the_console_is_heard_and_the_policy_holds(show: Show, rich_page: str) -> None:
    seen = show(rich_page.replace("</main>", "<script>document.title = 'ran'</script></main>"))
    assert "Content Security Policy" in " ".join(seen.console)
    assert seen.run("document.title") != "ran"


def painted(picture: Path, mode: str) -> int:
    """Return how many pixels have a colour of a series; the one that text has too does not count."""
    kept = [tone for name, tone in theme.SERIES.items() if name != "s7"]
    wanted = {tuple(bytes.fromhex(getattr(tone, mode)[1:])) for tone in kept}
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(1 << 24) or []
    return sum(count for count, colour in found if colour in wanted)


@pytest.mark.parametrize(("mode", "width"), [("light", 1280), ("dark", 390)])
def test_the_pictures_are_drawn_in_the_colours_of_the_surroundings(
    show: Show, rich_page: str, tmp_path: Path, mode: str, width: int
) -> None:
    seen = show(rich_page)
    seen.media(mode)
    seen.width(width)
    drawn, bare = tmp_path / "drawn.png", tmp_path / "bare.png"
    seen.screenshot(drawn)
    seen.run("document.querySelectorAll('.drawings').forEach(one => one.style.visibility = 'hidden')")
    seen.screenshot(bare)
    assert painted(drawn, mode) > 3 * painted(bare, mode) > 0  # legends have these colours too
    other = MODES[mode == "light"]
    assert painted(drawn, other) < 0.01 * painted(drawn, mode)


# Opens everything and returns what does not fit, which labels meet, and letters smaller than 11 pixels.
UNFIT = """(() => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const said = [];
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) said.push("page is " + root.scrollWidth + " wide");
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest(".scroll, svg") || one.getBoundingClientRect().right <= innerWidth + 1) continue;
    said.push(one.tagName + " " + one.className + " sticks out");
  }
  for (const chart of document.querySelectorAll("svg[role]")) {
    const texts = [...chart.querySelectorAll("text")].filter((one) => one.textContent.trim());
    const boxes = texts.map((one) => one.getBoundingClientRect());
    for (const [place, a] of boxes.entries()) for (const [further, b] of boxes.slice(place + 1).entries())
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        said.push([texts[place].textContent, texts[place + 1 + further].textContent].join(" meets "));
    const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
    for (const one of texts) {
      const size = scale * parseFloat(getComputedStyle(one).fontSize);
      if (size < 11) said.push(one.textContent + " has " + size + " pixels");
    }
  }
  for (const one of document.querySelectorAll(".scroll"))
    if (one.scrollWidth > one.clientWidth && one.tabIndex !== 0) said.push("cannot be scrolled by keyboard");
    else if (one.tabIndex === 0 && one.firstElementChild.offsetWidth < 240) said.push("a stop for nothing");
  return said;
})()"""
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


# What does not fit on paper: wider than the page, or a chart that is torn or taller than the page.
UNPRINTABLE = """((width, height) => {
  const said = [];
  for (const one of document.querySelectorAll("table, pre, svg[role], .file"))
    if (one.getBoundingClientRect().right > width + 1) said.push(one.outerHTML.slice(0, 80) + " is clipped");
  for (const one of document.querySelectorAll(".whole")) {
    if (getComputedStyle(one).breakInside !== "avoid") said.push("a chart may be torn");
    if (one.getBoundingClientRect().height > height) said.push(one.textContent.slice(0, 80) + " is too tall");
  }
  return said;
})"""


@pytest.mark.parametrize("long", [False, True])
def test_it_fits_phones_screens_and_paper_and_labels_can_be_read(
    show: Show, rich: Sequence[results.Run], rich_page: str, long: bool
) -> None:
    if long:
        for run in rich:
            lengthen(run)
        rich_page = page.render([f"runs/{LONG}.json", "two.json"], rich)
    seen = show(rich_page)
    for width in (390, 1280):
        seen.width(width)
        assert seen.run(UNFIT) == [], width
    seen.width(A4_WIDTH, A4_HEIGHT)
    seen.media("dark", "print")
    assert seen.run(f"{UNPRINTABLE}({A4_WIDTH}, {A4_HEIGHT})") == []


def test_paper_is_light_and_has_the_warnings(show: Show, rich_page: str) -> None:
    seen = show(rich_page)
    seen.media("dark", "print")
    assert colour(seen.run("getComputedStyle(document.body).backgroundColor")) == "#ffffff"
    line = "document.querySelector('.warnings li')"
    assert colour(seen.run(f"getComputedStyle({line}).color")) == theme.THEME["absent"].light
    assert seen.run(f"{line}.checkVisibility({{contentVisibilityAuto: true}})")


# Every pair of colours in the page, with the least contrast that it needs.
PAIRS = """(() => {
  const seen = new Map();
  const add = (what, one, other, least) => seen.set([one, other, least].join(), [what, one, other, least]);
  const paper = getComputedStyle(document.body).backgroundColor;
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (walker.currentNode.textContent.trim() && !one.closest("svg"))
      add(walker.currentNode.textContent, getComputedStyle(one).color, behind(one), 4.5);
  }
  for (const one of document.querySelectorAll("svg[role] text")) {
    const on = /--on-(s[0-9])/.exec(one.getAttribute("style"));
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = on ? `var(--${on[1]})` : paper;
    add(one.textContent, getComputedStyle(one).fill, getComputedStyle(probe).color, 4.5);
    probe.remove();
  }
  for (const one of document.querySelectorAll("svg path, svg use")) {
    const style = getComputedStyle(one);
    const named = one.getAttribute("style") || "";
    for (const kind of ["fill", "stroke"]) {
      const name = new RegExp(`${kind}: var\\\\(--([a-z0-9]+)\\\\)`).exec(named);
      if (name && !["paper", "grid", "rule", "band"].includes(name[1])) add(name[1], style[kind], paper, 3);
    }
  }
  return [...seen.values()];
})()"""


def colour(text: str) -> str:
    """Return a computed colour as "#rrggbb"."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", text)[:3])


@pytest.mark.parametrize("mode", MODES)
def test_everything_stands_out_from_what_is_behind_it(show: Show, rich_page: str, mode: str) -> None:
    seen = show(rich_page)
    seen.media(mode)
    pairs = seen.run(PAIRS)
    assert len(pairs) > 15
    for what, one, other, least in pairs:
        assert theme.contrast(colour(one), colour(other)) >= least, (what, one, other)


def nodes(seen: chromium.Chromium) -> list[dict[str, str]]:
    """Return what assistive technology is told: role and name of every node."""
    found = []
    for node in seen("Accessibility.getFullAXTree")["nodes"]:
        if not node.get("ignored"):
            found.append({key: node.get(key, {}).get("value", "") for key in ("role", "name")})
    return found


def test_every_picture_says_what_can_be_seen_in_it(show: Show, rich_page: str) -> None:
    seen = show(rich_page)
    names = [node["name"] for node in nodes(seen) if node["role"] in ("image", "img", "graphics-document")]
    assert len(names) == rich_page.count('role="img"') > 20
    assert [name for name, count in Counter(names).items() if count > 1] == []
    for name in names:
        assert re.search(r"\d", name), name
        assert len(name.split()) > 8, name
    said = " ".join(names)
    assert re.search(
        r"Latency: decode A: mla won, [\d.]+x as fast as mla-reference \([^)]*\), at \d+ %", said
    )
    assert re.search(r"prefill, mla: \d+ % of the (compute|memory) limit", said)


def test_a_page_can_be_heard_in_order(show: Show, rich_page: str) -> None:
    seen = show(rich_page)
    found = nodes(seen)
    roles = Counter(node["role"] for node in found)
    assert (roles["banner"], roles["main"], roles["contentinfo"]) == (1, 1, 1)
    levels = seen.run("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    tables = [node["name"] for node in found if node["role"] == "table"]
    assert all(tables)
    assert [name for name, count in Counter(tables).items() if count > 1] == []
    assert roles["rowheader"] > 20 < roles["columnheader"]


# Texts of a picture that leave it, or whose boxes meet above the chart.
OUTSIDE = """(() => {
  const root = document.rootElement.getBoundingClientRect();
  const box = (one) => one.getBoundingClientRect();
  const texts = [...document.querySelectorAll("text")];
  const said = texts.filter((one) => box(one).right > root.right || box(one).bottom > root.bottom);
  const above = [...document.querySelectorAll(":root > text")];
  for (const [place, a] of above.entries()) for (const b of above.slice(place + 1))
    if (Math.min(box(a).right, box(b).right) > Math.max(box(a).left, box(b).left)
        && Math.min(box(a).bottom, box(b).bottom) - Math.max(box(a).top, box(b).top) > 3) said.push(a, b);
  return said.map((one) => one.textContent);
})()"""


def test_a_picture_of_its_own_fits_its_frame(show: Show, rich: Sequence[results.Run]) -> None:
    for run in rich:
        run.backend.device = "A card with quite a long name, 80 GB"
        for case in run.cases:
            case.implementation += "[latent_attention=flashinfer,linear=reference]"
    made = pictures.render(["one.json", "two.json"], rich)
    for name in ("roofline-a-light.svg", "decode-latency-dark.svg", "decode-stages-light.svg"):
        seen = show(made[name])
        assert seen.run(OUTSIDE) == [], name
