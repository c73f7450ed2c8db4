"""What a library takes against what an adapter passes and a fake assumes: one sentence per difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.drift.catalog import FAKES, Call, Library
from benchmarks.gpu.drift.sources import Lost, Signature, Sources, read


@dataclass
class Findings:
    """Sentences. `drift` must be acted upon; `notes` say what was not compared, or is new and not needed."""

    checked: int = 0
    drift: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(library: Library, real: Sources) -> Findings:
    """Compare every call to a library with its sources."""
    findings = Findings()
    for call in library.calls:
        title = f"{real.label}: {call.function}"
        passed = call.passed()
        findings.checked += 1
        try:
            taken = real.signature(call.module, call.function)
        except Lost as reason:
            findings.drift.append(f"{real.label}: {reason}, which the adapter calls")
            continue
        given = {*passed, *call.where_taken, *taken.placed(call.placed)}
        findings.drift += [f"{title} {reason}" for reason in _refused(call, passed, given, taken)]
        _with_fake(call, title, given, taken, findings)
    return findings


def _refused(call: Call, passed: Sequence[str], given: set[str], taken: Signature) -> Iterator[str]:
    """Yield why the adapter's call would be refused."""
    for name in passed:
        if not taken.takes(name):
            yield f"has no argument `{name}`, which the adapter passes"
    if len(taken.placed(call.placed)) < call.placed and not taken.any_place:
        yield f"takes fewer than the {call.placed} values that the adapter passes by place"
    for argument in taken.arguments:
        if argument.default is None and argument.name not in given:
            yield f"needs an argument `{argument.name}`, which the adapter does not pass"


def _with_fake(call: Call, title: str, given: set[str], taken: Signature, findings: Findings) -> None:
    """Add what the fake has otherwise: arguments, and defaults of those that the adapter leaves out."""
    folder = FAKES / call.fake
    if not folder.is_dir():
        findings.notes.append(
            f"{title} was not compared with a fake: there is no tests/fakes/kernels/{call.fake}"
        )
        return
    try:
        fake = read(folder, call.fake).signature(call.module, call.function)
    except Lost as reason:
        findings.drift.append(f"{title} is not in the fake {call.fake}: {reason}")
        return
    if fake.any_keyword or taken.any_keyword:
        return
    for asked in fake.arguments:
        real = taken.find(asked.name)
        if real is None:
            findings.drift.append(f"{title} has no argument `{asked.name}`, which the fake {call.fake} takes")
        elif real.default != asked.default and asked.name not in given:
            findings.drift.append(
                f"{title} has {_default(real.default)} for `{asked.name}`, which the adapter leaves out and "
                f"the fake {call.fake} has {_default(asked.default)} for"
            )
    new = [
        f"`{argument.name}`"
        for argument in taken.arguments
        if fake.find(argument.name) is None and argument.default is not None
    ]
    if new:
        also = f"{title} also takes {', '.join(new)}"
        findings.notes.append(f"{also}, which the fake {call.fake} does not know")


def _default(text: str | None) -> str:
    return "no default" if text is None else f"the default {text}"
