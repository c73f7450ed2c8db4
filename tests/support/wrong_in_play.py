"""A process that runs what is wrong through the command lines, and prints what they say of it.

    PYTHONPATH=tests/support python -m wrong_in_play GROUP

prints JSON lines, each a key and a finding: ["latent.decode/0 neighbours_table", "fails latent.decode"]. It
knows of the project what a user knows: how backends and ops are written, options, reports and exit codes.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import tempfile
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import wrong_attention
import wrong_devices
import wrong_sparse
from ceiling_cases import measure_limits_quickly
from smaller_cases import make_nearer
from sound_backend import Asynchronous, Sound
from tiny_run import HEADLINE, write_tiny_run
from wrong_ops import by_kind, formats, formulas, habits, of_layers, places
from wrong_ops.base import SMALL_OPS

from mla.cases import played
from mla.conformance import drawn, trial
from mla.conformance.registry import all_checks

MODULE = types.ModuleType("in_play")  # `--backend in_play:backend`
FIXED = frozenset(check.id for check in all_checks())  # other faults are found by drawn cases
# What a fault is about -> the name of the check whose fixed cases are the next to it.
BORDERS = {
    **dict.fromkeys(("decode", "page_sizes", "prefill", "product", "scores", "selections"), "formula"),
    **dict.fromkeys(("halves", "interleaved"), "formula"),
    "variant": "mixed",
    "indexer_formats": "formats",
    "indexer_steps": "update",  # of a layer
    **dict.fromkeys(("requests", "rows", "rows_and_heads", "segments"), "grid"),
    **dict.fromkeys(("cut_tokens", "keys", "long", "new_tokens", "positions"), "tiles"),
}
DRAWS = 300
NAMES = {"after", "wrong", "given", "Latent", "Expanded", "mutant"}  # that tell nothing


class Whole(Sound):
    """Takes every dtype of a layer."""

    def dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Wrong:
    """A wrong op or backend: its key in the table, what its fault is about, and what makes it."""

    key: str
    fault: str  # a check, or one that only drawn cases find
    make: Callable[[], Any]
    dtype: str = "float32"

    @property
    def checks(self) -> tuple[str, ...]:
        """The checks that are asked, until one fails."""
        group, _, about = self.fault.partition(".")
        named = self.fault if self.fault in FIXED else f"{group}.{BORDERS.get(about)}"
        others = "*[mine-*]" if group == "layer" else f"{group}.drawn"
        return (self.fault,) if named == self.fault else (*FIXED & {named}, others)


@dataclass(frozen=True)
class Call:
    """A command line: the keys of its findings, and what runs it and returns key -> finding."""

    keys: tuple[str, ...]
    run: Callable[[], dict[str, str]]


def said(make: Any) -> str:
    """Return what a maker calls, with its numbers: all that its source tells about the mutant."""
    if isinstance(make, functools.partial):
        return f"{said(make.func)} {make.args}"
    if not hasattr(make, "__code__") or make.__name__ != "<lambda>":
        return str(getattr(make, "__name__", "")).strip()
    names = [name for name in make.__code__.co_names if name not in NAMES]
    return " ".join([*names, *map(str, make.__defaults__ or ())])


def numbered(makers: Mapping[str, Iterable[Callable[[], Any]]], dtype: str = "float32") -> Iterator[Wrong]:
    for check, those in makers.items():
        for number, make in enumerate(those):
            suffix = "" if dtype == "float32" else f" {dtype}"
            yield Wrong(f"{check}/{number} {said(make)}".rstrip() + suffix, check, make, dtype)


def small_ops() -> Iterator[Wrong]:
    """Yield the wrong small ops."""
    for check, ops in formulas.MUTANTS.items():
        for number, op in enumerate(ops):
            yield Wrong(f"{check}/{number} {type(op).__name__}", check, lambda op=op: op)
    for kind, those in by_kind.KINDS.items():
        dtype = "bfloat16" if kind == "numbers" else "float32"
        for check, make, name in those:
            yield Wrong(f"{check}/{name} {dtype}", check, make, dtype)
    for kind in SMALL_OPS:
        yield Wrong(f"{kind}.empty/fails_empty", f"{kind}.empty", functools.partial(places.fails_empty, kind))
        for dtype in ("bfloat16", "float16"):
            for share in (2e-3, 1e-3):
                make = functools.partial(habits.adds_previous, kind, share)
                yield Wrong(f"{kind}.call_before/{share} {dtype}", f"{kind}.call_before", make, dtype)


def of_formats() -> Iterator[Wrong]:
    """Yield ops that write or read a format of the cache wrong."""
    for kind, those in (("write_latent", formats.WRITES), ("latent", formats.READS)):
        yield from (Wrong(f"{kind}.formats/{name}", f"{kind}.formats", make) for name, make in those)
    for name, make in formats.NARROW_WRITES:
        yield Wrong(f"write_latent.formats/{name} bfloat16", "write_latent.formats", make, "bfloat16")


def attention(kind: str) -> Iterator[Wrong]:
    """Yield the wrong ops of `latent` or `expanded` attention."""
    for table, dtype in ((wrong_attention.ALL, "float32"), (wrong_attention.NARROW, "bfloat16")):
        yield from numbered({check: those for check, those in table.items() if check.startswith(kind)}, dtype)


def of_ops(those: Iterable[Wrong]) -> Iterator[Call]:
    """Yield calls about ops, one for those that are asked the same."""
    asked = defaultdict(list)
    for mutant in those:
        asked[mutant.checks, mutant.dtype].append(mutant)
    for (checks, dtype), group in asked.items():
        keys = {f"wrong{number}": mutant.key for number, mutant in enumerate(group)}

        def backend(group: list[Wrong] = group) -> Sound:
            return Whole(ops={f"wrong{number}": mutant.make() for number, mutant in enumerate(group)})

        only = [f"{check}[wrong*]" for check in checks]
        yield conformance(only, backend, keys, dtype, checks[0].endswith(".prepare"))


def of_layers_and_devices() -> Iterator[Call]:
    """Yield calls about what takes a backend of its own."""
    for mutant in numbered(of_layers.MUTANTS):
        yield conformance(
            mutant.checks[:1], lambda mutant=mutant: Sound(ops={"mine": mutant.make()}), {"": mutant.key}
        )
    for check, makers in wrong_devices.MUTANTS.items():
        waits = "synchronize" in check or "timer" in check
        for number, make in enumerate(makers):
            key = {"": f"{check}/{number}"}
            only = check if check in FIXED else check.partition(".")[0]
            yield conformance([only], lambda make=make: type(make(Sound)), key, waits=waits)


def conformance(
    only: Sequence[str],
    backend: Callable[[], Any],
    keys: Mapping[str, str],
    dtype: str = "float32",
    waits: bool = False,
) -> Call:
    """Return a call of the suite; `keys`: name of an op -> its key, "" for any."""
    words = ["--backend", "in_play:backend", "--quick", "--draws", str(DRAWS)]
    words += ["--dtype", dtype, *(word for pattern in only for word in ("--only", pattern))]

    def run() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            done = forked.call(
                ["mla.conformance", *words, "--report", "report.json"],
                Path(folder),
                lambda: put_in_play(backend(), waits),
            )
            report = Path(folder, "report.json")
            checks = json.loads(report.read_bytes())["checks"] if report.exists() else []
        failed = [(check["of"], verdict(check)) for check in checks if check["status"] == "fail"]
        of = {name: dict.fromkeys(text for op, text in failed if name in ("", op)) for name in keys}
        otherwise = "not found" if checks else f"exit {done.code}"
        return {key: ", ".join(of[name]) or otherwise for name, key in keys.items()}

    return Call(tuple(keys.values()), run)


def verdict(check: Mapping[str, Any]) -> str:
    """Return what a check that failed says: it failed by numbers, or because something was raised."""
    return f"fails {check['check']}{' by raising' * ('raised ' in check['reason'])}"


def put_in_play(backend: Any, waits: bool = False) -> None:
    """Let `in_play:backend` be this one; with `waits`, products queue as on a device."""
    MODULE.backend = backend  # type: ignore[attr-defined]
    sys.modules[MODULE.__name__] = MODULE
    patches = pytest.MonkeyPatch()
    make_nearer(patches)
    patches.setattr(drawn, "SHRINKING", 0.0)
    patches.setattr(played, "MAX_HOSTS", DRAWS)  # truths serve all wrong ops of a call
    patches.setattr(trial.Trial, "case", until_one_fails(trial.Trial.case))
    if waits:
        Asynchronous().__enter__()


def until_one_fails(case: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Trial.case` that runs no case of an op behind one that has failed: a finding takes no more."""
    trials: list[Any] = []

    def next_case(self: Any, label: str = "") -> Any:
        trials.extend([self] if not any(self is trial for trial in trials) else [])
        if any(trial.of == self.of and trial.failures for trial in trials):
            self.chosen = frozenset()
        return case(self, label)

    return next_case


