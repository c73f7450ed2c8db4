"""`Trial`: one check on one subject, and the outcomes of its cases."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from mla.errors import UnsupportedBatch
from mla.layer.ops import Say, preflight_reasons
from mla.verify.places import Places
from mla.verify.tolerances import judge, judge_lse
from mla_backends.api import OPS, Backend, FusedOp
from mla_backends.errors import BackendError, describe, original, plugin_code

# Dtypes that a layer can have.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


@dataclass(frozen=True)
class BackendUnderTest:
    """The backend under test."""

    backend: Backend
    name: str
    quick: bool = False
    version: str | None = None
    reopen: Callable[[Mapping[str, str]], Backend] | None = None  # creates the backend with other options
    say: Say | None = None  # is told in one line what an op compiles, before it does
    slow: frozenset[torch.dtype] = frozenset()  # dtypes of which a handful of cases run

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
_NEEDED = frozenset({"subject", "dtype", "op", "backend", "device", "require"})


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
    beat: Callable[[], None] = lambda: None  # called after every case that ran
    labels: list[str] = field(default_factory=list)  # of all cases, chosen or not
    cases: list[Case] = field(default_factory=list)  # that ran
    worst: float | None = None  # largest error over its bound
    note: str = ""  # a figure worth reading
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

    @property
    def quick(self) -> bool:
        return object.__getattribute__(self, "subject").quick

    def ended(self, outcome: Outcome) -> list[Case]:
        """Return the cases that ended so."""
        return [case for case in self.cases if case.outcome == outcome]

    def run(self, check: Callable[[Trial], None]) -> None:
        """Run a check. What it raises outside of its cases is case 0, as is a check without cases."""
        with self._judged(0, "", may_refuse=False):
            check(self)
        if self.cases[-1].outcome == "passed" and self.labels:
            self.cases.pop()

    @contextmanager
    def case(self, label: str = "") -> Iterator[None]:
        """Count the body as one case. What it raises is its outcome; the next case still runs.

        A case that is not chosen ends where it first asks the trial for its dtype, device or op.
        """
        self.labels.append(label)
        number = len(self.labels)
        if self.chosen is None or number in self.chosen:
            with self._judged(number, label, self.may_refuse):
                yield
            self.beat()
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
        except (Refused, UnsupportedBatch) as why:
            ended = "refused", str(why)
        except CheckFailed as why:
            ended = "failed", str(why)
        except BackendError as why:  # ops raise it on the host, before anything is launched
            ended = ("refused", str(why)) if may_refuse else ("failed", raised(why))
        except Exception as error:  # noqa: BLE001  # whatever is raised is a finding, even SystemExit
            ended = "failed", raised(error)
        self.cases.append(Case(number, label, *ended))

    def judge(
        self,
        found: torch.Tensor,
        truth: torch.Tensor,
        reference: torch.Tensor,
        what: str,
        places: Places | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Compare an output with the truth and the reference's error. Raises `CheckFailed`.

        `places` names the rows in its text; without it a row is a token, the only thing that is known. `lse`
        is attention's true log-sum-exp of every row.
        """
        self._record(*judge(found, truth, reference, self.dtype, places, lse), what)

    def judge_lse(self, found: torch.Tensor, truth: torch.Tensor, places: Places | None = None) -> None:
        """Compare a log-sum-exp with the truth. Raises `CheckFailed`."""
        self._record(*judge_lse(found, truth, self.dtype, places), "lse")

    def _record(self, ratio: float, reason: str, what: str) -> None:
        self.worst = max(ratio, self.worst or 0.0)
        if reason:
            raise CheckFailed(f"{what}: {reason}")

    def require(self, spec: Any, query_lens: Sequence[int] = (), kv_lens: Sequence[int] = ()) -> FusedOp:
        """Return the op if it serves this spec and these lengths; raises `Refused` with its reasons."""
        assert self.op is not None, "only checks of ops have one"
        if self.op.contract != OPS[self.kind]:
            raise Refused(f"it implements {self.op.contract}, but this suite checks {OPS[self.kind]}")
        reasons = list(self.op.unsupported_reasons(spec))
        if not reasons:
            reasons = preflight_reasons(self.name, self.op, spec, self.subject.say)
        if not reasons and query_lens:
            reasons = list(self.op.unsupported_batch(spec, query_lens, kv_lens))
        if reasons:
            raise Refused("; ".join(reasons))
        return self.op


def expect(condition: bool, reason: str) -> None:
    """Raise `CheckFailed` with `reason` unless the condition holds."""
    if not condition:
        raise CheckFailed(reason)


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
