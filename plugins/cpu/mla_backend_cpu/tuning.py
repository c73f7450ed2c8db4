"""Measurements, once per process, that decide between two ways to compute a product."""

from __future__ import annotations

import functools
import math

from mla_backend_cpu import instruction_sets
from mla_backend_cpu.fp32_linear import fastest
from mla_backend_cpu.library import Library


class _SpeedTrial:
    """A product of ones, computed in several ways."""

    def __init__(self, kernels: Library, tokens: int, inputs: int, outputs: int, fp32: bool = False) -> None:
        """`fp32`: the tensors are float32, not bfloat16."""
        import torch

        self._fp32 = fp32
        ones = functools.partial(torch.ones, dtype=torch.float32 if fp32 else torch.bfloat16, device="cpu")
        self._call = kernels.functions
        self._shape = (tokens, inputs, outputs)
        self._x, self._weight, self._out = ones(tokens, inputs), ones(outputs, inputs), ones(tokens, outputs)
        self._packed = ones(-(-outputs // 16) * 16 * inputs)
        pack = self._call.mla_pack_fp32 if self._fp32 else self._call.mla_pack
        pack(self._weight.data_ptr(), 0, inputs, 1, 1, outputs, inputs, self._packed.data_ptr(), 1)

    def native(self, wide: bool, threads: int) -> None:
        tokens, inputs, outputs = self._shape
        arguments = (
            self._x.data_ptr(), inputs, self._packed.data_ptr(), None, self._out.data_ptr(), outputs,
            tokens, inputs, outputs,
        )  # fmt: skip
        if self._fp32:
            self._call.mla_linear_fp32(*arguments, threads)
        else:
            self._call.mla_linear(*arguments, wide, threads)

    def torch(self) -> None:
        import torch

        torch.mm(self._x, self._weight.t(), out=self._out)


@functools.cache
def fp32_gain(kernels: Library) -> float:
    """Measure how much faster the kernels are with widened values than with bf16 pairs."""
    trial = _SpeedTrial(kernels, 64, 1024, 512)
    pairs, wide = fastest(lambda: trial.native(False, 1), lambda: trial.native(True, 1))
    return pairs / wide


# What `product_gain` has measured in this process: fp32 or not -> the gain.
PRODUCT_GAINS: dict[bool, float] = {}


@functools.cache
def product_gain(kernels: Library, fp32: bool, /) -> float:
    """Measure how much faster the kernels' products are than torch's, averaged over few and many tokens.

    `fp32`: of float32 tensors, else of bfloat16 ones. Only by position: a keyword would be another entry of
    the cache, so a second measurement, and a result would name a gain that decided nothing.
    """
    import torch

    threads = torch.get_num_threads()
    gains = []
    for tokens in (16, 512):
        trial = _SpeedTrial(kernels, tokens, 2048, 2048, fp32)
        theirs, ours = fastest(trial.torch, functools.partial(trial.native, False, threads))
        gains.append(theirs / ours)
    PRODUCT_GAINS[fp32] = math.sqrt(math.prod(gains))
    return PRODUCT_GAINS[fp32]


def torch_has_tiles() -> bool:
    """Return whether torch's products may use AMX, so that these kernels need not be faster."""
    return "amx_bf16" in instruction_sets.processor_flags()
