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
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mla.cases import KINDS
from mla.cases.case import OpCase
from mla.cases.memory import NoRoom, Tensors
from mla.cases.played import Host, Laid, Player, Scene, on_host
from mla.conformance.registry import DEVICE, LAYER, OP
from mla.conformance.report import Drawn, Failure, Refusal
from mla.conformance.selection import case_id
from mla.errors import UnsupportedBatch
from mla.layer.ops import Say, preflight_reasons
from mla.text import dtype_name
from mla_backends.api import OPS, Backend, FusedOp, current, format_refusals
from mla_backends.errors import BackendError, describe, original, plugin_code

if TYPE_CHECKING:
    from mla.conformance.registry import ConformanceCheck

# Dtypes that a layer can have.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MORE_HEADS, MOST_FLOPS = (4, 16, 64, 128), 3e10  # what an op gets that refuses fewer, if it takes no longer


class CheckFailed(Exception):
    """The backend lacks the property; the text says what was seen."""


class Refused(Exception):
    """The backend declared beforehand that it does not serve a case, as the contract allows."""


REFUSALS = (Refused, NoRoom, UnsupportedBatch)  # of a case that is not served
Answer = TypeVar("Answer")
Default = TypeVar("Default")


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


@dataclass
class Trial:
    """A check of one subject, what it needs, and what it found. Its cases are counted one by one.

    The subject is the device, a dtype, an op in a dtype, or a layer in a dtype.
    """

    subject: BackendUnderTest
    check: ConformanceCheck
    dtype: torch.dtype
    of: str = ""  # op, or the policy of a layer's ops
    op: FusedOp | None = None
    chosen: frozenset[int] | None = None  # numbers of the cases that run, from 1; None: all
    labels: list[str] = field(default_factory=list, init=False)  # of all cases, chosen or not
    passed: int = field(default=0, init=False)
    left_out: int = field(default=0, init=False)  # because they are not chosen, or late
    late: int = field(default=0, init=False)  # left out because time was up
    failures: list[Failure] = field(default_factory=list, init=False)
    refusals: list[Refusal] = field(default_factory=list, init=False)
    worst: float | None = field(default=None, init=False)  # largest error over its bound
    note: str = field(default="", init=False)  # a figure worth reading
    drawn: Drawn | None = field(default=None, init=False)  # what was drawn, of a check that draws its cases

    @property
    def dtype_name(self) -> str:
        """The dtype; "" where it does not matter."""
        return "" if self.check.scope == DEVICE else dtype_name(self.dtype)

    @property
    def brackets(self) -> str:
        """What stands in brackets behind the check's id."""
        return "-".join(filter(None, (self.of, self.dtype_name)))

    @property
    def id(self) -> str:
        return f"{self.check.id}[{self.brackets}]" if self.brackets else self.check.id

    @property
    def backend(self) -> Backend:
        return self.subject.backend

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @property
    def ran(self) -> int:
        """Number of cases that ran; a check that ends outside of its cases is one as well."""
        return self.passed + len(self.refusals) + len(self.failures)

    def run(self) -> Trial:
        """Run the check, once. What it raises outside of its cases is a case, as is a check without cases.

        Raises nothing but KeyboardInterrupt.
        """
        with self._judged(0, "", may_refuse=False):
            self.check.run(self)
        return self

    def all_labels(self) -> list[str]:
        """Return the labels of all cases, of which none runs; empty for a check without cases."""
        return replace(self, chosen=frozenset()).run().labels

    @contextmanager
    def case(self, label: str = "") -> Iterator[None]:
        """Count the body as one case. What it raises is its outcome; the next case still runs.

        A case that is not chosen or comes too late ends where it first asks for the dtype, device or op.
        """
        self.labels.append(label)
        number, served = len(self.labels), self.passed or self.failures
        chosen = self.chosen is None or number in self.chosen
        late = chosen and bool(served) and time.monotonic() > self.subject.drawing.until
        if chosen and not late:
            with self._judged(number, label, may_refuse=self.check.scope in (OP, LAYER)):
                yield
            return
        self.late, self.left_out = self.late + late, self.left_out + 1
        held, self.__dict__ = self.__dict__, {}  # so that nothing is drawn, computed or called
        try:
            with contextlib.suppress(Exception):  # AttributeError, or what the body made of it
                yield
        finally:
            self.__dict__ = held

    @contextmanager
    def _judged(self, number: int, label: str, may_refuse: bool) -> Iterator[None]:
        """Judge case `number`; 0 is the check as a whole, which is counted if it fails or has no cases.

        A `BackendError` may be a refusal: ops raise it on the host, before anything is launched.
        """
        try:
            with plugin_code():
                yield
        except Exception as error:  # noqa: BLE001  # whatever is raised is a finding, even SystemExit
            refused = isinstance(error, (*REFUSALS, *[BackendError] * may_refuse))
            reason = str(error) if refused or isinstance(error, CheckFailed) else raised(error)
            if refused:
                self.refusals.append(Refusal(label, reason))
            else:
                self.failures.append(Failure(case_id(self.id, number), label, reason))
        else:
            self.passed += number > 0 or not self.labels

    def serve(self, case: OpCase, given: Tensors | None = None) -> Laid:
        """Return a call of the op for a case in the trial's dtype; its operands are drawn unless given.

        Raises `Refused` where the op does not serve the case.
        """
        case = case.but(dtype=self.dtype, device=self.device)
        op = self.require_case(case)
        return Laid(case, op, host=None if given is None else Host(on_host(case), given))

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
        reasons = reasons or preflight_reasons(self.of, op, spec, self.subject.say)
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

    def serves_most(self) -> bool:
        """Return whether the op serves what most layers have."""
        kind, entry = self.check.kind, KINDS[self.check.kind]

        def serves() -> bool:
            spec = entry.spec(**entry.usual, dtype=self.dtype, device=self.device)
            return self.require_case(OpCase(kind, spec, (1,), (64,))) is not None

        return ask(serves, False)

    def op_of_contract(self) -> FusedOp:
        """Return the op; raises `Refused` if it implements another version of its contract."""
        assert self.op is not None, "only checks of ops have one"
        if not current(self.op.contract, self.check.kind):
            raise Refused(f"it implements {self.op.contract}, but this suite checks {OPS[self.check.kind]}")
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
