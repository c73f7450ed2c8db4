"""A result of several ranks: what no run can have written, and what other commands make of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mla.bench import results
from mla.bench.cli.main import main
from mla.bench.results.schema import RankFacts, Spread

Make = Callable[..., results.Run]


def spread(*samples: list[float]) -> Spread:
    """Return what ranks with these samples did."""
    ranks = [
        RankFacts(
            rank=rank,
            samples=of_rank,
            collective_ms=0.25,
            collective_bytes=3 << 10,
            cache_bytes=1 << 20,
            weight_bytes=5 << 20,
            cost=results.Cost(flops=625 * 10**6, bytes=10**6),
        )
        for rank, of_rank in enumerate(samples)
    ]
    return Spread(layout="tp=2", library="gloo", ranks=ranks)


@pytest.fixture
def files(make_run: Make, tmp_path: Path) -> list[str]:
    """Write the result of one device, and that of two ranks; return their names."""
    samples = [4.0, 4.0, 4.1, 4.0, 4.1, 4.0, 4.0]
    first_run = make_run(samples)
    half = [sample / 2 for sample in samples]
    two = make_run(half, spread=spread(half, [0.9 * sample for sample in half]))
    for name, run in (("one.json", first_run), ("two.json", two)):
        results.write(run, tmp_path / name)
    return [str(tmp_path / name) for name in ("one.json", "two.json")]


def test_a_comparison_with_one_device_says_so(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    assert "layout over ranks differs: one device and tp=2" in out
    assert "prefill, mla: 2.00x on 2 times the devices: efficiency 100 %" in out


def test_a_comparison_of_one_layout_says_nothing_of_it(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = results.read(Path(files[1]))
    run.created = "2001-01-01T00:00:00+00:00"
    results.write(run, Path(files[0]))
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    assert "layout" not in out
    assert "efficiency" not in out


def test_the_report_has_a_table_of_ranks(files: list[str], tmp_path: Path) -> None:
    assert main(["report", *files, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "tp=2 over gloo" in page
    assert "5 MiB" in page
    assert "2.00x on 2 times the devices: efficiency 100 %" in page
    assert msgspec.json.decode((tmp_path / "two.json").read_bytes())["cases"][0]["spread"]["layout"] == "tp=2"


@pytest.mark.parametrize("kind", ["table", "md", "csv", "json"])
def test_every_format_of_show_takes_it(
    files: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", files[1], "--format", kind]) == 0
    out = capsys.readouterr().out
    if kind in ("table", "md"):
        assert "ranks of prefill, mla: tp=2 over gloo" in out
        rows = [line.replace("|", " ").split() for line in out.splitlines()]
        assert ["0", "2", "0.25", "+6", "%", "3", "KiB", "1", "MiB", "5", "MiB"] in rows
        assert ["1", "1.8", "0.25", "-6", "%", "3", "KiB", "1", "MiB", "5", "MiB"] in rows
        assert "Imbalance 6 %. Repeated on ranks: 20 % of all FLOPs, 50 % of all bytes." in out


def test_tables_of_numbers_have_them_too(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["show", files[1]], ["export", files[1]]):
        assert main([*words, "--format", "csv"]) == 0
        (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert (row["layout"], row["ranks"], row["predicted"].lower()) == ("tp=2", "2", "false")
        assert (row["collective_ms"], row["collective_bytes"]) == ("0.25", str(3 << 10))
        assert (row["rank_cache_bytes"], row["rank_weight_bytes"]) == (str(1 << 20), str(5 << 20))
        shares = [float(row[name]) for name in ("imbalance", "repeated_flops", "repeated_bytes")]
        assert shares == pytest.approx([1.75 / 1.65 - 1, 0.2, 0.5])
    assert main(["show", files[0], "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["layout"], row["imbalance"], row["predicted"]) == ("", "", "false")
