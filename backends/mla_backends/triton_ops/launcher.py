"""How Triton ops start: what Triton lacks here, `Launcher`, and the base of the ops.

Triton compiles kernels itself, but builds a small launcher in C for them at the first use: with `$CC`, gcc or
clang and the headers of Python, into a cache folder. So do all releases from 3.1 to 3.9.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

from mla_backends.api import FusedOp
from mla_backends.errors import describe, one_line
from mla_backends.kernels.vendor import DeviceReason, KernelRefused, layer_reasons
from mla_backends.selftest import failures
from mla_backends.triton_ops.tuning import Tile

if TYPE_CHECKING:
    import torch

# Packages that wheels of torch take Triton from.
PACKAGES = (
    "triton", "triton-rocm", "triton-xpu", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu",
)  # fmt: skip
# Change where Triton's kernels come from, what they compute or how fast they are.
VARIABLES = (
    "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_MANAGER", "TRITON_OVERRIDE_DIR",
    "TRITON_KERNEL_OVERRIDE", "TRITON_ALWAYS_COMPILE", "TRITON_DEFAULT_BACKEND", "TRITON_DEFAULT_FP_FUSION",
    "TRITON_F32_DEFAULT", "TRITON_OVERRIDE_ARCH", "TRITON_PTXAS_PATH", "TRITON_LIBCUDA_PATH",
    "DISABLE_PTXAS_OPT", "TRITON_DEBUG", "CC",
)  # fmt: skip


def missing() -> list[str]:
    """Return that Triton is not installed, and how to get it (empty if it is)."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:  # a folder of that name, of anything
        return [f"triton is not installed: {_source()}"]
    return []


def interprets() -> bool:
    """Return whether Triton interprets kernels on the host."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _source() -> str:
    """Return how to get the Triton that belongs to the installed torch."""
    try:
        required = metadata.requires("torch") or ()
    except metadata.PackageNotFoundError:
        required = ()
    for line in required:
        wanted = line.partition(";")[0].replace(" ", "")
        if wanted.startswith(PACKAGES):
            return f"this torch asks for it: pip install {wanted}"
    return "it comes with torch's wheels for CUDA and with vendors' builds of torch; this torch asks for none"


# ----------------------------------------------------------------------------------------- launcher
# `Launcher`: starts Triton kernels, with a smaller tile where the device lacks the resources for one.

Grid = tuple[int, ...]

# 32-bit registers of a multiprocessor of NVIDIA's, of a thread of it, and threads of a warp.
REGISTERS, THREAD_REGISTERS, WARP = 65536, 255, 32

# What Triton and vendors' forks raise, by name, for a kernel that needs too much; and what assemblers and
# drivers say of one.
OUT_OF_RESOURCES = "OutOfResources"
SAID = re.compile(
    r"too many resources|out of resources?|too much shared|exceed\w* .*(shared|local) memory|\(LDS\)"
    r"|register allocation failed",
    re.IGNORECASE,
)


class Launcher:
    """Starts kernels. `launches` counts them; `remarks` says which tiles did not fit.

    With `early`, a kernel may be started while the launch before it still runs, and waits for it itself
    (programmatic dependent launch): its launch takes no time of its own. Triton and the card must have it.
    """

    def __init__(self, early: bool = False, native_e4m3: bool = False, bounds: bool = False) -> None:
        """`native_e4m3`: the card converts e4m3 itself, which integers do elsewhere.

        `bounds`: its Triton takes a bound on registers. Without one, ptxas spills a few of them wherever one
        more program then fits, though shared memory may not hold it.
        """
        self.early = early and not interprets()
        self.native_e4m3 = native_e4m3
        self.bounds = bounds and not interprets()
        self.launches = 0
        self.remarks: list[str] = []
        self._fitting: dict[tuple[Any, ...], Tile] = {}  # kernel, tile and variant -> the tile that runs

    def start(
        self,
        kernel: Any,
        grid: Grid,
        arguments: Mapping[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
        programs: int = 1,
    ) -> None:
        """Start `kernel` (made by `triton.jit`) on `grid`; `arguments` by name, constants included.

        Registers are bounded so that a multiprocessor runs at least `programs` at a time.
        """
        written = arguments.get("out", arguments.get("cache"))
        with on_device(written.device):  # Triton starts kernels on the current device
            options: dict[str, Any] = (
                {"launch_pdl": True} if arguments.get("EARLY") else {}
            )  # not all have it
            if self.bounds:
                options["maxnreg"] = registers(warps, programs)
            kernel[grid](**arguments, num_warps=warps, num_stages=stages, **options)
        self.launches += 1

    def start_tiled(
        self,
        name: str,
        tile: Tile,
        arguments: Mapping[str, Any],
        variant: Sequence[str],
        start: Callable[[Tile], None],
    ) -> None:
        """Call `start` with `tile`, or with a smaller one where the device lacks the resources for it.

        What fits one variant of the kernel need not fit another: `variant` names the arguments that tell them
        apart, beside dtype and device. What did not fit is not tried again. Raises `KernelRefused` if no tile
        fits.
        """
        out = arguments["out"]
        key = (name, tile, out.device, out.dtype, *map(arguments.__getitem__, variant))
        begin, why = self._fitting.get(key, tile), ""
        for candidate in chain((begin,), begin.smaller()):  # which is seldom asked for a second
            try:
                start(candidate)
            except Exception as error:
                if not lacks_resources(error):
                    raise
                why = why or one_line(describe(error))
            else:
                self._fitting[key] = candidate
                if why:
                    given = ", ".join(f"{word.lower()} {arguments[word]}" for word in variant)
                    said = (
                        f"{name} ({given}) runs with {candidate}, as {begin} does not fit this device ({why})"
                    )
                    self.remarks += [said] * (said not in self.remarks)
                return
        raise KernelRefused(f"{name} does not fit this device in any tile ({why}).")


def registers(warps: int, programs: int) -> int:
    """Return how many registers a thread may have where so many programs run on a multiprocessor."""
    return min(THREAD_REGISTERS, REGISTERS // (WARP * warps * programs) // 8 * 8)


# Formats of the cache that kernels read and write: a branch of jit/formats.py. "fp8:" is fp8 over any scale.
CACHE_FORMATS = ("fp8", "fp8:", "fp8_ds_mla", "fp8_ds_mla_any", "int8", "q8_0")
IN_TWO_PARTS = ("fp8_ds_mla_any", "q8_0")  # whose numbers have more digits than products take
Q8_BLOCK = 32  # columns that share a scale of q8_0


def format_reasons(spec: Any) -> list[str]:
    """Return why a kernel cannot store the latents of a layer in its cache format (empty if it can)."""
    if spec.cache_format != "q8_0" or spec.kv_lora_rank % Q8_BLOCK == 0:
        return []
    return [f"it stores q8_0 for latents of a multiple of {Q8_BLOCK}, not {spec.kv_lora_rank}"]


def stored(cache: torch.Tensor, cache_format: str, launcher: Launcher) -> tuple[dict[str, Any], float]:
    """Return what kernels are compiled for by a cache [pages, page, bytes or c + r], and the scale of fp8.

    "fp8:0.05" has the scale 0.05, which is passed at run time; every other name has 1.
    """
    name, _, scale = cache_format.partition(":")
    facts = {"TOKEN": cache.shape[2], "FORMAT": name or "plain", "NATIVE": launcher.native_e4m3}
    return facts, float(scale or 1)


def strides(**tensors: torch.Tensor | None) -> dict[str, int]:
    """Return the steps from a token, and from a head, to the next: `q_token`, `q_head`; 0 for None."""
    steps: dict[str, int] = {}
    for name, x in tensors.items():
        steps[f"{name}_token"], steps[f"{name}_head"] = (0, 0) if x is None else x.stride()[:2]
    return steps


def lacks_resources(error: Exception) -> bool:
    """Return whether a kernel was not started because it needs too much of the device."""
    name = type(error).__name__
    if name == OUT_OF_RESOURCES:
        return True
    return name in ("RuntimeError", "PTXASError") and SAID.search(str(error)) is not None


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one of its kind, for a while, unless it is."""
    import torch

    module = getattr(torch, device.type, None)
    current = getattr(module, "current_device", None)
    if device.index is None or device.type == "cpu" or current is None or current() == device.index:
        return nullcontext()
    guard: AbstractContextManager[Any] = module.device(device.index)  # type: ignore[union-attr]
    return guard


