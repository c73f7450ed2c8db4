"""One op bound to operands on one device, laid out in memory as the layer passes them.

Memory around a strided operand is NaN, pages come in shuffled order, and unowned slots are poisoned as for
the layer (`mla.verify.poison`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mla.bench.subjects.op.problem import OpProblem
from mla.bench.subjects.setting import SPARE_PAGES
from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.layer.ops import Choice
from mla.verify.op_check import Tensors
from mla.verify.places import Places
from mla.verify.poison import TAIL, Poison
from mla_backends.api import SegmentLengths


@dataclass(frozen=True)
class Placement:
    """The device of a call, and the layout of its cache."""

    device: torch.device
    page_size: int
    seed: int  # of the page order


class BoundCall:
    """A repeatable call of an op. Only `run` is timed; it writes `results`."""

    def __init__(self, problem: OpProblem, choice: Choice, placement: Placement) -> None:
        self.problem, self.choice, self.placement = problem, choice, placement
        self.leading: tuple[Any, ...] = ()  # a packed weight, or the result of `prepare`
        self.arguments: dict[str, Any] = {}
        self.results: Tensors = {}
        self.weight_bytes = self.cache_bytes = 0
        self._op = choice.op
        self._lay_out()

    def _lay_out(self) -> None:
        raise NotImplementedError

    def prepare(self) -> bool:
        """Prepare the op's state for the batch; return whether it has one. Never part of the timed call."""
        return False

    def run(self) -> None:
        """Call the op once."""
        self._op(*self.leading, **self.arguments)

    def clear(self) -> None:
        """Overwrite all results with NaN."""
        for result in self.results.values():
            result.fill_(torch.nan)

    def found(self) -> Tensors:
        """Return the results of the last call by name."""
        return self.results

    def damage(self) -> str:
        """Return what was written outside the results, as a clause; "" if nothing."""
        return ""

    def places(self) -> Places:
        """Return which request and position every row of the results belongs to."""
        problem = self.problem
        if problem.role == "kv_b_proj":
            return Places.context(problem.kv_lens)
        return Places.new_tokens(problem.scenario.query_lens, problem.kv_lens)

    def _give(self, name: str, before: int = 0, after: int = 0) -> torch.Tensor:
        """Copy an operand to the device, as columns of a row with `before` and `after` more around them."""
        return _columns(self.problem.given[name], self.placement.device, before, after)

    def _blank(self, shape: Sequence[int], before: int = 0, after: int = 0) -> torch.Tensor:
        nothing = torch.full(tuple(shape), torch.nan, dtype=self.problem.spec.dtype)
        return _columns(nothing, self.placement.device, before, after)


def _columns(tensor: torch.Tensor, device: torch.device, before: int, after: int) -> torch.Tensor:
    if not before and not after:
        return tensor.to(device, copy=True)
    width = tensor.shape[-1]
    wide = torch.full((*tensor.shape[:-1], before + width + after), torch.nan, dtype=tensor.dtype)
    part = wide.to(device)[..., before : before + width]
    part.copy_(tensor)
    return part


class LinearCall(BoundCall):
    """`linear` and `batched_linear`."""

    def _lay_out(self) -> None:
        packed = self._op.pack(self._give("weight"))
        self.leading, self.weight_bytes = (packed,), packed.nbytes
        r = self.problem.config.qk_rope_head_dim
        after_x, after_out = {"kv_b_proj": (r, 0), "w_uk": (r, r)}.get(self.problem.role, (0, 0))
        out = self._blank(self.problem.truth["out"].shape, after=after_out)
        self.arguments = {"x": self._give("x", after=after_x), "out": out}
        if self.problem.kind == "linear":  # a weight per head has no bias
            self.arguments["bias"] = self._give("bias") if "bias" in self.problem.given else None
        self.results = {"out": out}


class NormCall(BoundCall):
    """`rms_norm` of the query latent, which shares its rows with the new tokens' latents."""

    def _lay_out(self) -> None:
        config, out = self.problem.config, self._blank(self.problem.truth["out"].shape)
        x, weight = self._give("x", after=config.latent_dim), self._give("weight")
        self.arguments = {"x": x, "weight": weight, "eps": config.rms_norm_eps, "out": out}
        self.weight_bytes, self.results = weight.nbytes, {"out": out}


class RotateCall(BoundCall):
    """`rotate_query` from the last channels of the queries to those of the latent queries."""

    def _lay_out(self) -> None:
        config = self.problem.config
        out = self._blank(self.problem.truth["out"].shape, before=config.kv_lora_rank)
        self.arguments = {
            "x": self._give("x", before=config.qk_nope_head_dim),
            "cos_sin": self._give("cos_sin"),
            "interleaved": config.rope_interleave,
            "out": out,
        }
        self.results = {"out": out}


