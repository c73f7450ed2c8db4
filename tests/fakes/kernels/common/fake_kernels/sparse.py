"""Sparse attention of `flash_mla` for DeepSeek-V3.2, over bytes and over bf16 rows."""

from __future__ import annotations

import math

import torch

import fake_kernels
from fake_kernels import check

LATENT, TOKEN, TILE = 512, 656, 64
IMA = "CUDA error: an illegal memory access was encountered"


def check_queries(q, indices, tile):
    """Check what both kernels do: q [.., h, 576] and indices [.., topk]."""
    check(fake_kernels.CAPABILITY["flash_mla"] in ((9, 0), (10, 0)), "Unsupported architecture")
    check(q.dtype == torch.bfloat16, "q must have dtype bfloat16")
    check(q.shape[-1] == 576, f"Unsupported d_qk: {q.shape[-1]}")
    check(q.shape[-2] in (64, 128), f"Unsupported h_q: {q.shape[-2]}")
    check(q.is_contiguous(), "Expected q.stride(1) == d_qk")
    check(q.data_ptr() % 16 == 0, "The base address of q must be 16B aligned")
    check(indices.dtype == torch.int32, "indices must have dtype int32")
    check(indices.is_contiguous(), "indices must be contiguous")
    topk = indices.shape[-1]
    check(topk > 0, "topk must be positive")
    check(topk % tile == 0, f"topk ({topk}) mod B_TOPK ({tile}) must be 0")


def tokens(cache, cut=False):
    """Return rows [n, 576] in float64 of bytes [n, 656]; Blackwell's kernels cut scales to powers of two."""
    rows = fake_kernels.host(cache).contiguous().view(-1, TOKEN)
    latents = rows[:, :LATENT].contiguous().view(torch.float8_e4m3fn).double().unflatten(1, (4, 128))
    bits = rows[:, LATENT : LATENT + 16].contiguous().view(torch.int32)
    if cut:
        bits = bits & 0x7F800000
    scales = bits.view(torch.float32).double()[..., None]
    keys = rows[:, LATENT + 16 :].contiguous().view(torch.bfloat16).double()
    return torch.cat(((latents * scales).flatten(1), keys), dim=1)


def attend(q, rows, indices, scale, named):
    """Attend q [n, h, 576] to `rows` by indices [n, topk] that are `named`: out [n, h, 512], lse [n, h]."""
    q, indices = fake_kernels.host(q).double(), fake_kernels.host(indices).long()
    out = torch.empty(*q.shape[:2], LATENT, dtype=torch.float64)
    lse = torch.empty(q.shape[:2], dtype=torch.float64)
    for token, chosen in enumerate(indices):
        keys = rows[chosen[named(chosen)]].double()
        out[token], lse[token] = fake_kernels.attend(q[token], keys, scale, LATENT)
    return out, lse


def decode(meta, q, k_cache, indices, head_dim_v, softmax_scale):
    """Return out [b, s, h, 512] and lse [b, h, s]; only -1 is no token, and no other index is checked."""
    b, s, h, _ = q.shape
    check_queries(q, indices, TILE)
    check(k_cache.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn), "kcache must have bytes")
    check(k_cache.shape[2:] == (1, TOKEN), f"Unsupported bytes_per_token: {k_cache.shape[3]}")
    check(k_cache.is_contiguous(), "The whole block must be contiguous when is_fp8_cache is True")
    check(head_dim_v == LATENT, "Only head_size_v == 512 is supported")
    check(indices.shape[:2] == (b, s), "indices must be [b, s_q, topk]")
    config = (b, s, h, *k_cache.shape[1:3], indices.shape[2])
    meta.have_initialized, meta.config = True, meta.config or config
    assert meta.config == config, f"sched_meta.config {meta.config} is not {config}"
    cut = fake_kernels.CAPABILITY["flash_mla"] != (9, 0)
    rows, names = tokens(k_cache, cut), fake_kernels.host(indices)
    check(bool(((names >= -1) & (names < len(rows))).all()), IMA)
    flat = q.flatten(0, 1), rows, indices.flatten(0, 1), softmax_scale or q.shape[-1] ** -0.5
    out, lse = attend(*flat, lambda chosen: chosen != -1)
    lse = lse.unflatten(0, (b, s)).transpose(1, 2)
    return (
        fake_kernels.device_like(out.unflatten(0, (b, s)), q, q.dtype),
        fake_kernels.device_like(lse, q, torch.float32),
    )


def prefill(q, kv, indices, sm_scale, d_v):
    """Return out [s_q, h, 512], the largest logits and lse [s_q, h]; what is no row of kv is no token."""
    wide = q.shape[1] == 128 and fake_kernels.CAPABILITY["flash_mla"] == (10, 0)
    check_queries(q, indices, 2 * TILE if wide else TILE)
    check(kv.dtype == torch.bfloat16, "kv must have dtype bfloat16")
    check(kv.shape[1:] == (1, 576), "q/kv have other d_qk")
    check(d_v == LATENT, "Only d_v == 512 is supported")
    check(indices.shape[:2] == (len(q), 1), "indices must be [s_q, h_kv, topk]")
    rows = fake_kernels.host(kv)[:, 0]
    out, lse = attend(q, rows, indices[:, 0], sm_scale, lambda chosen: (chosen >= 0) & (chosen < len(rows)))
    most = lse.new_full(lse.shape, math.nan)  # nobody here reads it
    return tuple(
        fake_kernels.device_like(part, q, dtype)
        for part, dtype in ((out, q.dtype), (most, torch.float32), (lse, torch.float32))
    )
