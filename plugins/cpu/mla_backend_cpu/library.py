"""The compiled kernels as Python functions: loading them, and their C signatures."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

from mla_backend_cpu import build

#: Argument types by letter: p address, i int64, f float, n int.
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "n": ctypes.c_int}
#: Arguments of each function of native/api.cpp, in groups that belong to one tensor or one idea.
SIGNATURES = {
    "mla_pack": "piii iii p n",
    "mla_unpack": "p iii p n",
    "mla_linear": "pi p p pi iii nn",
    "mla_batched_linear": "pii p pii iiii nn",
    "mla_latent_attention": "pii p pi pp iiiii f pii pii n",
    "mla_expanded_attention": "pii pii pii iii f pii pii ppin n",
    "mla_rms_norm": "pi p f pi ii n",
    "mla_rotate": "pii pi pii iiin n",
    "mla_write_latent": "pi p f pi p p iiin n",
    "mla_dot_bf16": "",
}


class Library:
    """The kernels of one level; `functions.mla_linear(...)` and so on."""

    def __init__(self, level: str, functions: ctypes.CDLL) -> None:
        self.level = level
        self.functions = functions
        for name, signature in SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes = [_TYPES[letter] for letter in signature.replace(" ", "")]
            function.restype = ctypes.c_int if name == "mla_dot_bf16" else None
        self.dot_bf16 = bool(functions.mla_dot_bf16())


def load(wanted: str) -> Library:
    """Build (once per machine) and load the kernels of the best level, or of the one named.

    Raises `BuildError`; what failed is not tried again in this process.
    """
    found = _load(wanted)
    if isinstance(found, str):
        raise build.BuildError(found)
    return found


@functools.cache
def _load(wanted: str) -> Library | str:
    """Return the kernels, or why there are none.

    Torch comes first: the OpenMP runtime it has loaded is the one the kernels use.
    """
    import torch  # noqa: F401  # loads the OpenMP runtime

    if platform.system() != "Linux":
        return f"kernels are built on Linux only, and this is {platform.system()}"
    if sys.byteorder != "little":
        return "the kernels read pairs of bf16 values as little-endian words, and this processor's are not"
    try:
        level = build.choose_level(wanted)
        return Library(level.name, ctypes.CDLL(str(build.library(level))))
    except build.BuildError as error:
        return str(error)
    except (OSError, AttributeError) as error:
        hint = "; build them with g++, since torch has loaded GNU's OpenMP" if "__kmpc" in str(error) else ""
        return f"the built kernels cannot be loaded: {error}{hint}"
