"""Tiny problems for `preflight`: a kernel that is compiled or loaded at its first use proves itself on one.

The device computes a few tokens, and the results must agree roughly with the definition in float32 on the
host. Whether an op is exact is for the conformance suite to say; so is what bytes of a cache format mean, of
which only zeros are tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, FusedOp, IndexerSpec, NormSpec, SegmentLengths
from mla_backends.errors import BackendError, describe, one_line, out_of_memory

if TYPE_CHECKING:
    import torch

TOLERANCE = 0.03  # of a row's norm; bfloat16 rounds by 0.004
Lengths = tuple[tuple[int, ...], tuple[int, ...]]  # new tokens and keys, of each request or segment
ROWS: Lengths = ((1, 1), (3, 70))  # new tokens and keys: a decode step of two requests
SEGMENTS: Lengths = ((2, 3), (2, 70))  # a new request and one with a history
OTHERWISE = "update the package, or use another op (`--ops reference` takes none of its kind)"
# Of the small ops.
TOKENS, EPS, SLOTS = 3, 1e-6, (5, 0, 2)
POISON = 0xA5
WRONG = "gives wrong results"
# What runtimes say of a kernel that broke off, or that has no code for the device.
_OF_THE_DEVICE = re.compile(
    r"\b(?:CUDA|MUSA|MACA|HIP)(?: driver| runtime)? error|\bcudaError|\bCUDA_ERROR_"
    r"|no kernel image|kernel image is invalid|illegal (?:memory|instruction|address)|misaligned address"
    r"|device-side assert|launch failure"
)


def failures(attempt: Callable[[], str], label: str, cure: str) -> list[str]:
    """Return why `attempt` failed, which returns what is wrong or raises; empty if nothing is.

    `cure` is for a kernel that cannot be compiled or loaded. What ends the process cannot be turned into a
    reason.
    """
    try:
        wrong = attempt()
    except BackendError as refusal:
        return [f"{label} refuses a tiny batch here: {str(refusal).rstrip('.')}; {OTHERWISE}"]
    except Exception as error:  # noqa: BLE001  # compilers and loaders raise anything
        if trouble := device_trouble(error):
            return [f"{label} {trouble}"]
        return [f"{label} raises {_with_cause(error)} on a tiny batch here; {cure}"]
    return [f"{label} {wrong} on a tiny batch here; {OTHERWISE}"] if wrong else []


def device_trouble(error: BaseException) -> str:
    """Return a clause for an error that no compiler or package cures, "" for any other."""
    said = _with_cause(error)
    if out_of_memory(said):
        return f"finds too little memory for a tiny batch here ({said}): free some, and start again"
    if _OF_THE_DEVICE.search(said):
        cure = "check that its package has kernels for this card, or run without it (`--ops reference`)"
        return f"fails on this device ({said}): {cure}"
    return ""


def _with_cause(error: BaseException) -> str:
    behind = f", because of {describe(error.__cause__)}" if error.__cause__ else ""
    return one_line(describe(error) + behind)


# -------------------------------------------------------------------------------------------- attention
def try_latent(
    op: FusedOp, spec: AttentionSpec, page_size: int, lengths: Lengths = ROWS, with_lse: bool = True
) -> str:
    """Run an op of absorbed attention on two requests; return what is wrong, "" if nothing.

    One of `sparse_latent_attention` selects half of what each token sees, as far as its width reaches.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    width = spec.kv_lora_rank + spec.qk_rope_head_dim
    batch, given, rows = _pages(spec, width, page_size, lengths, generator)
    q = _draw((sum(lengths[0]), spec.num_heads, width), spec.dtype, generator)
    out = _poisoned((len(q), spec.num_heads, spec.kv_lora_rank), spec)
    lse = _poisoned((len(q), spec.num_heads), spec, torch.float32) if with_lse else None
    keys = [row[:, None].expand(-1, spec.num_heads, -1) for row in rows]
    each: Sequence[torch.Tensor | None] = [None] * len(keys)
    if op.contract == OPS["sparse_latent_attention"]:
        given["selection"] = _selected(lengths, spec.topk, generator)
        each = given["selection"].split(lengths[0])
    given |= {"q": q, "softmax_scale": spec.softmax_scale, "out": out, "lse": lse}
    _run(op, spec, op.prepare(spec, batch), **given)
    queries = zip(q.split(lengths[0]), keys, each, strict=True)
    truth = [_attend(query, k, k[..., : spec.kv_lora_rank], spec, chosen=ids) for query, k, ids in queries]
    return _judge(out, lse if op.writes_lse else None, truth)


