"""Sections about the project's own kernels, as data: their best tiles, and whether others are faster."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.sizes import HERE, Sizes, shapes
from benchmarks.gpu.steps import OPTIONAL, Machine, Section, Step, bench_step
from benchmarks.gpu.tuning.classes import classes

DECODE_SECONDS, PROMPT_SECONDS = 140, 90  # all kernels on the shapes of one head count
LARGE_SECONDS = (150, 150, 300)  # ... on one large shape
DEFAULT_SECONDS, R1_SECONDS = 240, 360  # a layer, as in the standard scenarios
SWEEP_SECONDS, PICK_SECONDS = 110, 45  # for the tiles of one class of calls
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
        "choose",
        (program, "choose", "--backend", machine.backend, *tiny, "--out", "{out}"),
        PICK_SECONDS, "file", "^(use|ship) it", OPTIONAL, machine.tuning, always=True,
    )  # fmt: skip
    return Section("tune", "Tiles and splits of the project's own kernels", (*sweeps, pick))


def large_rivals(machine: Machine, sizes: Sizes) -> tuple[Section, ...]:
    """Decode on the shapes that targets are judged on, a step for each: their keys are up to 10 GB."""
    return tuple(
        Section(
            f"rivals-{heads}",
            f"All kernels in turns on large shapes, {heads} heads",
            tuple(
                _in_turns(
                    f"latent-heads-{heads}-{batch}x{history}", machine, sizes, "latent_attention", heads,
                    limit, shapes(batch, history),
                )
                for (batch, history), limit in zip(sizes.large_shapes, LARGE_SECONDS, strict=False)
            ),
        )
        for heads in sizes.large_heads
    )  # fmt: skip


def rivals(machine: Machine, sizes: Sizes) -> Section:
    """Every attention that runs here in turns on the same shapes."""
    small = shapes(sizes.rival_batches, sizes.rival_histories)
    calls = {
        "latent_attention": (sizes.heads, DECODE_SECONDS, small),
        "expanded_attention": (sizes.prompt_heads, PROMPT_SECONDS, sizes.prompts),
    }
    steps = tuple(
        _in_turns(f"{op.partition('_')[0]}-heads-{heads}", machine, sizes, op, heads, limit, axes)
        for op, (each, limit, axes) in calls.items()
        for heads in each
    )
    return Section("rivals", "All kernels of attention in turns", steps)


def _in_turns(
    name: str, machine: Machine, sizes: Sizes, op: str, heads: int, limit: int, axes: tuple[str, ...]
) -> Step:
    words = (str(HERE / "rivals.py"), "--backend", machine.backend, "--op", op, "--heads", str(heads))
    counts = (*sizes.large, *axes, *sizes.rival_counts)
    return Step(name, (*words, *counts), limit, "run", tolerates=OPTIONAL, tuning=_tuning(machine))


def own_layers(machine: Machine, sizes: Sizes) -> Section:
    """The standard scenarios with the project's own kernels, whichever the backend would choose."""
    own = f"mla[{','.join(f'{op}={name}' for op, name in OURS.items())}]"
    words = ("--implementations", own, "--cache", "warm", *sizes.counts, *sizes.layer)
    layers = {
        "deepseek-v2-lite": (DEFAULT_SECONDS, sizes.default),
        "deepseek-r1": (R1_SECONDS, (*sizes.large, "--scenario", "decode")),
    }
    steps = (
        bench_step(f"own-{name}", machine, limit, *more, *words, tolerates=OPTIONAL)
        for name, (limit, more) in layers.items()
    )
    tuned = tuple(replace(step, tuning=_tuning(machine)) for step in steps)
    return Section("own-layers", "The layer with the project's own kernels", tuned)


def _tuning(machine: Machine) -> str:
    """Return where the tuning is, seen from another section; "" for a backend that reads none."""
    return f"../tune/{machine.tuning}" if "tuning" in machine.options else ""
