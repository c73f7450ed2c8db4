"""What counts in the comparison, and that documents hold what was measured."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.transformers import summary
from benchmarks.transformers.records import OURS, PAGED, STOCK, Row, groups, read
from benchmarks.transformers.tables import sentences, tables

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmarks" / "transformers"
RECORDS = sorted((FOLDER / "results").glob("*.json"))


def _row(side: str, ms: Sequence[float], **facts: Any) -> Row:
    times = {"attention_ms": [list(ms)], "model_ms": [[2 * milliseconds for milliseconds in ms]]}
    place = {"config": "deepseek-r1", "phase": "decode", "history": 64, "new_tokens": 1, "dtype": "bfloat16"}
    return Row(**{**place, "side": side, **times, **facts})


def test_each_party_counts_in_its_best_setting() -> None:
    rows = [_row("sdpa", [10]), _row("sdpa", [8], allocator="kept"), _row("mla", [2]), _row("mla-paged", [4])]
    rows += [_row("eager", [9]), _row("eager", [6], dtype="float16", allocator="kept")]
    rows += [_row("mla", [3], allocator="kept"), _row("mla-paged", [1.5], allocator="kept")]
    (group,) = groups(rows)
    (point,) = group.points
    assert (point.ratio(OURS), point.ratio(PAGED)) == (3, 4)
    assert (point.ratio(OURS, allocator="default"), point.ratio(OURS, allocator="kept")) == (4.5, 2)
    assert "| 64 | 6 | eager, float16, kept | 2 (default) | 3x | 1.5 (kept) | 4x |" in tables(group)[0]
    assert "| decode | 64 | 9 | 2 | 4.5x | 4 | 2.25x | 6 | 3 | 2x | 1.5 | 4x |" in tables(group)[1]


def test_a_model_needs_weights_and_caches_of_all_layers_and_the_rest_once() -> None:
    def row(side: str, weights: int, besides: int, history: int) -> Row:
        sizes = {"weight_bytes": weights, "cache_bytes": history + 1, "transient_bytes": besides}
        return _row(side, [1], history=history, **sizes)

    pairs = [(64, 1000), (512, 61 * 300), (2048, 61 * 400)]  # ours: 300 bytes a layer more, and 100 besides
    rows = [row("eager", 500, 100 + besides, history) for history, besides in pairs]
    rows += [row(side, 800, 100, history) for side in ("mla", "mla-paged") for history, _ in pairs]
    assert rows[0].needed_bytes(1) == 500 + 64 + 1100
    assert rows[0].needed_bytes(61) == 61 * 500 + 60 * 65 + 64 + 1100
    (group,) = groups([*rows, row("sdpa", 500, 9000, 64)])
    assert group.points[0].needed(STOCK, 1) == 1664  # the leaner one's
    said = next(
        sentence for sentence in sentences(group) if "`use_mla`: attention of all 61 layers" in sentence
    )
    assert said.endswith(" needs less memory than in `transformers` in decode from 2048 tokens on.")


def test_tables_of_a_second_machine_say_so() -> None:
    rows = [_row("sdpa", [10]), _row("mla", [1], requests=8)]
    assert [group.title for group in groups(rows, "no AMX")] == [
        "deepseek-r1, no AMX",
        "deepseek-r1, no AMX, 8 requests",
    ]


def test_only_rows_that_were_compared_count_as_compared() -> None:
    rows = [_row("mla", [1], deviation=0.002), _row("mla-paged", [1]), _row("sdpa", [1])]
    (group,) = groups(rows)
    said = next(sentence for sentence in sentences(group) if "was compared" in sentence)
    assert "in 1 of 3 rows with times, " in said
    assert said.endswith("was within 0.2 % of it.")
    (group,) = groups([rows[1], _row("mla", [1])])
    assert "deepseek-r1: no attention was compared." in sentences(group)


def test_documents_hold_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in RECORDS:
        drawing = [] if read(path).label else ["--pictures", str(tmp_path)]
        assert summary.main([str(path), *drawing]) == 0
    printed, drawn = capsys.readouterr()
    sections = _sections(printed)
    assert sections
    assert _sections((FOLDER / "README.md").read_text()) == sections
    section = (ROOT / "docs" / "transformers.md").read_text().split("## How fast it is")[1].split("\n## ")[0]
    said = [line for title, lines in sections if title.endswith("in words") for line in _items(lines)]
    assert set() < set(_items(section)) <= set(said)
    shown = re.findall(r'/([\w-]+)-light\.svg"\nalt="([^"]*)"', section)
    assert {f"{name}: {' '.join(alt.split())}" for name, alt in shown} <= set(drawn.splitlines())
    assert len(shown) == section.count("<img")
    alone = re.sub(r'^\|.*$|^- .*$|^  .*$|alt="[^"]*"', "", section, flags=re.MULTILINE)
    assert not re.search(r"\d(?:x| ms| MiB| %)", alone)  # all else that was measured comes from the record
    assert _words(tmp_path) == _words(ROOT / "docs/pictures/transformers")


def _sections(text: str) -> list[tuple[str, str]]:
    """Return headings of the third level, in their order, with what is below them."""
    parts = re.split(r"^### (.*)\n\n", text, flags=re.MULTILINE)[1:]
    return [(title, below.strip()) for title, below in zip(parts[::2], parts[1::2], strict=True)]


def _items(text: str) -> list[str]:
    """Return the items of a list, each in one line."""
    items = re.findall(r"^- (.*(?:\n  .*)*)", text, re.MULTILINE)
    return [" ".join(item.split()) for item in items]


def _words(folder: Path) -> dict[str, list[str]]:
    """Return what is written in each picture, which other releases of the drawing library place otherwise."""
    return {path.name: re.findall(r">([^<>\s][^<>]*)<", path.read_text()) for path in folder.iterdir()}


def test_a_record_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name in ("missing.json", "other.json"):
        assert summary.main([str(tmp_path / name)]) == 1
        assert re.fullmatch(r"error: .*\n", capsys.readouterr().err), name


def test_freed_memory_stays_in_a_process_whose_allocator_keeps_it() -> None:
    def faults(*command: str) -> int:
        program = (
            "import resource, torch\nuse = lambda: torch.ones(64 << 20, dtype=torch.int8)\nuse(), use()\n"
        )
        program += "now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nbefore = now(); use()\n"
        words = [*command, sys.executable, "-c", f"{program}print(now() - before)"]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    assert faults(sys.executable, str(ROOT / "benchmarks" / "allocator.py")) < 16 < faults()
