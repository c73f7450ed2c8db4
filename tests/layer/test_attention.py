"""The layer against the float64 oracle: dtypes, shapes, page sizes, poisoned memory, magnitudes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mla
from mla import MLA, MLAConfig
from mla.config import YarnScaling
from mla_backends.testing import HostBackend

MODES = ("auto", "absorbed", "expanded")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NOT_SET_UP = HostBackend()
NOT_SET_UP.device = None
YARN = YarnScaling(40, 64, mscale=0.707, mscale_all_dim=0.707)


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


# Beside the ends of pages, and any others.
lengths = st.one_of(st.integers(0, 40), st.sampled_from((63, 64, 65, 127, 128, 129)))
# Like those of most models, and all of them odd.
WIDTHS = ({}, {"hidden_size": 33, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 21})


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_matches_the_oracle_for_any_shape(
    make_case: Any, tiny: Any, assert_rows_close: Any, data: st.DataObject
) -> None:
    new, old = zip(*data.draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=6)), strict=True)
    config = tiny(
        num_attention_heads=data.draw(st.integers(1, 7)),
        q_lora_rank=data.draw(st.sampled_from([None, 20])),
        kv_lora_rank=data.draw(st.sampled_from([8, 15, 32])),  # with 8, absorbed is always cheaper
        rope_scaling=data.draw(st.sampled_from([None, YARN])),
        rope_interleave=data.draw(st.booleans()),
        attention_bias=data.draw(st.booleans()),
        **data.draw(st.sampled_from(WIDTHS)),
    )
    case = make_case(
        new,
        old,
        config,
        attention=data.draw(st.sampled_from(MODES)),
        page_size=data.draw(st.sampled_from([1, 2, 16, 64, 128])),
        seed=data.draw(st.integers(0, 99)),
    )
    assert_rows_close(case.run(), case.truth(), BOUND[torch.float32])


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize(("new", "old"), [([128], [0]), ([1, 1], [1024, 300])])
def test_real_dimensions_in_bf16_stay_within_the_projects_own_target(
    make_case: Any, attention: str, new: list[int], old: list[int]
) -> None:
    config = MLAConfig.preset("deepseek-v2-lite")
    case = make_case(new, old, config, dtype=torch.bfloat16, attention=attention, page_size=64)
    assert relative(case.run(), case.truth()) <= 8e-3


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
def test_memory_that_no_request_owns_never_leaks(make_case: Any, attention: str) -> None:
    """Unowned pages and slots past a request's end change no bit, whether NaN or finite; none is written."""
    case = make_case([3, 1, 20], [30, 17, 0], attention=attention)
    owned = torch.cat([case.cache.slots(sequence) for sequence in case.ids])
    unowned = torch.ones(case.cache.num_pages * 16, dtype=torch.bool)
    unowned[owned] = False
    assert unowned.sum() > 3 * 15, "the case must leave slots and pages unowned"
    flat = case.cache.pages.view(-1, case.config.latent_dim)
    poisoned = case.run()
    assert flat[unowned].isnan().all()
    flat[unowned] = 1e4
    assert torch.equal(case.run(), poisoned)
    assert poisoned.isfinite().all()
    assert (flat[unowned] == 1e4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("rank", [None, 24])
def test_large_inputs_give_no_nan_and_no_infinity(
    make_case: Any, tiny: Any, dtype: torch.dtype, attention: str, rank: int | None
) -> None:
    config = tiny(q_lora_rank=rank)
    case = make_case(
        [20, 1], [9, 60], config, dtype=dtype, attention=attention, hidden_scale=1e3, history_scale=1e2
    )
    out = case.run()
    assert out.isfinite().all()
    assert out.abs().max() > 1  # the history really was attended


@pytest.mark.parametrize("attention", MODES)
def test_a_zero_input_is_finite(make_case: Any, attention: str) -> None:
    case = make_case([4, 1], [0, 20], attention=attention, hidden_scale=0.0)
    assert case.run().isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_default_device_changes_nothing(make_case: Any, assert_rows_close: Any, mode: str) -> None:
    """`torch.set_default_device` is for what a user makes: tables of the host stay there."""
    with torch.device("meta"):
        case = make_case([40, 1, 7], [0, 90, 33], attention=mode)
        out = case.run()
    assert_rows_close(out, case.truth(), BOUND[torch.bfloat16])


def test_a_layer_shows_its_shapes_ops_and_weights(make_case: Any, tiny: Any) -> None:
    config = tiny()
    empty = repr(MLA(config, dtype=torch.float32))
    assert empty == (
        f"MLA({config.name!r}, hidden={config.hidden_size}, heads={config.num_attention_heads}, "
        f"latent={config.kv_lora_rank}+{config.qk_rope_head_dim}, torch.float32 on cpu, attention='auto', "
        f"0 of {len(MLA(config).ops.names())} ops fused, no weights)"
    )
    loaded = repr(make_case([1], [0], config, dtype=torch.float32).layer)
    assert loaded.startswith(empty.partition("no weights")[0])
    assert loaded.endswith("B of weights)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "deepseek-r1"}, "config must be an MLAConfig, as .*, got 'deepseek-r1'"),
        ({"backend": "cpu"}, r"backend must be what mla.load_backend\(\) returns, got a str"),
        ({"backend": NOT_SET_UP}, "backend 'host' is not set up"),
        ({"attention": "absorb"}, r"attention must be one of .* got 'absorb'"),
        ({"dtype": "bfloat16"}, "dtype must be a floating-point one, such as torch.bfloat16, got 'bfloat16'"),
        ({"dtype": torch.int32}, "dtype must be a floating-point one, such as torch.bfloat16, got"),
        ({"overrides": ["linear"]}, r"overrides must map roles to names of ops, got \['linear'\]"),
        ({"workspace_bytes": "1G"}, "workspace_bytes must be a number of bytes, got '1G'"),
        ({"workspace_bytes": -1}, "workspace_bytes must be a number of bytes, got -1"),
    ],
)
def test_a_name_in_place_of_an_object_says_what_to_pass(
    tiny: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MLA(**{"config": tiny(), **arguments})


def test_what_names_no_backend_says_what_to_pass() -> None:
    with pytest.raises(
        TypeError, match=r"load_backend\(\) takes the name of a backend, such as 'cpu', got None"
    ):
        mla.load_backend(None)  # type: ignore[arg-type]
