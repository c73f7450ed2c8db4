"""`Trial`: one check on one subject, and the outcomes of its cases."""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mla.cases.case import OpCase
from mla.cases.memory import NoRoom, Tensors
from mla.cases.played import Host, Laid, Player, Scene, on_host
from mla.conformance.report import Drawn
from mla.errors import UnsupportedBatch
from mla.layer.ops import Say, preflight_reasons
from mla_backends.api import OPS, Backend, FusedOp, current, format_refusals
from mla_backends.errors import BackendError, describe, original, plugin_code

# Dtypes that a layer can have.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MORE_HEADS, MOST_FLOPS = (4, 16, 64, 128), 3e10  # what an op gets that refuses fewer, if it takes no longer


class CheckFailed(Exception):
    """The backend lacks the property; the text says what was seen."""


class Refused(Exception):
    """The backend declared beforehand that it does not serve a case, as the contract allows."""


class _NotChosen(Exception):
    """Ends a case that does not run."""


Outcome = Literal["passed", "refused", "failed"]
Answer = TypeVar("Answer")
Default = TypeVar("Default")


@dataclass(frozen=True)
class Case:
    """One case that ran."""

    number: int  # from 1, in the order of the check; 0 is the check as a whole
    label: str
    outcome: Outcome
    reason: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.label, self.reason)))


@dataclass(eq=False)  # a subject is a key of what a run keeps
class Drawing:
    """How many cases are drawn; the same for all checks of a run but `seconds`."""

    count: int | None = None  # of draws; None: as many as `seconds` allow
    seconds: float = 0.0  # that the check which runs next may draw for ...
    most: float = 0.0  # ... or this, until it has `least` judged draws
    least: int = 0
    until: float = math.inf  # by `time.monotonic`: after that, a check that draws nothing has one case served
    seed: int = 0
    folder: Path | None = None  # where the numbers of failures are kept, to come first the next time
    smallest: dict[str, Scene] = field(default_factory=dict)  # the wrong case of every check that failed
    again: bool = False  # nothing but that one is played


@dataclass(frozen=True)
class BackendUnderTest:
    """The backend under test."""

    backend: Backend
    name: str
    version: str | None = None
    reopen: Callable[[Mapping[str, str]], Backend] | None = None  # creates the backend with other options
    say: Say | None = None  # is told in one line what an op compiles, before it does
    drawing: Drawing = field(default_factory=Drawing)  # how many cases are drawn

    @property
    def device(self) -> torch.device:
        """The device that `setup` returned."""
        device = self.backend.device
        if device is None:
            raise CheckFailed(f"backend '{self.name}' is not set up; use mla.load_backend().")
        return device

    def create(self, options: Mapping[str, str]) -> Backend:
        """Return another backend of this kind, created with `options` and not set up."""
        if self.reopen is not None:
            return self.reopen(options)
        return type(self.backend)(options)


# What a case that is not chosen cannot have: without it nothing is drawn, computed or called.
_NEEDED = frozenset({"subject", "dtype", "op", "backend", "device", "require", "serve", "play"})


