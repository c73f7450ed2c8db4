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
from mla.bench.report import figures, page

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
        path = tmp_path / ("page.svg" if text.startswith("<?xml") else "page.html")
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
        "img": "<img ",
        "td": "<td",
    }.items():
        count = seen.run(f"document.querySelectorAll('{selector}').length")
        assert count == rich_page.count(mark) > 0, mark
    loaded = "[...document.images].every((one) => one.naturalWidth > 300)"
    assert seen.run(loaded)
    assert not seen.console


def test_the_console_is_heard_and_the_policy_holds(show: Show, rich_page: str) -> None:
    seen = show(rich_page.replace("</main>", "<script>document.title = 'ran'</script></main>"))
    assert "Content Security Policy" in " ".join(seen.console)
    assert seen.run("document.title") != "ran"


VISIBLE = "[...document.images].filter((one) => one.checkVisibility()).map((one) => one.className)"


@pytest.mark.parametrize(
    ("mode", "width", "medium", "kind"),
    [
        ("light", 1280, "", "wide light"),
        ("dark", 1280, "", "wide dark"),
        ("light", 390, "", "narrow light"),
        ("dark", 390, "", "narrow dark"),
        ("dark", A4_WIDTH, "print", "wide light"),
    ],
)
def test_each_chart_is_shown_once_in_the_size_and_colours_of_its_surroundings(
    show: Show, rich_page: str, tmp_path: Path, mode: str, width: int, medium: str, kind: str
) -> None:
    seen = show(rich_page)
    seen.media(mode, medium)
    seen.width(width)
    assert seen.run(VISIBLE) == [kind] * rich_page.count("<figure ")
    wide = "[...document.images].filter((one) => one.checkVisibility()).every((one) => one.width > 0.9 * %d)"
    assert seen.run(wide % min(width - 60, 1100))
    seen.screenshot(tmp_path / "drawn.png")
    colour = getattr(figures.SERIES["s1"], kind.split()[1])
    with Image.open(tmp_path / "drawn.png") as image:
        counts = {shade: count for count, shade in image.convert("RGB").getcolors(1 << 24) or []}
    assert counts.get(tuple(bytes.fromhex(colour[1:])), 0) > 1000


# Opens everything and returns what does not fit.
UNFIT = """(() => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const said = [];
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) said.push("page is " + root.scrollWidth + " wide");
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest(".scroll") || one.getBoundingClientRect().right <= innerWidth + 1) continue;
    said.push(one.tagName + " " + one.className + " sticks out");
  }
  for (const one of document.querySelectorAll(".scroll"))
    if (one.scrollWidth > one.clientWidth && one.tabIndex !== 0) said.push("cannot be scrolled by keyboard");
  return said;
})()"""
# What does not fit on paper: wider than the page, or a chart that is torn or taller than the page.
UNPRINTABLE = """((width, height) => {
  const said = [];
  for (const one of document.querySelectorAll("section:not(#numbers) table, pre, img, .file"))
    if (one.getBoundingClientRect().right > width + 1) said.push(one.outerHTML.slice(0, 80) + " is clipped");
  for (const one of document.querySelectorAll("figure")) {
    if (getComputedStyle(one).breakInside !== "avoid") said.push("a chart may be torn");
    if (one.getBoundingClientRect().height > height) said.push(one.textContent.slice(0, 80) + " is too tall");
  }
  return said;
})"""
LONG_NAME = "x" * 200


def lengthen(run: results.Run) -> None:
    """Give everything in a run a name that is wider than any screen."""
    run.environment[LONG_NAME] = LONG_NAME
    run.backend.device, run.config["name"] = f"card {LONG_NAME}", f"/p/{LONG_NAME}.json"
    for case in run.cases:
        case.scenario, case.base = f"{case.scenario} {LONG_NAME}", f"{case.base} {LONG_NAME}"
        case.implementation = f"{case.implementation}[{'role=an_op,' * 20}]"
        case.check.reason = case.repro = LONG_NAME
        case.roofline.doubt = LONG_NAME if case.mode == "decode" else ""
    for ceiling in run.ceilings:
        ceiling.source = ceiling.dtype = LONG_NAME


