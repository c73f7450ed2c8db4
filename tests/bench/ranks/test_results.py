"""A result of several ranks: what no run can have written, and what other commands make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mla.bench import results
from mla.bench.cli.main import main
from mla.bench.results.schema import RankFacts, Spread
from mla.bench.results.validity import fault_of_run

Make = Callable[..., results.Run]


def spread(*samples: list[float], layout: str = "tp=2", first: int = 0) -> Spread:
    """Return what ranks with these samples did."""
    ranks = [
        RankFacts(
            rank=rank,
            samples=one,
            collective_ms=0.25,
            collective_bytes=3 << 10,
            cache_bytes=1 << 20,
            weight_bytes=5 << 20,
        )
        for rank, one in enumerate(samples, start=first)
    ]
    return Spread(layout=layout, library="gloo", ranks=ranks)


SLOWEST = [2.0, 1.0, 3.0]


def test_a_right_spread_is_accepted(make_run: Make) -> None:
    run = make_run(SLOWEST, spread=spread([2.0, 0.5, 1.0], [1.5, 1.0, 3.0]))
    assert fault_of_run(run) is None


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (spread([2.0, 0.5, 1.0], [1.5, 1.0, 3.0], layout="tp=2,dcp=2"), "Expected ranks 0 to 3"),
        (spread([2.0, 0.5, 1.0], [1.5, 1.0, 3.0], first=1), "Expected ranks 0 to 1"),
        (spread([2.0, 0.5, 1.0], [1.5, 1.0, 3.0], layout="two"), "a layout is written as"),
        (spread([2.0, 0.5, 1.0], [1.5, 1.0]), "Expected 3 samples, as the case has, got 2"),
        (spread([2.0, 0.5, 1.0], [1.5, 1.0, 2.9]), "the slowest rank's, forward by forward"),
        (spread([2.0, 0.5, 1.0], [1.5, 1.0, 3.1]), "the slowest rank's, forward by forward"),
    ],
)
def test_what_contradicts_the_case_is_refused(make_run: Make, found: Spread, fault: str) -> None:
    assert fault in str(fault_of_run(make_run(SLOWEST, spread=found)))


@pytest.fixture
def files(make_run: Make, tmp_path: Path) -> list[str]:
    """Write the result of one device, and that of two ranks; return their names."""
    samples = [4.0, 4.0, 4.1, 4.0, 4.1, 4.0, 4.0]
    one = make_run(samples)
    half = [sample / 2 for sample in samples]
    two = make_run(half, spread=spread(half, [0.9 * sample for sample in half]))
    for name, run in (("one.json", one), ("two.json", two)):
        results.write(run, tmp_path / name)
    return [str(tmp_path / name) for name in ("one.json", "two.json")]


def test_a_comparison_with_one_device_says_so(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    assert "layout over ranks differs: one device and tp=2" in out
    assert "FASTER" in out


def test_a_comparison_of_one_layout_says_nothing_of_it(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", files[1], files[1]]) == 0
    assert "layout" not in capsys.readouterr().out


def test_the_report_has_a_table_of_ranks(files: list[str], tmp_path: Path) -> None:
    assert main(["report", *files, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "tp=2 over gloo" in page
    assert "5 MiB" in page
    assert msgspec.json.decode((tmp_path / "two.json").read_bytes())["cases"][0]["spread"]["layout"] == "tp=2"


@pytest.mark.parametrize("kind", ["table", "md", "csv", "json"])
def test_every_format_of_show_takes_it(
    files: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", files[1], "--format", kind]) == 0
    out = capsys.readouterr().out
    assert ("ranks of prefill" in out) == (kind in ("table", "md"))
