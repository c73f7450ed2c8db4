"""What chooses between two ways to compute a product: measurements, made once per process."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

from mla_backend_cpu import compilation
from mla_backend_cpu.library import Library


def fastest(*functions: Callable[[], object], rounds: int = 9) -> list[float]:
    """Time functions interleaved, and keep the fastest of each: other load can only slow them down."""
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, mine in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return [min(mine) for mine in samples]


Native = Callable[[bool, int], None]  # whether values are widened, and the number of threads


def _product(
    kernels: Library, tokens: int, inputs: int, outputs: int, fp32: bool = False
) -> tuple[Callable[[], object], Native]:
    """Return torch's product of ones, x [tokens, inputs] times [outputs, inputs], and the kernels'."""
    import torch

    ones = functools.partial(torch.ones, dtype=torch.float32 if fp32 else torch.bfloat16, device="cpu")
    pack, multiply = (
        getattr(kernels.functions, f"mla_{name}{'_fp32' * fp32}") for name in ("pack", "linear")
    )
    x, weight, out = ones(tokens, inputs), ones(outputs, inputs), ones(tokens, outputs)
    packed = ones(-(-outputs // 16) * 16 * inputs)
    pack(weight.data_ptr(), 0, inputs, 1, 1, outputs, inputs, packed.data_ptr(), 1)

    def native(wide: bool, threads: int) -> None:
        multiply(
            x.data_ptr(), inputs, 0, packed.data_ptr(), None, out.data_ptr(), outputs, 0,
            tokens, 1, inputs, outputs, wide, threads,
        )  # fmt: skip

    return lambda: torch.mm(x, weight.t(), out=out), native


@functools.cache
def widening_gain(kernels: Library) -> float:
    """Measure how much faster the kernels are with widened values than with bf16 pairs."""
    _, native = _product(kernels, 64, 1024, 512)
    pairs, wide = fastest(lambda: native(False, 1), lambda: native(True, 1))
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

    gains = []
    for tokens in (16, 512):
        of_torch, native = _product(kernels, tokens, 2048, 2048, fp32)
        theirs, ours = fastest(of_torch, functools.partial(native, False, torch.get_num_threads()))
        gains.append(theirs / ours)
    PRODUCT_GAINS[fp32] = math.sqrt(math.prod(gains))
    return PRODUCT_GAINS[fp32]


def torch_has_tiles() -> bool:
    """Return whether torch's products may use AMX, so that these kernels need not be faster."""
    return "amx_bf16" in compilation.processor_flags()
