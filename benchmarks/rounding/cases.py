"""Layers and ops at which forms of arithmetic are held to the bounds, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.rounding.forms import Form
from benchmarks.rounding.ops import OPS, ops
from mla import MLA, MLAConfig
from mla.cases.case import OpCase
from mla.cases.layer import LayerCall, LayerCase
from mla.cases.played import Laid
from mla.cases.stress import Stress
from mla.verify.layer_check import Checker, Forward
from mla.verify.tolerances import relative_error
from mla_backends.api import AttentionSpec, LinearSpec
from mla_backends.testing import HostBackend

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    """Forwards of a layer, one for every seed."""

    name: str
    case: LayerCase
    forms: int = 99  # the first so many of all, where more would take long
    same_weights: int = 1  # seeds that share weights
    alike: bool = False  # inputs repeat numbers of the weights: large logits, and one key decides a row

    def drawn(self, dtype: torch.dtype, seed: int) -> LayerCase:
        """Return the case of a seed, and of a dtype."""
        own_seed = seed if self.alike else seed + 1_000_000
        return replace(self.case, dtype=dtype, model=seed // self.same_weights, seed=own_seed)


# Four heads; the widths of the smallest DeepSeek are those of `MLAConfig` by default.
FOUR_HEADS, SIXTEEN_HEADS = MLAConfig(256, 4), MLAConfig(2048, 16)
PREFILL = (64, 128, 256, 256), (512, 0, 0, 256)  # new tokens, and cached ones
DECODE = Layer("4 heads, decode", LayerCase((1,) * 5, (0, 1, 7, 100, 400), FOUR_HEADS))
LAYERS = (
    Layer("4 heads, prefill", LayerCase(*PREFILL, FOUR_HEADS), forms=5),
    Layer("4 heads, prefill, alike", LayerCase((64, 256), (0, 256), FOUR_HEADS), forms=4, alike=True),
    DECODE,
    Layer("4 heads, one token", LayerCase((1,), (3,), replace(FOUR_HEADS, q_lora_rank=128))),
    Layer(
        "16 heads, hidden 2048", LayerCase((5, 1, 1), (30, 200, 0), SIXTEEN_HEADS), forms=3, same_weights=20
    ),
)  # fmt: skip


def output(case: LayerCase, form: Form | None) -> torch.Tensor:
    """Return the outputs [1, T, d] of a layer with a form's ops, or of the reference."""
    if form is None:
        return case.host.reference
    layer = MLA(case.config, backend=HostBackend(ops=ops(form)), dtype=case.dtype)
    layer.load_state_dict(case.host.state)
    return LayerCall(case, layer).run()


def layer_ratio(case: LayerCase, form: Form) -> float:
    """Return the largest error of a form over its bound."""
    return case.host.check(output(case, form)).error_ratio or 0.0


def new_ratio(case: LayerCase) -> float:
    """Return that of the reference on inputs other than those that bounds are known from."""
    new = replace(case, seed=case.seed + 1_000_000)
    checker = Checker(case.host.truth, case.dtype, lambda: case.host.reference)
    forward = Forward(0, new.host.reference[0], new.host.truth[0], "")
    return checker.check_forwards([forward], held_to_reference=True).error_ratio or 0.0


def roundings(case: LayerCase, form: Form) -> float:
    """Return the error of a form over that of rounding the truth once."""
    truth = case.host.truth
    rounded = relative_error((truth.to(case.dtype), truth))
    return relative_error((output(case, form), truth)) / rounded


# ---------------------------------------------------------------------------------------------- ops


def attention(
    kind: str, heads: int, queries: int, keys: int, widths: tuple[int, int, int, int] = (512, 128, 64, 128),
    scale: float = 192**-0.5,
) -> OpCase:  # fmt: skip
    """Return one request of an attention op; `widths` are c, n, r and v of `AttentionSpec`."""
    spec = AttentionSpec(heads, *widths, scale, torch.float32, CPU)
    return OpCase(f"{kind}_attention", spec, (queries,), (keys,), stress=Stress())


ATTENTION = {
    "absorbed": attention("latent", 4, 16, 80),
    "absorbed, one row": attention("latent", 1, 1, 3),
    "absorbed, narrow": attention("latent", 4, 16, 40, (32, 16, 8, 12), 24**-0.5),
    "expanded, narrow": attention("expanded", 4, 16, 40, (32, 16, 8, 12), 24**-0.5),
    "absorbed, large logits": attention("latent", 4, 16, 80, scale=8 * 192**-0.5),
}
LONG_CONTEXT = attention("latent", 4, 2, 2500)
PRODUCTS = tuple(
    OpCase("linear", LinearSpec(features, outputs, 1, torch.float32, CPU), (rows,), (rows,), stress=Stress())
    for rows, features, outputs in ((7, 512, 96), (1, 2048, 17), (40, 33, 5))
)


def op_ratio(case: OpCase, form: Form, dtype: torch.dtype, seed: int) -> float:
    """Return the largest error of a form over its bound: of out, and of the log-sum-exp."""
    call = Laid(case.but(dtype=dtype, seed=seed), OPS[case.kind](form))
    call.prepare()
    call.run()
    known = call.pool
    faults = case.entry.faults(call.results(), known.truth, errors=known.errors, dtype=dtype)
    return max(ratio for ratio, _ in faults)


def product_ratio(form: Form, dtype: torch.dtype, seed: int) -> float:
    """Return the largest error of a form's products over its bound: projections, wide and narrow."""
    return max(op_ratio(case, form, dtype, seed) for case in PRODUCTS)
