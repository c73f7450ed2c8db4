"""The loop over sections and steps: what is kept, what is skipped and why, and what ends the campaign."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu import child, verdicts
from benchmarks.gpu.dry_run import shell_line
from benchmarks.gpu.record import Ledger, Record, save
from benchmarks.gpu.steps import Machine, Section, Step
from mla.command import console

LEAST = 5.0  # seconds of budget that are worth starting a step for


class Campaign:
    """One command's walk through the sections; the ledger is written after every step."""

    def __init__(
        self, machine: Machine, folder: Path, ledger: Ledger, budget: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._machine, self._folder, self._ledger = machine, folder, ledger
        self._clock = clock
        self._end = None if budget is None else clock() + budget

    def forget(self, names: Iterable[str]) -> None:
        """Remove what earlier campaigns left of these sections."""
        for name in names:
            self._ledger.forget(name)
            shutil.rmtree(self._folder / name, ignore_errors=True)
        save(self._ledger, self._folder)

    def walk(self, wanted: Iterable[Section]) -> None:
        """Carry out the sections. KeyboardInterrupt ends the step, is recorded, and goes on to the caller."""
        for section in wanted:
            for number, step in enumerate(section.steps, 1):
                where = f"{section.name} {number}/{len(section.steps)} {step.name}"
                record = self._step(section, step, where)
                self._ledger.put(record)
                save(self._ledger, self._folder)
                kept = " (kept)" if record.kept else f" ({record.seconds:.0f} s)" * (record.code is not None)
                console.note(f"{where}: {record.verdict}{kept}: {record.reason}")

    def _step(self, section: Section, step: Step, where: str) -> Record:
        old = self._ledger.find(section.name, step.name)
        if old is not None and old.final and not step.always:
            return old
        if reason := verdicts.short(self._why_not(section)):
            return Record(
                section=section.name, step=step.name, verdict="skipped", reason=reason, limit=step.limit
            )
        return self._run(section, step, where)

    def _why_not(self, section: Section) -> str:
        """Return why a section is not started now; "" if it is."""
        if not section.serves(self._machine.backend):
            return f"it is about {', '.join(sorted(section.backends))} only"
        if section.needs_device and not self._machine.usable:
            return f"the backend is not usable: {self._machine.reason}"
        return "the budget is used up" if self._left() < LEAST else ""

    def _left(self) -> float:
        return float("inf") if self._end is None else self._end - self._clock()

    def _run(self, section: Section, step: Step, where: str) -> Record:
        folder = self._folder / section.name
        folder.mkdir(exist_ok=True)
        result = step.result(folder, self._machine.stem)
        before = _stamp(result)
        seconds = int(min(step.limit, self._left()))
        words = [sys.executable, *step.command(result, seconds, resume=before is not None)]
        record = Record(
            section=section.name, step=step.name, verdict="interrupted", reason="ended by Ctrl-C or SIGTERM",
            limit=seconds, command=shell_line(words, seconds),
        )  # fmt: skip
        out = result.with_suffix(".out") if step.kind != "text" else result
        try:
            console.note(f"{where}: at most {seconds} s")
            ended = child.run(words, seconds, out, result.with_suffix(".log"))
        except KeyboardInterrupt:
            self._ledger.put(record)
            save(self._ledger, self._folder)
            raise
        wrote = _stamp(result) not in (None, before)
        return self._judged(step, ended, result, wrote, record)

    def _judged(self, step: Step, ended: child.Ended, result: Path, wrote: bool, record: Record) -> Record:
        record.code, record.seconds = ended.code, round(ended.seconds, 1)
        record.verdict, record.reason = verdicts.judge(step, ended, result, wrote)
        trimmed = record.verdict == "timed out" and record.limit < step.limit
        doubted = record.verdict == "doubtful" and self._ledger.smoke  # tiny sizes have no times to miss
        record.failed = record.verdict not in ("ok", *step.tolerates) and not trimmed and not doubted
        record.cut = verdicts.is_cut(step, ended) or trimmed
        answered = record.verdict != "refused" and not record.failed  # a crash that was looked for
        record.final = (record.verdict == "wrong" or answered) and not record.cut
        if record.cut:
            record.reason = f"{record.reason}; the rest did not fit into {record.limit} s"
        if step.kind == "question" and (answer := verdicts.answer_of(ended)):
            result.write_bytes(verdicts.encoded(answer))
        return record


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written again; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
