"""`linear` and `batched_linear`: a weight packed once, applied many times."""

from __future__ import annotations

import torch

from mla.conformance.checks.small_ops.kinds import PRODUCTS, both_ways, small_check
from mla.conformance.problems.small_call import check_small
from mla.conformance.problems.small_ops import MatMul, SmallProblem, host
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial, expect
from mla.verify.tolerances import same_bits
from mla_backends.api import Packed

# What 128 heads of 192 channels have, and more than 2^15; both are multiples of 128.
WIDE = (24_576, 33_024)


@check(
    "linear.product",
    scope=OP,
    kind="linear",
    catches="a weight that is transposed, or a last tile that is missing",
    fails="tiles",
)
def linear_product(trial: Trial) -> None:
    """The product is correct for one token and for many."""
    more = (MatMul(64, 512, 2048), MatMul(300, 128, 512), MatMul(5, 96, 70))
    check_small(trial, *products(0), *(() if trial.quick else more))


@check(
    "batched_linear.product",
    scope=OP,
    kind="batched_linear",
    catches="a head that gets its neighbour's weight",
    fails="tiles",
)
def batched_product(trial: Trial) -> None:
    """The product is correct for one token and for many."""
    more = (MatMul(64, 512, 128, 16), MatMul(300, 128, 512, 16), MatMul(5, 96, 70, 16))
    check_small(trial, *products(16), *(() if trial.quick else more))


def products(groups: int) -> list[MatMul]:
    """Return products of one token, some and many, and of odd widths."""
    return [*(MatMul(tokens, 128, 256, groups) for tokens in (1, 7, 130)), MatMul(5, 33, 17, groups)]


@small_check(
    "pack",
    kinds=PRODUCTS,
    catches="a layout that loses bits, so that a checkpoint cannot be saved again",
    fails="contract",
)
def pack(trial: Trial, example: SmallProblem) -> None:
    """unpack(pack(weight)) is the weight, bit for bit, whatever its strides."""
    for problem in (example, MatMul(1, 96, 70, getattr(example, "groups", 0))):
        with trial.case(problem.label):
            op = trial.require(problem.spec(trial.dtype, trial.device))
            weight = host(problem, trial.dtype).weight
            assert weight is not None
            for name, given in layouts(weight.to(trial.device, copy=True)).items():
                packed = op.pack(given)
                expect(isinstance(packed, Packed), f"pack() returned a {type(packed).__name__}")
                expect(packed.nbytes > 0, f"nbytes is {packed.nbytes}")
                expect(same_bits(given, weight), f"pack() changed the weight it was given ({name})")
                expect(same_bits(op.unpack(packed), weight), f"unpack() returns different bits ({name})")


def layouts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weight as a layer may pass it: contiguous, and as a view of a transposed one."""
    return {"contiguous": weight, "transposed": weight.mT.contiguous().mT}


@check("linear.bias", scope=OP, kind="linear", catches="a bias that is ignored")
def bias(trial: Trial) -> None:
    """A bias is added to every row."""
    check_small(trial, *(MatMul(tokens, 128, 256, biased=True) for tokens in (1, 7, 130)))


@check(
    "linear.wide",
    scope=OP,
    kind="linear",
    catches="more tiles of outputs than a grid was made for, or columns that are counted in 15 bits",
    fails="grid",
)
def wide(trial: Trial) -> None:
    """Every one of tens of thousands of outputs is right."""
    widths = WIDE[-1:] if trial.quick else WIDE
    check_small(trial, *both_ways(*(MatMul(3, 128, outputs) for outputs in widths)))
