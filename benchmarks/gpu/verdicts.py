"""What a step's exit code and result say: a verdict, and a reason of one line."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.gpu.child import TIMED_OUT, Ended
from benchmarks.gpu.steps import Step
from mla.bench import results
from mla.command.exit_codes import Exit
from mla.conformance import report
from mla.errors import MLAError

REFUSED = (Exit.USAGE, Exit.BACKEND, Exit.NOTHING_RAN)
LONGEST = 300  # characters of a reason
STATUSES = ("ok", "wrong", "doubtful", "not run")  # of a case's check
CUT = "--budget skipped"  # how the runner says on stderr that its budget left something out


class Answer(msgspec.Struct, kw_only=True):
    """What a question prints as one line of JSON."""

    question: str
    answer: str
    evidence: dict[str, object] = {}


def judge(step: Step, ended: Ended, result: Path, wrote: bool) -> tuple[str, str]:
    """Return the verdict and its reason; `wrote` says that the step left its result file just now."""
    code = ended.code
    if code == TIMED_OUT:
        kept = f"; kept: {summary(step, ended, result)}" if step.resumes and wrote else ""
        return "timed out", f"it was ended at its limit{kept}"
    if code == Exit.OK:
        return "ok", short(summary(step, ended, result))
    if code == Exit.WRONG:
        return "wrong", short(f"{summary(step, ended, result)} {ended.last_error}".strip())
    if code == Exit.DOUBTFUL:
        return "doubtful", short(summary(step, ended, result) or ended.last_error)
    began = step.kind == "run" and wrote  # the runner has refused nothing: an op raised
    if code in REFUSED and not (code == Exit.BACKEND and began):
        told = ended.last_error or summary(step, ended, result)  # doctor's answer is all on stdout
        return "refused", short(_answer(ended) if step.kind == "question" else told)
    said = _answer(ended) if step.kind == "question" and code > 0 else ended.last_error
    return "crashed", short(": ".join(filter(None, (_how(code), said))))


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def short(text: str) -> str:
    """Return one line of bounded length."""
    line = " ".join(text.removeprefix("error: ").split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def is_cut(step: Step, ended: Ended) -> bool:
    """Return whether a step's own budget left something out that a later one can resume."""
    return step.resumes and CUT in ended.err.read_text(errors="replace")


def summary(step: Step, ended: Ended, result: Path) -> str:
    """Return what a step found, in one line."""
    try:
        if step.kind == "run":
            return run_summary(results.read(result).cases)
        if step.kind == "conformance":
            return _conformance_summary(report.decode(result.read_bytes()))
        if step.kind == "question":
            return _answer(ended)
    except (MLAError, OSError) as error:
        return f"its result cannot be read ({error})"
    lines = ended.out.read_text(errors="replace").splitlines()
    quoted = [" ".join(line.split()) for line in lines if step.says and re.search(step.says, line)]
    return "; ".join(quoted) or ended.last_output


def run_summary(cases: Sequence[results.Case]) -> str:
    """Return how many cases have which outcome, and the first reason why one has no number."""
    counts = [(word, sum(case.check.status == word for case in cases)) for word in STATUSES]
    said = ", ".join(f"{count} {word}" for word, count in counts if count) or "no case"
    reasons = [f"{case.scenario}: {case.check.reason}" for case in cases if case.check.status != "ok"]
    return f"{said} ({reasons[0]})" if reasons and reasons[0][-2:] != ": " else said


def _conformance_summary(found: report.ConformanceReport) -> str:
    counts = found.counts()
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    failed = [one.id for one in found.checks if one.status == "fail"]
    cut = f"; {found.planned - len(found.checks)} not reached" if len(found.checks) < found.planned else ""
    return f"{said}{cut}" + (f"; failed: {', '.join(failed)}" if failed else "")


def answer_of(ended: Ended) -> Answer | None:
    """Return what a question printed, or None."""
    try:
        return msgspec.json.decode(ended.last_output.encode(), type=Answer)
    except msgspec.DecodeError:
        return None


def _answer(ended: Ended) -> str:
    found = answer_of(ended)
    return found.answer if found else ended.last_error or "it printed no answer"


def encoded(answer: Answer) -> bytes:
    """Return an answer as the file of its question."""
    return msgspec.json.format(msgspec.json.encode(answer), indent=1) + b"\n"
