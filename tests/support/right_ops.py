"""Ops of every kind that are right, and written in other ways than the reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mla_backends.api import FusedOp, Packed


class TransposedLinear(FusedOp):
    """Keeps the weight as [i, o]."""

    contract = "linear/1"

    def pack(self, weight: torch.Tensor) -> Packed:
        columns = weight.t().contiguous()
        return Packed(columns, columns.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.t()

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        product = x.float() @ packed.data.float()
        out.copy_(product if bias is None else product + bias.float())


class HeadByHead(FusedOp):
    contract = "batched_linear/1"

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        for head, weight in enumerate(packed.data):
            out[:, head] = x[:, head].float() @ weight.float().T


class LoopLatent(FusedOp):
    """Query by query. As real kernels do, it refuses many heads and other pages than 64."""

    contract = "latent_attention/1"

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [f"it serves up to 64 heads, not {spec.num_heads}"] if spec.num_heads > 64 else []

    def unsupported_batch(self, spec: Any, query_lens: Any, kv_lens: Any, page_size: Any = None) -> list[str]:
        return ["it serves contexts up to 2000 tokens"] if max(kv_lens, default=0) > 2000 else []

    def prepare(self, spec: Any, batch: Any) -> Any:
        from mla_backends import BackendError

        if batch.page_size != 64:
            raise BackendError(f"it reads pages of 64 tokens, not {batch.page_size}")
        return batch.query_lens, batch.kv_lens

    def __call__(
        self, state: Any, *, q: Any, cache: Any, block_table: Any, kv_lens: Any, cu_q: Any, **rest: Any
    ) -> None:
        token, (out, lse) = 0, (rest["out"], rest["lse"])
        for request, (new, length) in enumerate(zip(*state, strict=True)):
            pages = block_table[request, : -(-length // 64)].long()
            rows = cache[pages].flatten(0, 1)[:length].float()
            for visible in range(length - new + 1, length + 1):
                keys = rows[: max(0, visible)]
                logits = q[token].float() @ keys.T * rest["softmax_scale"]
                lse[token] = logits.logsumexp(-1) if len(keys) else -torch.inf
                out[token] = (
                    (logits - lse[token][:, None]).exp() @ keys[:, : out.shape[2]] if len(keys) else 0
                )
                token += 1


class DenseLatent(FusedOp):
    """Attends whole pages behind a mask made from the device's own lengths, so that a graph may replay it."""

    contract = "latent_attention/1"
    nan_safe_tail = True

    def prepare(self, spec: Any, batch: Any) -> Any:
        return SimpleNamespace(graph_safe=True)

    def __call__(
        self, state: Any, *, q: Any, cache: Any, block_table: Any, kv_lens: Any, cu_q: Any, **rest: Any
    ) -> None:
        width, tokens = cache.shape[2], torch.arange(q.shape[0])
        rows = cache.index_select(0, block_table.flatten().long()).view(len(kv_lens), -1, width).float()
        request = torch.searchsorted(cu_q[1:], tokens, right=True)
        seen = kv_lens[request] - (cu_q[request + 1] - 1 - tokens)
        hidden = torch.arange(rows.shape[1])[None] >= seen[:, None]
        rows = rows[request].masked_fill(hidden[..., None], 0)
        logits = torch.einsum("thd,tsd->ths", q.float(), rows) * rest["softmax_scale"]
        lse = logits.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)
        weights = (logits - lse.clamp_min(-1e30)[..., None]).masked_fill(hidden[:, None], -torch.inf).exp()
        rest["out"].copy_(torch.einsum("ths,tsd->thd", weights, rows[..., : rest["out"].shape[2]]))
        rest["lse"].copy_(lse)


class LoopExpanded(FusedOp):
    contract = "expanded_attention/1"

    def prepare(self, spec: Any, batch: Any) -> Any:
        return batch

    def __call__(
        self, state: Any, *, q: Any, k: Any, v: Any, softmax_scale: float, out: Any, lse: Any
    ) -> None:
        token = first = 0
        for new, length in zip(state.query_lens, state.kv_lens, strict=True):
            for i in range(new):
                stop = length - new + i + 1 if state.causal else length
                keys, values = (part[first : first + max(0, stop)].float() for part in (k, v))
                logits = torch.einsum("hd,shd->hs", q[token].float(), keys) * softmax_scale
                lse[token] = logits.logsumexp(-1) if len(keys) else -torch.inf
                weights = (logits - lse[token][:, None]).exp()
                out[token] = torch.einsum("hs,shd->hd", weights, values) if len(keys) else 0
                token += 1
            first += length


class FusedNorm(FusedOp):
    contract = "rms_norm/1"

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps))


