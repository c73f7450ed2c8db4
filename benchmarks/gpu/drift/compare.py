"""What a library takes against what an adapter passes and a fake assumes: one sentence per difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import Parameter

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
    if len(taken.placed(call.placed)) < call.placed and not taken.of(Parameter.VAR_POSITIONAL):
        yield f"takes fewer than the {call.placed} values that the adapter passes by place"
    for name, argument in taken.named.items():
        if argument.default is Parameter.empty and name not in given:
            yield f"needs an argument `{name}`, which the adapter does not pass"


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
    for name, asked in fake.named.items():
        real = taken.named.get(name)
        if real is None:
            findings.drift.append(f"{title} has no argument `{name}`, which the fake {call.fake} takes")
        elif real.default != asked.default and name not in given:
            findings.drift.append(
                f"{title} has {_default(real)} for `{name}`, which the adapter leaves out and "
                f"the fake {call.fake} has {_default(asked)} for"
            )
    optional = [name for name, real in taken.named.items() if real.default is not Parameter.empty]
    if new := [f"`{name}`" for name in optional if name not in fake.named]:
        also = f"{title} also takes {', '.join(new)}"
        findings.notes.append(f"{also}, which the fake {call.fake} does not know")


def _default(taken: Parameter) -> str:
    return "no default" if taken.default is Parameter.empty else f"the default {taken.default}"
