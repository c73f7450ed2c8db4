"""The sections of a campaign, as data, in the order of their value. To add to one, add a line.

Limits are in seconds; those of a section add up to at most ten minutes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from benchmarks.gpu import contract
from benchmarks.gpu.own_kernels import large_rivals, own_layers, rivals, tune
from benchmarks.gpu.sizes import FULL, HERE, SMOKE, Sizes, shapes
from benchmarks.gpu.steps import MOST_SECONDS, OPTIONAL, Machine, Section, Step, bench_step

ANYTHING = frozenset({"refused", "crashed", "timed out"})  # it looks for the place where a library breaks

ATTENTION = "^(latent|expanded)_attention"
HEADLINE = ("--mode", "eager", "--cache", "warm", "--clock", "host")

# question -> limit; `python benchmarks/gpu/ask.py --list` says what each asks.
DEVICE_QUESTIONS = {
    "driver": 30,
    "tf32": 30,
    "launch": 40,
    "event-gap": 30,
    "copies": 30,
    "copies-alive": 60,
    "bmm-strided": 40,
    "l2-flush": 30,
}
ATTENTION_QUESTIONS = {"sdpa": 90, "varlen": 60}
LIBRARY_QUESTIONS = {
    "flash-mla": 60,
    "tokenspeed": 60,
    "flashinfer-compiler": 120,  # longer than its two processes may take
    "flashinfer-plan": 60,
    "flashinfer-heads": 60,
    "flashinfer-pages": 60,
    "flashinfer-split": 60,
    "flashinfer-graph": 60,
    "flashinfer-items": 60,  # the last: it may end the process and leave the device unusable to it
}
BREAKING = frozenset({"flashinfer-items"})
TILES_SECONDS, LAYER_SECONDS = 180, 150  # of the first hour: to compile all tiles, and for one config
FEWEST_SECONDS, KERNEL_SECONDS = 20, 90  # for one kernel
PROFILE_SECONDS, CHOICE_SECONDS = 120, 120  # for a profile, and for one op inside the layer


def sections(machine: Machine, smoke: bool = False) -> tuple[Section, ...]:
    """Return the sections for a machine."""
    sizes = SMOKE if smoke else FULL
    return (
        preparation(machine, sizes),
        facts(machine),
        standard(machine, sizes),
        contract.quick(machine, smoke),
        grid(machine, sizes),
        kernels(machine, sizes),
        tune(machine, smoke),
        *large_rivals(machine, sizes),
        own_layers(machine, sizes),
        rivals(machine, sizes),
        choices(machine, sizes),
        long_prefill(machine, sizes),
        questions("questions", "The device", machine, DEVICE_QUESTIONS),
        questions("libraries", "Libraries of kernels", machine, LIBRARY_QUESTIONS, frozenset({"nvidia"})),
        layers(machine, sizes),
        *contract.others(machine, smoke),
    )


def first_hour(machine: Machine, smoke: bool = False) -> tuple[Section, ...]:
    """Return what targets are judged by, in parts, for a machine that is lent for less than an hour."""
    sizes = SMOKE if smoke else FULL
    tiles = (str(HERE / "tune.py"), "compile", *("--smoke",) * smoke)
    kernels = (
        Step("tiles", tiles, TILES_SECONDS, "sweep", tolerates=OPTIONAL),
        *preparation(machine, sizes).steps[-1:],
    )
    large = [replace(one, steps=one.steps[:1]) for one in large_rivals(machine, sizes)]
    layer, quick = own_layers(machine, sizes), contract.quick(machine, smoke)
    return (
        Section("compile", "Kernels compiled at first use, tiles in many processes", kernels),
        replace(facts(machine), steps=facts(machine).steps[-1:]),
        *large,
        replace(layer, steps=tuple(replace(step, limit=LAYER_SECONDS) for step in layer.steps)),
        replace(quick, steps=quick.steps[:1]),
        tune(machine, smoke),
        *(replace(one, name=f"{one.name}-tuned", title=f"{one.title}, tuned") for one in large),
        replace(choices(machine, sizes), title="A profile", steps=choices(machine, sizes).steps[:1]),
    )


def preparation(machine: Machine, sizes: Sizes) -> Section:
    """Compile what is compiled at first use, a minute or more for each kernel: libraries keep it on disk.

    First what the layer chooses, then what else the backend offers; later sections have limits without that.
    """
    listing = ("-m", "mla.bench", "--backend", machine.backend, "--list-ops")
    others = ("-m", "mla.conformance", "--backend", machine.backend, "--quick", "--only", "ops.preflight")
    return Section(
        "prepare",
        "Kernels compiled at first use, and which op runs where",
        (
            Step("ops", (*listing, *sizes.default), 210, says=ATTENTION),
            Step("ops-deepseek-r1", (*listing, *sizes.large), 150, says=ATTENTION),
            Step("other-ops", others, 240, "conformance", tolerates=OPTIONAL),
        ),
    )


def facts(machine: Machine) -> Section:
    """What is there: whether the backend is usable, and what its device can do at most."""
    bench, backend = ("-m", "mla.bench"), ("--backend", machine.backend)
    return Section(
        "facts",
        "Machine and ceilings",
        (
            Step("doctor", (*bench, "doctor", machine.backend), 360),  # it chooses ops once more
            Step("list", (*bench, "list"), 60, says=f"^{re.escape(machine.backend)} "),
            Step("ceilings", (*bench, "ceilings", *backend, "-o", "{out}"), 120, "file"),
        ),
        needs_device=False,
    )


def standard(machine: Machine, sizes: Sizes) -> Section:
    """The two standard scenarios, eager and as a graph, with warm and cold caches, on both clocks."""
    return Section(
        "standard",
        "Standard scenarios",
        (
            bench_step("deepseek-v2-lite", machine, 240, *sizes.default, *sizes.counts),
            bench_step("deepseek-r1", machine, 360, *sizes.large, *sizes.counts),
        ),
    )


def grid(machine: Machine, sizes: Sizes) -> Section:
    """Absorbed attention alone, by heads, batch and history; what does not fit into memory is skipped."""
    words = ("--op", "latent_attention", "--implementations", "mla", *sizes.large, *sizes.grid_counts)
    axes = shapes(sizes.batches, sizes.histories)
    return Section(
        "grid",
        "Decode attention by heads, batch and history",
        tuple(
            bench_step(f"heads-{heads}", machine, 200, *words, *axes, "-a", f"heads={heads}")
            for heads in sizes.heads
        ),
    )


def kernels(machine: Machine, sizes: Sizes) -> Section:
    """Every attention that the backend offers, one by one, and what torch's own attention does."""
    offered = [
        (op, name) for op in ("latent_attention", "expanded_attention") for name in machine.ops.get(op, ())
    ]
    left = MOST_SECONDS - sum(ATTENTION_QUESTIONS.values())
    limit = min(KERNEL_SECONDS, max(FEWEST_SECONDS, left // max(1, len(offered))))
    axes = {
        "latent_attention": (f"heads={sizes.kernel_heads}", f"kv={sizes.kernel_histories}"),
        "expanded_attention": (f"heads={sizes.kernel_heads}", "q_len=128"),
    }
    runs = tuple(
        bench_step(
            f"{op.split('_')[0]}-{name.replace('_', '-')}", machine, limit,
            "--op", op, "--ops", name, "--batch", "8", *sizes.large,
            *(word for axis in axes[op] for word in ("-a", axis)), *sizes.grid_counts,
            tolerates=OPTIONAL,
        )
        for op, name in offered
    )  # fmt: skip
    return Section("kernels", "Kernels against each other", runs + _asked(machine, ATTENTION_QUESTIONS))


def choices(machine: Machine, sizes: Sizes) -> Section:
    """Every absorbed attention inside the layer, against the chosen one and the reference; and a profile."""
    offered = machine.ops.get("latent_attention", ())
    left = MOST_SECONDS - PROFILE_SECONDS
    limit = min(CHOICE_SECONDS, max(FEWEST_SECONDS, left // max(1, len(offered))))
    trace = ("--implementations", "mla", *HEADLINE, "--profile", "{out}.trace.json.gz")
    every = (*sizes.default, *sizes.counts)
    return Section(
        "choices",
        "Attention ops inside the layer, and a profile",
        (
            bench_step("profile", machine, PROFILE_SECONDS, *trace, *every, *sizes.layer),
            *(
                bench_step(
                    name.replace("_", "-"), machine, limit,
                    "--scenario", "decode", "--clock", "host", "--implementations",
                    f"mla,mla[latent_attention={name}],mla[latent_attention=reference]", *every,
                    tolerates=OPTIONAL,  # one that does not serve the layer says why
                )
                for name in offered
            ),
        ),
    )  # fmt: skip


def long_prefill(machine: Machine, sizes: Sizes) -> Section:
    """Prompts that one round of the expanded path cannot hold."""
    words = ("--workload", str(HERE / "long_prefill.toml"), "--implementations", "mla")
    counts = sizes.counts and (*sizes.counts, "--scenario", "new-1024-after-4096")
    return Section(
        "long-prefill",
        "Long prompts",
        (bench_step("deepseek-r1", machine, 300, *sizes.large, *words, *HEADLINE, *counts),),
    )


def layers(machine: Machine, sizes: Sizes) -> Section:
    """The whole layer's decode step, by batch and history."""
    axes = ("-a", f"batch={sizes.layer_batches}", "-a", f"kv={sizes.layer_histories}")
    words = ("--scenario", "decode", "--implementations", "mla", *axes, *sizes.large, *sizes.grid_counts)
    return Section(
        "layers",
        "Decode step of the layer by batch and history",
        (bench_step("decode", machine, MOST_SECONDS, *words),),
    )


def questions(
    name: str, title: str, machine: Machine, asked: dict[str, int], backends: frozenset[str] = frozenset()
) -> Section:
    """Open questions, each a process of its own."""
    return Section(name, title, _asked(machine, asked), backends)


def _asked(machine: Machine, asked: dict[str, int]) -> tuple[Step, ...]:
    program = str(HERE / "ask.py")
    return tuple(
        Step(
            name,
            (program, name, "--backend", machine.backend),
            limit,
            "question",
            tolerates=ANYTHING if name in BREAKING else OPTIONAL,
        )
        for name, limit in asked.items()
    )
