"""A kernel is compiled once for all steps of a decode: a compilation within a step takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.triton.recording import Launch, Recorder
from mla_backends.api import AttentionSpec, SegmentLengths
from mla_backends.triton_ops import Tile, Tuning, triton_ops

CPU = torch.device("cpu")
SPEC = AttentionSpec(16, 512, 128, 64, 128, 0.1, torch.bfloat16, CPU)
TUNING = Tuning({1: Tile(16, 32, 4, 2), 33: Tile(64, 32, 8, 2)}, {1: Tile(64, 32, 4, 2)})


def specialization(launch: Launch) -> tuple[Any, ...]:
    """Return what Triton compiles a launch for: constants, types, and values and alignments it looks at."""

    def seen(name: str, value: Any) -> Any:
        parameter = next(candidate for candidate in launch.kernel.params if candidate.name == name)
        if isinstance(value, torch.Tensor):
            aligned = None if parameter.do_not_specialize else value.data_ptr() % 16 == 0
            return value.dtype, aligned
        if parameter.is_constexpr or value is None:
            return value
        if isinstance(value, float) or parameter.do_not_specialize:
            return type(value)
        return value == 1, value % 16 == 0

    arguments = {name: seen(name, value) for name, value in launch.arguments.items()}
    return launch.kernel.fn.__name__, launch.warps, launch.stages, tuple(sorted(arguments.items()))


def decode(ops: dict[str, Any], kv_lens: tuple[int, ...], page: int) -> None:
    """Plan and run one decode step, its tables in one buffer as in the layer, so that their places move."""
    requests, width = len(kv_lens), -(-max(kv_lens) // page)
    buffer = torch.zeros(3 * requests + 1 + requests * width, dtype=torch.int32)
    lens, cu_q, pages = buffer[requests:].split((requests, requests + 1, requests * width))
    batch = SimpleNamespace(
        query_lens=(1,) * requests, kv_lens=kv_lens, page_size=page, block_table=pages.view(requests, width)
    )
    op, bf16 = ops["triton_latent"], torch.bfloat16
    op(
        op.prepare(SPEC, batch),
        q=torch.empty(requests, 16, 576, dtype=bf16),
        cache=torch.empty(4, page, 576, dtype=bf16),
        block_table=batch.block_table,
        kv_lens=lens,
        cu_q=cu_q,
        softmax_scale=0.1,
        out=torch.empty(requests, 16, 512, dtype=bf16),
        lse=None,
    )


def compiled(run: Any, *calls: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield what each launch of all calls is compiled for."""
    recorder = Recorder()
    ops = triton_ops(TUNING, 132, recorder)
    for call in calls:
        run(ops, *call)
    yield from map(specialization, recorder.recorded)


@pytest.mark.parametrize("requests", [1, 3, 16, 200])
@pytest.mark.parametrize("page", [16, 64])
def test_a_decode_step_is_compiled_once_whatever_its_lengths(requests: int, page: int) -> None:
    """From no split to many, over borders of pages, with tables of any width and alignment."""
    lengths = [*range(60, 400, 7), 1000, 1024, 5000, 40_000]
    calls = [(tuple(length + number for number in range(requests)), page) for length in lengths]
    kernels = set(compiled(decode, *calls))
    assert {kernel[0] for kernel in kernels} <= {"attend_latent", "merge_latent"}
    assert len(kernels) == len({kernel[0] for kernel in kernels})


def prefill(ops: dict[str, Any], lengths: tuple[int, ...]) -> None:
    op, tokens, bf16 = ops["triton_expanded"], sum(lengths), torch.bfloat16
    state = op.prepare(SPEC, SegmentLengths(lengths, lengths, causal=True))
    wide = torch.empty(tokens, 16, 320, dtype=bf16)
    op(
        state,
        q=wide[..., :192],
        k=torch.empty(tokens, 16, 192, dtype=bf16),
        v=wide[..., 192:],
        softmax_scale=0.1,
        out=torch.empty(tokens, 16, 128, dtype=bf16),
        lse=torch.empty(tokens, 16),
    )


def test_prompts_of_any_length_are_compiled_once() -> None:
    ragged = [((5, 9),), ((17, 300, 33),), ((1, 2, 3, 4, 5),), ((64, 65),)]
    assert len(set(compiled(prefill, *ragged))) == 1
