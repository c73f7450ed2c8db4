"""What the adapters of `mla_backends.kernels` call in which library. To follow another call, add an entry."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KERNELS = "mla_backends.kernels"
FAKES = Path(__file__).resolve().parents[3] / "tests" / "fakes" / "kernels"


@dataclass(frozen=True)
class Call:
    """One function of a library, and how it is called.

    `passes` names the arguments that are passed by keyword, each directly or as "module:CONSTANT" of an
    adapter (a tuple of names, or one). `fake` is the folder of tests/fakes/kernels that stands in.
    """

    function: str  # "function" or "Class.method", in `module`
    passes: tuple[str, ...]
    module: str
    fake: str
    placed: int = 0  # values passed by place, the first arguments
    where_taken: tuple[str, ...] = ()  # passed only to releases that take them

    def passed(self) -> Sequence[str]:
        """Return the names passed by keyword."""
        return [name for given in self.passes for name in _resolved(given)]


@dataclass(frozen=True)
class Library:
    """A distribution, or a repository that publishes none."""

    name: str
    calls: tuple[Call, ...]
    on_index: bool = True  # a wheel can be downloaded; else a path must be given


def _resolved(name: str) -> tuple[str, ...]:
    module, _, constant = name.partition(":")
    if not constant:
        return (name,)
    value = getattr(importlib.import_module(f"{KERNELS}.{module}"), constant)
    return (value,) if isinstance(value, str) else tuple(value)


def _flash_mla(fake: str, module: str = "flash_mla", *more: str) -> tuple[Call, ...]:
    decode = Call("flash_mla_with_kvcache", ("latent:ARGUMENTS", *more), module, fake)
    return decode, Call("get_mla_metadata", (), module, fake, placed=3)


def _sparse(fake: str, *more: str, module: str = "flash_mla") -> tuple[Call, ...]:
    return (
        Call("flash_mla_with_kvcache", ("sparse:DECODE_ARGUMENTS", *more), module, fake),
        Call("flash_mla_sparse_fwd", ("sparse:PREFILL_ARGUMENTS", *more), module, fake),
    )


def _flash_attn(module: str, fake: str) -> tuple[Call, ...]:
    asks = ("return_attn_probs", "return_softmax_lse")
    return (Call("flash_attn_varlen_func", ("expanded:ARGUMENTS",), module, fake, where_taken=asks),)


_WRAPPER = "BatchMLAPagedAttentionWrapper"
_IX = "ixformer.inference.functions"

LIBRARIES = (
    Library(
        "flashinfer-python",
        (
            Call(f"{_WRAPPER}.__init__", (), "flashinfer.mla", "flashinfer_07", placed=1),
            Call("MLAPlanMetadata.csr", ("flashinfer:FLAT",), "flashinfer.mla", "flashinfer_07"),
            Call(
                f"{_WRAPPER}.plan", ("metadata", "flashinfer:PLAN"), "flashinfer.mla",
                "flashinfer_07", where_taken=("query_layout", "kv_cache_layout", "lse_mode"),
            ),
            Call(
                f"{_WRAPPER}.run", ("flashinfer:PAIRS", "flashinfer:RUN", "flashinfer:SCALES"),
                "flashinfer.mla", "flashinfer_07",
            ),
            Call(
                "trtllm_batch_decode_with_kv_cache_mla", ("sparse:TRTLLM_ARGUMENTS",), "flashinfer.mla",
                "flashinfer_07",
            ),
        ),
    ),
    Library(
        "sgl-flash-mla",
        (*_flash_mla("nvidia_sgl", "flash_mla", "use_legacy"), *_sparse("nvidia_sgl", "use_legacy")),
    ),
    Library(
        "tokenspeed-mla",
        (
            Call("tokenspeed_mla_decode", ("tokenspeed:DECODE_ARGUMENTS",), "tokenspeed_mla", "tokenspeed"),
            Call("tokenspeed_mla_prefill", ("tokenspeed:PREFILL_ARGUMENTS",), "tokenspeed_mla", "tokenspeed"),
        ),
    ),
    Library("FlashMLA", (*_flash_mla("nvidia_c"), *_sparse("nvidia_c")), on_index=False),
    Library(
        "MATE",
        (
            *_flash_mla("moore_mate", "mate.flashmla"),
            *_sparse("moore_mate", module="mate.flashmla"),
            Call("get_mla_metadata", ("sparse:PLAN_ARGUMENTS",), "mate.flashmla", "moore_mate"),
        ),
        on_index=False,
    ),
    Library("mcFlashMLA", _flash_mla("metax"), on_index=False),
    Library("flash-attn", _flash_attn("flash_attn", "flash_attn_2"), on_index=False),
    Library("flash-attn-3", _flash_attn("flash_attn_interface", "flash_attn_3"), on_index=False),
    Library(
        "ixformer",
        (
            Call(
                "vllm_paged_attention_mla", ("latent:IXFORMER_ARGUMENTS",), _IX, "ixformer",
                where_taken=("return_softmax_lse", "use_cuda_graph"),
            ),
        ),
        on_index=False,
    ),
)  # fmt: skip
