"""One op with a problem's operands on the device, to be called again and again, and what is judged of it."""

from __future__ import annotations

import functools

import torch

from mla.cases.memory import Placed, bits, place
from mla.conformance.problems.small_ops import SIZES, LatentWrite, SmallProblem, draw, host, reference
from mla.conformance.trial import Trial, expect
from mla_backends.api import Packed


class SmallCall:
    """Every operand lies amid NaN; if strided, as a slice of a wider tensor, vectors apart."""

    def __init__(
        self, trial: Trial, problem: SmallProblem, strided: bool = False, packed: Packed | None = None
    ) -> None:
        """Place operands, and pack the weight unless it is given. Raises `Refused`."""
        self.trial, self.problem, self.strided = trial, problem, strided
        self.op = trial.require(problem.spec(trial.dtype, trial.device))
        self.host = host(problem, trial.dtype)
        self.packed = packed
        if packed is None and self.host.weight is not None:
            self.packed = self.op.pack(place(self.host.weight, trial.device).part)
        self.inputs = {
            **{name: self._place(self._of_tokens(rows)) for name, rows in self.host.rows.items()},
            **{name: self._place(one) for name, one in self.host.shared.items()},
        }

    def _place(self, tensor: torch.Tensor) -> Placed:
        return place(tensor, self.trial.device, self.strided)

    def _of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a row for every token."""
        tokens = self.problem.tokens
        return rows[:tokens] if tokens <= len(rows) else rows[torch.arange(tokens) % len(rows)]

    def blank(self) -> Placed:
        """Return memory to write to."""
        shape = (self.problem.tokens, *self.host.truth.shape[1:])
        return self._place(torch.full(shape, torch.nan, dtype=self.trial.dtype))

    def run(self, out: Placed | None = None) -> Placed:
        """Call the op once and return where it wrote."""
        out = out or self.blank()
        self.call(**self._target(out))
        return out

    def call(self, **targets: torch.Tensor) -> None:
        """Call the op; `targets` may also stand in for inputs."""
        leading = () if self.packed is None else (self.packed,)
        given = {name: one.part for name, one in self.inputs.items()}
        self.op(*leading, **{**given, **self.problem.options(self.trial.dtype), **targets})

    def _target(self, out: Placed) -> dict[str, torch.Tensor]:
        return {"out": out.part}

    def judge(self, out: Placed) -> None:
        """Compare what was written with the truth. Raises `CheckFailed`."""
        self.judge_rows(self.found(out))

    def judge_rows(self, found: torch.Tensor) -> None:
        """Compare rows [T, ...] on the host with the truth. Raises `CheckFailed`."""
        truth, expected = self.host.truth, reference(self.problem, self.trial.dtype)
        expect(len(found) == self.problem.tokens, f"{len(found)} rows instead of {self.problem.tokens}")
        sizes = SIZES if self.problem.spread else 1
        for start in range(0, self.problem.tokens, len(truth) or 1):
            rows = found[start : start + len(truth)]
            where = f" from row {start}" * bool(start)
            for first in range(min(sizes, len(rows))):  # rows of one size are judged together
                alike = slice(first, len(rows), sizes)
                for name, part in self.problem.parts:
                    parts = (rows[alike, ..., part], truth[alike, ..., part], expected[alike, ..., part])
                    self.trial.judge(*parts, name + where)

    def found(self, out: Placed) -> torch.Tensor:
        """Return the rows that the op wrote, on the host."""
        return out.part.cpu()

    def expect_guards(self, out: Placed) -> None:
        """Raise `CheckFailed` if memory around the output was written."""
        expect_guards(out, "out")

    def expect_inputs(self) -> None:
        """Raise `CheckFailed` if an input, or memory around it, was written."""
        for name, one in self.inputs.items():
            expect_unchanged(one, name)

    def take(self, other: SmallCall) -> None:
        """Copy the inputs of another call of the same shapes into the memory of this one's."""
        for name, one in self.inputs.items():
            one.part.copy_(other.inputs[name].part)
        self.host, self.problem = other.host, other.problem


class WriteCall(SmallCall):
    """A call of write_latent: what it writes is rows of a cache, which has a page on either side."""

    problem: LatentWrite

    def __init__(self, trial: Trial, problem: LatentWrite, strided: bool = False) -> None:
        super().__init__(trial, problem, strided)
        self.slots = problem.slots()
        self.inputs["slots"] = place(self.slots, trial.device, fill=problem.spare)

    def blank(self) -> Placed:
        problem = self.problem
        before = cached(problem.pages, problem.page_size, problem.dims.latent, self.trial.dtype)
        return place(before, self.trial.device, guard=1)

    def _target(self, out: Placed) -> dict[str, torch.Tensor]:
        return {"cache": out.part}

    def found(self, out: Placed) -> torch.Tensor:
        return out.part.flatten(0, 1)[self.slots.to(self.trial.device)].cpu()

    def expect_guards(self, out: Placed) -> None:
        expect_guards(out, "cache")
        others = torch.ones(self.problem.spare + 1, dtype=torch.bool)
        others[self.slots] = False
        expect_untouched(out.part.cpu(), out.before[out.where], others)

    def take(self, other: SmallCall) -> None:
        super().take(other)
        self.slots = other.slots  # type: ignore[attr-defined]  # one of the same kind


@functools.lru_cache(maxsize=8)
def cached(pages: int, page_size: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what a cache [pages, page, c + r] holds before a write, on the host; its last page is NaN."""
    before = draw(pages, page_size, width, dtype=dtype, seed=2)
    before[-1] = torch.nan
    return before


def expect_guards(placed: Placed, name: str) -> None:
    """Raise `CheckFailed` if memory around an operand was written."""
    around = placed.around(name)
    expect(not around, around)


def expect_unchanged(placed: Placed, name: str) -> None:
    """Raise `CheckFailed` if an input, or memory around it, was written."""
    clause = placed.around(name) or placed.inside(name)
    expect(not clause, clause)


def expect_untouched(cache: torch.Tensor, before: torch.Tensor, others: torch.Tensor) -> None:
    """Raise `CheckFailed` if a slot of `others` [slots] has changed; both caches are [pages, page, c + r]."""
    now, then = (bits(whole.flatten(0, 1)).flatten(1) for whole in (cache, before))
    changed = (now != then).any(1) & others
    page, slot = divmod(int(changed.int().argmax()), cache.shape[1])
    expect(
        not bool(changed.any()),
        f"{int(changed.sum())} slots that should not be written have changed, the first is slot {slot} of "
        f"page {page}",
    )


def small_call(trial: Trial, problem: SmallProblem, strided: bool = False) -> SmallCall:
    """Return a call of a problem of any kind. Raises `Refused`."""
    if isinstance(problem, LatentWrite):
        return WriteCall(trial, problem, strided)
    return SmallCall(trial, problem, strided)


def check_small(trial: Trial, *problems: SmallProblem, strided: bool = False) -> None:
    """Call the op for each problem, one case each: right, and nothing else is written."""
    for problem in problems:
        with trial.case(problem.label + ", strided" * strided):
            check_once(small_call(trial, problem, strided))


def check_once(call: SmallCall, out: Placed | None = None) -> Placed:
    """Call once, and check the output, what lies around it, and the inputs. Raises `CheckFailed`."""
    out = call.run(out)
    call.judge(out)
    call.expect_guards(out)
    call.expect_inputs()
    return out
