"""The command line of `run` as typed values, and the command lines that repeat or resume a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla.bench.workload.grid import Point
from mla.bench.workload.implementations import parse
from mla.bench.workload.workload_file import STANDARD
from mla.command import launcher
from mla.command.backend import BackendOptions
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError
from mla.parallel.layout import Layout

DEFAULT_DTYPE = "bfloat16"
DEFAULT_PAGE_SIZE = 64
PROGRAM = ("python", "-m", "mla.bench")


@dataclass(frozen=True)
class RunOptions(BackendOptions):
    """The options of `run`, one field each. None: not given."""

    config: str | None
    model_path: Path | None
    layer: str | None
    preset: str | None
    workload: str | None
    scenarios: tuple[str, ...]
    axes: tuple[str, ...]
    implementations: str | None
    runs: int | None
    passes: int | None
    warmups: int | None
    dtype: str | None
    attention: str
    page_size: int | None
    ops: str
    seed: int
    output: Path | None
    resume: Path | None
    budget: float | None
    hang_after: float
    baseline: Path | None
    fail_slower: float | None
    kind: str
    dry_run: bool
    list_ops: bool
    op: str | None = None
    batch: int | None = None
    kv: int | None = None
    q_len: int | None = None
    heads: int | None = None
    layers: int | None = None
    stages: bool = False
    strict: bool = False
    mode: str | None = None
    cache: str | None = None
    clock: str | None = None
    profile: Path | None = None
    dump_failure: Path | None = None
    batch_specs: tuple[str, ...] = ()
    parallel: Layout | None = None
    simulate: bool = False
    link: str | None = None
    detail: str | None = None  # "verbose" or "quiet"
    link_source: str = ""  # where its numbers are from (`mla.bench.plan.resolve`)

    @property
    def workload_name(self) -> str:
        """The workload to load: a preset is a shipped one."""
        return self.preset or self.workload or STANDARD

    @property
    def workload_flag(self) -> str | None:
        """The flag that chose the workload; None: the standard one, which nobody asked for."""
        flags = {
            "--preset": self.preset is not None,
            "--workload": self.workload not in (None, STANDARD),
            "--scenario": bool(self.scenarios),
        }
        return next((flag for flag, given in flags.items() if given), None)

    @property
    def target(self) -> Path | None:
        """The file to write: a resumed run goes back where it came from."""
        return self.output or self.resume

    @property
    def op_shape(self) -> dict[str, int | None]:
        """Flag -> value of the options that shape one op."""
        return {
            "--batch": self.batch,
            "--kv": self.kv,
            "--q-len": self.q_len,
            "--heads": self.heads,
        }

    @property
    def implementation_names(self) -> list[str]:
        """The names that were listed; without any, one layer of a checkpoint runs with `transformers`.

        Raises `UsageError`.
        """
        if self.implementations is None:
            alone = self.layers in (None, 1) and self.parallel is None
            return ["mla", "transformers"] if self.model_path and alone else []
        names = list(map(str, parse(self.implementations)))
        if not names:
            raise UsageError("--implementations names nothing: leave it out, or list what to time.")
        return names


def common_options(options: RunOptions, backend: str, device: int | None) -> list[str]:
    """Return the options that reproduce any case of this run on a backend, by its name."""
    config = DEFAULT_CONFIG if options.config is None else options.config
    flags: Sequence[tuple[str, object, object]] = (
        ("--device", device, None),
        ("--threads", options.threads, None),
        ("--config", None if options.model_path else config, None),
        ("--model-path", options.model_path, None),
        ("--layer", options.layer, None),
        ("--workload", options.workload_name, STANDARD),
        ("--runs", options.runs, None),
        ("--passes", options.passes, None),
        ("--warmups", options.warmups, None),
        ("--layers", options.layers, None),
        ("--parallel", options.parallel, None),
        ("--link", options.link if options.simulate else None, None),
        ("--dtype", options.dtype, DEFAULT_DTYPE),
        ("--attention", options.attention, "auto"),
        ("--page-size", options.page_size, DEFAULT_PAGE_SIZE),
        ("--ops", options.ops, "auto"),
        ("--seed", options.seed, None),
        ("--mode", options.mode, None),
        ("--cache", options.cache, None),
        ("--clock", options.clock, None),
    )
    words = ["--backend", backend]
    for option in options.backend_options:
        words += ["-O", option]
    for flag, value, default in flags:
        if value is not None and value != default:
            words += [flag, str(value)]
    return words


def selection(options: RunOptions) -> list[str]:
    """Return the options that choose scenarios and points."""
    words = [word for name in options.scenarios for word in ("--scenario", name)]
    words += [word for specs in options.batch_specs for word in ("--batch-spec", specs)]
    for flag, value in (("--op", options.op), *options.op_shape.items()):
        words += [] if value is None else [flag, str(value)]
    return words + [word for axis in options.axes for word in ("-a", axis)]


def case_command(common: Sequence[str], point: Point, implementation: str) -> str:
    """Return the command that repeats one case."""
    return command([*common, *point.selection, "--implementations", implementation])


def command(words: Iterable[str]) -> str:
    """Return a command of the runner as one line for a shell; over several ranks, with what started this.

    With a link, ranks are simulated.
    """
    words = list(words)
    if "--link" in words:
        words.insert(words.index("--link"), "--simulate")
    elif "--parallel" in words:
        world = Layout.parse(words[words.index("--parallel") + 1]).world
        return shlex.join([*launcher.start_words(world), *PROGRAM[1:], *words])
    return shlex.join([*PROGRAM, *words])
