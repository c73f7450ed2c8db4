"""One attention call on the device: tensors laid out as a check wants them, the op run, outputs fetched."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch

from mla.cases.memory import PLAIN, Layout, Pages, Placed, place
from mla.conformance.problems.attention import MANY, PAGE, AttentionProblem, cumulative, data
from mla.conformance.problems.reach import hardly_touched, scattered
from mla.conformance.trial import Trial, expect
from mla.reference import REFERENCE
from mla.verify.places import Places
from mla_backends.api import FusedOp

Outputs = tuple[torch.Tensor, torch.Tensor]  # out [T, h, dv] and lse [T, h]
MORE_HEADS = (4, 16, 64, 128)  # what an op is given that refuses fewer, and how large problems may get by it
MOST_NUMBERS, MOST_LOGITS = 1 << 25, 1 << 22
AROUND = 77.0  # what outputs lie in; neither 0 nor NaN, which is what is written by mistake


class AttentionCall:
    """A problem on a device. `inputs` are what the op gets; `run` may be called again and again."""

    def __init__(
        self, problem: AttentionProblem, dtype: torch.dtype, device: torch.device, layout: Layout = PLAIN
    ) -> None:
        self.problem, self.dtype, self.device, self.layout = problem, dtype, device, layout
        self.case = problem.case(dtype, device)
        self.guards: dict[str, Placed] = {}
        self.pages: Pages | None = None
        self._batches: list[Any] = []  # what states were prepared for, which live as long
        host = data(problem, dtype)
        self.inputs = {"q": self._put("q", host.q)}
        if problem.absorbed:
            self._page(torch.cat(host.keys)[:, 0])
        else:
            self.inputs |= {
                "k": self._put("k", torch.cat(host.keys)),
                "v": self._put("v", torch.cat(host.values)),
            }

    def _put(self, name: str, tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
        """Copy to the device, into larger memory full of `fill`; if strided, rows are parts of wider ones."""
        if self.layout.apart and tensor.dim() == 3:
            return scattered(tensor, self.device, self.layout.apart)
        self.guards[name] = place(tensor, self.device, self.layout.strided, fill=fill)
        return self.guards[name].part

    def _page(self, latents: torch.Tensor) -> None:
        """Put latents [K, c + r] and tables on the device."""
        problem, layout = self.problem, replace(self.layout, page_size=self.problem.page_size)
        pages = self.pages = Pages.of(problem.kv_lens, layout, problem.common)
        if layout.sparse:
            self.inputs["cache"] = hardly_touched(pages, latents, self.device)
        else:
            self.guards["cache"] = place(pages.cache(latents), self.device, fill=layout.unowned, guard=1)
            self.inputs["cache"] = self.guards["cache"].part
        lens, cu_q = (
            torch.tensor(numbers, dtype=torch.int32)
            for numbers in (problem.kv_lens, cumulative(problem.query_lens))
        )
        self.inputs |= {
            "block_table": self._put("block_table", pages.table, int(pages.order[0])),
            "kv_lens": self._put("kv_lens", lens, 1),
            "cu_q": self._put("cu_q", cu_q, 1),
        }

    def refill(self, problem: AttentionProblem) -> None:
        """Overwrite the inputs, in place, with those of a problem of the same shapes."""
        for name, tensor in AttentionCall(problem, self.dtype, self.device).inputs.items():
            self.inputs[name].copy_(tensor)

    def places(self) -> Places:
        """Return where the new tokens are, in their requests and in the cache."""
        return self.case.places(self.inputs.get("block_table"))

    def outputs(self) -> Outputs:
        """Return out and lse full of NaN, on the device."""
        width = data(self.problem, self.dtype).out.shape[2]
        shape = (*self.inputs["q"].shape[:2], width)
        return (
            self._put("out", torch.full(shape, torch.nan, dtype=self.dtype), AROUND),
            self._put("lse", torch.full(shape[:2], torch.nan, dtype=torch.float32), AROUND),
        )

    def prepare(self, op: FusedOp) -> Any:
        """Return the op's state for this batch."""
        self._batches.append(self.case.entry.batch(self.inputs, self.case.lengths))
        return op.prepare(self.case.spec, self._batches[-1])

    def attend(self, op: FusedOp, state: Any, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Call the op. Raises `CheckFailed` if it wrote next to an output."""
        op(state, **self.inputs, softmax_scale=self.problem.scale, out=out, lse=lse)
        self.check_around("out", "lse")

    def check_around(self, *names: str) -> None:
        """Raise `CheckFailed` if memory next to any of these operands was written."""
        for name in names:
            guard = self.guards.get(name)
            intact = guard is None or not guard.around(name)
            expect(intact, f"memory next to `{name}` was written")

    def run(self, op: FusedOp, state: Any = None) -> Outputs:
        """Run the op once and return what it wrote, on the host."""
        state = self.prepare(op) if state is None else state
        out, lse = self.outputs()
        self.attend(op, state, out, lse)
        return out.cpu(), lse.cpu()


def reference(problem: AttentionProblem, dtype: torch.dtype) -> Outputs:
    """Return what the reference gives on the host."""
    made = _reference_of_many if problem.numbers <= MANY else _reference_of_few
    return made(problem.in_pages_of(PAGE), dtype)


def _reference(problem: AttentionProblem, dtype: torch.dtype) -> Outputs:
    call = AttentionCall(problem, dtype, torch.device("cpu"))
    return call.run(REFERENCE[problem.kind])


_reference_of_many = functools.lru_cache(maxsize=512)(_reference)
_reference_of_few = functools.lru_cache(maxsize=6)(_reference)


def serve(trial: Trial, problem: AttentionProblem, layout: Layout = PLAIN) -> tuple[FusedOp, AttentionCall]:
    """Return the op and a call for it; raises `Refused` where the op does not serve the problem."""
    spec = problem.spec(trial.dtype, trial.device)
    op = trial.require(spec, problem.query_lens, problem.kv_lens)
    return op, AttentionCall(problem, trial.dtype, trial.device, layout)


def fitted(trial: Trial, problem: AttentionProblem) -> AttentionProblem:
    """Return the problem with the fewest more heads that the op takes, if it refuses as few as these.

    For checks that are not about heads. The problem stays as it is, to be refused, if it grew too large.
    """
    tried = [problem] + [replace(problem, heads=count) for count in MORE_HEADS if count > problem.heads]
    small = (one for one in tried if one.numbers <= MOST_NUMBERS and one.logits <= MOST_LOGITS)
    with contextlib.suppress(Exception):  # the case itself reports what an op raises
        if _refuses(trial, problem):
            return next((one for one in small if not _refuses(trial, one)), problem)
    return problem


def _refuses(trial: Trial, problem: AttentionProblem) -> bool:
    op = trial.op
    return op is not None and bool(op.unsupported_reasons(problem.spec(trial.dtype, trial.device)))


def check_out(
    trial: Trial, *problems: AttentionProblem, layout: Layout = PLAIN, heads_count: bool = False
) -> None:
    """Compare the op's outputs with the truth, one case per problem.

    An op that refuses so few heads gets more of them, unless `heads_count`.
    """
    for asked in problems:
        problem = asked if heads_count else fitted(trial, asked)
        with trial.case(problem.label + layout.label):
            op, call = serve(trial, problem, layout)
            judge_both(trial, call, call.run(op))


def writes_lse(trial: Trial) -> bool:
    """Return whether the op supplies the log-sum-exp; the layer needs it only to merge parts of a context."""
    return bool(getattr(trial.op, "writes_lse", True))


def judge_both(
    trial: Trial, call: AttentionCall, found: Outputs, problem: AttentionProblem | None = None
) -> None:
    """Compare `out`, and `lse` if the op supplies it, with the truth: of the call's problem by default.

    Raises `CheckFailed`.
    """
    problem = problem or call.problem
    judge_out(trial, problem, found[0], call.places())
    if writes_lse(trial):
        trial.judge_lse(found[1], data(problem, trial.dtype).lse, call.places())


def judge_out(
    trial: Trial, problem: AttentionProblem, out: torch.Tensor, places: Places | None = None
) -> None:
    """Compare one output with the truth, its rows named without pages by default. Raises `CheckFailed`."""
    places = places or Places.new_tokens(problem.query_lens, problem.kv_lens)
    truth = data(problem, trial.dtype)
    trial.judge(out, truth.out, reference(problem, trial.dtype)[0], "out", places, truth.lse)
