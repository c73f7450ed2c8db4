"""Brings an emulated device that no plugin knows to torch, as `torch.acme`, like a vendor's package does.

Torch does not load it by itself. Environment: ACME_COUNT is how many cards there are, ACME_HAS lists all that
torch.acme has (default: everything), ACME_REFUSES lists operators without a kernel. It has no float64.
"""

import os

import emulated
import torch
from emulated import tensor

__version__ = "4.5.6"


def _listed(variable):
    return set(filter(None, os.environ.get(variable, "").split(",")))


class _NoFloat64:
    """Makes tensors of the device, but none in float64."""

    make = staticmethod(tensor.EmulatedTensor.__new__)

    @staticmethod
    def __new__(cls, raw, index):
        if raw.dtype == torch.float64:
            raise TypeError("Cannot convert an acme tensor to float64: acme has no float64")
        return _NoFloat64.make(cls, raw, index)


def _check_kernels(name, here, check=tensor._check_arithmetic):
    if name in _listed("ACME_REFUSES") and here:
        raise NotImplementedError(
            f"Could not run '{name}' with arguments from the 'acme' backend. This could be because the "
            f"operator doesn't exist for this backend. '{name}' is only available for: [CPU, Meta].\n\n"
            "CPU: registered at RegisterCPU.cpp:1"
        )
    check(name, here)


tensor.EmulatedTensor.__new__ = _NoFloat64.__new__
tensor._check_arithmetic = _check_kernels
module = emulated.install(
    "acme", emulated.Card("Acme One", (1, 0), 8), int(os.environ.get("ACME_COUNT", "2"))
)
if "ACME_HAS" in os.environ:
    for name in [name for name in vars(module) if not name.startswith("_")]:
        if name not in _listed("ACME_HAS"):
            delattr(module, name)