def try_select(op: FusedOp, spec: IndexerSpec, page_size: int, lengths: Lengths = ROWS) -> str:
    """Run a `select_latents` op on two requests; return what is wrong, "" if nothing.

    Any keys will do whose scores are within TOLERANCE of the best, relative to the largest.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    batch, given, rows = _pages(spec, spec.head_dim, page_size, lengths, generator)
    q = _draw((sum(lengths[0]), spec.num_heads, spec.head_dim), spec.dtype, generator)
    weights = _draw((len(q), spec.num_heads), torch.float32, generator)
    out = torch.full((len(q), spec.topk), POISON, dtype=torch.int32, device=spec.device)
    _run(op, spec, op.prepare(spec, batch), q=q, weights=weights, out=out, **given)
    heard = [
        (torch.einsum("shd,nd->shn", query.float(), keys.float()).relu() * weight[..., None]).sum(1)
        for query, weight, keys in zip(q.split(lengths[0]), weights.split(lengths[0]), rows, strict=True)
    ]
    scores = [row[: len(row) - len(each) + new + 1] for each in heard for new, row in enumerate(each)]
    return WRONG if any(map(_misses, out.cpu(), scores)) else ""


def _misses(chosen: torch.Tensor, scores: torch.Tensor) -> bool:
    """Return whether `chosen` [topk] are not places of the best scores [seen], and -1 behind them."""
    count = min(len(chosen), len(scores))
    names = chosen[:count].long()
    if bool((chosen[count:] != -1).any()) or bool(((names < 0) | (names >= len(scores))).any()):
        return True
    least = scores.topk(count).values[-1] - TOLERANCE * scores.abs().max()
    return len(names.unique()) < count or bool((scores[names] < least).any())


def _selected(lengths: Lengths, topk: int, generator: torch.Generator) -> torch.Tensor:
    """Return a selection [T, topk] int32 on the host: half of what each token sees, and -1 behind."""
    import torch

    selection = torch.full((sum(lengths[0]), topk), -1, dtype=torch.int32, device="cpu")
    each = [kv_len - count + new + 1 for count, kv_len in zip(*lengths, strict=True) for new in range(count)]
    for row, seen in zip(selection, each, strict=True):
        names = torch.randperm(seen, generator=generator, device="cpu")[: min(topk, (seen + 1) // 2)]
        row[: len(names)] = names
    return selection


def _pages(
    spec: AttentionSpec | IndexerSpec,
    width: int,
    page_size: int,
    lengths: Lengths,
    generator: torch.Generator,
) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    """Return what `BatchView` asks for, the cache and tables as an op is given them, and requests' rows.

    Page 0 holds NaN and is nobody's; what the table names behind a request's last page is page 0.
    """
    import torch

    query_lens, kv_lens = lengths
    counts = [-(-keys // page_size) for keys in kv_lens]
    cache = _draw((1 + sum(counts), page_size, width), spec.dtype, generator)
    cache[0] = torch.nan
    held = cache
    if spec.cache_format:  # all of which read zeros as zeros
        cache[1:] = 0
        held = torch.zeros(*cache.shape[:2], spec.token_bytes, dtype=torch.uint8, device="cpu")
        held[0] = 0x7F  # NaN, or large
    table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32, device="cpu")
    rows = []
    owned = torch.arange(1, len(cache), device="cpu").split(counts)
    for row, pages, keys in zip(table, owned, kv_lens, strict=True):
        row[: len(pages)] = pages
        rows.append(cache[pages].flatten(0, 1)[:keys])
    lens, cu_q = (
        torch.tensor(numbers, dtype=torch.int32, device="cpu").to(spec.device)
        for numbers in (kv_lens, [0, *accumulate(query_lens)])
    )
    tables = {"block_table": table.to(spec.device), "cu_q": cu_q}
    facts = {"query_lens": query_lens, "kv_lens": kv_lens, "page_size": page_size, "kv_lens_device": lens}
    return SimpleNamespace(**facts, **tables), {"cache": held, "kv_lens": lens, **tables}, rows


def try_expanded(
    op: FusedOp,
    spec: AttentionSpec,
    lengths: Lengths = SEGMENTS,
    causal: bool = True,
    with_lse: bool = True,
) -> str:
    """Run an `expanded_attention` op on a few segments; return what is wrong, "" if nothing."""
    import torch

    generator = torch.Generator().manual_seed(0)  # the caller's own random numbers stay as they are
    width, (query_lens, kv_lens) = spec.qk_nope_head_dim + spec.qk_rope_head_dim, lengths
    shapes = ((sum(query_lens), width), (sum(kv_lens), width), (sum(kv_lens), spec.v_head_dim))
    q, k, v = (_draw((tokens, spec.num_heads, size), spec.dtype, generator) for tokens, size in shapes)
    out = _poisoned((len(q), spec.num_heads, spec.v_head_dim), spec)
    lse = _poisoned((len(q), spec.num_heads), spec, torch.float32) if with_lse else None
    sliced = torch.cat((k, v), dim=2).to(spec.device)[..., width:]  # as the layer has it
    state = op.prepare(spec, SegmentLengths(query_lens, kv_lens, causal))
    _run(op, spec, state, q=q, k=k, v=sliced, softmax_scale=spec.softmax_scale, out=out, lse=lse)
    pieces = zip(q.split(query_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
    truth = [_attend(*piece, spec, causal) for piece in pieces]
    return _judge(out, lse if op.writes_lse else None, truth)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    causal: bool = True,
    chosen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend on the host: q [s, h, d], k [n, h, d], v [n, h, e] give out [s, h, e], lse [s, h].

    With `chosen` [s, topk], a query sees what it names.
    """
    import torch

    logits = torch.einsum("shd,nhd->hsn", q.float(), k.float()) * spec.softmax_scale
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    if chosen is not None:
        named = (chosen[..., None] == torch.arange(len(k), device=q.device)).any(1)
        logits = logits.masked_fill(~named, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)  # of a query that sees no key
    return torch.einsum("hsn,nhe->she", weights, v.float()), logits.logsumexp(-1).t()


