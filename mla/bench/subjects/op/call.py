"""One op bound to operands on one device, laid out in memory as the layer passes them.

Every call gets operands of its own, in the same memory, and writes results of its own. Memory around a
strided operand is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mla.bench.subjects.op.changes import Change, change
from mla.bench.subjects.op.outputs import buffers, on_host, poison
from mla.bench.subjects.op.problem import OpProblem
from mla.bench.subjects.shelf import Shelf
from mla.cache.ragged_batch import RaggedBatch
from mla.layer.ops import Choice
from mla.verify.op_check import Tensors
from mla.verify.places import Places

# Changes of so many rows are made and uploaded before a pass begins, which keeps its calls close together.
EARLY_ROWS = 1 << 20


@dataclass(frozen=True)
class Placement:
    """The device of a call, and the layout of its cache."""

    device: torch.device
    page_size: int
    seed: int  # of the page order
    calls: int = 1  # in a pass


class BoundCall:
    """A repeatable call of an op. Only `run` is timed."""

    varied: ClassVar[tuple[str, ...]] = ("x",)  # operands that differ from call to call

    def __init__(self, problem: OpProblem, choice: Choice, placement: Placement) -> None:
        self.problem, self.choice, self.placement = problem, choice, placement
        self.leading: tuple[Any, ...] = ()  # a packed weight, or the result of `prepare`
        self.arguments: dict[str, Any] = {}
        self.weight_bytes = self.cache_bytes = 0
        self._op = choice.op
        self._number = 0
        self._batch: RaggedBatch | None = None  # of an op that works on a cache
        self._change: Change | None = None  # that of the last call
        self._early: list[Change] = []  # those of the pass
        self._shelf = self._make_shelf(self._lay_out())
        self._pools = {name: problem.given[name].to(placement.device) for name in self.varied}

    def _lay_out(self) -> Tensors:
        """Fill `arguments`, and return the buffers of the results: name -> [buffers, ..]."""
        raise NotImplementedError

    def _make_shelf(self, stacks: Tensors) -> Shelf[Tensors]:
        parts = zip(*(stack.unbind() for stack in stacks.values()), strict=True)
        return Shelf([dict(zip(stacks, one, strict=True)) for one in parts], self.placement.calls, poison)

    def prepare(self) -> bool:
        """Prepare the op's state for the batch; return whether it has one. Never part of the timed call."""
        return False

    def restore(self, number: int) -> None:
        """Begin pass `number`."""
        self._number = number
        self.forget()
        calls = self.placement.calls
        early = range(calls if calls * self.problem.pool_size[1] <= EARLY_ROWS else 0)
        self._early = [self._uploaded(index) for index in early]

    def _uploaded(self, index: int) -> Change:
        """Return the change of a call, with what its operands need on the device."""
        one, device = change(self.problem, self._number, index), self.placement.device
        signs = {name: one.signs[name].to(self._pools[name]) for name in self.varied if name in one.signs}
        return Change(one.rows.to(device), signs)

    def forget(self) -> None:
        """Forget the results of all calls."""
        self._change = None
        self._shelf.clear()

    def before(self, index: int) -> None:
        """Prepare call `index` of the pass."""
        self.take(self._early[index] if self._early else self._uploaded(index))

    def take(self, one: Change) -> None:
        """Write the operands of a call to where the op reads them, and give it a buffer for its results."""
        self._change = one
        for name in self.varied:
            for target, values in self._contents(one, name):
                target.copy_(values)
        self._offer(self._shelf.next())

    def _offer(self, results: Tensors) -> None:
        """Have the next call write to these buffers, which the caches hold as they do in a layer."""
        poison(results)
        self.arguments.update(results)

    def run(self) -> None:
        """Call the op once."""
        self._op(*self.leading, **self.arguments)

    def after(self, index: int) -> None:
        """Keep the results of call `index`, or not."""
        self._shelf.keep(index)

    def collect(self) -> dict[int, Tensors]:
        """Return the kept results by call, copied to the host."""
        return {index: on_host(results) for index, results in sorted(self._shelf.kept.items())}

    def places(self) -> Places:
        """Return which request and position every row of the results belongs to."""
        problem = self.problem
        if problem.role == "kv_b_proj":
            return Places.context(problem.kv_lens)
        lengths = (problem.scenario.query_lens, problem.kv_lens)
        if self._batch is None:
            return Places.new_tokens(*lengths)
        return Places.new_tokens(*lengths, self._batch.block_table_host, self.placement.page_size)

    def damage(self) -> str:
        """Return what was written outside the results, as a clause; "" if nothing."""
        if self._change is None:
            return ""
        changed = [name for name in self.varied if not self._intact(self._change, name)]
        return f"the op wrote to {' and '.join(changed)}, which it only reads" if changed else ""

    def _intact(self, one: Change, name: str) -> bool:
        return all(torch.equal(target, values) for target, values in self._contents(one, name))

    def _contents(self, one: Change, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the parts of an operand, and what a call gets in them."""
        operand, pool, signs = self.arguments[name], self._pools[name], one.signs.get(name)
        for block, columns in enumerate(self.problem.columns):
            target = operand[..., columns]
            values = pool[..., columns].index_select(0, one.rows[block].to(pool.device)).view(target.shape)
            yield target, values if signs is None else values * signs[block].to(pool)

    def _put(self, name: str, before: int = 0) -> torch.Tensor:
        """Copy an operand to the device, as the columns of a row that has `before` more."""
        given = self.problem.given[name]
        target = self._blank(given.shape, before)
        return target.copy_(given)

    def _blank(self, shape: Sequence[int], before: int = 0, after: int = 0) -> torch.Tensor:
        """Return NaN on the device, as the columns of rows with `before` and `after` more around them."""
        spec, width = self.problem.spec, shape[-1]
        whole = (*shape[:-1], before + width + after)
        wide = torch.full(whole, torch.nan, dtype=spec.dtype, device=self.placement.device)
        return wide[..., before : before + width] if before or after else wide

    def _results(self, name: str = "out", before: int = 0, after: int = 0) -> torch.Tensor:
        """Return the buffers of one result, [buffers, ..]."""
        return self._blank((self._buffers, *self.problem.shapes[name]), before, after)

    @property
    def _buffers(self) -> int:
        return buffers(self.problem, self.placement.calls)


class LinearCall(BoundCall):
    """`linear` and `batched_linear`."""

    def _lay_out(self) -> Tensors:
        problem, packed = self.problem, self._op.pack(self._put("weight"))
        self.leading, self.weight_bytes = (packed,), packed.nbytes
        r = problem.config.qk_rope_head_dim
        after_x, after_out = {"kv_b_proj": (r, 0), "w_uk": (r, r)}.get(problem.role, (0, 0))
        shape = (problem.rows, *problem.given["x"].shape[1:])
        self.arguments = {"x": self._blank(shape, after=after_x)}
        if problem.kind == "linear":  # a weight per head has no bias
            self.arguments["bias"] = self._put("bias") if "bias" in problem.given else None
        return {"out": self._results(after=after_out)}


class NormCall(BoundCall):
    """`rms_norm` of the query latent, which shares its rows with the new tokens' latents."""

    def _lay_out(self) -> Tensors:
        config, weight = self.problem.config, self._put("weight")
        x = self._blank((self.problem.rows, weight.shape[0]), after=config.latent_dim)
        self.arguments = {"x": x, "weight": weight, "eps": config.rms_norm_eps}
        self.weight_bytes = weight.nbytes
        return {"out": self._results()}


class RotateCall(BoundCall):
    """`rotate_query` from the last channels of the queries to those of the latent queries."""

    varied = ("x", "cos_sin")

    def _lay_out(self) -> Tensors:
        config, problem = self.problem.config, self.problem
        self.arguments = {
            "x": self._blank(problem.shapes["out"], before=config.qk_nope_head_dim),
            "cos_sin": angles(problem, self.placement.device),
            "interleaved": config.rope_interleave,
        }
        return {"out": self._results(before=config.kv_lora_rank)}


def angles(problem: OpProblem, device: torch.device) -> torch.Tensor:
    """Return memory [T, r] fp32 for the cosines and sines of a call."""
    shape = (problem.rows, problem.config.qk_rope_head_dim)
    return torch.full(shape, torch.nan, dtype=torch.float32, device=device)
