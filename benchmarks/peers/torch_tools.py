"""Careful hand-written PyTorch, as an expert would write it without compiling anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.peers.assembled import (
    Attention,
    BatchedProduct,
    LatentAttention,
    Parts,
    PeerProblem,
    Product,
    Toolbox,
)

# Query rows per product with the keys before them: a trade-off of masked pairs against product size.
BLOCK = 128

Attend = Callable[[torch.Tensor, torch.Tensor, float, int], torch.Tensor]


def linear(weight: torch.Tensor, tokens: int) -> Product:
    """Return `functional.linear`."""
    return lambda x: functional.linear(x, weight)


def prepacked(weight: torch.Tensor, tokens: int) -> Product:
    """Return oneDNN's product, its weight prepacked for this many tokens."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def bmm(weight: torch.Tensor) -> BatchedProduct:
    """Return one product per head as `torch.bmm`."""
    transposed = weight.transpose(1, 2).contiguous()
    return lambda x: torch.bmm(x.transpose(0, 1), transposed).transpose(0, 1)


def by_length(attend: Attend) -> Callable[[PeerProblem], LatentAttention]:
    """Return absorbed attention with one call per group of equal lengths."""

    def make(problem: PeerProblem) -> LatentAttention:
        groups = [
            (group.first, group.first + group.count, problem.group_rows(group)) for group in problem.groups
        ]
        scale, width = problem.config.softmax_scale, problem.config.kv_lora_rank

        def attention(q: torch.Tensor, step: int) -> torch.Tensor:
            lens = problem.lens[step]
            return torch.cat(
                [attend(q[first:end], rows[:, : lens[first]], scale, width) for first, end, rows in groups]
            )

        return attention

    return make


def sdpa(q: torch.Tensor, latents: torch.Tensor, scale: float, width: int) -> torch.Tensor:
    """Return flash attention [g, h, c]: heads are the queries of one head, values the keys, c + r wide."""
    keys = latents[:, None]
    return functional.scaled_dot_product_attention(q[:, None], keys, keys, scale=scale)[:, 0, :, :width]


def sdpa_fp32(q: torch.Tensor, latents: torch.Tensor, scale: float, width: int) -> torch.Tensor:
    """Return `sdpa` over widened copies: faster without bf16 products in hardware."""
    return sdpa(q.float(), latents.float(), scale, width).to(q.dtype)


def products(q: torch.Tensor, latents: torch.Tensor, scale: float, width: int) -> torch.Tensor:
    """Return attention [g, h, c] as two products around a softmax; the last needs no rotary channels."""
    weights = torch.bmm(q * scale, latents.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, latents[..., :width])


class Expanded:
    """Keys and values of every head, rebuilt from the whole cache with one product."""

    def __init__(self, parts: Parts) -> None:
        problem, config = parts.problem, parts.problem.config
        self._rows, self._n, self._c = problem.rows, config.qk_nope_head_dim, config.kv_lora_rank
        self._kv_b = parts.kv_b(self._rows.shape[0])
        shape = (config.num_attention_heads, self._rows.shape[0], config.qk_head_dim)
        self._keys = torch.empty(shape, dtype=problem.dtype)

    def rebuild(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [h, S, n + r], contiguous, and values [h, S, v], a view of the product."""
        both = self._kv_b(self._rows[:, : self._c]).unflatten(1, (self._keys.shape[0], -1)).transpose(0, 1)
        self._keys[..., : self._n].copy_(both[..., : self._n])
        self._keys[..., self._n :].copy_(self._rows[:, self._c :])
        return self._keys, both[..., self._n :]


def flash(parts: Parts) -> Attention:
    """Return flash attention per request; values are padded to the keys' width, as its kernel requires."""
    problem, config = parts.problem, parts.problem.config
    expanded = Expanded(parts)
    requests = [_RequestSlices(problem, request) for request in range(len(problem.starts))]

    def attention(q: torch.Tensor, step: int) -> torch.Tensor:
        keys, values = expanded.rebuild()
        values = functional.pad(values, (0, config.qk_head_dim - config.v_head_dim))
        outputs = []
        for request in requests:
            out = functional.scaled_dot_product_attention(
                q[request.new].transpose(0, 1)[None],
                keys[None, :, request.slots],
                values[None, :, request.slots],
                attn_mask=request.bias,
                is_causal=request.bias is None,
                scale=config.softmax_scale,
            )
            outputs.append(out[0, ..., : config.v_head_dim].transpose(0, 1))
        return torch.cat(outputs)

    return attention


class _RequestSlices:
    """A request's new tokens and slots; `bias` is None without history, where `is_causal` suffices."""

    def __init__(self, problem: PeerProblem, request: int) -> None:
        first, start = problem.firsts[request], problem.starts[request]
        count, past = problem.scenario.query_lens[request], problem.scenario.history[request]
        self.new = slice(first, first + count)
        self.slots = slice(start, start + past + count)
        square = _bias(count, problem.dtype)
        self.bias = (
            torch.cat((torch.zeros(count, past, dtype=problem.dtype), square), dim=1) if past else None
        )


def in_blocks(parts: Parts) -> Attention:
    """Return attention as products around a softmax, in blocks of query rows with the keys they can see."""
    problem, config = parts.problem, parts.problem.config
    expanded = Expanded(parts)
    work = [block for request in range(len(problem.starts)) for block in _blocks(problem, request)]
    shape = (problem.scenario.tokens, config.num_attention_heads, config.v_head_dim)
    out = torch.empty(shape, dtype=problem.dtype)

    def attention(q: torch.Tensor, step: int) -> torch.Tensor:
        keys, values = expanded.rebuild()
        scaled = (q * config.softmax_scale).transpose(0, 1)
        for new, slots, bias in work:
            logits = torch.bmm(scaled[:, new], keys[:, slots].transpose(1, 2))
            logits[..., -len(bias) :].add_(bias)
            out[new] = torch.bmm(logits.softmax(-1), values[:, slots]).transpose(0, 1)
        return out

    return attention


def _blocks(problem: PeerProblem, request: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """Return per block of a request: its new tokens, the slots they see, and the causal mask."""
    count, first = problem.scenario.query_lens[request], problem.firsts[request]
    start, past = problem.starts[request], problem.scenario.history[request]
    blocks = []
    for low in range(0, count, BLOCK):
        high = min(low + BLOCK, count)
        slots = slice(start, start + past + high)
        blocks.append((slice(first + low, first + high), slots, _bias(high - low, problem.dtype)))
    return blocks


def _bias(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [count, count]: 0 where a token sees itself or an earlier one, else -inf."""
    return torch.full((count, count), -torch.inf).triu(1).to(dtype)


TORCH = Toolbox(
    product={"linear": linear, "onednn_prepacked": prepacked},
    batched={"bmm": bmm},
    decode={
        "sdpa_by_length": by_length(sdpa),
        "sdpa_fp32_by_length": by_length(sdpa_fp32),
        "products_by_length": by_length(products),
    },
    prefill={"flash_padded_values": flash, "products_in_blocks": in_blocks},
)
