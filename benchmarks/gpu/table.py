#!/usr/bin/env python3
"""The table of a first hour on a card, from the results that `first_hour.sh` has left.

\b
    python benchmarks/gpu/table.py results > table.md

What happened in each step, which targets are met, and the figures of every result file as Markdown.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import click

from benchmarks.gpu.report import in_turns, predictions, targets
from benchmarks.gpu.tuning import trials
from benchmarks.gpu.tuning.classes import classes
from mla.bench import results
from mla.bench.results import rows
from mla.bench.results.file import decode_any
from mla.bench.results.schema import Case, CeilingRun, Latency, Run
from mla.bench.terminal import run_table
from mla.command import console
from mla.command.display import markdown
from mla.command.exit_codes import guarded
from mla.errors import MLAError

Rows = list[list[str]]

STEPS = ("step", "result", "code", "s", "what it says")
STANDARD = ("config", "scenario", "mode", "cache", "figure", "original", "ratio", "check")
ANSWERS = ("question", "answer", "evidence")
SQUARE = "8192 x 8192 x 8192 bfloat16"  # in the source of a ceiling
TUNED = "-tuned"  # the end of a step's name: it replaces the step without

# Published by the original test for its own implementation, whose sizes are those of the default config
# (hidden 2048, 16 heads): README.md of InfiniLM's test/models/deepseek_r1, which does not name its card.
ORIGINAL_CONFIG = "deepseek-v2-lite"
ORIGINAL_PREFILL_MS = 2.22
ORIGINAL_DECODE_TOKENS = 2224.27
FOOTNOTE = """\
original: 2.22 ms per prefill batch and 2224.27 tok/s of decode, means over 100 runs, published in the README
of InfiniLM's test/models/deepseek_r1 for its own implementation with deepseek-v2-lite's sizes; it does not
name the card and has no figures for other configs. Figures here are means too. ratio: how many times as fast.
"""


def report(folder: Path) -> str:
    """Return all tables of a folder of results."""
    card = _text(folder / "card") or "an unknown card"
    parts = [f"# {card}\n\n{_text(folder / 'left')}\n"]
    for title, header, listed, note in _tables(folder, card):
        if listed:
            parts.append(f"## {title}\n\n{markdown(header, listed)}{note and f'{chr(10)}{note}'}")
    return "\n".join(parts)


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _tables(folder: Path, card: str) -> Iterator[tuple[str, Sequence[str], Rows, str]]:
    """Yield title, header, rows and note of every table."""
    runs, ceilings = runs_in(folder), ceilings_in(folder)
    standard = {step: run for step, run in runs.items() if step.startswith("standard-")}
    rivals = in_turns_only(runs)
    yield "Steps", STEPS, step_rows(folder), ""
    own_first = {step: run for step, run in runs.items() if step.startswith("own-")} | standard
    evidence = targets.Evidence(own_first, rivals, ceilings)
    judged = targets.rows(evidence, card) if own_first or rivals else []
    yield "Targets", targets.HEADER, judged, targets.note(card)
    yield "Predictions", predictions.HEADER, predictions.rows(rivals, card), predictions.NOTE
    yield "Standard scenarios", STANDARD, standard_rows(standard), FOOTNOTE
    yield "Kernels in turns", in_turns.HEADER, in_turns.rows(rivals, ceilings), in_turns.NOTE
    tiles = trials.table(list(classes("tiny sizes" in card).values()), trials.sweeps_in(folder))
    yield "Tiles", trials.HEADER, tiles, ""
    rest = {
        step: run for step, run in runs.items() if step not in standard and not step.startswith("rivals-")
    }
    yield "Other runs", ("step", *run_table.COLUMNS), case_rows(rest), ""
    yield "Answers", ANSWERS, list(answers(folder)), ""
    yield "Machine", ("fact", "value"), machine_rows(runs), ""


def step_rows(folder: Path) -> Rows:
    """Return a row under `STEPS` per step that was started; its last line counts."""
    with (folder / "steps.tsv").open(encoding="utf-8", errors="replace") as file:  # cut to 300 bytes
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        last = {name: rest for name, *rest in lines}
    return [
        [name, f"{verdict}{' (cut short)' * (state == 'cut')}", code, seconds, said]
        for name, (verdict, state, code, seconds, _, said) in last.items()
    ]


def runs_in(folder: Path) -> dict[str, Run]:
    """Return step -> result, of the files of runs that can be read, in the order of their making."""
    by_name = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            by_name[path.stem] = results.read(path)
        except MLAError:
            continue  # of another kind, or one that the steps table has spoken about
    return by_name


def in_turns_only(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Return step -> result, of the steps in which kernels took turns; tuned ones in place of the others."""
    rivals = {step: run for step, run in runs.items() if step.startswith("rivals-")}
    return {step: rivals.get(f"{step}{TUNED}", run) for step, run in rivals.items() if TUNED not in step}


