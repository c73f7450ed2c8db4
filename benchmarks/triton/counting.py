"""What a step over keys takes, counted in machine code: products, shared memory and instructions.

A kernel's loop over keys is the one with the most products per instruction: code that waits out of line jumps
back too, over almost the whole program. Its body is a step of one warp; a program has several.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

LANES = 32  # of an NVIDIA warp
WAVE = 64  # lanes of an AMD wavefront
GROUP = 4  # warps that start one wgmma together
ELEMENT = 2  # bytes of a bfloat16
WAVEFRONT = LANES * 4  # bytes that one instruction without a width moves for a warp

# Regular expressions of a label, an instruction, and a branch that may close a loop.
SASS = (r"^\.(L_x_\d+):", r"/\*[0-9a-f]+\*/\s+(.*?);", r"BRA.*\(\.(L_x_\d+)\)")
PTX = (r"^\$(L__\w+):", r"^\s+(.*);", r"bra(?:\.uni)?\s+\$(L__\w+)")
GCN = (r"^\.(LBB\d+_\d+):", r"^\t([a-z]\S*.*)", r"^s_c?branch\S*\s+\.(LBB\d+_\d+)")


class Cost(NamedTuple):
    """What one instruction takes for all the warps that start it together."""

    unit: str = ""  # which matrix instruction it is: mma, wgmma, tcgen05, mfma
    flops: int = 0
    shared: int = 0  # bytes through shared memory


FREE = Cost()


class Code(NamedTuple):
    """A program as its instructions, where its labels stand, and the branches that may close a loop."""

    instructions: list[str]
    labels: dict[str, int]
    branch: str  # a regular expression with the label as its group

    def loops(self) -> Iterator[Sequence[str]]:
        """Yield the body of every loop: what a branch jumps back over."""
        for place, text in enumerate(self.instructions):
            match = re.search(self.branch, text)
            start = self.labels.get(match[1], place + 1) if match else place + 1
            if start <= place:
                yield self.instructions[start : place + 1]


def of_nvidia(sass: str, ptx: str, warps: int) -> dict[str, Any] | None:
    """Return what a step takes of an NVIDIA GPU; None of a kernel without products.

    Shapes of tcgen05 products stand in descriptors, whose values only PTX shows.
    """
    body = _hottest(_code(sass, *SASS), _sass)
    if body is None:
        return None
    costs = [_sass(text) for text in body]
    wide = _tcgen05(ptx) if any(cost.unit == "tcgen05" for cost in costs) else []
    kept = [cost for cost in costs if cost.unit != "tcgen05"]
    times = [(cost, warps / (GROUP if cost.unit == "wgmma" else 1)) for cost in kept]
    return _total(len(body) * warps, [*times, *((cost, 1.0) for cost in wide)])


def of_amd(code: str, warps: int) -> dict[str, Any] | None:
    """Return what a step takes of an AMD GPU; None of a kernel without products.

    Only vector instructions are counted: others are started beside them.
    """
    body = _hottest(_code(code, *GCN), _gcn)
    if body is None:
        return None
    costs = [_gcn(text) for text in body]
    vector = sum(text.startswith("v_") and not cost.unit for text, cost in zip(body, costs, strict=True))
    return _total(vector * warps, [(cost, float(warps)) for cost in costs])


def _total(instructions: int, costs: Sequence[tuple[Cost, float]]) -> dict[str, Any]:
    flops: Counter[str] = Counter()
    for cost, times in costs:
        if cost.unit:
            flops[cost.unit] += round(cost.flops * times)
    shared = round(sum(cost.shared * times for cost, times in costs))
    return {"instructions": instructions, "flops": dict(flops), "shared": shared}


def _code(text: str, label: str, instruction: str, branch: str) -> Code:
    code = Code([], {}, branch)
    for line in text.splitlines():
        if match := re.match(label, line.strip()):
            code.labels[match[1]] = len(code.instructions)
        elif match := re.search(instruction, line):
            code.instructions.append(match[1].strip())
    return code


def _hottest(code: Code, cost: Any) -> Sequence[str] | None:
    """Return the body of the loop over keys; None without products in a loop."""

    def density(body: Sequence[str]) -> float:
        return sum(bool(cost(text).unit) for text in body) / len(body)

    best = max(code.loops(), key=density, default=None)
    return best if best and density(best) else None


def _sass(text: str) -> Cost:
    """Return what an instruction of NVIDIA's machine code takes."""
    name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    kind = name.partition(".")[0]
    if kind == "HMMA":  # 16816 is 16 x 8 x 16
        return Cost("mma", 2 * 16 * 8 * (16 if ".16816" in name else 8))
    if kind == "HGMMA":
        rows, columns, depth = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", name)[0])
        from_shared = columns + (rows if operands.split(", ")[1].startswith("gdesc") else 0)
        return Cost("wgmma", 2 * rows * columns * depth, from_shared * depth * ELEMENT)
    if re.fullmatch(r"UTC\w*MMA", kind):
        return Cost("tcgen05")
    if kind in ("LDSM", "STSM"):  # 1, 2 or 4 matrices of 8 x 8
        count = re.search(r"\.MT?88\.(\d)", name)
        return Cost(shared=WAVEFRONT * int(count[1] if count else 1))
    if kind in ("LDS", "STS", "LDGSTS"):
        width = re.search(r"\.(64|128)\b", name)
        return Cost(shared=WAVEFRONT * (int(width[1]) // 32 if width else 1))
    return FREE


def _tcgen05(ptx: str) -> list[Cost]:
    """Return the products of a step that tensor memory collects, from their descriptors.

    Bits 17 to 22 of a descriptor hold columns / 8, bits 24 to 28 rows / 16 (PTX ISA, tcgen05 instruction
    descriptor). A first operand in brackets is in tensor memory.
    """
    known = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx)}
    code = _code(ptx, *PTX)
    product = re.compile(r"tcgen05\.mma\S*\s+\[[^]]*\],\s+(\[[^]]*\]|%rd\d+),\s+%rd\d+,\s+(%r\d+),")
    body = _hottest(code, lambda text: Cost("tcgen05") if product.search(text) else FREE) or []
    costs = []
    for match in filter(None, map(product.search, body)):
        descriptor, depth = known[match[2]], 16
        columns, rows = (descriptor >> 17 & 63) * 8, (descriptor >> 24 & 31) * 16
        from_shared = columns + (0 if match[1].startswith("[") else rows)
        half = ", 64 rows" if rows == 64 else ""
        costs.append(Cost(f"tcgen05{half}", 2 * rows * columns * depth, from_shared * depth * ELEMENT))
    return costs


def _gcn(text: str) -> Cost:
    """Return what an instruction of AMD's assembly takes."""
    name = text.split()[0]
    if shape := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        rows, columns, depth = map(int, shape.groups())
        return Cost("mfma", 2 * rows * columns * depth)
    if width := re.match(r"ds_(?:\w+?)(2?)(?:st64)?_[bu](\d+)", name):
        return Cost(shared=WAVE * int(width[2]) // 8 * (2 if width[1] else 1))
    return FREE