def _judge(
    out: torch.Tensor, lse: torch.Tensor | None, truth: list[tuple[torch.Tensor, torch.Tensor]]
) -> str:
    """Return how the results differ from the truth; "" if they do not."""
    import torch

    right, sums = (torch.cat(parts) for parts in zip(*truth, strict=True))
    if _differs(out, right):
        return WRONG
    if lse is not None and not torch.allclose(lse.cpu(), sums, atol=TOLERANCE, rtol=0):
        return "gives a wrong log-sum-exp"
    return ""


# -------------------------------------------------------------------------------------------- small ops
def try_rms_norm(op: FusedOp, spec: NormSpec) -> str:
    """Run an `rms_norm` op on a few rows; return what is wrong, "" if nothing."""
    x, weight = (_draw(shape, spec.dtype) for shape in ((TOKENS, spec.features), (spec.features,)))
    out = _poisoned((TOKENS, spec.features), spec)
    _run(op, spec, x=x, weight=weight, eps=EPS, out=out)
    return WRONG if _differs(out, _norm(x, weight)) else ""


def try_rotate_query(op: FusedOp, spec: AttentionSpec) -> str:
    """Run a `rotate_query` op both ways; return what is wrong, "" if nothing."""
    shape, cos_sin = (TOKENS, spec.num_heads, spec.qk_rope_head_dim), _angles(spec)
    x = _draw(shape, spec.dtype)
    for interleaved in (True, False):
        out = _poisoned(shape, spec)
        _run(op, spec, x=x, cos_sin=cos_sin, interleaved=interleaved, out=out)
        if _differs(out, _rotate(x, cos_sin[:, None], interleaved)):
            return WRONG
    return ""


