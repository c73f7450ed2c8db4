"""The project's own GPU kernels in Triton, offered through the op contract.

One source for every GPU that has a Triton: what differs between cards is data, a `Tuning` that the plugin
chooses. Nothing imports Triton before an op is tried, and what Triton lacks is a reason in `--list-ops`::

    from mla_backends.triton_ops import Tile, TritonBackend, Tuning

    class Acme(TritonBackend):
        def default_tuning(self):
            return Tuning(latent={1: Tile(16, 16, 4, 1)}, expanded={1: Tile(32, 32, 4, 1)})

| op | launches | what it does |
|---|---|---|
| `triton_latent` | 1, or 2 where requests are split | flash decoding over pages of any size |
| `triton_sparse_latent` | 1, or 2 where tokens are split | the same to the keys that each token selects |
| `triton_select` | 2 | scores of an indexer, and a radix select of the best |
| `triton_expanded` | 1 | flash attention over all segments |
| `triton_write_latent` | 1 | norm, rotation and scatter of a token's latent, and the rotation of all heads |
| `triton_rotate_query` | 1 | rotation of all heads, where `triton_write_latent` does not do it |
| `triton_rms_norm` | 1 | norm of the query latent |
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mla_backends.api import FusedOp
from mla_backends.errors import BackendError, BackendOptionError
from mla_backends.kernels.vendor import DeviceReason
from mla_backends.torch_backend import TorchBackend, known, set_variables
from mla_backends.triton_ops.attention import ExpandedAttention, LatentAttention, SparseLatentAttention
from mla_backends.triton_ops.launcher import VARIABLES, Launcher
from mla_backends.triton_ops.pointwise import RmsNorm, RotateQuery, WriteLatent
from mla_backends.triton_ops.selection import SelectLatents
from mla_backends.triton_ops.tuning import Tile, Tuning, card_file, read_tuning, write_tuning

if TYPE_CHECKING:
    import torch

__all__ = ["Launcher", "Tile", "TritonBackend", "Tuning", "read_tuning", "triton_ops", "write_tuning"]

OPTION, SWITCH = "tuning", "triton"


def triton_ops(
    tuning: Tuning,
    multiprocessors: int | None,
    launcher: Launcher | None = None,
    device_reason: DeviceReason | None = None,
) -> dict[str, FusedOp]:
    """Return the ops by name. `device_reason` says why a device cannot run them, "" if it can."""
    starts = launcher or Launcher()
    rotate = RotateQuery(starts, device_reason)
    return {
        "triton_latent": LatentAttention(starts, tuning, multiprocessors, device_reason),
        "triton_sparse_latent": SparseLatentAttention(starts, tuning, multiprocessors, device_reason),
        "triton_select": SelectLatents(starts, device_reason),
        "triton_expanded": ExpandedAttention(starts, tuning, device_reason),
        "triton_write_latent": WriteLatent(starts, device_reason, rotate),
        "triton_rotate_query": rotate,
        "triton_rms_norm": RmsNorm(starts, device_reason),
    }


def ordered(
    kernels: Mapping[str, FusedOp], ours: Mapping[str, FusedOp], ahead_of: Mapping[str, str]
) -> dict[str, FusedOp]:
    """Return both, best first: ours last, but for those that `ahead_of` places before a vendor's kernel."""
    placed: dict[str, FusedOp] = {}
    for name, op in kernels.items():
        placed |= {first: ours[first] for first, other in ahead_of.items() if other == name and first in ours}
        placed[name] = op
    return {**placed, **{name: op for name, op in ours.items() if name not in placed}}


class TritonBackend(TorchBackend):
    """Base beside `TorchBackend` or one of its kinds, named before it.

    The tuning is that of the file in `-O tuning=FILE`; else the one measured on a card of this name, from the
    folder `tunings`; else `default_tuning()`. `-O triton=off` offers none of the ops, so that nothing is
    compiled.
    """

    tunings: Path | None = None  # a folder of tuning files, named by `card_file`

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._given = _read(self.name, self.options[OPTION]) if OPTION in self.options else None
        chosen = self.options.get(SWITCH, "on")
        if chosen not in ("on", "off"):
            raise BackendOptionError(f"backend '{self.name}' takes -O {SWITCH}=on or off, got '{chosen}'.")
        self._offers = chosen == "on"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        return (*super().known_options(), OPTION, SWITCH)

    def default_tuning(self) -> Tuning:
        """Return a tuning for a card that none was measured on, from what the device reports of itself."""
        raise NotImplementedError

    def triton_reason(self, device: torch.device) -> str:
        """Return why the device cannot run the kernels; "" if it can, or may."""
        return ""

    def launcher(self) -> Launcher:
        """Return what starts the kernels; a subclass says what its card and its Triton have."""
        return Launcher()

    @functools.cached_property
    def tuning(self) -> Tuning:
        """The tuning of the device, which is known after setup."""
        if self._given is not None:
            return self._given
        file = self.tunings / card_file(self.device_info().name) if self.tunings is not None else None
        return read_tuning(file) if file is not None and file.is_file() else self.default_tuning()

    def shared_memory(self) -> int | None:
        """Return the bytes of shared memory that a block may use; None if the stack does not report them."""
        properties = self.properties()
        most = known(properties, "shared_memory_per_block_optin")
        whole = known(properties, "shared_memory_per_multiprocessor")
        return most or (whole - 1024 if whole else None)  # CUDA keeps 1 KiB of each block

    def kernels(self) -> Mapping[str, FusedOp]:
        """Return the ops on the vendor's kernels, best first; called once the device is known."""
        return {}

    def ahead_of(self) -> Mapping[str, str]:
        """Return our op -> the vendor's that it comes before on this device, where evidence puts it ahead.

        All others of ours come last.
        """
        return {}

    @functools.cached_property
    def _ops(self) -> Mapping[str, FusedOp]:
        """The vendor's ops and ours, kept for their scratch memory; they import no kernel."""
        return ordered(self.kernels(), self.triton_ops(), self.ahead_of())

    def ops(self) -> Mapping[str, FusedOp]:
        return self._ops

    def triton_ops(self) -> Mapping[str, FusedOp]:
        """Return the Triton ops for this device; keep them, because they hold scratch memory."""
        if not self._offers:
            return {}
        return triton_ops(self.tuning, self.multiprocessors(), self.launcher(), self.triton_reason)

    def vendor_facts(self) -> Mapping[str, str]:
        tuning = {} if self.device is None else {"tuning": self.tuning.source}  # it is chosen by the device
        return {**super().vendor_facts(), **tuning, **set_variables(VARIABLES)}


def _read(backend: str, file: str) -> Tuning:
    try:
        return read_tuning(file)
    except BackendError as error:
        raise BackendOptionError(f"backend '{backend}' cannot take -O {OPTION}: {error}") from error
