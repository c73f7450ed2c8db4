"""Products: for processors whose bf16 ones are slower than fp32 ones, and what chooses between ways.

Without AMX, bf16 products ran at half the speed of fp32 ones on the machines tried. There a product over many
tokens is faster with the weight widened block by block; the weight itself stays bf16, and so does what a
decode step streams. Sums are fp32 either way, rounded once.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mla_backend_cpu import instruction_sets
from mla_backend_cpu.library import Library
from mla_backends import FusedOp
from mla_backends.api import LinearSpec, Packed

if TYPE_CHECKING:
    import torch

MIN_TOKENS = 48  # from here on, widening the weight pays; below, reading it dominates
MIN_GAIN = 1.2  # fp32 must be this much faster to be used
# Elements of a widened block: 32 MiB of fp32 bound the scratch memory; smaller blocks were slower.
BLOCK = 1 << 23


class _Widening(FusedOp):
    """What both ops share: when they serve, and fp32 scratch memory."""

    def __init__(self, policy: str = "auto") -> None:
        self._policy = policy  # "auto" measures, "on" and "off" do not
        self._scratch: dict[str, torch.Tensor] = {}

    def unsupported_reasons(self, spec: LinearSpec) -> list[str]:
        import torch

        if spec.dtype != torch.bfloat16:
            return [f"it widens bfloat16 weights, but this layer's are {spec.dtype}"]
        if self._policy == "off":
            return ["disabled by the option fp32=off"]
        if self._policy == "auto" and fp32_gain() < MIN_GAIN:
            return [f"fp32 products were measured at only {fp32_gain():.2f}x the speed of bfloat16 ones here"]
        return []

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        """Return fp32 scratch memory, which grows to the largest use and is kept."""
        import torch

        size = math.prod(shape)
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                held = self._scratch[name] = torch.empty(size, device="cpu")
        return held[:size].view(shape)


class Fp32Linear(_Widening):
    """y = x W^T + b with bf16 tensors and fp32 products."""

    contract = "linear/1"

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        import torch

        weight = packed.data  # [o, i]
        if x.shape[0] >= MIN_TOKENS:
            self._widened(weight, x, bias, out)
        elif bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def _widened(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        import torch

        tokens, inputs = x.shape
        step = max(256, BLOCK // inputs)
        wide_x = self._take("x", tokens, inputs).copy_(x)
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            wide = self._take("weight", *rows.shape).copy_(rows)
            product = torch.mm(wide_x, wide.t(), out=self._take("product", tokens, len(rows)))
            if bias is not None:
                product += bias[start : start + step]
            out[:, start : start + step] = product


class Fp32BatchedLinear(_Widening):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i] with bf16 tensors and fp32 products."""

    contract = "batched_linear/1"

    def pack(self, weight: torch.Tensor) -> Packed:
        rows = weight.transpose(1, 2).contiguous()  # [h, i, o]
        return Packed(rows, rows.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        weight: torch.Tensor = packed.data.transpose(1, 2)
        return weight

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        import torch

        weight, by_head = packed.data, x.transpose(0, 1)
        if x.shape[0] >= MIN_TOKENS:
            by_head = self._take("x", *by_head.shape).copy_(by_head)
            weight = self._take("weight", *weight.shape).copy_(weight)
        out.transpose(0, 1).copy_(torch.bmm(by_head, weight))


@functools.cache
def fp32_gain() -> float:
    """Measure once per process how much faster a product of many tokens is in fp32, widening included."""
    import torch

    x, weight = (torch.ones(256, 1024, dtype=torch.bfloat16, device="cpu") for _ in range(2))
    wide_x, wide = x.float(), weight.float()

    def widened() -> None:
        torch.mm(wide_x, wide.copy_(weight).t())

    narrow, broad = fastest(lambda: torch.mm(x, weight.t()), widened)
    return narrow / broad


def fastest(*functions: Callable[[], object], rounds: int = 9) -> list[float]:
    """Time functions interleaved, and keep the fastest of each: other load can only slow them down."""
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, mine in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return [min(mine) for mine in samples]


# ------------------------------------------------------------------------------------------- tuning
# Measurements, once per process, that decide between two ways to compute a product.
class _SpeedTrial:
    """A product of ones, computed in several ways."""

    def __init__(self, kernels: Library, tokens: int, inputs: int, outputs: int, fp32: bool = False) -> None:
        """`fp32`: the tensors are float32, not bfloat16."""
        import torch

        ones = functools.partial(torch.ones, dtype=torch.float32 if fp32 else torch.bfloat16, device="cpu")
        pack, self._multiply = (
            getattr(kernels.functions, f"mla_{name}{'_fp32' * fp32}") for name in ("pack", "linear")
        )
        self._shape = (tokens, inputs, outputs)
        self._x, self._weight, self._out = ones(tokens, inputs), ones(outputs, inputs), ones(tokens, outputs)
        self._packed = ones(-(-outputs // 16) * 16 * inputs)
        pack(self._weight.data_ptr(), 0, inputs, 1, 1, outputs, inputs, self._packed.data_ptr(), 1)

    def native(self, wide: bool, threads: int) -> None:
        tokens, inputs, outputs = self._shape
        self._multiply(
            self._x.data_ptr(), inputs, 0, self._packed.data_ptr(), None, self._out.data_ptr(), outputs, 0,
            tokens, 1, inputs, outputs, wide, threads,
        )  # fmt: skip

    def torch(self) -> None:
        import torch

        torch.mm(self._x, self._weight.t(), out=self._out)


@functools.cache
def widening_gain(kernels: Library) -> float:
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