def try_write_latent(op: FusedOp, spec: AttentionSpec) -> str:
    """Run a `write_latent` op both ways, with queries if it rotates some; return what is wrong, or ""."""
    import torch

    latent, width = spec.kv_lora_rank, spec.kv_lora_rank + spec.qk_rope_head_dim
    kv_a, weight, cos_sin = _draw((TOKENS, width), spec.dtype), _draw((latent,), spec.dtype), _angles(spec)
    x = _draw((TOKENS, spec.num_heads, spec.qk_rope_head_dim), spec.dtype)
    for interleaved in (True, False):
        cache = _poisoned((2, 4, spec.token_bytes or width), spec, torch.uint8 if spec.cache_format else None)
        queries = {} if op.rotates is None else {"x": x, "out": _poisoned(x.shape, spec)}
        given = {"kv_a": kv_a, "weight": weight, "eps": EPS, "cos_sin": cos_sin, "interleaved": interleaved}
        _run(op, spec, **queries, **given, slots=torch.tensor(SLOTS, device="cpu"), cache=cache)
        rows, slots = cache.flatten(0, 1).cpu(), list(SLOTS)
        right = (_norm(kv_a[:, :latent], weight), _rotate(kv_a[:, latent:], cos_sin, interleaved))
        if spec.cache_format:
            if (rows == POISON).all(1).nonzero().flatten().tolist() != sorted({*range(8)} - {*SLOTS}):
                return WRONG
        elif any(map(_differs, rows[slots].split([latent, width - latent], dim=1), right)):
            return WRONG
        if queries and _differs(queries["out"], _rotate(x, cos_sin[:, None], interleaved)):
            return WRONG
    return ""


def _angles(spec: AttentionSpec) -> torch.Tensor:
    """Return cos_sin [TOKENS, r] fp32, on the host."""
    import torch

    pairs = spec.qk_rope_head_dim // 2
    angles = torch.arange(TOKENS * pairs, device="cpu").view(TOKENS, pairs).float()
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    import torch

    cos, sin = cos_sin.chunk(2, dim=-1)
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


# ------------------------------------------------------------------------------------------------ shared
def _run(op: FusedOp, spec: Any, *arguments: Any, **tensors: Any) -> None:
    """Call an op with tensors on its device, and the format of its cache if it is not plain."""
    there = {name: x.to(spec.device) if hasattr(x, "to") else x for name, x in tensors.items()}
    name = getattr(spec, "cache_format", "")
    op(*arguments, **there, **({"cache_format": name} if name else {}))


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return normal numbers on the host: the next ones of `generator`, or the same for each shape."""
    import torch

    generator = generator or torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(dtype)


def _poisoned(
    shape: tuple[int, ...], spec: AttentionSpec | NormSpec, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return NaN on the device, or bytes of POISON, for an op to overwrite."""
    import torch

    chosen = dtype or spec.dtype
    return torch.full(shape, POISON if chosen == torch.uint8 else torch.nan, dtype=chosen, device=spec.device)


def _differs(out: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether a row of `out` is farther from the right one, on the host, than rounding takes it."""
    error = (out.float().cpu() - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-9)
    return not bool((error <= TOLERANCE).all())  # NaN is not either
