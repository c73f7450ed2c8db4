"""Makes Triton's interpreter fit to prove kernels with, on a host without a GPU. Import it before triton.

bfloat16 and float8 are computed exactly, which the interpreter by itself gets wrong. What it lets pass and a
device does not becomes an error: an access outside the arguments of a launch, an index that overflows int32,
a dot below the least size, an argument that the kernel does not have. fp32 products lose digits as in TF32
unless they ask for IEEE. Programs run in random order inside `shuffled(seed)`. A launch on tensors of an
emulated device is one opaque kernel of that device.

From the first launch on, this process can interpret kernels and no longer compile them.
"""

from __future__ import annotations

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

if not isinstance(tl.max, getattr(interpreter, "InterpretedFunction")):  # noqa: B009
    raise ImportError(
        "triton was imported without TRITON_INTERPRET=1: set it in the environment of the process, "
        "or import `interpreting` first."
    )

from interpreting.faults import KernelFault, OutOfBounds, Overflow
from interpreting.launching import install, shuffled

install()

__all__ = ["KernelFault", "OutOfBounds", "Overflow", "shuffled"]