# ---------------------------------------------------------------------------------------- kernel op
# What the Triton ops share: what they need to run, and a trial before the first use.

CURE = (
    "check that Triton finds gcc or clang (or CC), Python's headers (python3-dev), and a cache folder to "
    "write (TRITON_CACHE_DIR), or use other ops (`-O triton=off` offers none of these)"
)


class KernelOp(FusedOp):
    """Base of the ops. Its kernels are compiled at the first use, which `preflight` is."""

    compiles = "Triton kernels, unless they are in Triton's cache"
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    tiled = ""  # what the launcher calls the kernel that has a tile

    def __init__(self, launcher: Launcher, device_reason: DeviceReason | None = None) -> None:
        self.launcher = launcher
        self._device_reason = device_reason

    @property
    def remarks(self) -> list[str]:  # type: ignore[override]
        """Say which of its tiles did not fit the device."""
        return [said for said in self.launcher.remarks if self.tiled and said.startswith(self.tiled)]

    def unsupported_reasons(self, spec: Any) -> list[str]:
        """Return that there is no Triton, and what the kernel is not made for."""
        reasons = layer_reasons(self._device_reason, self.dtypes, spec)
        return reasons + self.shape_reasons(spec) + missing()

    def shape_reasons(self, spec: Any) -> list[str]:
        """Return why the kernel is not made for these sizes (empty if it is)."""
        return []

    def preflight(self, spec: Any) -> list[str]:
        """Run tiny problems, which compiles the kernels."""
        return failures(lambda: self.attempt(spec), "the Triton kernel", CURE)

    def attempt(self, spec: Any) -> str:
        """Run a tiny problem; return what is wrong, "" if nothing."""
        raise NotImplementedError


def wide(size: int, least: int = 1) -> int:
    """Return the next power of two, at least `least`; 0 for 0."""
    return max(least, 1 << (size - 1).bit_length()) if size else 0
