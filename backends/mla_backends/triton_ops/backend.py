"""`TritonBackend`: a device whose plugin offers the Triton ops, with the tuning for the card at hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mla_backends.api import FusedOp
from mla_backends.errors import BackendError, BackendOptionError
from mla_backends.torch_backend import TorchBackend, known, set_variables
from mla_backends.triton_ops import triton_ops
from mla_backends.triton_ops.launcher import VARIABLES
from mla_backends.triton_ops.tuning import Tuning, card_file, read_tuning

if TYPE_CHECKING:
    import torch

OPTION, SWITCH = "tuning", "triton"


class TritonBackend(TorchBackend):
    """Base beside `TorchBackend` or one of its kinds, named before it.

    The tuning is that of the file in `-O tuning=FILE`; else the one measured on a card of this name, from the
    folder `tunings`; else `default_tuning()`. `-O triton=off` offers none of the ops, so that nothing is
    compiled.
    """

    tunings: Path | None = None  # a folder of files that campaigns have written, named by `card_file`

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

    @functools.cached_property
    def _ops(self) -> Mapping[str, FusedOp]:
        """The vendor's ops and then ours, kept for their scratch memory; they import no kernel.

        Ours come last, as long as no card has shown that one is faster than another kernel.
        """
        return {**self.kernels(), **self.triton_ops()}

    def ops(self) -> Mapping[str, FusedOp]:
        return self._ops

    def triton_ops(self) -> Mapping[str, FusedOp]:
        """Return the Triton ops for this device; keep them, because they hold scratch memory."""
        if not self._offers:
            return {}
        return triton_ops(self.tuning, self.multiprocessors(), device_reason=self.triton_reason)

    def vendor_facts(self) -> Mapping[str, str]:
        tuning = {} if self.device is None else {"tuning": self.tuning.source}  # it is chosen by the device
        return {**super().vendor_facts(), **tuning, **set_variables(VARIABLES)}


def _read(backend: str, file: str) -> Tuning:
    try:
        return read_tuning(file)
    except BackendError as error:
        raise BackendOptionError(f"backend '{backend}' cannot take -O {OPTION}: {error}") from error
