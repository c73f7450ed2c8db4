"""tokenspeed-mla 2.0.4 (wheel of 2026-11): decoding and prefill, compiled at first use by CuTe DSL.

Facts, all read in the wheel:

- mla_decode.py, `tokenspeed_mla_decode`: dtypes, the workspace's dtype and size, what is returned; the lse is
  a tensor of zeros until the kernel writes it. Devices (mla_helpers.py) are SM100, SM103 and SM107.
- mla_decode_fp16.py, `can_implement`: latents of 512 + 64, at most 128 heads, pages of 2 to 128 tokens.
- The same, `load_page_table`: tiles of 128 keys; pages behind the table's end are page 0. What is behind a
  request's end is multiplied by zero.
- The same, `write_empty_output` is reached only with `local_visible_lens`: without it, a row without keys is
  left unwritten where there is one split, and is 0 times 1/0 where there are several.
- The same, `reduction_kernel`: the lse is in base 2, [B, q_len, H].
- fmha.py, `__call__`: q, k and v are read from their first element as if they were contiguous. The grid
  covers `max_seq_len_q` in tiles of 256. `correction_epilog`: the lse is natural, [T, h].
- mla_prefill.py, `tokenspeed_mla_prefill`: the errors for `out`, which is always bfloat16.
- Both compile for addresses that are multiples of 16 bytes (`assumed_align=16`).
- __init__.py: without CuTe DSL the import succeeds, and functions raise ImportError when they are called: see
  the fake `tokenspeed_bare`.
"""

from __future__ import annotations

import math

import fake_kernels
import torch
from fake_kernels import check

__all__ = ["tokenspeed_mla_decode", "tokenspeed_mla_prefill"]

MULTIPROCESSORS = 148
TILE = 128


def check_device():
    capability = fake_kernels.CAPABILITY["tokenspeed_mla"]
    if capability not in ((10, 0), (10, 3), (10, 7)):
        raise ValueError(f"MLA decode requires SM100, SM103 or SM107, got {capability}")


def tokenspeed_mla_decode(
    query,
    kv_cache,
    workspace_buffer,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    softmax_scale,
    output_scale=1.0,
    out=None,
    is_var_seq=True,
    causal_mask=True,
    window_left=-1,
    enable_pdl=False,
    return_lse=False,
    causal_seqs=None,
    cp_world=1,
    cp_rank=0,
    cp_interleave_size=1,
    *,
    min_split_kv=1,
    local_visible_lens=None,
):
    fake_kernels.CALLS["tokenspeed_mla_decode"] += 1
    assert query.dtype in (torch.float16, torch.bfloat16), f"got {query.dtype}"
    assert kv_cache.dtype == query.dtype, (
        f"kv_cache dtype {kv_cache.dtype} must match query dtype {query.dtype}"
    )
    batch, queries, heads, width = query.shape
    assert width == kv_lora_rank + qk_rope_head_dim
    assert (output_scale, is_var_seq, window_left, cp_world) == (1.0, True, -1, 1), "the fake is plain"
    assert causal_seqs is None, "the fake is plain"
    assert local_visible_lens is None, "the fake is plain"
    if max_seq_len <= 0:
        raise ValueError(f"max_seq_len must be > 0, got {max_seq_len}")
    check_device()
    splits = check_workspace(workspace_buffer, batch, queries, heads)
    page = kv_cache.shape[1]
    if (kv_lora_rank, qk_rope_head_dim) != (512, 64) or not 0 < heads <= 128 or page == 1 or TILE % page:
        raise ValueError(f"tokenspeed_mla_decode: unsupported configuration (page_size={page})")
    check_tensors(query, kv_cache, block_tables, seq_lens, out)
    check(
        bool((fake_kernels.host(seq_lens) <= max_seq_len).all()), "the fake holds max_seq_len to be a bound"
    )
    values, sums = attend(query, kv_cache, block_tables, seq_lens, softmax_scale, causal_mask)
    empty = fake_kernels.host(seq_lens) == 0
    values[empty], sums[empty] = math.nan, 0.0 if splits == 1 else -math.inf
    result = fake_kernels.device_like(values, query, query.dtype)
    if out is not None:
        fake_kernels.host(out).copy_(fake_kernels.host(result))
        result = out
    return (result, fake_kernels.device_like(sums, query, torch.float32)) if return_lse else result


