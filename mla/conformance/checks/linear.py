"""`linear` and `batched_linear`: a weight packed once, applied many times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mla.conformance.problems.tensors import blank, draw, expect_margin, place
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial, expect
from mla.reference import REFERENCE
from mla.verify.op_oracle import product
from mla.verify.tolerances import same_bits
from mla_backends.api import FusedOp, LinearSpec, Packed


@dataclass(frozen=True)
class MatMul:
    """x [T, i] or [T, h, i] times a weight [o, i] or [h, o, i]."""

    tokens: int
    inputs: int
    outputs: int
    groups: int = 0  # heads of batched_linear; 0 is linear
    biased: bool = False
    seed: int = 0

    @property
    def kind(self) -> str:
        return "batched_linear" if self.groups else "linear"

    @property
    def label(self) -> str:
        heads = f"{self.groups} heads, " * bool(self.groups)
        return f"{self.tokens} tokens, {heads}{self.inputs} to {self.outputs}{', bias' * self.biased}"

    def spec(self, dtype: torch.dtype, device: torch.device) -> LinearSpec:
        return LinearSpec(self.inputs, self.outputs, max(1, self.groups), dtype, device)


@dataclass(frozen=True)
class HostProduct:
    """The host's side of a product."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    truth: torch.Tensor  # float64


@functools.lru_cache(maxsize=64)
def host(problem: MatMul, dtype: torch.dtype) -> HostProduct:
    """Draw x ~ N(0, 1) and a weight ~ N(0, 1 / inputs), and multiply in float64."""
    heads = (problem.groups,) * bool(problem.groups)
    x = draw(problem.tokens, *heads, problem.inputs, dtype=dtype, seed=problem.seed)
    weight = draw(*heads, problem.outputs, problem.inputs, seed=problem.seed + 1) * problem.inputs**-0.5
    weight = weight.to(dtype)
    bias = draw(problem.outputs, dtype=dtype, seed=problem.seed + 2) if problem.biased else None
    return HostProduct(x, weight, bias, product(x, weight, bias))


def run(
    op: FusedOp,
    packed: Packed,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Apply the op: a weight per head has no bias."""
    if x.dim() == 3:
        op(packed, x=x, out=out)
    else:
        op(packed, x=x, bias=bias, out=out)
    return out


@functools.lru_cache(maxsize=64)
def reference(problem: MatMul, dtype: torch.dtype) -> torch.Tensor:
    """Return what the reference gives on the host."""
    op, one = REFERENCE[problem.kind], host(problem, dtype)
    return run(op, op.pack(one.weight), one.x, one.bias, torch.empty(one.truth.shape, dtype=dtype))


def check_product(trial: Trial, problem: MatMul, strided: bool = False) -> None:
    """Compare one product with the truth."""
    with trial.case(problem.label):
        op, one = trial.require(problem.spec(trial.dtype, trial.device)), host(problem, trial.dtype)
        packed = op.pack(one.weight.to(trial.device, copy=True))
        x = place(one.x, trial.device, strided)
        bias = None if one.bias is None else one.bias.to(trial.device, copy=True)
        out = run(op, packed, x, bias, blank(tuple(one.truth.shape), trial.dtype, trial.device, strided))
        trial.judge(out, one.truth, reference(problem, trial.dtype), "out")
        if strided:
            expect_margin(out)


def check_pack(trial: Trial, problem: MatMul) -> None:
    """Check that packing preserves the weight, and leaves the original alone."""
    with trial.case(problem.label):
        op = trial.require(problem.spec(trial.dtype, trial.device))
        weight = host(problem, trial.dtype).weight
        for name, given in layouts(weight.to(trial.device, copy=True)).items():
            packed = op.pack(given)
            expect(isinstance(packed, Packed), f"pack() returned a {type(packed).__name__}")
            expect(packed.nbytes > 0, f"nbytes is {packed.nbytes}")
            expect(same_bits(given, weight), f"pack() changed the weight it was given ({name})")
            expect(same_bits(op.unpack(packed), weight), f"unpack() returns different bits ({name})")


def layouts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weight as a layer may pass it: contiguous, and as a view of a transposed one."""
    return {"contiguous": weight, "transposed": weight.mT.contiguous().mT}


def check_unchanged(trial: Trial, problem: MatMul) -> None:
    """Check that two calls of the op change neither its input nor its weight, and are both right."""
    with trial.case(problem.label):
        op, one = trial.require(problem.spec(trial.dtype, trial.device)), host(problem, trial.dtype)
        packed, x = op.pack(one.weight.to(trial.device, copy=True)), one.x.to(trial.device, copy=True)
        bias = None if one.bias is None else one.bias.to(trial.device, copy=True)
        for _ in range(2):
            out = run(op, packed, x, bias, blank(tuple(one.truth.shape), trial.dtype, trial.device, False))
            trial.judge(out, one.truth, reference(problem, trial.dtype), "out")
        expect(same_bits(x, one.x), "the op wrote to x")
        expect(same_bits(op.unpack(packed), one.weight), "the op wrote to its weight")
        expect(bias is None or one.bias is None or same_bits(bias, one.bias), "the op wrote to its bias")


def _register(kind: str, groups: int, product_bug: str) -> None:
    """Register the checks that both ops share."""

    def register(
        name: str, catches: str, text: str, body: Callable[[Trial, MatMul], None], shapes: Sequence[MatMul]
    ) -> None:
        def function(trial: Trial) -> None:
            for problem in shapes if trial.quick else (*shapes, *more):
                body(trial, problem)

        function.__doc__ = text
        check(f"{kind}.{name}", catches=catches, scope=OP, kind=kind)(function)

    base = [MatMul(tokens, 96, 70, groups) for tokens in (1, 7, 130)] + [MatMul(5, 33, 17, groups)]
    more = [MatMul(64, 512, 2048 if not groups else 128, groups), MatMul(300, 128, 512, groups)]
    register(
        "product", product_bug, "The product is correct for one token and for many.", check_product, base
    )
    register(
        "strided",
        "a kernel that ignores strides, or writes outside its output",
        "Input and output may be columns of wider tensors; memory around them is neither read nor written.",
        functools.partial(check_product, strided=True),
        base[1:],
    )
    register(
        "pack",
        "a layout that loses bits, so that a checkpoint cannot be saved again",
        "unpack(pack(weight)) is the weight, bit for bit, whatever its strides.",
        check_pack,
        base[:1],
    )
    register(
        "inputs",
        "a kernel that uses its input or weight as scratch memory",
        "Input and weight are unchanged after the call, and a second call is correct too.",
        check_unchanged,
        base[1:3],
    )


_register("linear", 0, "a weight that is transposed, or a last tile that is missing")
_register("batched_linear", 16, "a head that gets its neighbour's weight")


@check("linear.bias", scope=OP, kind="linear", catches="a bias that is ignored")
def bias(trial: Trial) -> None:
    """A bias is added to every row."""
    for tokens in (1, 7, 130):
        check_product(trial, MatMul(tokens, 96, 70, biased=True))


@check("batched_linear.heads", scope=OP, kind="batched_linear", catches="a head count that is assumed")
def heads(trial: Trial) -> None:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    for groups in (1, 3, 128) if trial.quick else (1, 2, 3, 5, 8, 20, 40, 64, 128):
        check_product(trial, MatMul(3, 64, 40, groups))
