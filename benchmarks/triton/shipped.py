"""The tiles that plugins ship, and the GPUs that stand for the cards they are for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.triton.cases import Case, Target, case_of
from benchmarks.triton.problems import launches
from mla_backend_iluvatar import TILES as ILUVATAR
from mla_backend_metax import TILES as METAX
from mla_backend_moore.kernels import TILES as MOORE
from mla_backend_nvidia.cards import tuning_for
from mla_backends.triton_ops import Tuning

KIB = 1024
SMALL = 64  # KiB: what a block may use on cards that do not say


@dataclass(frozen=True)
class Shipped:
    """The tiles of some cards, compiled for one of them, or for a GPU that stands for them."""

    cards: str
    tuning: Tuning
    target: Target
    shared: int  # KiB that a block may use
    early: bool = False  # with programmatic dependent launch
    native_e4m3: bool = False  # the card converts e4m3
    bounds: bool = False  # registers are bounded

    def cases(self) -> dict[str, Case]:
        """Return by name what all problems launch."""
        launched = launches(self.tuning, self.early, self.native_e4m3, self.bounds)
        return {name: case_of(launch, self.target) for name, launch in launched.items()}


def _nvidia(cards: str, arch: int, shared: int) -> Shipped:
    tuning = tuning_for(shared * KIB, cards)
    return Shipped(cards, tuning, _cuda(arch), shared, arch >= 90, arch >= 89, bounds=True)


def with_triton(triton: tuple[int, ...], new: Iterable[Shipped]) -> tuple[Shipped, ...]:
    """Return what the same cards get with an older Triton. Only NVIDIA's plugin looks at the version."""
    return tuple(
        replace(shipped, tuning=tuning_for(shipped.shared * KIB, shipped.cards, triton))
        if shipped.bounds
        else shipped
        for shipped in new
    )


def _cuda(arch: int) -> Target:
    return Target("cuda", arch, 32)


A100 = _nvidia("A100", 80, 163)
L40 = _nvidia("L4, L40, RTX 40", 89, 99)
H100 = _nvidia("H100, H200", 90, 227)
B200 = _nvidia("B200", 100, 227)
RTX50 = _nvidia("RTX 50, RTX PRO 6000", 120, 99)
METAX_AS_CDNA3 = Shipped("MetaX", METAX, Target("hip", "gfx942", 64), SMALL)

# With the Triton that torch pins: without a fault.
CURRENT = (A100, L40, H100, B200, RTX50, METAX_AS_CDNA3)
# With those that older releases of torch pin: likewise.
TRITON_3_8, TRITON_3_6 = with_triton((3, 8), CURRENT), with_triton((3, 6), CURRENT)
# With Triton 3.1, whose language the vendors' compilers speak: without a fault, as far as these can tell.
PORTABLE = (
    Shipped("MetaX", METAX, _cuda(80), SMALL),
    METAX_AS_CDNA3,
    Shipped("Iluvatar", ILUVATAR, _cuda(80), SMALL),
    Shipped("Moore Threads", MOORE, _cuda(80), SMALL),
)
