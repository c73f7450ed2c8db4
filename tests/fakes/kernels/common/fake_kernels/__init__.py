"""What the fake kernels share: checks that fail like the real ones, and attention in float64."""

from __future__ import annotations

import collections
import math

import torch

# Package -> the capability of the device it believes to run on.
CAPABILITY = {
    "flash_mla": (9, 0), "mate": (3, 1), "tokenspeed_mla": (10, 0),
    "flashinfer sparse": (10, 0),
}  # fmt: skip
# Package -> whether its optional half was built.
HAS_LEGACY = {"flash_mla": True}
# Function -> how often it was called.
CALLS = collections.Counter()


def host(tensor):
    """Return the tensor on the host; a tensor of an emulated device may carry its numbers in `raw`."""
    tensor = getattr(tensor, "raw", tensor)
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def device_like(values, like, dtype=None):
    """Return `values` as a new contiguous tensor on the device of `like`."""
    target = torch.empty(values.shape, dtype=dtype or values.dtype, device=like.device)
    inner = getattr(target, "raw", target)
    inner.copy_(values)
    return target


def check(condition, message):
    """Fail as an extension module does."""
    if not condition:
        raise RuntimeError(message)


def check_table(name, tensor, shape):
    check(tensor.dtype == torch.int32, f"{name} must have dtype int32")
    check(tensor.stride(-1) == 1, f"{name} must have contiguous last dimension")
    check(tuple(tensor.shape) == tuple(shape), f"{name} must have shape {tuple(shape)}")


def attend(q, keys, scale, width):
    """Attend q [h, d] over keys [n, d], whose first `width` columns are the values: out [h, width], lse [h].

    Without a key the output is 0 and the log-sum-exp +inf, as FlashMLA has it.
    """
    if keys.shape[0] == 0:
        return torch.zeros(q.shape[0], width, dtype=torch.float64), torch.full(q.shape[:1], math.inf).double()
    logits = q @ keys.T * scale
    lse = logits.logsumexp(-1)
    return (logits - lse[:, None]).exp() @ keys[:, :width], lse


def paged(q, cache, table, lens, scale, causal, width):
    """Attend q [b, s, h, d] over pages [n, page, d]: out [b, s, h, width] and lse [b, s, h], float64.

    The last page is multiplied whole: what is behind a request's end must be finite.
    """
    q, cache, rows = host(q).double(), host(cache), host(table).tolist()
    page = cache.shape[1]
    out = torch.empty(*q.shape[:3], width, dtype=torch.float64)
    lse = torch.empty(q.shape[:3], dtype=torch.float64)
    for b, length in enumerate(host(lens).tolist()):
        pages = cache[rows[b][: -(-length // page)]].reshape(-1, cache.shape[2]).double()
        for s in range(q.shape[1]):
            seen = max(0, length - (q.shape[1] - 1 - s)) if causal else length
            out[b, s], lse[b, s] = attend(q[b, s], pages[:seen], scale, width)
            out[b, s] += (0.0 * pages[length:, :width]).sum(0)
    return out, lse


# ------------------------------------------------------------------------------------------- planning


def fingerprint(lens, query_rows):
    """Return eight int32 that tell lengths apart, as a row of scheduler metadata."""
    values = host(lens).long()
    place = torch.arange(1, len(values) + 1)
    mixed = ((values + 1) * place * 7919 % 1000003).sum() % 1000003
    return torch.tensor([len(values), query_rows, int(values.sum()), int(mixed), 0, 0, 0, 0]).int()


def schedule(lens, query_rows, parts):
    """Return metadata [parts, 8] and splits [b + 1], both int32, on the device of `lens`."""
    check(lens.dtype == torch.int32, "seqlens_k must have dtype int32")
    check(lens.is_contiguous(), "seqlens_k must be contiguous")
    metadata = fingerprint(lens, query_rows).repeat(parts, 1)
    splits = torch.arange(lens.shape[0] + 1, dtype=torch.int32)
    return device_like(metadata, lens), device_like(splits, lens)


def check_schedule(metadata, splits, lens, query_rows):
    """Raise for a plan of other lengths, which the real kernel would follow, missing or inventing keys."""
    check_table("tile_scheduler_metadata", metadata, (metadata.shape[0], 8))
    check_table("num_splits", splits, (lens.shape[0] + 1,))
    planned, called = host(metadata)[0], fingerprint(lens, query_rows)
    check(torch.equal(planned, called), f"planned for {planned.tolist()}, called with {called.tolist()}")


# ------------------------------------------------------------------------------------------- flash_mla


def check_decode(q, k_cache, block_table, cache_seqlens, head_dim_v, *, dtypes, widths=(576,), page=64):
    """Check what every dense `flash_mla` decode does."""
    check(q.dtype in dtypes, "Unsupported dtype for query tensor")
    check(k_cache.dtype == q.dtype, "query and key must have the same dtype")
    check(q.dim() == 4 and k_cache.dim() == 4, "q and kcache must have 4 dimensions")
    check(q.stride(-1) == 1, "q must have contiguous last dimension")
    check(k_cache.stride(-1) == 1, "kcache must have contiguous last dimension")
    check(q.shape[0] > 0, "batch size must be positive")
    check(q.shape[3] in widths, f"Only head_size_k in {widths} is supported")
    check(k_cache.shape[3] == q.shape[3], "kcache must have the head size of q")
    check(head_dim_v == 512, "Only head_size_v == 512 is supported")
    check(k_cache.shape[2] == 1, "the fake has one key head")
    check(page is None or k_cache.shape[1] == page, f"Currently page_block_size must be {page}")
    check_table("seqlens_k", cache_seqlens, (q.shape[0],))
    check_table("block_table", block_table, (q.shape[0], block_table.shape[1]))
    devices = {tensor.device for tensor in (q, k_cache, block_table, cache_seqlens)}
    check(len(devices) == 1, f"tensors are on {devices}")


def unplanned(q, width):
    """Return what a plan without parts leaves: memory nobody wrote."""
    b, s, h, _ = q.shape
    return q.new_full((b, s, h, width), math.nan), q.new_full((b, h, s), math.nan, dtype=torch.float32)


def decode(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal):
    """Return out [b, s, h, dv] in the dtype of q and lse [b, h, s] fp32; the mask is off for one query."""
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    causal = causal and q.shape[1] > 1
    cache = k_cache.squeeze(2)
    out, lse = paged(q, cache, block_table, cache_seqlens, softmax_scale, causal, head_dim_v)
    return device_like(out, q, q.dtype), device_like(lse.transpose(1, 2), q, torch.float32)
