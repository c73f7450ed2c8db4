"""What a campaign consists of: sections of steps, each one command with a time limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mla_backends.triton_ops.tuning import card_file, card_slug

# run: `python -m mla.bench` with a result file that can be resumed; sweep: another program that is given a
# budget and goes on with its own file `{out}`; conformance: with a report; file: writes `{out}`; question:
# prints one line of JSON; text: what it prints is the result.
Kind = Literal["run", "sweep", "conformance", "file", "question", "text"]

MOST_SECONDS = 600  # of a section, all its steps together
OPTIONAL = frozenset({"refused"})  # tolerated where a library may be missing: that is no failure
MARGIN = 0.1  # of a step's limit, for a run with a budget to start, check and write its file


@dataclass(frozen=True)
class Step:
    """One command. `words` follow `python`; `{out}` is the result file."""

    name: str
    words: tuple[str, ...]
    limit: int  # seconds
    kind: Kind = "text"
    says: str = ""  # text: pattern of the lines that the table quotes; "": the last
    tolerates: frozenset[str] = frozenset()  # verdicts besides "ok" that are an answer, not a failure
    file: str = ""  # name of the result; "": after the card and the step
    tuning: str = ""  # file of another section, seen from this one's folder: used if it is there
    always: bool = False  # it runs again although it has: what it reads may have grown

    @property
    def resumes(self) -> bool:
        """Whether it is told its time, and goes on later with what did not fit."""
        return self.kind in ("run", "sweep")

    def result(self, folder: Path, stem: str) -> Path:
        """Return where the step leaves its result."""
        return folder / (self.file or f"{stem}-{self.name}.{'txt' if self.kind == 'text' else 'json'}")

    def command(self, result: Path, seconds: int, resume: bool) -> list[str]:
        """Return the words after `python`, for a run of at most `seconds`."""
        words = [word.replace("{out}", str(result)) for word in self.words]
        if self.tuning and (tuning := result.parent / self.tuning).exists():
            words += ["-O", f"tuning={tuning.resolve()}"]
        if self.resumes:
            words += ["--budget", f"{max(1, round(seconds * (1 - MARGIN)))}s"]
        if self.kind == "run":
            words += [*(["--resume"] if resume else ["-o"]), str(result)]
        elif self.kind == "conformance":
            words += ["--report", str(result)]
        return words


@dataclass(frozen=True)
class Section:
    """Steps that answer one thing. The order of sections is that of their value."""

    name: str
    title: str
    steps: tuple[Step, ...]
    backends: frozenset[str] = frozenset()  # empty: all
    needs_device: bool = True

    def serves(self, backend: str) -> bool:
        """Return whether the section says anything about this backend's devices."""
        return not self.backends or backend in self.backends

    @property
    def limit(self) -> int:
        """Seconds that all steps may take together."""
        return sum(step.limit for step in self.steps)


@dataclass(frozen=True)
class Machine:
    """What the campaign knows of the device before it measures; `facts.py` prints it."""

    backend: str
    card: str = "unknown"
    usable: bool = False
    reason: str = ""  # why the backend is not usable
    ops: Mapping[str, Sequence[str]] = field(default_factory=dict)  # op -> names that the backend offers
    facts: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()  # that the backend takes after -O

    @property
    def tuning(self) -> str:
        """The name of the card's tuning file: the one by which a plugin finds it."""
        return card_file(self.card)

    @property
    def stem(self) -> str:
        """The card's name as the beginning of file names, such as nvidia-h100-80gb-hbm3."""
        return card_slug(
            self.card if self.card.lower().startswith(self.backend) else f"{self.backend}-{self.card}"
        )


def bench_step(
    name: str, machine: Machine, limit: int, *words: str, tolerates: frozenset[str] = frozenset()
) -> Step:
    """Return a run of the benchmark."""
    every = ("-m", "mla.bench", "--backend", machine.backend, *words)
    return Step(name, every, limit, "run", tolerates=tolerates)