def ceilings_in(folder: Path) -> dict[str, float]:
    """Return kind of work -> the best the device reached: beyond its cache, and in bfloat16."""
    try:
        measured = decode_any((folder / "facts.json").read_bytes())
    except (MLAError, OSError):
        return {}
    if not isinstance(measured, CeilingRun):
        return {}
    best: dict[str, float] = {}
    for ceiling in measured.measured:
        inside = (ceiling.footprint_bytes or 0) <= (measured.backend.cache_bytes or 0)
        cached = ceiling.work != "matmul" and inside
        if ceiling.dtype in (None, "bfloat16") and not cached:
            best[ceiling.work] = max(best.get(ceiling.work, 0.0), ceiling.value)
            if SQUARE in ceiling.source:
                best[in_turns.PRODUCT] = ceiling.value
    return best


def standard_rows(runs: Mapping[str, Run]) -> Rows:
    """Return a row per timing of the standard scenarios, on the host's clock."""
    cases = [(run, case) for run in runs.values() for case in run.cases]
    return [_standard_row(run, case, *timing) for run, case in cases for timing in _timings(case)]


def _timings(case: Case) -> Iterator[tuple[str, str, Latency | None]]:
    """Yield mode, cache and latency of the headline, and of what was timed besides on the host's clock."""
    yield "eager", "warm", case.latency_ms
    for timing in case.timings:
        if timing.clock in ("host", case.clock):
            yield timing.mode, timing.cache, timing.latency_ms


def _standard_row(run: Run, case: Case, mode: str, cache: str, latency: Latency | None) -> list[str]:
    name, config = f"{case.scenario}, {case.implementation}", Path(str(run.config.get("name", ""))).name
    if latency is None:
        return [config, name, mode, cache, "-", "-", "-", f"{case.check.status} {case.check.reason}".strip()]
    mean, tokens = statistics.fmean(latency.samples), sum(case.query_lens)
    comparable = config == ORIGINAL_CONFIG and cache == "warm"
    if case.mode == "prefill":
        figure, original, ratio = f"{mean:.4g} ms", f"{ORIGINAL_PREFILL_MS} ms", ORIGINAL_PREFILL_MS / mean
    else:
        rate = tokens / mean * 1e3
        figure, original = f"{rate:.4g} tok/s", f"{ORIGINAL_DECODE_TOKENS} tok/s"
        ratio = rate / ORIGINAL_DECODE_TOKENS
    compared = [original, f"{ratio:.3g}x"] if comparable else ["-", "-"]
    return [config, name, mode, cache, figure, *compared, case.check.status]


def case_rows(runs: Mapping[str, Run]) -> Rows:
    """Return a row per case: its step, and the columns of the terminal's detailed table."""
    return [
        [step, *(column(row) for column in run_table.COLUMNS.values())]
        for step, run in runs.items()
        for row in rows.case_rows(run)
    ]


def answers(folder: Path) -> Iterator[list[str]]:
    """Yield a row under `ANSWERS` per question that was answered."""
    for path in sorted(folder.glob("ask-*.out")):
        line = (path.read_text(errors="replace").splitlines() or [""])[-1]
        if line.startswith("{"):
            said = json.loads(line)
            evidence = ", ".join(f"{key} {value}" for key, value in said["evidence"].items())
            yield [said["question"], said["answer"], evidence]


def machine_rows(runs: Mapping[str, Run]) -> Rows:
    """Return what the newest result says of the machine."""
    if not runs:
        return []
    run = list(runs.values())[-1]
    info = {"memory_bytes": run.backend.memory_bytes, "cache_bytes": run.backend.cache_bytes}
    facts = {"device": run.backend.device, **info, "git_commit": run.git_commit, **run.environment}
    return [[key, str(value)] for key, value in facts.items() if value is not None]


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def main(folder: Path) -> None:
    """Carry out the command line."""
    console.out(report(folder))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(standalone_mode=False)))
