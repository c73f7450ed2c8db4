"""Render the report and write it: one file, whole or not at all."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mla.bench.report import cross_file, series, summary
from mla.bench.report.draw import theme
from mla.bench.results.cases import labelled
from mla.bench.results.schema import Run
from mla.command import files
from mla.errors import MLAError, ResultError

# In the head of every report; only a file with one of them is overwritten. Early reports have no generator.
_MARKS = (b'<meta name="generator" content="python -m mla.bench report">', b"<title>MLA benchmark: ")
PAGE = files.Kind("a report", lambda data: any(mark in data[:2000] for mark in _MARKS))


class PageError(MLAError):
    """The page cannot be made."""


def require() -> None:
    """Raise `PageError` unless the libraries of the extra `report` can be imported."""
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise PageError(
                f"a report needs {name}, which cannot be imported ({error}): `pip install {name}`, or in a "
                "checkout `pip install '.[report]' ./backends`."
            ) from error


def check_target(target: Path, inputs: Sequence[Path]) -> None:
    """Raise `ResultError` if `target` cannot be written, or exists and is not a report."""
    if target.exists() and any(path.exists() and path.samefile(target) for path in inputs):
        raise ResultError(f"cannot write '{target}': it is one of the result files; name another file.")
    files.check_writable(target, PAGE)


def render(paths: Sequence[str], runs: Sequence[Run]) -> str:
    """Return the HTML page about these runs; the first is the base of comparisons."""
    import jinja2

    from mla.bench.report import sections
    from mla.bench.report.panel import Context

    files = series.result_files(paths, list(map(labelled, runs)))
    loader = jinja2.PackageLoader("mla.bench.report", ".")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2").render(
        files=files,
        summaries=list(map(summary.summary, files)),
        several=len(files) > 1,
        between_files=cross_file.verdicts(files),
        sections=sections.sections(Context(files)),
        light=theme.css("light"),
        dark=theme.css("dark"),
        version=metadata.version("mla"),
    )


def write(page: str, path: Path) -> None:
    """Write the page. Raises `ResultError`."""
    files.write_bytes(page.encode("utf-8", "replace"), path)
