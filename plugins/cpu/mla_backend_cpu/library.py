"""The compiled kernels as Python functions: loading them, and their C signatures."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Mapping

from mla_backend_cpu import cache, compilation
from mla_backend_cpu.compilation import Artifact, BuildError, Level

# Types by letter: p address, s text, i int64, f float, n int.
_TYPES = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
    "n": ctypes.c_int,
}
# Arguments of each function of native/api.cpp, in groups that belong to one tensor or one idea, and after ">"
# what it returns: a fact, or a sentence about an invalid argument or a lack of memory.
_DECLARED = {
    "mla_pack": "piii iii p n",
    "mla_unpack": "p iii p n",
    "mla_linear": "pii p p pii iiii nn > s",
    "mla_pack_fp32": "piii iii p n",
    "mla_unpack_fp32": "p iii p n",
    "mla_linear_fp32": "pii p p pii iiii nn > s",
    "mla_latent_attention": "piii p piif i pii pp iiiii f pii pii pii n > s",
    "mla_expanded_attention": "piii piii pii iii f pii pii ppin n > s",
    "mla_rms_norm": "pi p f pi ii n",
    "mla_rotate": "pii pi pii iiin n",
    "mla_write_latent": "pi p f pi p p piif i iiin n > s",
    "mla_write_index_key": "pi p p f pi p piin iiin n > s",
    "mla_select_latents": "piii pi p nii pii pp iii pii n > s",
    "mla_huge_pages": "pi",
    "mla_recorded": "s > p",
    "mla_run_recorded": "pi n > s",
    "mla_dot_bf16": "> n",
    "mla_tiles": "> n",
}
# Name -> the letters of its arguments, and that of its result, "" for None.
SIGNATURES = {name: tuple(text.replace(" ", "").partition(">")[::2]) for name, text in _DECLARED.items()}


class Library:
    """The kernels of one level; `functions.mla_linear(...)` and so on."""

    def __init__(
        self,
        level: str,
        functions: ctypes.CDLL,
        origin: str = "",
        passed_over: Mapping[str, str] | None = None,
    ) -> None:
        """`origin`: who built it. `passed_over`: better levels by name, and why they are not used."""
        self.level = level
        self.functions = functions
        self.origin = origin
        self.passed_over = dict(passed_over or {})
        for name, (arguments, result) in SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes = [_TYPES[letter] for letter in arguments]
            function.restype = _TYPES.get(result)
        self.dot_bf16 = bool(functions.mla_dot_bf16())
        self.tiles = bool(functions.mla_tiles())

    @property
    def emulated(self) -> bool:
        """Whether the instructions this level is named after are emulated in C++."""
        return self.level == compilation.EMULATED


@functools.cache
def loaded(wanted: str) -> Library | str:
    """Return the kernels, or why there are none.

    Torch comes first: the OpenMP runtime it has loaded is the one the kernels use.
    """
    import torch  # noqa: F401  # loads the OpenMP runtime

    if platform.system() != "Linux":
        return f"kernels are built on Linux only, but this is {platform.system()}"
    if sys.byteorder != "little":
        return (
            "the kernels read pairs of bf16 values as little-endian words, but this processor is big-endian"
        )
    try:
        return _first(wanted)
    except BuildError as error:
        return str(error)


def _first(wanted: str) -> Library:
    """Return the kernels of the first level that may run and can be had. Raises `BuildError`."""
    passed_over: dict[str, str] = {}
    for level in compilation.levels(wanted):
        try:
            if (reason := compilation.missing(level)) is None:
                return _loaded(level, passed_over)
        except BuildError as error:
            reason = str(error)
        passed_over[level.name] = reason
    raise BuildError(passed_over[level.name])


def _loaded(level: Level, passed_over: Mapping[str, str]) -> Library:
    """Load what came with this installation, else what was built here, else build it now."""
    prebuilt = cache.find_prebuilt(level)
    if isinstance(prebuilt, Artifact):
        try:
            return _library(level, prebuilt, "came with this installation", passed_over)
        except OSError as error:  # pip keeps wheels it has built, perhaps on a newer system
            prebuilt = f"those that came with this installation cannot be loaded ({error})"
    kept = cache.find(level) or cache.make(level, since=prebuilt)
    try:
        return _library(level, kept, "built here", passed_over)
    except OSError as error:
        raise BuildError(f"the built kernels cannot be loaded: {error}{_cure(str(error))}") from error


def _library(level: Level, kernels: Artifact, by: str, passed_over: Mapping[str, str]) -> Library:
    """Load exactly what was checked: a file may be replaced between two uses of its name.

    The descriptor stays open, because the loader would take another one of its number for the same library.
    Raises OSError, which names their file, if they cannot be loaded or lack a function.
    """
    name = f"/proc/self/fd/{kernels.descriptor}"
    try:
        return Library(level.name, ctypes.CDLL(name), f"{by}, {kernels.compiler}", passed_over)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError):  # else it is loaded, and stays
            os.close(kernels.descriptor)
        raise OSError(str(error).replace(name, f"'{kernels.path}'")) from error


def _cure(message: str) -> str:
    """Return what the user can do about a library of the cache that the loader refuses."""
    if "__kmpc" in message:
        return "; build them with g++, since torch has loaded GNU's OpenMP"
    if "failed to map segment" in message:
        return " (set MLA_CACHE_DIR to a folder on a file system without noexec)"
    return ""
