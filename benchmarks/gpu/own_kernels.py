"""Sections about the project's own kernels, as data: their best tiles, and whether others are faster."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.sizes import HERE, Sizes
from benchmarks.gpu.steps import OPTIONAL, Machine, Section, Step, bench_step
from benchmarks.gpu.tuning.classes import classes

DECODE_SECONDS, PROMPT_SECONDS, OURS_SECONDS = 120, 60, 60  # all kernels on the shapes of one head count
SWEEP_SECONDS, PICK_SECONDS = 115, 20  # for the tiles of one class of calls
OURS = {"latent_attention": "triton_latent", "expanded_attention": "triton_expanded"}


def tune(machine: Machine, smoke: bool) -> Section:
    """Tiles and splits of the project's own kernels, and the file that a plugin reads."""
    program, tiny = str(HERE / "tune.py"), ("--smoke",) * smoke
    sweeps = tuple(
        Step(
            name,
            (program, "sweep", name, "--backend", machine.backend, *tiny, "--out", "{out}"),
            SWEEP_SECONDS, "sweep", tolerates=OPTIONAL,
        )
        for name in classes(smoke)
    )  # fmt: skip
    pick = Step(
        "choose", (program, "choose", *tiny, "--out", "{out}"), PICK_SECONDS, "file",
        tolerates=OPTIONAL, file=machine.tuning, always=True,
    )  # fmt: skip
    return Section("tune", "Tiles and splits of the project's own kernels", (*sweeps, pick))


def rivals(machine: Machine, sizes: Sizes) -> Section:
    """Every attention that runs here in turns on the same shapes, and the layer with the project's own."""
    counts = (*sizes.counts, *sizes.rival_counts)
    shapes = {
        "latent_attention": (sizes.heads, DECODE_SECONDS, sizes.decodes),
        "expanded_attention": (sizes.prompt_heads, PROMPT_SECONDS, sizes.prompts),
    }
    program = str(HERE / "rivals.py")
    steps = tuple(
        Step(
            f"{op.partition('_')[0]}-heads-{heads}",
            (
                program, "--backend", machine.backend, "--op", op, "--heads", str(heads), *sizes.large,
                *axes, *counts,
            ),
            limit, "run", tolerates=OPTIONAL, tuning=_tuning(machine),
        )
        for op, (each, limit, axes) in shapes.items()
        for heads in each
    )  # fmt: skip
    return Section("rivals", "All kernels of attention in turns", steps + _own_layers(machine, sizes))


def _tuning(machine: Machine) -> str:
    """Return where the tuning is, seen from another section; "" for a backend that reads none."""
    return f"../tune/{machine.tuning}" if "tuning" in machine.options else ""


def _own_layers(machine: Machine, sizes: Sizes) -> tuple[Step, ...]:
    """The standard scenarios with the project's own kernels, whichever the backend would choose."""
    if not all(name in machine.ops.get(op, ()) for op, name in OURS.items()):
        return ()
    own = f"mla[{','.join(f'{op}={name}' for op, name in OURS.items())}]"
    words = ("--implementations", own, "--cache", "warm", *sizes.counts)
    steps = (
        bench_step("own-deepseek-v2-lite", machine, OURS_SECONDS, *sizes.default, *words, tolerates=OPTIONAL),
        bench_step(
            "own-deepseek-r1",
            machine,
            OURS_SECONDS,
            *sizes.large,
            "--scenario",
            "decode",
            *words,
            tolerates=OPTIONAL,
        ),
    )
    return tuple(replace(step, tuning=_tuning(machine)) for step in steps)  # fmt: skip
