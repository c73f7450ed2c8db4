"""The adapters of vendors' kernels, each on a fake of its package, with the limits that a plugin declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from mla_backend_moore.kernels import CAPABILITY, kernels
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashMla,
    IxformerMla,
    LatentLimits,
    TokenspeedMla,
    TokenspeedPrefill,
    TorchVarlen,
    VarlenLimits,
)

MATE = LatentLimits(
    heads=(8, 16, 32, 64, 128),
    pads_heads_to=(8, 16, 32, 64, 128),
    lse_layout="tokens_first",
    empty_rows=False,
)


class Launches(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Latent:
    """A fake, and an op of absorbed attention on it."""

    folder: str
    make: Callable[[], Any]
    heads: tuple[int, ...] = (1, 4, 16, 128)  # with 4 heads and 4 queries the shape of lse says nothing
    pages: tuple[int, ...] = (64,)
    any_heads: bool = True  # serves any number up to 128
    plan: str = "get_mla_metadata"  # the fake's counter
    tells: bool = True  # the fake raises for a plan of other lengths; else its results are NaN


FLASH_MLA = {
    "nvidia_b": Latent("nvidia_b", lambda: FlashMla(LatentLimits(max_query_rows=132 * 64))),
    "nvidia_c": Latent("nvidia_c", FlashMla),
    "nvidia_sgl": Latent("nvidia_sgl", FlashMla, tells=False),
    "metax": Latent("metax", lambda: FlashMla(LatentLimits(page_sizes=None)), pages=(1, 2, 16, 64, 128)),
    "moore_mate": Latent("moore_mate", lambda: FlashMla(MATE)),
    "moore_mate_bare": Latent(
        "moore_mate", lambda: FlashMla(MATE, module="mate.flashmla"), plan="mate.get_mla_metadata"
    ),
}
FLASHINFER = ("flashinfer", "flashinfer_07")
LATENT = {
    **FLASH_MLA,
    "mate, as it is offered": Latent("moore_mate", lambda: kernels(lambda: CAPABILITY)["mate"]),
    "ixformer": Latent("ixformer", IxformerMla, pages=(64, 16)),
    "tokenspeed": Latent("tokenspeed", TokenspeedMla, heads=(1, 4, 16, 96, 128), pages=(64, 32)),
    **{name: Latent(name, FlashInferMla, pages=(64, 1, 8, 16), any_heads=False) for name in FLASHINFER},
}


@dataclass(frozen=True)
class Expanded:
    """A fake, and an op of expanded attention on it."""

    folder: str
    make: Callable[[], Any]
    kernel: str = ""  # of torch's own, as a vendor's build has it
    empty: bool = True  # serves segments without keys


VARLEN_3 = VarlenLimits(pads_values=False)
EXPANDED = {
    "flash_attn_2": Expanded("flash_attn_2", FlashAttnVarlen),
    "flash_attn_3": Expanded(
        "flash_attn_3", lambda: FlashAttnVarlen(VARLEN_3, module="flash_attn_interface")
    ),
    "torch, cuda": Expanded("flash_attn_2", TorchVarlen, kernel="cuda"),
    "torch, musa": Expanded("flash_attn_2", lambda: TorchVarlen(VARLEN_3), kernel="musa"),
    "tokenspeed": Expanded("tokenspeed", TokenspeedPrefill),
    "mate": Expanded("moore_mate", lambda: kernels(lambda: CAPABILITY)["mate_varlen"], empty=False),
}