def benchmark(key: str, *words: str) -> Call:
    """Return a call of the benchmark: its finding is the exit code, and what became of the cases."""
    few = ("--dtype", "float32", "--warmups", "0", "--implementations", "mla", "--config", "tiny.json")

    def run() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_tiny_run(folder, q_lora_rank=24)
            done = forked.call(
                ["mla.bench", *words, *few, "-o", "run.json", *HEADLINE], folder, measure_little
            )
            file = folder / "run.json"
            cases = json.loads(file.read_bytes())["cases"] if file.exists() else []
        return {key: " ".join([f"exit {done.code}", *sorted({case["check"]["status"] for case in cases})])}

    return Call((key,), run)


def measure_little() -> None:
    """Take no time for limits, which no finding here is about."""
    measure_limits_quickly(pytest.MonkeyPatch())


def of_the_benchmark() -> Iterator[Call]:
    """Yield calls about faults that a run of one op, or of the layer, has to name."""
    layer = ("--workload", "tiny.toml", "--passes", "2", "--runs", "2", "--scenario")
    for kind in (*SMALL_OPS, "latent_attention", "expanded_attention"):
        alone = ("--op", {"rms_norm": "q_a_layernorm"}.get(kind, kind), "--batch", "3", "--runs", "2")
        alone += ("--passes", "2", *(("--kv", "20") if "attention" in kind else ()))
        whole = (*layer, "prefill" if kind == "expanded_attention" else "decode")
        for fault in ("scale", "head", "half", "stops"):
            options = (*FAULTY, "-O", f"op={kind}", "-O", f"fault={fault}")
            yield benchmark(f"faulty {kind} {fault}, alone", *options, *alone)
            yield benchmark(f"faulty {kind} {fault}, layer", *options, *whole)
    several = ("--backend", "several_ops:SeveralOps", *layer, "decode", "-O")
    for option in ("wrong=first", "wrong=rows", *(f"refuse=first:{how}" for how in REFUSES)):
        yield benchmark(f"several {option}", *several, option)
    leaving = ("--backend", "leaving_backend:Leaving", *layer, "decode", "-O")
    for at, raised in itertools.product(LEAVES, ("SystemExit", "BackendError")):
        if (at, raised) != ("sensors", "BackendError"):  # which costs the sensors alone
            yield benchmark(f"leaving {at} {raised}", *leaving, f"at={at}", "-O", f"raises={raised}")


FAULTY = ("--backend", "faulty_backend:FaultyBackend")
REFUSES = ("batch", "prepare", "call", "raise")
LEAVES = (
    *("init", "probe", "setup", "synchronize", "device_count", "device_info", "dtypes", "memory"),
    *("environment", "sensors", "remarks", "ops", "unsupported_reasons", "pack", "call"),
)
GROUPS: Mapping[str, Callable[[], Iterator[Call]]] = {
    "small ops": lambda: of_ops(small_ops()),
    "formats": lambda: of_ops(of_formats()),
    "latent": lambda: of_ops(attention("latent")),
    "expanded": lambda: of_ops(attention("expanded")),
    "sparse": lambda: of_ops(numbered(wrong_sparse.MUTANTS)),
    "layers and devices": of_layers_and_devices,
    "benchmark": of_the_benchmark,
}


def keys(group: str) -> list[str]:
    """Return the keys of a group, without running anything."""
    return [key for row in GROUPS[group]() for key in row.keys]


def main(group: str) -> None:
    """Print the findings of a group."""
    torch.set_num_threads(1)
    forked.import_all("mla", "mla.integrations", "mla.bench.report")
    for call in GROUPS[group]():
        for pair in call.run().items():
            print(json.dumps(pair), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
