"""The fakes themselves: they refuse what the real packages refuse, and do by default what those do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

TENSORS = {"dtype": torch.bfloat16}


def decode_arguments(module: Any, **changes: Any) -> dict[str, Any]:
    """Return a right call of two rows: `changes` make it wrong."""
    if "use_legacy" in inspect.signature(module.flash_mla_with_kvcache).parameters:
        changes = {"use_legacy": True, **changes}
    generator = torch.Generator().manual_seed(0)
    lens = changes.get("cache_seqlens", torch.tensor([33, 65], dtype=torch.int32))
    meta, splits = module.get_mla_metadata(lens, 16, 1)
    return {
        "q": torch.randn(2, 1, 16, 576, generator=generator).bfloat16(),
        "k_cache": torch.randn(4, 64, 1, 576, generator=generator).bfloat16(),
        "block_table": torch.tensor([[3, 0], [1, 2]], dtype=torch.int32),
        "cache_seqlens": lens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": meta,
        "num_splits": splits,
        "softmax_scale": 0.1,
        "causal": True,
        **changes,
    }


FLASH_MLA = ("nvidia_a", "nvidia_b", "nvidia_c", "nvidia_sgl", "metax", "moore_legacy", "moore_mate")
each_flash_mla = pytest.mark.parametrize("folder", FLASH_MLA)


@each_flash_mla
def test_the_default_scale_is_that_of_the_width(installed: Any, folder: str) -> None:
    with installed(folder):
        import flash_mla

        arguments = decode_arguments(flash_mla)
        explicit = flash_mla.flash_mla_with_kvcache(**{**arguments, "softmax_scale": 576**-0.5})
        del arguments["softmax_scale"]
        default = flash_mla.flash_mla_with_kvcache(**arguments)
        for left, right in zip(explicit, default, strict=True):
            assert torch.equal(left, right)


@each_flash_mla
def test_layouts_are_those_of_the_package(installed: Any, folder: str) -> None:
    with installed(folder):
        import flash_mla

        out, lse = flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla))
        assert (out.shape, out.dtype) == ((2, 1, 16, 512), torch.bfloat16)
        assert lse.dtype == torch.float32
        assert lse.shape == ((2, 1, 16) if folder == "moore_mate" else (2, 16, 1))


@each_flash_mla
@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.zeros(2, 1, 16, 576)},
        {"k_cache": torch.zeros(4, 64, 1, 576)},
        {"q": torch.zeros(2, 1, 16, 200, **TENSORS)},
        {"head_dim_v": 576},
        {"block_table": torch.zeros(2, 2, dtype=torch.int64)},
        {"block_table": torch.zeros(3, 2, dtype=torch.int32)},
        {"q": torch.zeros(2, 1, 16, 1152, **TENSORS)[..., ::2]},
    ],
)
def test_wrong_tensors_are_refused(installed: Any, folder: str, changes: dict[str, Any]) -> None:
    with installed(folder):
        import flash_mla

        with pytest.raises(RuntimeError):
            flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla, **changes))


@each_flash_mla
def test_int64_lengths_are_refused(installed: Any, folder: str) -> None:
    with installed(folder):
        import flash_mla

        arguments = decode_arguments(flash_mla)
        with pytest.raises(RuntimeError, match="int32"):
            flash_mla.flash_mla_with_kvcache(**{**arguments, "cache_seqlens": torch.tensor([33, 65])})


@pytest.mark.parametrize(
    ("folder", "count"),
    [
        ("nvidia_a", 9),
        ("nvidia_b", 11),
        ("nvidia_c", 16),
        ("nvidia_d", 17),
        ("nvidia_sgl", 21),
        ("metax", 17),
    ],
)
def test_each_generation_has_its_own_arguments_in_its_own_order(
    installed: Any, folder: str, count: int
) -> None:
    with installed(folder):
        import flash_mla

        names = list(inspect.signature(flash_mla.flash_mla_with_kvcache).parameters)
        assert len(names) == count
        assert names[7:9] == ["softmax_scale", "causal"]
        if count > 11:
            assert names[11] == ("indices_all_valid_per_q" if folder == "metax" else "attn_sink")


def test_a_page_of_another_size_is_refused_or_ends_the_process(installed: Any) -> None:
    cache = torch.zeros(4, 32, 1, 576, **TENSORS)
    table = torch.zeros(2, 3, dtype=torch.int32)
    for folder, error in (
        ("nvidia_c", RuntimeError),
        ("moore_mate", RuntimeError),
        ("moore_legacy", SystemExit),
    ):
        with installed(folder):
            import flash_mla

            with pytest.raises(error):
                flash_mla.flash_mla_with_kvcache(
                    **decode_arguments(flash_mla, k_cache=cache, block_table=table)
                )


def test_another_chip_is_refused(installed: Any) -> None:
    for folder in ("nvidia_a", "nvidia_b", "nvidia_c", "nvidia_sgl"):
        with installed(folder) as fakes:
            import flash_mla

            fakes.CAPABILITY["flash_mla"] = (8, 0)
            with pytest.raises(RuntimeError):
                flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla))


def test_half_precision_was_compiled_out_of_the_legacy_package(installed: Any) -> None:
    with installed("moore_legacy"):
        import flash_mla

        half = {name: torch.zeros(shape).half() for name, shape in {"q": (2, 1, 16, 576)}.items()}
        cache = torch.zeros(4, 64, 1, 576).half()
        with pytest.raises(RuntimeError, match="Unsupported dtype"):
            flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla, **half, k_cache=cache))


@pytest.mark.parametrize("folder", ["nvidia_c", "moore_mate"])
def test_the_third_generation_takes_no_splits_and_one_kind_of_plan(installed: Any, folder: str) -> None:
    with installed(folder):
        import flash_mla

        arguments = decode_arguments(flash_mla)
        with pytest.raises(AssertionError, match="num_splits must be None"):
            flash_mla.flash_mla_with_kvcache(**{**arguments, "num_splits": torch.zeros(3).int()})
        with pytest.raises(AssertionError, match="FlashMLASchedMeta"):
            flash_mla.flash_mla_with_kvcache(
                **{**arguments, "tile_scheduler_metadata": torch.zeros(1, 8).int()}
            )
        flash_mla.flash_mla_with_kvcache(**arguments)
        with pytest.raises(AssertionError, match="consistent"):
            flash_mla.flash_mla_with_kvcache(**{**arguments, "causal": False})


def test_the_sparse_generation_fails_every_dense_call(installed: Any) -> None:
    with installed("nvidia_d"):
        import flash_mla

        for changes in ({}, {"is_fp8_kvcache": False}, {"causal": False}):
            with pytest.raises(AssertionError, match="Sparse attention is required"):
                flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla, **changes))


def test_the_fork_has_dense_attention_where_it_is_asked_for_and_built(installed: Any) -> None:
    with installed("nvidia_sgl") as fakes:
        import flash_mla

        for wrong in ({"use_legacy": False}, {"is_fp8_kvcache": True}, {"kv_format": "v4"}):
            with pytest.raises(AssertionError):
                flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla, **wrong))
        assert flash_mla.has_legacy()
        fakes.HAS_LEGACY["flash_mla"] = False
        assert not flash_mla.has_legacy()
        with pytest.raises(RuntimeError, match="legacy FlashMLA kernels are not available"):
            flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla))


def test_the_fork_follows_the_splits_of_its_first_call_without_a_word(installed: Any) -> None:
    with installed("nvidia_sgl"):
        import flash_mla

        arguments = decode_arguments(flash_mla)
        for _ in range(2):
            out, _ = flash_mla.flash_mla_with_kvcache(**arguments)
            assert out.isfinite().all()
        arguments["cache_seqlens"] = arguments["cache_seqlens"] + 1
        out, lse = flash_mla.flash_mla_with_kvcache(**arguments)
        assert out.isnan().all()
        assert lse.isnan().all()


def tokenspeed_arguments(**changes: Any) -> dict[str, Any]:
    """Return a right call of `tokenspeed_mla_decode`: `changes` make it wrong."""
    generator = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(2, 1, 16, 576, generator=generator).bfloat16(),
        "kv_cache": torch.randn(4, 64, 576, generator=generator).bfloat16(),
        "workspace_buffer": torch.empty(40 << 20, dtype=torch.int8),
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "block_tables": torch.tensor([[3, 3], [1, 2]], dtype=torch.int32),
        "seq_lens": torch.tensor([33, 65], dtype=torch.int32),
        "max_seq_len": 65,
        "softmax_scale": 0.1,
        "return_lse": True,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace_buffer": torch.empty(40 << 20, dtype=torch.uint8)}, "must be torch.int8"),
        ({"workspace_buffer": torch.empty(1 << 16, dtype=torch.int8)}, "workspace_buffer too small"),
        ({"query": torch.zeros(2, 1, 129, 576, **TENSORS)}, "unsupported configuration"),
        ({"kv_cache": torch.zeros(256, 1, 576, **TENSORS)}, "unsupported configuration"),
        ({"kv_cache": torch.zeros(4, 256, 576, **TENSORS)}, "unsupported configuration"),
        ({"kv_cache": torch.zeros(4, 64, 576)}, "must match"),
        ({"seq_lens": torch.tensor([33, 65])}, "int32"),
        ({"block_tables": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}, "compact"),
        ({"out": torch.zeros(2, 1, 17, 512, **TENSORS)[:, :, :16]}, "compact"),
        ({"max_seq_len": 0}, "max_seq_len must be > 0"),
    ],
)
def test_tokenspeed_refuses_what_its_source_does(
    installed: Any, changes: dict[str, Any], message: str
) -> None:
    with installed("tokenspeed"):
        import tokenspeed_mla

        tokenspeed_mla.tokenspeed_mla_decode(**tokenspeed_arguments())
        with pytest.raises((AssertionError, RuntimeError, ValueError), match=message):
            tokenspeed_mla.tokenspeed_mla_decode(**tokenspeed_arguments(**changes))


def test_tokenspeed_reads_whole_tiles_and_leaves_empty_rows(installed: Any) -> None:
    with installed("tokenspeed"):
        import tokenspeed_mla

        arguments = tokenspeed_arguments()
        out, lse = tokenspeed_mla.tokenspeed_mla_decode(**arguments)
        assert (out.shape, lse.shape) == ((2, 1, 16, 512), (2, 1, 16))
        arguments["kv_cache"][0] = torch.nan  # nobody's page
        for table in ([[3, 0], [1, 2]], [[3], [1]]):  # named behind the row's end, or standing in for it
            tables = torch.tensor(table, dtype=torch.int32)
            lens = torch.tensor([33, 64], dtype=torch.int32)
            changed = {**arguments, "block_tables": tables, "seq_lens": lens}
            out, _ = tokenspeed_mla.tokenspeed_mla_decode(**changed)
            assert out[0].isnan().all()
        empty = torch.tensor([0, 65], dtype=torch.int32)
        out, _ = tokenspeed_mla.tokenspeed_mla_decode(**{**arguments, "seq_lens": empty})
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


def test_tokenspeed_takes_strided_values_for_contiguous_ones(installed: Any) -> None:
    with installed("tokenspeed"):
        import tokenspeed_mla

        q, k, wide = (torch.randn(5, 2, width).bfloat16() for width in (192, 192, 256))
        bounds = torch.tensor([0, 5], dtype=torch.int32)

        def run(v: torch.Tensor) -> torch.Tensor:
            return tokenspeed_mla.tokenspeed_mla_prefill(q, k, v, bounds[1:], bounds, 5, 1, 0.1)

        assert not torch.equal(run(wide[..., 128:]), run(wide[..., 128:].contiguous()))


def test_the_old_spelling_of_a_plan_warns(installed: Any) -> None:
    with installed("metax"):
        import flash_mla

        lens = torch.tensor([3], dtype=torch.int32)
        with pytest.warns(DeprecationWarning, match="num_heads_per_head_k"):
            flash_mla.get_mla_metadata(lens, num_heads_per_head_k=16, num_heads_k=1)


def test_a_row_without_keys_has_infinity(installed: Any) -> None:
    lens = torch.tensor([0, 65], dtype=torch.int32)
    for folder in ("nvidia_a", "nvidia_b", "nvidia_c", "nvidia_sgl", "metax", "moore_legacy"):
        with installed(folder):
            import flash_mla

            out, lse = flash_mla.flash_mla_with_kvcache(**decode_arguments(flash_mla, cache_seqlens=lens))
            assert (out[0] == 0).all()
            assert (lse[0] == torch.inf).all()


def test_memory_behind_the_end_reaches_the_output(installed: Any) -> None:
    with installed("nvidia_c"):
        import flash_mla

        arguments = decode_arguments(flash_mla)
        arguments["k_cache"][3, 40] = torch.nan  # slot 40 of a request of 33
        out, _ = flash_mla.flash_mla_with_kvcache(**arguments)
        assert out[0].isnan().any()
        assert out[1].isfinite().all()


def test_a_host_bound_that_is_too_low_cuts_the_context(installed: Any) -> None:
    with installed("ixformer"):
        from ixformer.inference import functions

        q, cache = torch.randn(1, 4, 576).bfloat16(), torch.randn(2, 64, 576).bfloat16()
        table, lens = torch.tensor([[0, 1]]).int(), torch.tensor([100]).int()
        outs = [torch.empty(1, 4, 512).bfloat16() for _ in range(2)]
        for out, longest in zip(outs, (100, 64), strict=True):
            functions.vllm_paged_attention_mla(out, q, cache, 0.1, table, lens, longest)
        assert not torch.equal(*outs)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            functions.vllm_paged_attention_mla(outs[0], q, cache, 0.1, table, lens, lens.max())


def test_flashinfer_runs_only_what_was_planned(installed: Any) -> None:
    with installed("flashinfer"):
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(8))
        q, pe = torch.zeros(1, 4, 512, **TENSORS), torch.zeros(1, 4, 64, **TENSORS)
        caches = torch.zeros(2, 64, 512, **TENSORS), torch.zeros(2, 64, 64, **TENSORS)
        with pytest.raises(RuntimeError, match="plan"):
            wrapper.run(q, pe, *caches)
        lengths = [torch.tensor(values).int() for values in ([0, 1], [0, 1], [1], [33])]
        wrapper.plan(*lengths, 8, 512, 64, 64, True, 0.1, q.dtype, q.dtype)
        with pytest.raises(RuntimeError, match="does not fit the plan"):
            wrapper.run(q, pe, *caches)
        lengths[3] += 64
        with pytest.raises(RuntimeError, match="kv_indptr"):
            wrapper.plan(*lengths, 4, 512, 64, 64, True, 0.1, q.dtype, q.dtype)
