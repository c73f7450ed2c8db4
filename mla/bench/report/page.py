"""The page and the pictures: rendered from result files, written whole or not at all."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jinja2

import mla
from mla.bench.report import data, figures, summary, tables
from mla.bench.report.charts import Charts
from mla.bench.report.figures import NARROW, WIDE, Chart, svg
from mla.bench.report.tables import Table
from mla.bench.results import cases
from mla.bench.results.cases import labelled
from mla.bench.results.schema import Run
from mla.bench.terminal import lines, run_table
from mla.bench.terminal.tables import prediction
from mla.command import files
from mla.errors import ResultError
from mla.text import size

# In the head of every report; only a file with one of them is overwritten. Early reports have no generator.
_MARKS = (b'<meta name="generator" content="python -m mla.bench report">', b"<title>MLA benchmark: ")
PAGE = files.Kind("a report", lambda start: any(mark in start[:2000] for mark in _MARKS))
# How early pictures start, and what all others say in their metadata.
_SIGNS = (b"<!-- Made by python -m mla.bench report. -->", b"<dc:title>python -m mla.bench report</dc:title>")
PICTURE = files.Kind("a picture of a report", lambda start: any(sign in start for sign in _SIGNS))


class Section(NamedTuple):
    """Charts and tables; the template knows the section's title by its slug."""

    slug: str
    charts: Sequence[Chart]
    tables: Sequence[Table]


def check_target(target: Path, inputs: Sequence[Path]) -> None:
    """Raise `ResultError` if `target` cannot be written, or exists and is not a report."""
    if target.exists() and any(path.exists() and path.samefile(target) for path in inputs):
        raise ResultError(f"cannot write '{target}': it is one of the result files; name another file.")
    files.check_writable(target, PAGE)


def check_folder(folder: Path) -> None:
    """Raise `ResultError` if pictures cannot be written into `folder`, which need not exist."""
    if folder.exists() and not folder.is_dir():
        raise ResultError(f"cannot write pictures into '{folder}': it is a file; name a folder.")
    if not folder.exists():
        files.check_writable(folder)


def render(paths: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the HTML page about these runs; the first is the base of comparisons."""
    shown = data.result_files(paths, list(map(labelled, runs)))
    loader = jinja2.PackageLoader("mla.bench.report", ".")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=jinja2.StrictUndefined
    )
    modules = (cases, lines, run_table, summary, tables, figures)
    environment.globals |= {module.__name__.rpartition(".")[2]: module for module in modules}
    environment.globals |= {"images": _images, "prediction": prediction, "join": shlex.join, "size": size}
    drawn, version = list(sections(shown)), mla.__version__
    return environment.get_template("template.html.j2").render(files=shown, sections=drawn, version=version)


def _images(chart: Chart) -> Iterator[tuple[str, str]]:
    """Yield the CSS class and the source of a chart for either width and mode; the style sheet shows one."""
    for width, inches in (("wide", WIDE), ("narrow", NARROW)):
        for mode in get_args(figures.Mode):
            encoded = base64.b64encode(svg(chart, mode, inches).encode("utf-8", "replace"))
            yield f"{width} {mode}", f"data:image/svg+xml;base64,{encoded.decode()}"


def sections(shown: Sequence[data.ResultFile]) -> Iterator[Section]:
    """Yield the sections that have something to show, in the order of the page."""
    charts = Charts(shown)
    every: dict[str, tuple[Iterator[Chart], list[Table]]] = {
        "grid": (charts.grid(), []),
        "scenarios": (charts.scenarios(), []),
        "roofline": (charts.roofline(), []),
        "scaling": (charts.scaling(), [tables.scalings(shown)]),
        "comparison": (charts.comparison(), [tables.comparison(shown[0], new) for new in shown[1:]]),
        **{kind: (iter(()), [tables.per_case(kind, file) for file in shown]) for kind in tables.PER_CASE},
        "numbers": (iter(()), [tables.every_number(file) for file in shown]),
    }
    for slug, (drawn, listed) in every.items():
        section = Section(slug, list(drawn), [table for table in listed if table.rows])
        if section.charts or section.tables:
            yield section


def pictures(paths: Sequence[str], runs: Sequence[Run]) -> dict[str, str]:
    """Return the SVGs of all charts by the names of their files, such as "decode-latency-light.svg"."""
    made, taken = {}, Counter[str]()
    for section in sections(data.result_files(paths, list(map(labelled, runs)))):
        for chart in section.charts:
            taken[chart.name] += 1
            name = chart.name + f"-{taken[chart.name]}" * (taken[chart.name] > 1)
            for mode in get_args(figures.Mode):
                made[f"{name}-{mode}.svg"] = svg(chart, mode, NARROW, titled=True)
    return made


def write_pictures(made: dict[str, str], folder: Path) -> None:
    """Write pictures into a folder, making it. Raises `ResultError`, writing nothing, for a foreign file."""
    for name in made:
        if (folder / name).exists():
            files.check_writable(folder / name, PICTURE)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make the folder '{folder}': {error.strerror}.") from error
    for name, picture in made.items():
        files.write_bytes(picture.encode("utf-8", "replace"), folder / name)