@pytest.mark.parametrize("long", [False, True])
def test_it_fits_phones_screens_and_paper(
    show: Show, rich: Sequence[results.Run], rich_page: str, long: bool
) -> None:
    if long:
        for run in rich:
            lengthen(run)
        rich_page = page.render([f"runs/{LONG_NAME}.json", "two.json"], rich)
    seen = show(rich_page)
    for width in (390, 1280):
        seen.width(width)
        assert seen.run(UNFIT) == [], width
    seen.width(A4_WIDTH, A4_HEIGHT)
    seen.media("dark", "print")
    assert seen.run(f"{UNPRINTABLE}({A4_WIDTH}, {A4_HEIGHT})") == []


# Texts of a picture that leave it, meet each other, or have less than 11 pixels on a phone.
UNREADABLE = """(() => {
  const root = document.rootElement.getBoundingClientRect();
  const texts = [...document.querySelectorAll("text")].filter((one) => one.textContent.trim());
  const boxes = texts.map((one) => one.getBoundingClientRect());
  const said = [];
  const scale = 366 / document.rootElement.viewBox.baseVal.width;
  for (const [place, a] of boxes.entries()) {
    const text = texts[place].textContent;
    if (a.left < root.left - 1 || a.right > root.right + 1 || a.bottom > root.bottom + 1)
      said.push(text + " is cut");
    const size = scale * parseFloat(getComputedStyle(texts[place]).fontSize);
    if (size < 11) said.push(text + " has " + size + " pixels");
    for (const [further, b] of boxes.slice(place + 1).entries())
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        said.push(text + " meets " + texts[place + 1 + further].textContent);
  }
  return said;
})()"""


@pytest.mark.parametrize("long", [False, True])
def test_texts_of_a_picture_can_be_read(show: Show, rich: Sequence[results.Run], long: bool) -> None:
    for run in rich:
        if long:
            run.backend.device = "A card with quite a long name, 80 GB"
        for case in run.cases:
            case.implementation += "[latent_attention=flashinfer,linear=reference]" * long
    for name, svg in page.pictures(["one.json", "two.json"], rich).items():
        if name.endswith("light.svg"):
            assert show(svg).run(UNREADABLE) == [], name


def test_paper_is_light_and_has_the_warnings(show: Show, rich_page: str) -> None:
    seen = show(rich_page)
    seen.media("dark", "print")
    assert colour(seen.run("getComputedStyle(document.body).backgroundColor")) == "#ffffff"
    line = "document.querySelector('.warnings li')"
    assert colour(seen.run(f"getComputedStyle({line}).color")) == figures.THEME["amber"].light
    assert seen.run(f"{line}.checkVisibility({{contentVisibilityAuto: true}})")


# Every pair of colours of text and what is behind it.
PAIRS = """(() => {
  const seen = new Map();
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent, element = walker.currentNode.parentElement;
    const colours = [getComputedStyle(element).color, behind(element)];
    if (text.trim()) seen.set(colours.join(), [text, ...colours]);
  }
  return [...seen.values()];
})()"""


def colour(text: str) -> str:
    """Return a computed colour as "#rrggbb"."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", text)[:3])


def contrast(text_colour: str, other: str) -> float:
    """Return the contrast ratio of two colours "#rrggbb", from 1 to 21, as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(text_colour), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_texts_and_series_stand_out_from_what_is_behind_them(show: Show, rich_page: str, mode: str) -> None:
    seen = show(rich_page)
    seen.media(mode)
    pairs = seen.run(PAIRS)
    assert len(pairs) > 6
    paper = getattr(figures.THEME["paper"], mode)
    assert min(contrast(getattr(tone, mode), paper) for tone in figures.SERIES.values()) >= 3
    for what, text, behind in pairs:
        assert contrast(colour(text), colour(behind)) >= 4.5, (what, text, behind)


def test_a_page_can_be_heard_in_order(show: Show, rich_page: str) -> None:
    seen = show(rich_page)
    labelled = []
    for node in seen("Accessibility.getFullAXTree")["nodes"]:
        if not node.get("ignored"):
            labelled.append({key: node.get(key, {}).get("value", "") for key in ("role", "name")})
    roles = Counter(node["role"] for node in labelled)
    assert (roles["banner"], roles["main"], roles["contentinfo"]) == (1, 1, 1)
    levels = seen.run("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    for role, count in (("table", 20), ("image", 6)):
        names = [node["name"] for node in labelled if node["role"] == role]
        assert len(names) >= count
        assert all(len(name.split()) > 1 for name in names)
        assert [name for name, times in Counter(names).items() if times > 1] == []
    assert roles["rowheader"] > 20 < roles["columnheader"]
