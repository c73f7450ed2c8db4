"""The table of a campaign: what happened in each step, and the figures that it was made for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.record import Ledger, Record
from benchmarks.gpu.report import in_turns, targets
from benchmarks.gpu.report.figures import FOOTNOTE, attention_rows, standard_rows
from benchmarks.gpu.steps import Section
from benchmarks.gpu.tuning import choice
from benchmarks.gpu.tuning.classes import classes
from benchmarks.gpu.tuning.trials import sweeps_in
from mla.bench import results
from mla.bench.results.file import decode_ceilings
from mla.bench.workload.scenario import spoken
from mla.command.display import aligned, markdown
from mla.errors import MLAError
from mla_backends.triton_ops.tuning import card_file

Rows = list[list[str]]

STEPS = ("section", "step", "result", "code", "s", "what it says")
STANDARD = ("config", "scenario", "mode", "cache", "figure", "original", "ratio", "check")
ATTENTION = ("step", "case", "op", "ms", "of copy bandwidth", "of matmul peak", "check")
ANSWERS = ("question", "answer", "evidence")
SQUARE = "8192 x 8192 x 8192 bfloat16"  # in the source of a ceiling
LAYERS, RIVALS = ("own-layers", "standard"), "rivals"  # sections, and how names of others begin
WORDS = {"section", "step", "result", "what it says"}


def listing(sections: Sequence[Section]) -> str:
    """Return the sections with their limits."""
    rows = [
        [one.name, spoken(one.limit), one.title, ", ".join(sorted(one.backends)) or "all"] for one in sections
    ]
    return aligned(("section", "at most", "what", "backends"), rows, ("section", "what", "backends"))


class Report:
    """The tables of a ledger and of the result files in its folder."""

    def __init__(self, ledger: Ledger, folder: Path, sections: Sequence[Section]) -> None:
        self._ledger, self._folder, self._sections = ledger, folder, sections
        self._order = [(section.name, step.name) for section in sections for step in section.steps]

    def plain(self) -> str:
        """Return what happened, and the standard scenarios, for a terminal."""
        parts = [aligned(STEPS, self._steps(), WORDS)]
        rows = standard_rows(self._runs("standard"))
        if rows:
            parts.append(aligned(STANDARD, rows, {"config", "scenario", "mode", "cache", "check"}) + FOOTNOTE)
        if self._ran():
            parts.append(
                aligned(targets.HEADER, self._targets(), targets.HEADER) + targets.note(self._ledger.card)
            )
        return "\n".join(parts)

    def markdown(self) -> str:
        """Return all tables."""
        ledger = self._ledger
        smoke = " (--smoke: tiny sizes, which say nothing about the card)" if ledger.smoke else ""
        parts = [f"# {ledger.card}, backend {ledger.backend}{smoke}\n\n{self.left()}\n"]
        for title, header, rows, note in self._tables():
            if rows:
                parts.append(f"## {title}\n\n{markdown(header, rows)}{note and f'{chr(10)}{note}'}")
        return "\n".join(parts)

    def left(self) -> str:
        """Say which steps of the plan another campaign in the same folder has to start or to go on with."""
        names = self._ledger.left(self._sections)
        count = "1 step is" if len(names) == 1 else f"{len(names)} steps are"
        return f"{count} left{': ' * bool(names)}{', '.join(names)}"

    def _tables(self) -> Iterator[tuple[str, Sequence[str], Rows, str]]:
        ceilings = self._ceilings()
        yield "Steps", STEPS, self._steps(), ""
        yield "Targets", targets.HEADER, self._targets(), targets.note(self._ledger.card)
        yield "Standard scenarios", STANDARD, standard_rows(self._runs("standard")), FOOTNOTE
        yield "Kernels in turns", in_turns.HEADER, in_turns.rows(self._rivals(), ceilings), in_turns.NOTE
        yield "Tiles", choice.HEADER, self._tiles(), self._tuning()
        for name, title in (("grid", "Decode attention"), ("kernels", "Kernels"), ("layers", "Decode step")):
            yield title, ATTENTION, attention_rows(self._runs(name), ceilings), ""
        yield "Answers", ANSWERS, self._answers(), ""
        yield "Machine", ("fact", "value"), [[key, value] for key, value in self._ledger.facts.items()], ""

    def _records(self) -> list[Record]:
        """Return the records in the order of the sections; those of other commands come last."""
        place = {key: number for number, key in enumerate(self._order)}
        return sorted(self._ledger.records, key=lambda one: place.get((one.section, one.step), len(place)))

    def _steps(self) -> Rows:
        return [
            [
                one.section, one.step, one.verdict + (" (kept)" if one.kept else ""),
                "" if one.code is None else str(one.code), f"{one.seconds:.0f}", one.reason,
            ]
            for one in self._records()
        ]  # fmt: skip

    def _files(self, section: str) -> list[tuple[str, Path]]:
        steps = [one.step for one in self._records() if one.section == section]
        found = ((step, next((self._folder / section).glob(f"*-{step}.json"), None)) for step in steps)
        return [(step, path) for step, path in found if path is not None]

    def _runs(self, section: str) -> dict[str, results.Run]:
        """Return step -> result, of the files that can be read."""
        found = {}
        for step, path in self._files(section):
            try:
                found[step] = results.read(path)
            except MLAError:
                continue  # a question's answer, or a file that the steps table has spoken about
        return found

    def _rivals(self) -> dict[str, results.Run]:
        """Return step -> result, of all sections in which kernels took turns."""
        names = dict.fromkeys(one.section for one in self._records() if one.section.startswith(RIVALS))
        return {step: run for name in names for step, run in self._runs(name).items()}

    def _ceilings(self) -> dict[str, float]:
        """Return kind of work -> the best the device reached: beyond its cache, and in bfloat16."""
        path = next((self._folder / "facts").glob("*-ceilings.json"), None)
        try:
            found = decode_ceilings(path.read_bytes() if path else b"")
        except (MLAError, OSError):
            return {}
        best: dict[str, float] = {}
        for one in found.measured:
            inside = (one.footprint_bytes or 0) <= (found.backend.cache_bytes or 0)
            cached = one.work != "matmul" and inside
            if one.dtype in (None, "bfloat16") and not cached:
                best[one.work] = max(best.get(one.work, 0.0), one.value)
                if SQUARE in one.source:
                    best[in_turns.PRODUCT] = one.value
        return best

    def _ran(self) -> bool:
        """Return whether anything was run that targets are judged by."""
        ran = [one.section for one in self._ledger.records if one.verdict != "skipped"]
        return any(name in LAYERS or name.startswith(RIVALS) for name in ran)

    def _targets(self) -> Rows:
        own_first = {step: run for name in LAYERS for step, run in self._runs(name).items()}
        evidence = targets.Evidence(own_first, self._rivals(), self._ceilings())
        return targets.rows(evidence, self._ledger.card) if self._ran() else []

    def _tiles(self) -> Rows:
        return choice.table(list(classes(self._ledger.smoke).values()), sweeps_in(self._folder / "tune"))

    def _tuning(self) -> str:
        """Return how to use the tuning that was written; "" if there is none."""
        backend, card = self._ledger.backend, self._ledger.card
        path = self._folder / "tune" / card_file(card)
        return f"{choice.usage(path, backend, card)}\n" if path.exists() else ""

    def _answers(self) -> Rows:
        rows = []
        for section in dict.fromkeys(one.section for one in self._ledger.records):
            for _, path in self._files(section):
                found = json.loads(path.read_bytes())
                if "question" in found:
                    evidence = ", ".join(f"{key} {value}" for key, value in found["evidence"].items())
                    rows.append([found["question"], found["answer"], evidence])
        return rows
