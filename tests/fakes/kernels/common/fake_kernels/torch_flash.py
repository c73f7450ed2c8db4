"""`aten::_flash_attention_forward` on the host: as torch's CUDA build computes it, and as torch_musa does."""

from __future__ import annotations

import contextlib
import itertools

import torch

import fake_kernels
from fake_kernels import check
from fake_kernels.varlen import varlen


def cuda(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, *, scale=None):
    """FlashAttention 2 as torch compiles it: equal widths, multiples of 8; lse [h, T], +inf without keys."""
    check(dropout_p == 0.0 and not debug, "the fake has only the plain case")
    check(value.shape == key.shape, "v must have shape (total_k, num_heads_k, head_size)")
    check(query.shape[2] % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
    out, lse = varlen(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal)
    return out, lse, *_unused()


def musa(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, *, scale=None):
    """torch_musa over muDNN: any width of values; lse [segments, h, longest], NaN behind a segment's end."""
    check(dropout_p == 0.0 and not debug, "the fake has only the plain case")
    out, lse = varlen(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal)
    bounds = cum_seq_q.tolist()
    padded = torch.full((len(bounds) - 1, query.shape[1], max_q), torch.nan)
    for segment, (first, stop) in enumerate(itertools.pairwise(bounds)):
        padded[segment, :, : stop - first] = lse[:, first:stop]
    return out, padded, *_unused()


def first_key(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, *rest, scale=None):
    """A kernel whose causal mask aligns the first query with the first key, as SDPA's does."""
    causal = rest[1]
    bounds = list(zip(*(cum.tolist() for cum in (cum_seq_q, cum_seq_k)), strict=True))
    parts = []
    for (q0, k0), (q1, k1) in itertools.pairwise(bounds):
        kept = min(q1 - q0, k1 - k0) if causal else k1 - k0  # no query sees a later key
        parts.append((query[q0:q1], key[k0 : k0 + kept], value[k0 : k0 + kept]))
    lens = [torch.tensor([0, *(part[side].shape[0] for part in parts)]).cumsum(0).int() for side in (0, 1)]
    whole = [torch.cat(side) for side in zip(*parts, strict=True)]
    return cuda(*whole, *lens, max_q, max_k, 0.0, causal, False, scale=scale)


def without_flash(*arguments, **keywords):
    """A build without the kernel: the operator is registered all the same."""
    raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")


@contextlib.contextmanager
def registered(kernel, *keys):
    """Make `kernel` what the operator runs under these dispatch keys, and count its calls."""

    def counted(*arguments, **keywords):
        fake_kernels.CALLS["_flash_attention_forward"] += 1
        return kernel(*arguments, **keywords)

    library = torch.library.Library("aten", "IMPL")
    try:
        for key in keys:
            library.impl("_flash_attention_forward", counted, key)
        yield
    finally:
        library._destroy()


def _unused():
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