def check_workspace(workspace, batch, queries, heads):
    """Check what partial results need, and return how many there are per row."""
    fold = max(n for n in range(1, queries + 1) if queries % n == 0 and (n == 1 or heads * n <= TILE))
    tiles = min(queries // fold, -(-heads * queries // TILE))
    packed = tiles < queries // fold
    splits = min(32, max(1, MULTIPROCESSORS // batch // (2 * tiles)))
    rows = TILE * tiles if packed else heads * queries
    size = 0 if splits == 1 else batch * rows * splits * 513 * 4
    assert workspace.dtype == torch.int8, f"workspace_buffer must be torch.int8, got {workspace.dtype}"
    assert workspace.numel() >= size, (
        f"workspace_buffer too small: {workspace.numel()} bytes, need {size} bytes"
    )
    return splits


def check_aligned(*tensors):
    for tensor in tensors:
        check(tensor is None or fake_kernels.host(tensor).data_ptr() % 16 == 0, "misaligned address")


def check_tensors(query, kv_cache, table, lens, out):
    check_aligned(query, kv_cache, out)
    check(query.stride(-1) == 1 and kv_cache.stride(-1) == 1, "the last stride must be 1")
    check(table.dtype == torch.int32 and table.is_contiguous(), "page_table must be compact int32")
    check(table.shape[0] == query.shape[0], "page_table has another batch size")
    check(lens.dtype == torch.int32 and lens.shape == query.shape[:1], "cache_seqs must be int32 [B]")
    if out is not None:
        check(out.is_contiguous() and out.dtype == query.dtype, "o must be compact, in the dtype of q")
        check(out.shape == (*query.shape[:3], 512), "o has another shape")
    devices = {tensor.device for tensor in (query, kv_cache, table, lens)}
    check(len(devices) == 1, f"tensors are on {devices}")


def attend(query, kv_cache, table, lens, scale, causal):
    """Return out [b, s, h, 512] and lse [b, s, h] in base 2, float64, over whole tiles of pages."""
    q, cache, rows = fake_kernels.host(query).double(), fake_kernels.host(kv_cache), fake_kernels.host(table)
    per_tile = TILE // cache.shape[1]
    out = torch.full((*q.shape[:3], 512), math.nan, dtype=torch.float64)
    lse = torch.full(q.shape[:3], math.nan, dtype=torch.float64)
    for b, length in enumerate(fake_kernels.host(lens).tolist()):
        count = -(-length // TILE) * per_tile
        pages = [int(rows[b, i]) if i < rows.shape[1] else 0 for i in range(count)]
        keys = cache[pages].reshape(-1, cache.shape[2]).double()
        for s in range(q.shape[1]):
            seen = length - (q.shape[1] - 1 - s) if causal else length
            if seen > 0:
                out[b, s], sums = fake_kernels.attend(q[b, s], keys[:seen], scale, 512)
                out[b, s] += (0.0 * keys[length:, :512]).sum(0)
                lse[b, s] = sums / math.log(2)
    return out, lse


def tokenspeed_mla_prefill(
    query,
    key,
    value,
    seq_lens,
    cum_seq_lens,
    max_seq_len,
    batch_size,
    softmax_scale,
    is_causal=True,
    return_lse=False,
    cum_seq_lens_q=None,
    max_seq_len_q=None,
    enable_pdl=False,
    out=None,
):
    fake_kernels.CALLS["tokenspeed_mla_prefill"] += 1
    check_device()
    check_aligned(query, key, value, out)
    check(query.dtype == key.dtype == value.dtype, "Type mismatch")
    check(query.dtype in (torch.bfloat16, torch.float16), "the fake has no fp8")
    tokens, heads, width = query.shape
    assert (width, value.shape[2]) == (192, 128), "When Headdim is a tuple, it's for MLA. Must be (192, 128)"
    shape = (tokens, heads, 128)
    if out is not None:
        check_out(out, shape, query)
    values = torch.full(shape, math.nan, dtype=torch.float64)
    lse = torch.full((tokens, heads), math.nan, dtype=torch.float64)
    bounds = [
        fake_kernels.host(cu).tolist()
        for cu in (cum_seq_lens if cum_seq_lens_q is None else cum_seq_lens_q, cum_seq_lens)
    ]
    check(len(bounds[0]) == len(bounds[1]) == batch_size + 1, "batch_size does not fit the bounds")
    covered = -(-(max_seq_len if max_seq_len_q is None else max_seq_len_q) // 256) * 256
    q, k, v = (dense(tensor).double() for tensor in (query, key, value))
    for i in range(batch_size):
        queries, keys = (bound[i + 1] - bound[i] for bound in bounds)
        rows = slice(bounds[1][i], bounds[1][i + 1])
        for j in range(min(queries, covered)):
            seen = keys - (queries - 1 - j) if is_causal else keys
            place = bounds[0][i] + j
            if keys == 0:
                values[place], lse[place] = 0.0, -math.inf
            elif seen > 0:  # else 0 times 1/0
                logits = torch.einsum("hd,nhd->hn", q[place], k[rows][:seen]) * softmax_scale
                lse[place] = logits.logsumexp(-1)
                values[place] = torch.einsum("hn,nhd->hd", logits.softmax(-1), v[rows][:seen])
    result = fake_kernels.device_like(values, query, torch.bfloat16)
    if out is not None:
        fake_kernels.host(out).copy_(fake_kernels.host(result))
        result = out
    return (result, fake_kernels.device_like(lse, query, torch.float32)) if return_lse else result


def check_out(out, shape, query):
    if out.shape != shape:
        raise ValueError(f"out shape must be {shape}, got {out.shape}")
    if out.dtype != torch.bfloat16:
        raise TypeError(f"out dtype must be torch.bfloat16, got {out.dtype}")
    if out.device != query.device:
        raise ValueError(f"out device {out.device} must match query {query.device}")
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


def dense(tensor):
    """Return what the kernel reads: the tensor's number of elements, in order from its first."""
    raw = fake_kernels.host(tensor)
    strides = [math.prod(raw.shape[i + 1 :]) for i in range(raw.dim())]
    return torch.as_strided(raw, raw.shape, strides, raw.storage_offset())