@dataclass
class Trial:
    """What a check needs, and what it found. Its cases are counted one by one."""

    subject: BackendUnderTest
    dtype: torch.dtype = torch.float32
    op: FusedOp | None = None
    name: str = ""  # of the op
    kind: str = ""
    policy: str = "auto"  # of the layer's ops
    may_refuse: bool = False  # a `BackendError` is an op's refusal, not a failure
    chosen: frozenset[int] | None = None  # numbers of the cases that run; None: all
    late: int = 0  # cases that were left out because time was up
    labels: list[str] = field(default_factory=list)  # of all cases, chosen or not
    cases: list[Case] = field(default_factory=list)  # that ran
    worst: float | None = None  # largest error over its bound
    note: str = ""  # a figure worth reading
    drawn: Drawn | None = None  # what was drawn, of a check that draws its cases
    _left_out: bool = field(default=False, init=False)  # inside a case that is not chosen

    def __getattribute__(self, name: str) -> Any:
        if name in _NEEDED and object.__getattribute__(self, "_left_out"):
            raise _NotChosen
        return object.__getattribute__(self, name)

    @property
    def backend(self) -> Backend:
        return self.subject.backend

    @property
    def device(self) -> torch.device:
        return self.subject.device

    def ended(self, outcome: Outcome) -> list[Case]:
        """Return the cases that ended so."""
        return [case for case in self.cases if case.outcome == outcome]

    @property
    def _served(self) -> bool:
        return any(case.outcome != "refused" for case in self.cases)

    def run(self, check: Callable[[Trial], None]) -> None:
        """Run a check. What it raises outside of its cases is case 0, as is a check without cases."""
        with self._judged(0, "", may_refuse=False):
            check(self)
        if self.cases[-1].outcome == "passed" and self.labels:
            self.cases.pop()

    @contextmanager
    def case(self, label: str = "") -> Iterator[None]:
        """Count the body as one case. What it raises is its outcome; the next case still runs.

        A case that is not chosen or comes too late ends where it first asks for the dtype, device or op.
        """
        self.labels.append(label)
        number = len(self.labels)
        chosen = self.chosen is None or number in self.chosen
        late = chosen and self._served and time.monotonic() > self.subject.drawing.until
        self.late += late
        if chosen and not late:
            with self._judged(number, label, self.may_refuse):
                yield
            return
        self._left_out = True
        try:
            yield
        except Exception:  # noqa: BLE001  # `_NotChosen`, or what the body made of it
            pass
        finally:
            self._left_out = False

    @contextmanager
    def _judged(self, number: int, label: str, may_refuse: bool) -> Iterator[None]:
        ended: tuple[Outcome, str] = "passed", ""
        try:
            with plugin_code():
                yield
        except (Refused, NoRoom, UnsupportedBatch) as why:
            ended = "refused", str(why)
        except CheckFailed as why:
            ended = "failed", str(why)
        except BackendError as why:  # ops raise it on the host, before anything is launched
            ended = ("refused", str(why)) if may_refuse else ("failed", raised(why))
        except Exception as error:  # noqa: BLE001  # whatever is raised is a finding, even SystemExit
            ended = "failed", raised(error)
        self.cases.append(Case(number, label, *ended))

    def serve(self, case: OpCase, given: Tensors | None = None) -> Laid:
        """Return a call of the op for a case in the trial's dtype; its operands are drawn unless given.

        Raises `Refused` where the op does not serve the case.
        """
        case = case.but(dtype=self.dtype, device=self.device)
        op = self.require_case(case)
        return Laid(case, op, host=None if given is None else Host(on_host(case), given))

    def check(self, call: Laid) -> None:
        """Make a call and judge its results. Raises `CheckFailed`."""
        self.right(call, call.call())

    def right(self, judged: Laid | Player, reason: str) -> None:
        """Remember the largest error over its bound. Raises `CheckFailed` if there is a reason."""
        self.worst = max(judged.worst, self.worst or 0.0)
        expect(not reason, reason)

    def play(self, scene: Scene) -> None:
        """Make the calls of a scene and judge each. Raises `CheckFailed`."""
        player = Player(self.op_of_contract(), self.require_case)
        cases = tuple(case.but(dtype=self.dtype, device=self.device) for case in scene.cases)
        self.right(player, player.play(replace(scene, cases=cases)))

    def check_scenes(self, scenes: Iterable[Scene]) -> None:
        """Play each scene as a case of the check. An op of attention may get more heads."""
        for asked in scenes:
            scene = replace(asked, cases=tuple(map(self.fitted, asked.cases)))
            with self.case(scene.label):
                self.play(scene)

    def fitted(self, case: OpCase) -> OpCase:
        """Return the case with the fewest more heads, or in the widths of most layers, if it is refused.

        It stays as it is, to be refused, if no op of attention serves that, or it grew too large.
        """
        if not case.entry.prepares or self.op is None:
            return case
        widths = {name: of for name, of in case.entry.usual.items() if name not in ("num_heads", "topk")}
        more = [{"num_heads": count} for count in MORE_HEADS if count > case.spec.num_heads]
        tried = (case.but(**heads, **wide) for wide in ({}, widths) for heads in ({}, *more))
        with contextlib.suppress(Exception):  # the case itself reports what an op raises
            for other in tried:
                spec = replace(other.spec, dtype=self.dtype, device=self.device)
                if other.work.flops <= MOST_FLOPS and not self.op.unsupported_reasons(spec):
                    return other
        return case

    def require(self, spec: Any) -> FusedOp:
        """Return the op if it serves this spec; raises `Refused` with its reasons."""
        op = self.op_of_contract()
        reasons = format_refusals(op, spec) or list(op.unsupported_reasons(spec))
        reasons = reasons or preflight_reasons(self.name, op, spec, self.subject.say)
        if reasons:
            raise Refused("; ".join(reasons))
        return op

    def require_case(self, case: OpCase) -> FusedOp:
        """Return the op if it serves a case; raises `Refused` with its reasons."""
        op = self.require(case.spec)
        if case.entry.prepares:
            page_size = case.layout.page_size if case.entry.cached else None
            if reasons := op.unsupported_batch(case.spec, case.query_lens, case.kv_lens, page_size):
                raise Refused("; ".join(reasons))
        return op

    def op_of_contract(self) -> FusedOp:
        """Return the op; raises `Refused` if it implements another version of its contract."""
        assert self.op is not None, "only checks of ops have one"
        if not current(self.op.contract, self.kind):
            raise Refused(f"it implements {self.op.contract}, but this suite checks {OPS[self.kind]}")
        return self.op


def expect(condition: bool, reason: str) -> None:
    """Raise `CheckFailed` with `reason` unless the condition holds."""
    if not condition:
        raise CheckFailed(reason)


def kind_of(op: FusedOp) -> str:
    """Return the kind that an op's contract names, whatever its version."""
    return str(getattr(op, "contract", "")).partition("/")[0]


def ask(question: Callable[[], Answer], otherwise: Default) -> Answer | Default:
    """Return what a plugin answers, or `otherwise` if it raises: a check asks the same, and reports it."""
    try:
        with plugin_code():
            return question()
    except Exception:  # noqa: BLE001  # whatever a stack raises
        return otherwise


def raised(error: BaseException) -> str:
    """Return what was raised and where, as one clause."""
    frames = traceback.extract_tb(original(error).__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"raised {describe(error)}{place}"