class CacheCall(BoundCall):
    """An op that works on a paged cache."""

    _batch: RaggedBatch

    def _make_cache(self) -> tuple[LatentCache, list[int]]:
        """Return a cache of the problem's size, and its sequences, which are still empty."""
        problem, size = self.problem, self.placement.page_size
        pages = sum(-(-length // size) for length in problem.kv_lens) + SPARE_PAGES
        cache = LatentCache(
            problem.config,
            max_tokens=pages * size,
            page_size=size,
            device=self.placement.device,
            dtype=problem.spec.dtype,
            shuffle=self.placement.seed,
        )
        self.cache_bytes = cache.pages.nbytes
        return cache, cache.new_sequences(len(problem.kv_lens))

    def places(self) -> Places:
        lengths = (self.problem.scenario.query_lens, self.problem.kv_lens)
        return Places.new_tokens(*lengths, self._batch.block_table_host, self.placement.page_size)


class LatentCall(CacheCall):
    """`latent_attention` over latents in shuffled pages."""

    def _lay_out(self) -> None:
        cache, batch = self._fill()
        self._batch = batch
        out = self._blank(self.problem.truth["out"].shape)
        lse = torch.full(out.shape[:2], torch.nan, dtype=torch.float32, device=out.device)
        self.arguments = {
            "q": self._give("q"),
            "cache": cache.pages[0],
            "block_table": batch.block_table,
            "kv_lens": batch.kv_lens_device,
            "cu_q": batch.cu_q,
            "softmax_scale": self.choice.spec.softmax_scale,
            "out": out,
            "lse": lse,
        }
        self.results = {"out": out, "lse": lse}

    def _fill(self) -> tuple[LatentCache, RaggedBatch]:
        """Load the history, poison every other slot, then write the new tokens' latents."""
        problem, (cache, sequences) = self.problem, self._make_cache()
        scenario, c = problem.scenario, problem.config.kv_lora_rank
        requests = problem.given["keys"].split(problem.kv_lens)
        for sequence, keys, length in zip(sequences, requests, scenario.history, strict=True):
            cache.load(sequence, keys[:length, :c], keys[:length, c:])
        Poison(cache, sequences, problem.kv_lens, self._op.nan_safe_tail).apply()
        batch = cache.extend(sequences, scenario.query_lens)
        new = [keys[past:] for keys, past in zip(requests, scenario.history, strict=True)]
        rows = torch.cat(new).to(self.placement.device)
        cache.pages[0].view(-1, problem.config.latent_dim).index_copy_(0, batch.slots, rows)
        return cache, batch

    def prepare(self) -> bool:
        self.leading = (self._op.prepare(self.choice.spec, self._batch),)
        return True

    def found(self) -> Tensors:
        return _attention_results(self)


class ExpandedCall(BoundCall):
    """`expanded_attention` over rebuilt keys and values, which are columns of one product."""

    def _lay_out(self) -> None:
        problem = self.problem
        out = self._blank(problem.truth["out"].shape)
        lse = torch.full(out.shape[:2], torch.nan, dtype=torch.float32, device=out.device)
        self.arguments = {
            "q": self._give("q"),
            "k": self._give("k"),
            "v": self._give("v", before=problem.config.qk_nope_head_dim),
            "softmax_scale": self.choice.spec.softmax_scale,
            "out": out,
            "lse": lse,
        }
        self.results = {"out": out, "lse": lse}

    def prepare(self) -> bool:
        lengths = SegmentLengths(self.problem.scenario.query_lens, self.problem.kv_lens, True)
        self.leading = (self._op.prepare(self.choice.spec, lengths),)
        return True

    def found(self) -> Tensors:
        return _attention_results(self)


def _attention_results(call: BoundCall) -> Tensors:
    """Return `out`, and `lse` of an op that has one."""
    names = ("out", "lse") if call.choice.op.writes_lse else ("out",)
    return {name: call.results[name] for name in names}


class WriteCall(CacheCall):
    """`write_latent` to the slots of new tokens; every other slot holds a marker that must stay."""

    def _lay_out(self) -> None:
        problem, (cache, sequences) = self.problem, self._make_cache()
        if any(problem.scenario.history):
            cache.extend(sequences, problem.scenario.history)
        self._batch = cache.extend(sequences, problem.scenario.query_lens)
        self._slots = self._batch.slots
        cache.pages.fill_(TAIL)
        self._flat = cache.pages[0].view(-1, problem.config.latent_dim)
        self.arguments = {
            "kv_a": self._give("kv_a", before=_first_width(problem)),
            "weight": self._give("weight"),
            "eps": problem.config.rms_norm_eps,
            "cos_sin": self._give("cos_sin"),
            "interleaved": problem.config.rope_interleave,
            "slots": self._slots,
            "cache": cache.pages[0],
        }

    def clear(self) -> None:
        self._flat[self._slots] = torch.nan

    def found(self) -> Tensors:
        rows = self._flat.index_select(0, self._slots)
        c = self.problem.config.kv_lora_rank
        return {"latent": rows[:, :c], "key": rows[:, c:]}

    def damage(self) -> str:
        others = torch.ones(self._flat.shape[0], dtype=torch.bool, device=self._flat.device)
        others[self._slots] = False
        kept = (self._flat == torch.tensor(TAIL, dtype=self._flat.dtype)).all(1)
        changed = int((others & ~kept).sum())
        return f"{changed} slots other than those of the new tokens have changed" if changed else ""


def _first_width(problem: OpProblem) -> int:
    """Return the columns of the first projection that come before the latent."""
    config = problem.config
    return config.q_lora_rank or config.num_attention_heads * config.qk_head_dim


CALLS: dict[str, type[BoundCall]] = {
    "linear": LinearCall,
    "batched_linear": LinearCall,
    "rms_norm": NormCall,
    "rotate_query": RotateCall,
    "write_latent": WriteCall,
    "latent_attention": LatentCall,
    "expanded_attention": ExpandedCall,
}
