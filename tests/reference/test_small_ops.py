"""The reference ops around attention: projections, norm, rotation, cache write; and how ops are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla.errors import UnsupportedBatch, UnsupportedOps
from mla.layer.ops import Ops, choose
from mla.reference import REFERENCE
from mla_backends import BackendError, FusedOp
from mla_backends.api import OPS

LinearOp, LatentOp = type(REFERENCE["linear"]), type(REFERENCE["latent_attention"])
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.05 * 2.0**-8}  # rounding once, and fp32 noise


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    turn = draw(tokens, width // 2, seed=seed) * 3
    return torch.cat((turn.cos(), turn.sin()), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_matrix_product_plus_bias(assert_rows_close: Any, dtype: torch.dtype, bias: bool) -> None:
    op, x, weight = REFERENCE["linear"], draw(5, 12, dtype=dtype), draw(7, 12, dtype=dtype, seed=1)
    shift = draw(7, dtype=dtype, seed=2) if bias else None
    out = torch.full((5, 7), torch.nan, dtype=dtype)
    op(op.pack(weight), x=x, bias=shift, out=out)
    truth = x.double() @ weight.double().T + (shift.double() if bias else 0)
    assert_rows_close(out, truth, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_linear_applies_each_heads_own_weight(assert_rows_close: Any, dtype: torch.dtype) -> None:
    op, x, weight = (
        REFERENCE["batched_linear"],
        draw(5, 3, 12, dtype=dtype),
        draw(3, 7, 12, dtype=dtype, seed=1),
    )
    out = torch.full((5, 3, 7), torch.nan, dtype=dtype)
    op(op.pack(weight), x=x, out=out)
    truth = torch.stack([x[:, h].double() @ weight[h].double().T for h in range(3)], dim=1)
    assert_rows_close(out, truth, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("kind", ["linear", "batched_linear"])
def test_packing_returns_the_weight_bit_for_bit(kind: str) -> None:
    weight = draw(3, 7, 12, dtype=torch.bfloat16)
    op = REFERENCE[kind]
    assert torch.equal(op.unpack(op.pack(weight)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rms_norm_uses_its_eps_and_rounds_once(
    assert_rows_close: Any, dtype: torch.dtype, eps: float
) -> None:
    x, weight = draw(6, 24, dtype=dtype) * 1e-3, draw(24, dtype=dtype, seed=1)
    out = torch.full_like(x, torch.nan)
    REFERENCE["rms_norm"](x=x, weight=weight, eps=eps, out=out)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert_rows_close(out, truth, ROUNDING[dtype])


def rotated(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate by complex multiplication in float64; x [.., r] with angles [.., r]."""
    half = x.shape[-1] // 2
    turn = torch.complex(*cos_sin.double().chunk(2, dim=-1))
    if interleaved:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)
    product = torch.complex(*x.double().chunk(2, dim=-1)) * turn
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_multiplies_channel_pairs_as_complex_numbers(
    assert_rows_close: Any, dtype: torch.dtype, interleaved: bool
) -> None:
    x, cos_sin = draw(5, 3, 8, dtype=dtype), angles(5, 8)
    out = torch.full_like(x, torch.nan)
    REFERENCE["rotate_query"](x=x, cos_sin=cos_sin, interleaved=interleaved, out=out)
    assert_rows_close(out, rotated(x, cos_sin[:, None], interleaved), ROUNDING[dtype])


