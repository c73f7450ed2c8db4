"""What a shipped configuration must not do, and its resources as a row of a table."""

from __future__ import annotations

from typing import Any

from benchmarks.triton.cases import Case, Target, Work

KIB = 1024
MANY_ROWS = 64  # from which on no product may be computed twice, which warps of fewer rows have to
SPREADS = (3, 6)  # the oldest Triton with which none is: see jit/latent.py
TENSOR_MEMORY = 512  # columns
# Of a multiprocessor: KiB of shared memory (each block takes 1 more than it asks for).
PROCESSOR_KIB = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
REGISTERS, UNIT = 65536, 256  # a warp gets a multiple of the unit


def faults(case: Case, resources: dict[str, Any], shared_kib: int) -> list[str]:
    """Return what is wrong with a compiled case, on a card whose blocks may use so much shared memory."""
    if "error" in resources:
        return [f"does not compile: {resources['error']}"]
    wrong = []
    if resources["spilled"]:
        wrong.append(f"spills {resources['spilled']} bytes per thread")
    if resources["shared"] > shared_kib * KIB:
        wrong.append(f"needs {resources['shared'] / KIB:.0f} of {shared_kib} KiB of shared memory")
    if resources["tensor memory"] > TENSOR_MEMORY:
        wrong.append(f"needs {resources['tensor memory']} of {TENSOR_MEMORY} columns of tensor memory")
    if resources["trap"]:
        wrong.append("is nothing but a trap")
    needed = product_of(case)
    if needed and not resources["instructions"].get(needed):
        wrong.append(f"has no {needed} instruction")
    if (times := repeats(case, resources)) > 1.01:
        wrong.append(f"computes {times:.2f} times the products that it needs")
    if case.arguments["EARLY"]["value"] and not resources["instructions"].get("early start"):
        wrong.append("may start early, and does not wait for the launch before")
    return wrong


def product_of(case: Case) -> str:
    """Return the kind of matrix instruction that a kernel with tiles is worth shipping with; "" without."""
    if "ROWS" not in case.arguments:
        return ""
    if case.target.backend == "hip":
        return "mfma"
    wide = {90: "wgmma", 100: "tcgen05"}.get(int(case.target.arch))
    return wide if wide and case.arguments["ROWS"]["value"] >= MANY_ROWS else "mma"


def repeats(case: Case, resources: dict[str, Any]) -> float:
    """Return how often a step of MANY_ROWS computes the products that it needs; 0 of all other kernels."""
    rows = case.arguments.get("ROWS", {"value": 0})["value"]
    version = tuple(int(part) for part in resources["triton"].split(".")[:2])
    if rows < MANY_ROWS or version < SPREADS or not resources["step"]:
        return 0.0
    return float(sum(resources["step"]["flops"].values()) / Work.of(case).flops)


def programs(target: Target, warps: int, resources: dict[str, Any]) -> int | None:
    """Return how many programs fit on a multiprocessor; None where that is not known."""
    if str(target) not in PROCESSOR_KIB:
        return None
    per_warp = -(-resources["registers"] * target.warp_size // UNIT) * UNIT
    by_memory = PROCESSOR_KIB[str(target)] * KIB // (resources["shared"] + KIB)
    return min(REGISTERS // (per_warp * warps), by_memory)


def tile_of(case: Case) -> str:
    """Return "16 x 32, 4, 2, halves": rows, keys, warps, stages, and how latents are multiplied.

    Of kernels without tiles, the warps.
    """
    known = {name: argument.get("value") for name, argument in case.arguments.items()}
    if "ROWS" not in known:
        return str(case.warps)
    halves = ", halves" if known.get("HALVES") else ""
    return f"{known['ROWS']} x {known['KEYS']}, {case.warps}, {case.stages}{halves}"
