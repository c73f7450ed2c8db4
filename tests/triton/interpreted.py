"""The CPU as a backend whose ops are the Triton kernels, interpreted.

`TRITON_INTERPRET=1 PYTHONPATH=tests/triton python -m mla.conformance --backend interpreted:mla_backend`
holds them to the contract; with `--quick`, a dtype takes four minutes on one core.

An interpreter's time goes by programs and operations, not by numbers: few large tiles are quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import interpreting as interpreting  # first: it needs to come before triton

from mla_backends import Backend, hookimpl
from mla_backends.testing import HostBackend
from mla_backends.triton_ops import Tile, Tuning, attention, triton_ops

if TYPE_CHECKING:
    import torch

TUNING = Tuning(
    latent={1: Tile(16, 64, 4, 1), 17: Tile(128, 64, 4, 1)},
    expanded={1: Tile(16, 64, 4, 1), 17: Tile(64, 128, 4, 1)},
)
MULTIPROCESSORS = 2  # that requests are split for
# Programs that run one after another need not be many.
attention.MERGE_PROGRAMS, attention.MERGED_CHANNELS = 8, 256


class Interpreted(HostBackend):
    """The CPU, on which Triton kernels are interpreted."""

    name = "interpreted"

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options, ops=triton_ops(TUNING, MULTIPROCESSORS))
        for op in self.ops().values():  # nothing is compiled here, and the suite asks for every layer anew
            op.preflight, op.compiles = _passed, ""  # type: ignore[method-assign]

    def dtypes(self) -> tuple[torch.dtype, ...]:
        import torch

        return torch.bfloat16, torch.float16


def _passed(spec: Any) -> list[str]:
    return []


@hookimpl
def mla_backend(options: Mapping[str, str]) -> Backend:
    """Return the backend."""
    return Interpreted(options)