class ComplexRotation(FusedOp):
    contract = "rotate_query/1"

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        turn = torch.complex(*cos_sin.chunk(2, dim=-1))[:, None]
        half = x.shape[-1] // 2
        if interleaved:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (half, 2)).clone())  # at an even address
            out.copy_(torch.view_as_real(pairs * turn).flatten(-2))
        else:
            turned = torch.complex(*x.float().chunk(2, dim=-1)) * turn
            out.copy_(torch.cat((turned.real, turned.imag), dim=-1))


class HalfByHalf(FusedOp):
    """Writes latents and keys one after the other."""

    contract = "write_latent/1"

    def __call__(
        self, *, kv_a: Any, weight: Any, eps: float, cos_sin: Any, interleaved: bool, slots: Any, cache: Any
    ) -> None:
        rows, width = cache.view(-1, cache.shape[-1]), weight.shape[0]
        norm, key = kv_a[:, :width].clone(), kv_a[:, width:].clone()
        FusedNorm()(x=norm.clone(), weight=weight, eps=eps, out=norm)
        ComplexRotation()(x=key[:, None], cos_sin=cos_sin, interleaved=interleaved, out=key[:, None])
        rows[:, :width].index_copy_(0, slots, norm)
        rows[:, width:].index_copy_(0, slots, key)


class NormedByTorch(FusedOp):
    """Turns the first channels as complex numbers."""

    contract = "write_index_key/1"

    def __call__(
        self,
        *,
        k: Any,
        weight: Any,
        bias: Any,
        eps: float,
        cos_sin: Any,
        interleaved: bool,
        slots: Any,
        cache: Any,
    ) -> None:
        key = torch.nn.functional.layer_norm(k.float(), k.shape[1:], weight.float(), bias.float(), eps)
        first = key[:, None, : cos_sin.shape[1]].clone()
        ComplexRotation()(x=first, cos_sin=cos_sin, interleaved=interleaved, out=first)
        key[:, : cos_sin.shape[1]] = first[:, 0]
        cache.view(-1, cache.shape[-1])[slots] = key.to(cache.dtype)


class SortedSelect(FusedOp):
    """Query by query, the worst of the selected first."""

    contract = "select_latents/1"

    def prepare(self, spec: Any, batch: Any) -> Any:
        return batch.query_lens, batch.kv_lens

    def __call__(
        self, state: Any, *, q: Any, weights: Any, cache: Any, block_table: Any, out: Any, **rest: Any
    ) -> None:
        token = 0
        for new, length, table in zip(*state, block_table, strict=True):
            keys = cache[table.long()].flatten(0, 1)[:length].double()
            for seen in range(length - new + 1, length + 1):
                scores = (keys[: max(0, seen)] @ q[token].double().T).clamp_min(0) @ weights[token].double()
                best = scores.argsort(descending=True)[: out.shape[1]].flip(0)
                out[token] = torch.nn.functional.pad(best, (0, out.shape[1] - len(best)), value=-1)
                token += 1


class MaskedSparse(FusedOp):
    """Scores every token of a request, and hides what is not selected."""

    contract = "sparse_latent_attention/1"

    def prepare(self, spec: Any, batch: Any) -> Any:
        return batch.query_lens, batch.kv_lens

    def __call__(
        self, state: Any, *, q: Any, cache: Any, block_table: Any, selection: Any, **rest: Any
    ) -> None:
        first, (out, lse) = 0, (rest["out"], rest["lse"])
        for new, length, table in zip(*state, block_table, strict=True):
            tokens, keys = (
                slice(first, first := first + new),
                cache[table.long()].flatten(0, 1)[:length].float(),
            )
            chosen = torch.zeros((new, length + 1), dtype=torch.bool)
            chosen.scatter_(
                1,
                selection[tokens].long() % (length + 1),
                torch.ones(()).bool().expand(selection[tokens].shape),
            )
            logits = torch.einsum("thd,sd->ths", q[tokens].float(), keys) * rest["softmax_scale"]
            logits.masked_fill_(~chosen[:, None, :length], -torch.inf)
            lse[tokens] = logits.logsumexp(-1)
            weights = (logits - lse[tokens].clamp_min(-3e38)[..., None]).exp()
            out[tokens] = torch.einsum("ths,sd->thd", weights, keys[:, : out.shape[2]]).to(out.dtype)


RIGHT_OPS = (
    NormedByTorch,
    SortedSelect,
    MaskedSparse,
    TransposedLinear,
    HeadByHead,
    DenseLatent,
    LoopLatent,
    LoopExpanded,
    FusedNorm,
    ComplexRotation,
    HalfByHalf,
)