def test_rotation_in_place_gives_the_same_bits() -> None:
    x, cos_sin = draw(5, 3, 20), angles(5, 8)
    out = torch.empty(5, 3, 8)
    REFERENCE["rotate_query"](x=x[..., 12:], cos_sin=cos_sin, interleaved=True, out=out)
    untouched = x[..., :12].clone()
    REFERENCE["rotate_query"](x=x[..., 12:], cos_sin=cos_sin, interleaved=True, out=x[..., 12:])
    assert torch.equal(x[..., 12:], out)
    assert torch.equal(x[..., :12], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latent_norms_rotates_and_touches_only_its_slots(
    assert_rows_close: Any, dtype: torch.dtype
) -> None:
    kv_a, weight, cos_sin = draw(4, 30, dtype=dtype)[:, 6:], draw(16, dtype=dtype, seed=1), angles(4, 8)
    slots, cache = torch.tensor([9, 2, 3, 14]), draw(4, 4, 24, dtype=dtype, seed=2)
    before = cache.clone().view(-1, 24)
    REFERENCE["write_latent"](
        kv_a=kv_a, weight=weight, eps=1e-6, cos_sin=cos_sin, interleaved=True, slots=slots, cache=cache
    )
    rows, wide = cache.view(-1, 24), kv_a[:, :16].double()
    norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_rows_close(rows[slots][:, :16], norm, ROUNDING[dtype])
    assert_rows_close(rows[slots][:, 16:], rotated(kv_a[:, 16:], cos_sin, True), ROUNDING[dtype])
    others = [row for row in range(16) if row not in slots.tolist()]
    assert torch.equal(rows[others], before[others])


class Picky(LatentOp):  # type: ignore[misc, valid-type]
    """Right, but refuses odd head counts and more than one new token."""

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return ["it needs an even head count"] if spec.num_heads % 2 else []

    def unsupported_batch(self, spec: Any, query_lens: Any, kv_lens: Any, page_size: Any = None) -> list[str]:
        return ["it serves decode only"] if max(query_lens) > 1 else []


class Outdated(LatentOp):  # type: ignore[misc, valid-type]
    contract = "latent_attention/0"


def test_the_reference_serves_every_op_of_the_contract() -> None:
    assert {name: op.contract for name, op in REFERENCE.items()} == OPS


def test_an_op_that_refuses_the_layer_is_passed_over_with_its_reason(tiny: Any) -> None:
    ops = Ops(tiny(), {"old": Outdated(), "picky": Picky()}, torch.float32, torch.device("cpu"))
    assert ops["latent_attention"].name == "reference"
    assert ops.all_reference()
    explained = "\n".join(ops.explain())
    assert "fused op 'old' not used because it implements latent_attention/0" in explained
    assert "fused op 'picky' not used because it needs an even head count" in explained


def test_the_first_op_that_serves_the_layer_is_taken(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky(), "plain": LatentOp(), "linear": LinearOp()}
    ops = Ops(tiny(num_attention_heads=4), offered, torch.float32, torch.device("cpu"))
    names = ops.names()
    assert names["latent_attention"] == "picky"
    assert names["o_proj"] == "linear"
    assert names["expanded_attention"] == "reference"
    assert not ops.all_reference()


def test_a_policy_can_insist_on_fused_ops(tiny: Any) -> None:
    def ops(policy: str, heads: int) -> Ops:
        offered = {"old": Outdated(), "picky": Picky(), "plain": LatentOp(), "linear": LinearOp()}
        return Ops(tiny(num_attention_heads=heads), offered, torch.float32, torch.device("cpu"), policy)

    assert ops("plain", 4)["latent_attention"].name == "plain"  # though the better one would serve
    assert ops("plain", 4)["o_proj"].name == "linear"  # what is not named goes on as before
    assert ops("picky, linear", 4)["latent_attention"].name == "picky"
    assert ops("fused", 3)["latent_attention"].name == "plain"
    assert ops("fused", 3)["rotate_query"].name == "reference"  # nobody offers one
    with pytest.raises(
        UnsupportedOps, match=r"no fused latent_attention .* --ops picky .* an even head count"
    ):
        ops("picky", 3)
    with pytest.raises(UnsupportedOps, match=r"offers no op 'pickey'. Did you mean 'picky'\?"):
        ops("pickey", 4)
    with pytest.raises(UnsupportedOps, match="--ops reference cannot be combined"):
        ops("reference,picky", 4)


def test_fused_is_an_error_where_none_serves(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky()}
    with pytest.raises(UnsupportedOps, match=r"'old' not used because .*'picky' not used because"):
        Ops(tiny(num_attention_heads=3), offered, torch.float32, torch.device("cpu"), "fused")


def test_reference_policy_takes_no_fused_op(tiny: Any) -> None:
    offered: dict[str, FusedOp] = {"plain": LatentOp()}
    assert choose("latent_attention", None, offered, "reference").name == "reference"


def test_an_op_that_refuses_a_batch_raises_and_never_falls_back(make_case: Any, tiny: Any) -> None:
    config = tiny(num_attention_heads=4)
    case = make_case([1, 1], [20, 5], config, ops={"picky": Picky()}, attention="absorbed")
    assert case.run().isfinite().all()
    case = make_case([1, 2], [20, 5], config, ops={"picky": Picky()}, attention="absorbed")
    with pytest.raises(UnsupportedBatch, match=r"'picky' .* refuses this batch: it serves decode only"):
        case.run()


@pytest.mark.parametrize(
    ("name", "contract", "reason"),
    [
        (
            "mine",
            "latent_atention/1",
            "has unknown contract 'latent_atention/1'. Did you mean 'latent_att",
        ),
        ("reference", "linear/1", "may not be named 'reference'"),
    ],
)
def test_an_op_that_could_not_be_told_apart_or_would_never_run_is_refused(
    tiny: Any, name: str, contract: str, reason: str
) -> None:
    class Odd(FusedOp):
        def __call__(self, *args: Any, **tensors: Any) -> None:
            raise AssertionError("never called")

    Odd.contract = contract
    with pytest.raises(BackendError, match=reason):
        Ops(tiny(), {name: Odd()}, torch.float32, torch.device("cpu"))
