"""Charts as files of their own, and those of the gallery, which are made from committed results."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest

from mla.bench import results
from mla.bench.report import figures, page

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # benchmarks/ is no part of the installed packages
SVG = "{http://www.w3.org/2000/svg}"
USES = re.compile(r"pictures/([\w.-]+\.svg)")


def words(svg: str) -> str:
    """Return the title of a picture, which says what can be seen in it."""
    return str(ElementTree.fromstring(svg).findtext(f"{SVG}title"))


def shown(svg: str) -> tuple[list[str], int]:
    """Return every text of a picture and how many lines and areas it has: places differ between systems."""
    root = ElementTree.fromstring(svg)
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    return texts, sum(1 for part in root.iter() if part.tag in (f"{SVG}path", f"{SVG}use"))


def test_a_picture_carries_its_title_its_legend_and_its_colours(rich: Sequence[results.Run]) -> None:
    made = page.pictures(["one.json", "two.json"], rich)
    assert {"decode-latency-light.svg", "roofline-a-dark.svg"} <= set(made)
    for name, svg in made.items():
        mode = name.removesuffix(".svg").rpartition("-")[2]
        assert mode in get_args(figures.Mode)
        colours = set(re.findall(r"(?<!url\()(?<!href=\")#[0-9a-f]{6}\b", svg))
        assert colours <= {getattr(tone, mode) for tone in figures.THEME.values()}
        assert len(words(svg).split()) > 8
    texts, _ = shown(made["decode-latency-dark.svg"])
    for text in ("Latency: decode", "limit of the device", "A mla-reference"):
        assert text in texts
    assert "Card One 80GB" in " ".join(texts)


def test_an_interval_that_does_not_hold_its_value_is_drawn(rich: Sequence[results.Run]) -> None:
    """A file is read as it is, and may have been edited."""
    runs = deepcopy(list(rich))
    for case in (case for run in runs for case in run.cases if case.latency_ms):
        case.latency_ms.ci95 = (1e5, 2e5)
    assert (
        page.pictures(["one.json", "two.json"], runs).keys()
        == page.pictures(["one.json", "two.json"], rich).keys()
    )


def test_the_command_writes_pictures_and_overwrites_only_pictures(bench: Any, files: list[str]) -> None:
    done = bench("report", *files, "--pictures", "slides", "--html", "out.html")
    assert (done.code, done.out) == (0, "")
    assert re.search(r"wrote 12 pictures into slides: 22 cases of 2 files", done.err)
    assert Path("out.html").exists()
    made = {path.name for path in Path("slides").iterdir()}
    assert all(re.fullmatch(r"[a-z0-9-]+-(light|dark)\.svg", name) for name in made)
    assert bench("report", *files, "--pictures", "slides").code == 0
    mine = Path("slides") / "decode-latency-dark.svg"
    mine.write_text("<svg>mine</svg>")
    Path("slides/roofline-a-light.svg").unlink()
    done = bench("report", *files, "--pictures", "slides")
    assert done.code == 2
    assert done.err.startswith(f"error: cannot write '{mine}': it exists and is not a picture of a report")
    assert mine.read_text() == "<svg>mine</svg>"
    assert not Path("slides/roofline-a-light.svg").exists()


@pytest.mark.usefixtures("files")
def test_a_folder_that_cannot_be_is_one_sentence(bench: Any) -> None:
    done = bench("report", "one.json", "--pictures", "two.json")
    assert (done.code, done.err) == (2, "error: cannot make the folder 'two.json': File exists.\n")
    done = bench("report", "one.json", "--pictures", "gone/pictures")
    assert (done.code, done.err) == (
        2,
        "error: cannot make the folder 'gone/pictures': No such file or directory.\n",
    )


def test_the_gallery_shows_what_the_committed_results_say() -> None:
    from benchmarks.pictures import FOLDER, TAKEN, render

    made = render()
    drawn = [path for path in FOLDER.iterdir() if path.stem.endswith(get_args(figures.Mode))]
    committed = {path.name: path.read_text(encoding="utf-8") for path in drawn}
    assert set(committed) == set(made), "run `python -m benchmarks.pictures`"
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert set(USES.findall(gallery)) == set(made)
    told = " ".join(gallery.split())
    for name, svg in committed.items():
        same = (words(svg), shown(svg)) == (words(made[name]), shown(made[name]))
        assert same, "run `python -m benchmarks.pictures`"
        assert f'alt="{words(svg)}"' in told
    for name, _ in TAKEN.values():
        assert f"report benchmarks/results/{name}.json" in gallery
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in USES.findall(readme):
        assert name in committed
        assert f'alt="{words(committed[name])}"' in " ".join(readme.split())
