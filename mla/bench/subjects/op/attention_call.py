"""The ops of attention bound to their operands, and the write to the cache.

Pages come in shuffled order, and unowned slots are poisoned as for the layer (`mla.verify.poison`). What is
cached changes its signs from pass to pass, in place.
"""

from __future__ import annotations

import torch

from mla.bench.subjects.op.call import BoundCall, angles
from mla.bench.subjects.op.changes import pass_signs
from mla.bench.subjects.op.problem import OpProblem
from mla.bench.subjects.setting import SPARE_PAGES
from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.verify.op_check import Tensors
from mla.verify.poison import TAIL, Poison
from mla_backends.api import SegmentLengths


class AttentionCall(BoundCall):
    """An op with queries, a log-sum-exp and a prepared state."""

    varied = ("q",)
    _now: Tensors  # signs of the operands at present

    def restore(self, number: int) -> None:
        super().restore(number)
        new = pass_signs(self.problem, number)
        for name, operand in self._signed().items():
            relative = new[name] * self._now[name] if name in self._now else new[name]
            operand.mul_(relative.to(operand))
        self._now = new

    def _signed(self) -> Tensors:
        """Return the operands that change their signs in place, once per pass."""
        raise NotImplementedError

    def _attention_results(self) -> Tensors:
        self._now = {}
        out = self._results()
        shape = (out.shape[0], *self.problem.shapes["lse"])
        return {"out": out, "lse": torch.full(shape, torch.nan, dtype=torch.float32, device=out.device)}

    def collect(self) -> dict[int, Tensors]:
        """Return `out`, and `lse` of an op that has one."""
        names = ("out", "lse") if self._op.writes_lse else ("out",)
        return {index: {name: found[name] for name in names} for index, found in super().collect().items()}


def make_cache(call: BoundCall) -> tuple[LatentCache, list[int]]:
    """Return a cache of the problem's size, and its sequences, which are still empty."""
    problem, size = call.problem, call.placement.page_size
    pages = sum(-(-length // size) for length in problem.kv_lens) + SPARE_PAGES
    cache = LatentCache(
        problem.config,
        max_tokens=pages * size,
        page_size=size,
        device=call.placement.device,
        dtype=problem.spec.dtype,
        shuffle=call.placement.seed,
    )
    call.cache_bytes = cache.pages.nbytes
    return cache, cache.new_sequences(len(problem.kv_lens))


class LatentCall(AttentionCall):
    """`latent_attention` over latents in shuffled pages."""

    def _lay_out(self) -> Tensors:
        problem, (cache, batch) = self.problem, self._fill()
        self._batch = batch
        heads, width = problem.shapes["lse"], problem.given["q"].shape[-1]
        self.arguments = {
            "q": self._blank((*heads, width)),
            "cache": cache.pages[0],
            "block_table": batch.block_table,
            "kv_lens": batch.kv_lens_device,
            "cu_q": batch.cu_q,
            "softmax_scale": self.choice.spec.softmax_scale,
        }
        return self._attention_results()

    def _fill(self) -> tuple[LatentCache, RaggedBatch]:
        """Load the history, poison every other slot, then write the new tokens' latents."""
        problem, (cache, sequences) = self.problem, make_cache(self)
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

    def _signed(self) -> Tensors:
        return {"keys": self.arguments["cache"]}  # poison stays poison

    def prepare(self) -> bool:
        self.leading = (self._op.prepare(self.choice.spec, self._batch),)
        return True


class ExpandedCall(AttentionCall):
    """`expanded_attention` over rebuilt keys and values, which are columns of one product."""

    def _lay_out(self) -> Tensors:
        problem = self.problem
        self.arguments = {
            "q": self._blank((*problem.shapes["lse"], problem.given["q"].shape[-1])),
            "k": self._put("k"),
            "v": self._put("v", before=problem.config.qk_nope_head_dim),
            "softmax_scale": self.choice.spec.softmax_scale,
        }
        return self._attention_results()

    def _signed(self) -> Tensors:
        return {name: self.arguments[name] for name in ("k", "v")}

    def prepare(self) -> bool:
        lengths = SegmentLengths(self.problem.scenario.query_lens, self.problem.kv_lens, True)
        self.leading = (self._op.prepare(self.choice.spec, lengths),)
        return True


class WriteCall(BoundCall):
    """`write_latent` to the slots of new tokens; every other slot holds a marker that must stay."""

    varied = ("kv_a", "cos_sin")

    def _lay_out(self) -> Tensors:
        problem, (cache, sequences) = self.problem, make_cache(self)
        config, width = problem.config, problem.config.latent_dim
        if any(problem.scenario.history):
            cache.extend(sequences, problem.scenario.history)
        self._batch = cache.extend(sequences, problem.scenario.query_lens)
        self._slots = self._batch.slots
        cache.pages.fill_(TAIL)
        self._flat = cache.pages[0].view(-1, width)
        self.arguments = {
            "kv_a": self._blank((problem.rows, width), before=_first_width(problem)),
            "weight": self._put("weight"),
            "eps": config.rms_norm_eps,
            "cos_sin": angles(problem, self.placement.device),
            "interleaved": config.rope_interleave,
            "slots": self._slots,
            "cache": cache.pages[0],
        }
        return {"rows": self._blank((self._buffers, problem.rows, width))}

    def _offer(self, results: Tensors) -> None:
        self._flat[self._slots] = torch.nan

    def after(self, index: int) -> None:
        self._shelf.next()["rows"].copy_(self._flat.index_select(0, self._slots))
        super().after(index)

    def collect(self) -> dict[int, Tensors]:
        """Return what the kept calls wrote to the slots."""
        c, kept = self.problem.config.kv_lora_rank, super().collect()
        return {
            index: {"latent": one["rows"][:, :c], "key": one["rows"][:, c:]} for index, one in kept.items()
        }

    def damage(self) -> str:
        others = torch.ones(self._flat.shape[0], dtype=torch.bool, device=self._flat.device)
        others[self._slots] = False
        kept = (self._flat == torch.tensor(TAIL, dtype=self._flat.dtype)).all(1)
        return "; ".join(filter(None, (self._strays((others & ~kept).cpu()), super().damage())))

    def _strays(self, changed: torch.Tensor) -> str:
        """Return which slots [slots] of the cache have changed, as a clause; "" if none has."""
        if not bool(changed.any()):
            return ""
        page, slot = divmod(int(changed.int().argmax()), self.placement.page_size)
        return (
            f"{int(changed.sum())} slots other than those of the new tokens have changed, "
            f"the first is slot {slot} of page {page}"
        )


def _first_width(problem: OpProblem) -> int:
    """Return the columns of the first projection that come before the latent."""
    config = problem.config
    return config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
