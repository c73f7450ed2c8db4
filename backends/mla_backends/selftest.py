"""Tiny problems for `preflight`: a kernel that is compiled or loaded at its first use proves itself on one.

The device computes a few tokens, and the results must agree roughly with the definition in float32 on the
host. Whether an op is exact is for the conformance suite to say; so is what bytes of a cache format mean, of
which only zeros are tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
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


# ------------------------------------------------------------------------------------------------ shared
class _Problem:
    """A tiny problem of one op: what it is given is drawn on the host, what it writes is poisoned."""

    def __init__(self, op: FusedOp, spec: Any) -> None:
        import torch

        self.op, self.spec, self.torch = op, spec, torch
        self.generator = torch.Generator().manual_seed(0)  # the caller's own random numbers stay as they are

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return normal numbers on the host."""
        numbers = self.torch.randn(shape, generator=self.generator, device="cpu")
        return numbers.to(dtype or self.spec.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return NaN on the device, or integers of POISON, for the op to overwrite."""
        dtype = dtype or self.spec.dtype
        value = self.torch.nan if dtype.is_floating_point else POISON
        return self.torch.full(shape, value, dtype=dtype, device=self.spec.device)

    def run(self, *arguments: Any, **tensors: Any) -> None:
        """Call the op with tensors on its device, and the format of its cache if it is not plain."""
        there = {name: x.to(self.spec.device) if hasattr(x, "to") else x for name, x in tensors.items()}
        name = getattr(self.spec, "cache_format", "")
        self.op(*arguments, **there, **({"cache_format": name} if name else {}))

    def paged(
        self, width: int, page_size: int, lengths: Lengths
    ) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
        """Return what `BatchView` asks for, the cache and tables as an op is given them, and requests' rows.

        Page 0 holds NaN and is nobody's; what the table names behind a request's last page is page 0.
        """
        query_lens, kv_lens = lengths
        counts = [-(-keys // page_size) for keys in kv_lens]
        cache = self.draw(1 + sum(counts), page_size, width)
        cache[0] = self.torch.nan
        held = cache
        if self.spec.cache_format:  # all of which read zeros as zeros
            cache[1:] = 0
            shape = (*cache.shape[:2], self.spec.token_bytes)
            held = self.torch.zeros(shape, dtype=self.torch.uint8, device="cpu")
            held[0] = 0x7F  # NaN, or large
        owned = [pages.tolist() for pages in self.torch.arange(1, len(cache), device="cpu").split(counts)]
        table = [pages + [0] * (max(counts) + 1 - len(pages)) for pages in owned]
        numbers = {"block_table": table, "kv_lens": kv_lens, "cu_q": [0, *accumulate(query_lens)]}
        tables = {
            name: self.torch.tensor(values, dtype=self.torch.int32, device=self.spec.device)
            for name, values in numbers.items()
        }
        facts = {**tables, "query_lens": query_lens, "kv_lens": kv_lens, "page_size": page_size}
        batch = SimpleNamespace(**facts, kv_lens_device=tables["kv_lens"])
        rows = [cache[pages].flatten(0, 1)[:keys] for pages, keys in zip(owned, kv_lens, strict=True)]
        return batch, {"cache": held, **tables}, rows

    def seen(self, lengths: Lengths, causal: bool = True) -> list[torch.Tensor]:
        """Return for each request which keys [s, n] its queries see."""
        return [
            self.torch.ones(s, n, dtype=self.torch.bool, device="cpu").tril(n - s if causal else n)
            for s, n in zip(*lengths, strict=True)
        ]

    def attention(
        self, state: Any, q: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor],
        seen: Sequence[torch.Tensor], with_lse: bool, **given: Any,
    ) -> str:  # fmt: skip
        """Run the op, and return how it differs from attention on the host, "" if it does not.

        Queries are q [T, h, d]; keys [n, h, d], values [n, h, e] and `seen` [s, n] are by request.
        """
        out = self.poisoned(*q.shape[:2], values[0].shape[-1])
        lse = self.poisoned(*q.shape[:2], dtype=self.torch.float32) if with_lse else None
        self.run(state, q=q, softmax_scale=self.spec.softmax_scale, out=out, lse=lse, **given)
        each = zip(q.split([len(mask) for mask in seen]), keys, values, seen, strict=True)
        right, sums = map(self.torch.cat, zip(*(self._attend(*request) for request in each), strict=True))
        if _differs(out, right):
            return WRONG
        wrong = lse is not None and self.op.writes_lse and not sums.allclose(lse.cpu(), 0, TOLERANCE)
        return "gives a wrong log-sum-exp" if wrong else ""

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [s, h, e] and lse [s, h]."""
        logits = self.torch.einsum("shd,nhd->shn", q.float(), k.float()) * self.spec.softmax_scale
        logits = logits.masked_fill(~seen[:, None], -self.torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0)  # of a query that sees no key
        return self.torch.einsum("shn,nhe->she", weights, v.float()), logits.logsumexp(-1)

    def angles(self) -> torch.Tensor:
        """Return cos_sin [TOKENS, r] fp32, on the host."""
        pairs = self.spec.qk_rope_head_dim // 2
        angles = self.torch.arange(TOKENS * pairs, device="cpu").view(TOKENS, pairs).float()
        return self.torch.cat((angles.cos(), angles.sin()), dim=1)

    def rotate(self, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """Return x [..., r] rotated by cos_sin, fp32."""
        (cos, sin), wide = cos_sin.chunk(2, dim=-1), x.float()
        a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        return self.torch.stack(pair, dim=-1).flatten(-2) if interleaved else self.torch.cat(pair, dim=-1)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()


def _differs(out: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether a row of `out` is farther from the right one, on the host, than rounding takes it."""
    error = (out.float().cpu() - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-9)
    return not bool((error <= TOLERANCE).all())  # NaN is not either


# ----------------------------------------------------------------------------------------------- the ops
def try_latent(
    op: FusedOp, spec: AttentionSpec, page_size: int, lengths: Lengths = ROWS, with_lse: bool = True
) -> str:
    """Run an op of absorbed attention on two requests; return what is wrong, "" if nothing.

    One of `sparse_latent_attention` selects half of what each token sees, as far as its width reaches.
    """
    tiny, width = _Problem(op, spec), spec.kv_lora_rank + spec.qk_rope_head_dim
    batch, given, rows = tiny.paged(width, page_size, lengths)
    q, seen = tiny.draw(sum(lengths[0]), spec.num_heads, width), tiny.seen(lengths)
    if op.contract == OPS["sparse_latent_attention"]:
        given["selection"] = tiny.torch.full((len(q), spec.topk), -1, dtype=tiny.torch.int32, device="cpu")
        for mask, ids in zip(chain(*seen), given["selection"], strict=True):
            order = tiny.torch.randperm(int(mask.sum()), generator=tiny.generator, device="cpu")
            names = order[: min(spec.topk, (len(order) + 1) // 2)]
            ids[: len(names)] = names
            mask.fill_(False)[names] = True
    keys = [row[:, None].expand(-1, spec.num_heads, -1) for row in rows]
    values = [k[..., : spec.kv_lora_rank] for k in keys]
    return tiny.attention(op.prepare(spec, batch), q, keys, values, seen, with_lse, **given)


def try_expanded(
    op: FusedOp,
    spec: AttentionSpec,
    lengths: Lengths = SEGMENTS,
    causal: bool = True,
    with_lse: bool = True,
) -> str:
    """Run an `expanded_attention` op on a few segments; return what is wrong, "" if nothing."""
    tiny, width = _Problem(op, spec), spec.qk_nope_head_dim + spec.qk_rope_head_dim
    q = tiny.draw(sum(lengths[0]), spec.num_heads, width)
    k, v = (tiny.draw(sum(lengths[1]), spec.num_heads, size) for size in (width, spec.v_head_dim))
    sliced = tiny.torch.cat((k, v), dim=2).to(spec.device)[..., width:]  # as the layer has it
    state = op.prepare(spec, SegmentLengths(*lengths, causal))
    keys, values = k.split(lengths[1]), v.split(lengths[1])
    return tiny.attention(state, q, keys, values, tiny.seen(lengths, causal), with_lse, k=k, v=sliced)


def try_select(op: FusedOp, spec: IndexerSpec, page_size: int, lengths: Lengths = ROWS) -> str:
    """Run a `select_latents` op on two requests; return what is wrong, "" if nothing.

    Any keys will do whose scores are within TOLERANCE of the best, relative to the largest.
    """
    tiny = _Problem(op, spec)
    batch, given, rows = tiny.paged(spec.head_dim, page_size, lengths)
    q = tiny.draw(sum(lengths[0]), spec.num_heads, spec.head_dim)
    weights = tiny.draw(*q.shape[:2], dtype=tiny.torch.float32)
    out = tiny.poisoned(len(q), spec.topk, dtype=tiny.torch.int32)
    tiny.run(op.prepare(spec, batch), q=q, weights=weights, out=out, **given)
    each = zip(*(x.split(lengths[0]) for x in (q, weights, out.cpu())), rows, tiny.seen(lengths), strict=True)
    for query, weight, chosen, keys, seen in each:
        heard = tiny.torch.einsum("shd,nd->shn", query.float(), keys.float()).relu()
        scores = (heard * weight[..., None]).sum(1)
        if any(_misses(ids, row[mask]) for ids, row, mask in zip(chosen, scores, seen, strict=True)):
            return WRONG
    return ""


def _misses(chosen: torch.Tensor, scores: torch.Tensor) -> bool:
    """Return whether `chosen` [topk] are not places of the best scores [seen], and -1 behind them."""
    count = min(len(chosen), len(scores))
    names = chosen[:count].long()
    if bool((chosen[count:] != -1).any()) or bool(((names < 0) | (names >= len(scores))).any()):
        return True
    least = scores.topk(count).values[-1] - TOLERANCE * scores.abs().max()
    return len(names.unique()) < count or bool((scores[names] < least).any())


def try_rms_norm(op: FusedOp, spec: NormSpec) -> str:
    """Run an `rms_norm` op on a few rows; return what is wrong, "" if nothing."""
    tiny = _Problem(op, spec)
    x, weight = tiny.draw(TOKENS, spec.features), tiny.draw(spec.features)
    out = tiny.poisoned(*x.shape)
    tiny.run(x=x, weight=weight, eps=EPS, out=out)
    return WRONG if _differs(out, _norm(x, weight)) else ""


def try_rotate_query(op: FusedOp, spec: AttentionSpec) -> str:
    """Run a `rotate_query` op both ways; return what is wrong, "" if nothing."""
    tiny = _Problem(op, spec)
    x, cos_sin = tiny.draw(TOKENS, spec.num_heads, spec.qk_rope_head_dim), tiny.angles()
    for interleaved in (True, False):
        out = tiny.poisoned(*x.shape)
        tiny.run(x=x, cos_sin=cos_sin, interleaved=interleaved, out=out)
        if _differs(out, tiny.rotate(x, cos_sin[:, None], interleaved)):
            return WRONG
    return ""


def try_write_latent(op: FusedOp, spec: AttentionSpec) -> str:
    """Run a `write_latent` op both ways, with queries if it rotates some; return what is wrong, or ""."""
    tiny, latent, width = _Problem(op, spec), spec.kv_lora_rank, spec.kv_lora_rank + spec.qk_rope_head_dim
    kv_a, weight, cos_sin = tiny.draw(TOKENS, width), tiny.draw(latent), tiny.angles()
    x = tiny.draw(TOKENS, spec.num_heads, spec.qk_rope_head_dim)
    stored, codes = (spec.token_bytes, tiny.torch.uint8) if spec.cache_format else (width, None)
    for interleaved in (True, False):
        cache = tiny.poisoned(2, 4, stored, dtype=codes)
        queries = {} if op.rotates is None else {"x": x, "out": tiny.poisoned(*x.shape)}
        given = {"kv_a": kv_a, "weight": weight, "eps": EPS, "cos_sin": cos_sin, "interleaved": interleaved}
        tiny.run(**queries, **given, slots=tiny.torch.tensor(SLOTS, device="cpu"), cache=cache)
        rows, slots = cache.flatten(0, 1).cpu(), list(SLOTS)
        right = (_norm(kv_a[:, :latent], weight), tiny.rotate(kv_a[:, latent:], cos_sin, interleaved))
        if spec.cache_format:
            if (rows == POISON).all(1).nonzero().flatten().tolist() != sorted({*range(8)} - {*SLOTS}):
                return WRONG
        elif any(map(_differs, rows[slots].split([latent, width - latent], dim=1), right)):
            return WRONG
        if queries and _differs(queries["out"], tiny.rotate(x, cos_sin[:, None], interleaved)):
            return WRONG
    return ""
