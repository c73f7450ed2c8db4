"""One attention call on the device: tensors laid out as a check wants them, the op run, outputs fetched."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from mla.conformance.problems.attention import AttentionProblem, Lengths, cumulative, data
from mla.conformance.problems.load import MatmulLoad, best, elapsed, usual
from mla.conformance.trial import Refused, Trial, expect
from mla.reference import REFERENCE
from mla.verify.places import Places
from mla.verify.tolerances import same_bits
from mla_backends.api import FusedOp, SegmentLengths

Outputs = tuple[torch.Tensor, torch.Tensor]  # out [T, h, dv] and lse [T, h]


@dataclass(frozen=True)
class Layout:
    """What surrounds the numbers that count."""

    unowned: float = 0.0  # in pages that no request owns
    tail: float = 0.0  # in slots past a request's end
    strided: bool = False  # inputs and outputs are slices of wider tensors
    pages_before: int = 0  # that lie in front of all others, nobody owns and nobody writes


PLAIN = Layout()


@dataclass
class View:
    """The contract's `BatchView`. Columns of the block table past a request's pages name an unowned page."""

    query_lens: Lengths
    kv_lens: Lengths
    page_size: int
    block_table: torch.Tensor
    kv_lens_device: torch.Tensor
    cu_q: torch.Tensor


class AttentionCall:
    """A problem on a device. `inputs` are what the op gets; `run` may be called again and again."""

    def __init__(
        self, problem: AttentionProblem, dtype: torch.dtype, device: torch.device, layout: Layout = PLAIN
    ) -> None:
        self.problem, self.dtype, self.device, self.layout = problem, dtype, device, layout
        self.spec = problem.spec(dtype, device)
        self.view: View | SegmentLengths
        host = data(problem, dtype)
        self.inputs = {"q": self._place(host.q)}
        if problem.absorbed:
            self.view = self._page(host.keys)
            self.inputs |= {
                "block_table": self.view.block_table,
                "kv_lens": self.view.kv_lens_device,
                "cu_q": self.view.cu_q,
            }
        else:
            self.view = SegmentLengths(problem.query_lens, problem.kv_lens, problem.causal)
            self.inputs |= {"k": self._place(torch.cat(host.keys)), "v": self._place(torch.cat(host.values))}

    def _place(self, tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
        """Copy [t, h, d] to the device; if strided, into a wider tensor full of NaN."""
        if not self.layout.strided:
            return tensor.to(self.device, copy=True)
        tokens, heads, width = tensor.shape
        wide = torch.full((tokens, heads + 1, width + 32), fill, dtype=tensor.dtype, device=self.device)
        part = wide[:, :heads, 16 : 16 + width]
        part.copy_(tensor)
        return part

    def _page(self, latents: tuple[torch.Tensor, ...]) -> View:
        """Spread the latents over shuffled pages; some before, between and after them stay unowned."""
        problem, size = self.problem, self.problem.page_size
        counts = [-(-length // size) for length in problem.kv_lens]
        generator = torch.Generator().manual_seed(len(counts))  # layers of one batch share their tables
        order = torch.randperm(sum(counts) + 1, generator=generator) + 1
        unowned, order = order[:1].int(), order[1:]
        table = unowned.repeat(len(counts), max(1, *counts) + 1)
        shape = (sum(counts) + 3, size, problem.dims.latent)
        cache = torch.full(shape, self.layout.unowned, dtype=self.dtype)
        for row, pages, rows in zip(table, order.split(counts), latents, strict=True):
            row[: len(pages)] = pages.int()
            cache[pages] = self.layout.tail
            position = torch.arange(len(rows))
            cache[pages[position // size], position % size] = rows[:, 0]
        self.inputs["cache"] = self._placed(cache)
        table += self.layout.pages_before
        return View(
            problem.query_lens,
            problem.kv_lens,
            size,
            table.to(self.device),
            torch.tensor(problem.kv_lens, dtype=torch.int32).to(self.device),
            torch.tensor(cumulative(problem.query_lens), dtype=torch.int32).to(self.device),
        )

    def _placed(self, cache: torch.Tensor) -> torch.Tensor:
        """Copy the cache to the device, behind the layout's pages. Raises `Refused` if they take too much."""
        before = self.layout.pages_before
        if not before:
            return cache.to(self.device)
        try:
            whole = torch.empty((before + len(cache), *cache.shape[1:]), dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one, where torch has it
            raise Refused(f"a cache with {before} pages more could not be allocated") from error
        whole[before:].copy_(cache)
        return whole

    def places(self) -> Places:
        """Return where the new tokens are, in their requests and in the cache."""
        if isinstance(self.view, SegmentLengths):
            return Places.new_tokens(self.view.query_lens, self.view.kv_lens)
        lengths = (self.view.query_lens, self.view.kv_lens)
        return Places.new_tokens(*lengths, self.view.block_table, self.view.page_size)

    def outputs(self) -> Outputs:
        """Return out and lse full of NaN, on the device."""
        width = data(self.problem, self.dtype).out.shape[2]
        shape = (*self.inputs["q"].shape[:2], width)
        out = self._place(torch.full(shape, torch.nan, dtype=self.dtype))
        return out, torch.full(shape[:2], torch.nan, dtype=torch.float32, device=self.device)

    def prepare(self, op: FusedOp) -> Any:
        """Return the op's state for this batch."""
        return op.prepare(self.spec, self.view)

    def run(self, op: FusedOp, state: Any = None) -> Outputs:
        """Run the op once and return what it wrote, on the host."""
        state = self.prepare(op) if state is None else state
        out, lse = self.outputs()
        guard = surroundings(out) if self.layout.strided else None
        op(state, **self.inputs, softmax_scale=self.problem.scale, out=out, lse=lse)
        if guard is not None:
            expect(bool(surroundings(out).isnan().all()), "memory next to `out` was written")
        return out.cpu(), lse.cpu()


def surroundings(part: torch.Tensor) -> torch.Tensor:
    """Return the memory around a strided `AttentionCall._place`, on the host; the part itself reads NaN."""
    tokens, heads, width = part.shape
    wide = part.as_strided(
        (tokens, heads + 1, width + 32), (*part.stride()[:2], 1), part.storage_offset() - 16
    )
    copy = wide.detach().cpu().clone()
    copy[:, :heads, 16 : 16 + width] = torch.nan
    return copy


@functools.lru_cache(maxsize=96)
def reference(problem: AttentionProblem, dtype: torch.dtype) -> Outputs:
    """Return what the reference gives on the host."""
    call = AttentionCall(problem, dtype, torch.device("cpu"))
    return call.run(REFERENCE["latent_attention" if problem.absorbed else "expanded_attention"])


def serve(trial: Trial, problem: AttentionProblem, layout: Layout = PLAIN) -> tuple[FusedOp, AttentionCall]:
    """Return the op and a call for it; raises `Refused` where the op does not serve the problem."""
    spec = problem.spec(trial.dtype, trial.device)
    op = trial.require(spec, problem.query_lens, problem.kv_lens)
    return op, AttentionCall(problem, trial.dtype, trial.device, layout)


def check_out(trial: Trial, *problems: AttentionProblem, layout: Layout = PLAIN) -> None:
    """Compare the op's `out` with the truth, one case per problem."""
    for problem in problems:
        with trial.case(problem.label):
            op, call = serve(trial, problem, layout)
            judge_out(trial, problem, call.run(op)[0], call.places())


def judge_out(
    trial: Trial, problem: AttentionProblem, out: torch.Tensor, places: Places | None = None
) -> None:
    """Compare one output with the truth, its rows named without pages by default. Raises `CheckFailed`."""
    places = places or Places.new_tokens(problem.query_lens, problem.kv_lens)
    trial.judge(out, data(problem, trial.dtype).out, reference(problem, trial.dtype)[0], "out", places)


def check_lse(trial: Trial, *problems: AttentionProblem) -> None:
    """Compare the op's `lse` with the truth, one case per problem."""
    for problem in problems:
        with trial.case(problem.label):
            op, call = serve(trial, problem)
            trial.judge_lse(call.run(op)[1], data(problem, trial.dtype).lse, call.places())


def check_inputs(trial: Trial, problem: AttentionProblem) -> None:
    """Check that the op leaves every input unchanged."""
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        before = {name: tensor.cpu().clone() for name, tensor in call.inputs.items()}
        call.run(op)
        changed = [name for name, tensor in call.inputs.items() if not same_bits(tensor, before[name])]
        expect(not changed, f"the op wrote to its input {', '.join(changed)}")


def check_reuse(trial: Trial, first: AttentionProblem, second: AttentionProblem) -> None:
    """Run one state for two layers with different numbers, with another batch's calls in between."""
    with trial.case(f"{first.label}, and {second.label} in between"):
        op, layer = serve(trial, first)
        _, next_layer = serve(trial, replace(first, seed=first.seed + 1))
        _, other = serve(trial, second)
        states = [call.prepare(op) for call in (layer, other)]
        for call, state in zip((layer, other, next_layer, other, layer), states * 3, strict=False):
            judge_out(trial, call.problem, call.run(op, state)[0], call.places())


def check_prepare(trial: Trial, problem: AttentionProblem) -> None:
    """Check that preparing a batch does not wait for pending work on the device."""
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        call.prepare(op)  # one-time setup does not count
        work = MatmulLoad(trial.subject)
        pending = work.milliseconds(8)

        def busy() -> float:
            work.read()
            work.submit(8)
            return elapsed(lambda: call.prepare(op))

        behind = usual(busy)
        work.read()
        waited = behind - best(lambda: elapsed(lambda: call.prepare(op)))
        expect(waited < 0.5 * pending, f"prepare() waited {waited:.3g} of {pending:.3g} ms of pending work")
