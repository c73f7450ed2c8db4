"""The sections of a campaign, as data, in the order of their value. To add to one, add a line.

Limits are in seconds; those of a section add up to at most ten minutes.
"""

from __future__ import annotations

import re

from benchmarks.gpu.sizes import FULL, HERE, SMOKE, Sizes
from benchmarks.gpu.steps import MOST_SECONDS, Machine, Section, Step

OPTIONAL = frozenset({"refused"})  # a library that is not installed is no failure
ANYTHING = frozenset({"refused", "crashed", "timed out"})  # it looks for the place where a library breaks

ATTENTION = "^(latent|expanded)_attention"

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
    "flashinfer-compiler": 60,
    "flashinfer-plan": 90,
    "flashinfer-heads": 60,
    "flashinfer-pages": 60,
    "flashinfer-split": 60,
    "flashinfer-graph": 60,
    "flashinfer-items": 60,  # the last: it may end the process and leave the device unusable to it
}
BREAKING = frozenset({"flashinfer-items"})
FEWEST_SECONDS, KERNEL_SECONDS = 20, 90  # for one kernel


def sections(machine: Machine, smoke: bool = False) -> tuple[Section, ...]:
    """Return the sections for a machine."""
    sizes = SMOKE if smoke else FULL
    return (
        facts(machine),
        standard(machine, sizes),
        conformance(machine, smoke),
        grid(machine, sizes),
        kernels(machine, sizes),
        long_prefill(machine, sizes),
        questions("questions", "The device", machine, DEVICE_QUESTIONS),
        questions("libraries", "Libraries of kernels", machine, LIBRARY_QUESTIONS, frozenset({"nvidia"})),
        layers(machine, sizes),
    )


def facts(machine: Machine) -> Section:
    """What is there: whether the backend is usable, and which op runs where."""
    bench, backend = ("-m", "mla.bench"), ("--backend", machine.backend)
    large = FULL.large
    return Section(
        "facts",
        "Machine, ops and ceilings",
        (
            Step("doctor", (*bench, "doctor", machine.backend), 90),
            Step("list", (*bench, "list"), 60, says=f"^{re.escape(machine.backend)} "),
            Step("ops", (*bench, *backend, "--list-ops"), 60, says=ATTENTION),
            Step("ops-deepseek-r1", (*bench, *backend, *large, "--list-ops"), 60, says=ATTENTION),
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
            _run("deepseek-v2-lite", machine, 240, *sizes.default, *sizes.counts),
            _run("deepseek-r1", machine, 360, *sizes.large, *sizes.counts),
        ),
    )


def conformance(machine: Machine, smoke: bool) -> Section:
    """The contract, op by op: first a small grid of shapes, then all."""
    words = ("-m", "mla.conformance", "--backend", machine.backend)
    quick = Step("quick", (*words, "--quick", *(("--only", "device") * smoke)), 180, "conformance")
    return Section(
        "conformance",
        "Conformance",
        (quick,) if smoke else (quick, Step("full", words, 420, "conformance")),
    )


def grid(machine: Machine, sizes: Sizes) -> Section:
    """Absorbed attention alone, by heads, batch and history; what does not fit into memory is skipped."""
    axes = ("-a", f"batch={sizes.batches}", "-a", f"kv={sizes.histories}")
    words = ("--op", "latent_attention", "--implementations", "mla", *axes, *sizes.large)
    counts = (*sizes.counts, *sizes.grid_counts)
    return Section(
        "grid",
        "Decode attention by heads, batch and history",
        tuple(
            _run(f"heads-{heads}", machine, 200, *words, "-a", f"heads={heads}", *counts)
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
    counts = (*sizes.counts, *sizes.grid_counts)
    runs = tuple(
        _run(
            f"{op.split('_')[0]}-{name.replace('_', '-')}", machine, limit,
            "--op", op, "--ops", name, "--batch", "8", *sizes.large,
            *(word for axis in axes[op] for word in ("-a", axis)), *counts,
            tolerates=OPTIONAL,
        )
        for op, name in offered
    )  # fmt: skip
    return Section("kernels", "Kernels against each other", runs + _asked(machine, ATTENTION_QUESTIONS))


def long_prefill(machine: Machine, sizes: Sizes) -> Section:
    """Prompts that one round of the expanded path cannot hold."""
    words = ("--workload", str(HERE / "long_prefill.toml"), "--implementations", "mla")
    counts = sizes.counts and (*sizes.counts, "--scenario", "new-1024-after-4096")
    headline = ("--mode", "eager", "--cache", "warm", "--clock", "host")
    return Section(
        "long-prefill",
        "Long prompts",
        (_run("deepseek-r1", machine, 300, *sizes.large, *words, *headline, *counts),),
    )


def layers(machine: Machine, sizes: Sizes) -> Section:
    """The whole layer's decode step, by batch and history."""
    axes = ("-a", f"batch={sizes.layer_batches}", "-a", f"kv={sizes.layer_histories}")
    words = ("--scenario", "decode", "--implementations", "mla", *axes, *sizes.large)
    counts = (*sizes.counts, *sizes.grid_counts)
    return Section(
        "layers",
        "Decode step of the layer by batch and history",
        (_run("decode", machine, MOST_SECONDS, *words, *counts),),
    )


def questions(
    name: str, title: str, machine: Machine, asked: dict[str, int], backends: frozenset[str] = frozenset()
) -> Section:
    """Open questions, each a process of its own."""
    return Section(name, title, _asked(machine, asked), backends)


def _run(
    name: str, machine: Machine, limit: int, *words: str, tolerates: frozenset[str] = frozenset()
) -> Step:
    every = ("-m", "mla.bench", "--backend", machine.backend, *words)
    return Step(name, every, limit, "run", tolerates=tolerates)


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
