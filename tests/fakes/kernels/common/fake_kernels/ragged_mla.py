"""FlashInfer's planned MLA attention: what a wrapper is planned with decides, and runs must fit it.

Like the real kernels, it takes batches that it serves wrongly: see `lose_keys` and `WORK_ITEMS`.
"""

from __future__ import annotations

import itertools
import math

import torch

import fake_kernels
from fake_kernels import check

WORK_ITEMS = 16384  # places in the tables of a plan
KEYS = 64  # in a tile, as on Hopper


class Plan:
    """Host lengths and pages of a batch."""

    def __init__(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        for name, tensor in {
            "qo_indptr": qo_indptr,
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
        }.items():
            check(tensor.dtype == torch.int32, f"{name} must be int32")
        check((head_dim_ckv, head_dim_kpe) == (512, 64), "no module for these head dims")
        e4m3 = kv_data_type == torch.float8_e4m3fn and q_data_type == torch.bfloat16
        plain = q_data_type == kv_data_type and q_data_type.itemsize == 2
        check(e4m3 or plain, "no module for these dtypes")
        self.starts = fake_kernels.host(qo_indptr).tolist()
        self.pages = fake_kernels.host(kv_indptr).tolist()
        self.indices = fake_kernels.host(kv_indices).clone()
        self.lens = fake_kernels.host(kv_len_arr).tolist()
        self.heads, self.page_size, self.causal, self.scale = num_heads, page_size, causal, sm_scale
        self.dtype, self.stored = q_data_type, kv_data_type
        for i, length in enumerate(self.lens):
            check(
                self.pages[i + 1] - self.pages[i] == -(-length // page_size), "kv_indptr does not fit kv_len"
            )
            queries = self.starts[i + 1] - self.starts[i]
            check(not causal or queries <= max(1, length), "qo_len > kv_len is not supported with causal")
        rows = self.starts[-1] * num_heads // max(1, len(self.lens))
        self.tile = 128 if rows > 64 else 64
        lengths = [stop - start for start, stop in itertools.pairwise(self.starts)]
        tiles = sum(-(-count * num_heads // self.tile) for count in lengths)
        check(tiles <= WORK_ITEMS, "CUDA error: an illegal memory access was encountered")

    def lost(self, request):
        """Yield the tokens whose last key is left out: token, for how many heads, which key."""
        queries = self.starts[request + 1] - self.starts[request]
        for end in range(self.tile, queries * self.heads, self.tile):
            token, heads = divmod(end, self.heads)
            key = self.lens[request] - queries + token
            if heads and 0 <= key < self.lens[request] and key % KEYS == 0:
                yield token, heads, key


def run(plan, q_nope, q_pe, ckv_cache, kpe_cache, out, lse, scales=(1.0, 1.0)):
    """Write out and the natural log-sum-exp; rows without keys stay as they are. `scales`: of e4m3."""
    check(plan is not None, "plan() must be called before run()")
    check(tuple(q_nope.shape) == (plan.starts[-1], plan.heads, 512), "q_nope does not fit the plan")
    check(tuple(q_pe.shape) == (plan.starts[-1], plan.heads, 64), "q_pe does not fit the plan")
    check(ckv_cache.shape[1] == kpe_cache.shape[1] == plan.page_size, "the cache's pages do not fit the plan")
    check((q_nope.dtype, ckv_cache.dtype) == (plan.dtype, plan.stored), "dtypes do not fit the plan")
    for tensor in (q_nope, q_pe, ckv_cache, kpe_cache, out):
        check(tensor.stride(-1) == 1, "the last dimension must be contiguous")
    parts = [fake_kernels.host(part) for part in (ckv_cache, kpe_cache)]
    if plan.stored != plan.dtype:
        parts = [part.float() * scale for part, scale in zip(parts, scales, strict=True)]
    cache = torch.cat(parts, dim=-1)
    q = torch.cat((fake_kernels.host(q_nope), fake_kernels.host(q_pe)), dim=-1)
    for i, length in enumerate(plan.lens):
        rows = slice(plan.starts[i], plan.starts[i + 1])
        if length == 0 or rows.start == rows.stop:
            continue
        table = plan.indices[plan.pages[i] : plan.pages[i + 1]][None]
        lens = torch.tensor([length])
        value, sums = fake_kernels.paged(q[None, rows], cache, table, lens, plan.scale, plan.causal, 512)
        if plan.causal:
            lose_keys(plan, i, q[rows], cache[table[0].long()].flatten(0, 1), value[0], sums[0])
        fake_kernels.host(out)[rows] = value[0].to(out.dtype)
        if lse is not None:
            fake_kernels.host(lse)[rows] = sums[0].float()


def lose_keys(plan, request, q, keys, value, sums):
    """Attend again what a tile's end cuts: the heads in front of it miss a key that starts a tile of keys."""
    for token, heads, key in plan.lost(request):
        part = fake_kernels.attend(q[token, :heads].double(), keys[:key].double(), plan.scale, 512)
        value[token, :heads], sums[token, :heads] = part


def check_output(tensor, shape, dtype, name):
    """Check an output a caller gives."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(f"Invalid shape or dtype of {name}: {tuple(tensor.shape)} {tensor.dtype}")
    check(name != "lse" or tensor.is_contiguous(), "lse is written as if it were contiguous")


def to_base_2(lse):
    fake_kernels.host(lse).div_(math.log(2))
