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
from mla.bench.report import figures, summary
from mla.bench.report.charts import Charts
from mla.bench.report.figures import NARROW_INCHES, WIDE_INCHES, Chart, svg
from mla.bench.report.summary import ResultFile, result_files
from mla.bench.results import cases
from mla.bench.results.cases import labelled
from mla.bench.results.schema import Run
from mla.bench.terminal import lines, run_table, tables
from mla.bench.terminal.tables import Table, prediction
from mla.command import files
from mla.text import size

# In the head of every report, and in the metadata of every picture: only a file with it is overwritten.
_MARK = b'<meta name="generator" content="python -m mla.bench report">'
PAGE = files.Kind("a report", lambda start: _MARK in start[:2000])
_SIGN = b"<dc:title>python -m mla.bench report</dc:title>"
PICTURE = files.Kind("a picture of a report", lambda start: _SIGN in start)


class Section(NamedTuple):
    """Charts and tables; the template knows the section's title by its slug."""

    slug: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


def render(paths: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the HTML page about these runs; the first is the base of comparisons."""
    shown = result_files(paths, list(map(labelled, runs)))
    loader = jinja2.PackageLoader("mla.bench.report", ".")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=jinja2.StrictUndefined
    )
    modules = (cases, lines, run_table, summary, figures)
    environment.globals |= {module.__name__.rpartition(".")[2]: module for module in modules}
    environment.globals |= {"images": _images, "prediction": prediction, "join": shlex.join, "size": size}
    drawn, version = sections(shown), mla.__version__
    return environment.get_template("template.html.j2").render(files=shown, sections=drawn, version=version)


def _images(chart: Chart) -> Iterator[tuple[str, str]]:
    """Yield the CSS class and the source of a chart for either width and mode; the style sheet shows one."""
    for width, inches in (("wide", WIDE_INCHES), ("narrow", NARROW_INCHES)):
        for mode in get_args(figures.Mode):
            encoded = base64.b64encode(svg(chart, mode, inches).encode("utf-8", "replace"))
            yield f"{width} {mode}", f"data:image/svg+xml;base64,{encoded.decode()}"


def sections(shown: Sequence[ResultFile]) -> list[Section]:
    """Return the sections that have something to show, in the order of the page."""
    charts = Charts(shown)
    ranks, stages = (
        [
            table._replace(title=f"{file.key} {table.title}".strip())
            for file in shown
            for table in of(file.run.cases)
        ]
        for of in (tables.ranks, tables.stages)
    )
    every = [
        Section("grid", list(charts.grid())),
        Section("scenarios", list(charts.scenarios())),
        Section("roofline", list(charts.roofline())),
        Section("ranks", tables=ranks),
        Section("stages", tables=stages),
        Section("numbers", tables=[summary.every_number(file) for file in shown if file.run.cases]),
    ]
    return [section for section in every if section.charts or section.tables]


def pictures(paths: Sequence[str], runs: Sequence[Run]) -> dict[str, str]:
    """Return the SVGs of all charts by the names of their files, such as "decode-latency-light.svg"."""
    made, taken = {}, Counter[str]()
    for section in sections(result_files(paths, list(map(labelled, runs)))):
        for chart in section.charts:
            taken[chart.name] += 1
            name = chart.name + f"-{taken[chart.name]}" * (taken[chart.name] > 1)
            for mode in get_args(figures.Mode):
                made[f"{name}-{mode}.svg"] = svg(chart, mode, NARROW_INCHES, titled=True)
    return made


def write_pictures(made: dict[str, str], folder: Path) -> None:
    """Write pictures into a folder, making it. Raises `ResultError`, writing nothing, for a foreign file."""
    for name in made:
        if (folder / name).exists():
            files.check_writable(folder / name, PICTURE)
    files.make_folder(folder)
    for name, picture in made.items():
        files.write_bytes(picture.encode("utf-8", "replace"), folder / name)
