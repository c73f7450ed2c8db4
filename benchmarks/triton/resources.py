"""What a compiled kernel needs of a GPU, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia as nvidia

from benchmarks.triton import counting

BIN = Path(nvidia.__file__).parent / "bin"
# What to count in NVIDIA's machine code: products of matrices, copies to shared memory in the background, and
# where programs that may have started early wait for the launch before.
SASS = {
    "tcgen05": r"\bUTC\w*MMA\b",
    "wgmma": r"\b[HQI]GMMA\b",
    "mma": r"\b[HQI]MMA\b",
    "cp.async": r"\bLDGSTS\b",
    "early start": r"\bACQBULK\b",
}


def resources_of(kernel: Any) -> dict[str, Any]:
    """Return registers and spilled bytes per thread, bytes of shared memory, and counts of instructions.

    `step` is what a step over keys takes: see `counting`.
    """
    if "cubin" in kernel.asm:
        return _of_nvidia(kernel)
    return _of_amd(kernel.asm["amdgcn"], kernel.metadata)


def _of_nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(BIN / "cuobjdump", "-res-usage", file.name)
        code = _output(BIN / "nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"],  # these kernels have no arrays of their own: their frame is what spills
        "shared": kernel.metadata.shared,
        "tensor memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "trap": bool(re.search(r"\btrap;", kernel.asm["ptx"])),
        "instructions": _counted(code, kernel.asm["ptx"]),
        "step": counting.of_nvidia(code, kernel.asm["ptx"], kernel.metadata.num_warps),
    }


def _counted(sass: str, ptx: str) -> dict[str, int]:
    """Return how many instructions of each kind there are; no early start where something comes before it."""
    counts = {name: n for name, what in SASS.items() if (n := len(re.findall(what, sass)))}
    first = re.search(r"griddepcontrol\.wait|\b(?:ld|st|atom|red)\.(?:\w+\.)*global|\bcp\.async", ptx)
    if first is None or first[0] != "griddepcontrol.wait":
        counts.pop("early start", None)  # it reads what the launch before may still write, or the reverse
    return counts


def _of_amd(code: str, metadata: Any) -> dict[str, Any]:
    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(match[1]) if match else 0

    products = len(re.findall(r"\bv_(?:mfma|wmma)_", code))
    return {
        "registers": number("vgpr_count"),  # accumulators included
        "spilled": number("private_segment_fixed_size"),
        "shared": metadata.shared,
        "tensor memory": 0,
        "trap": "s_trap" in code,
        "instructions": {"mfma": products} if products else {},
        "step": counting.of_amd(code, metadata.num_warps),
    }


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout
