"""Commands that repeat a case, or resume a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from mla.bench.plan.options import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, RunOptions
from mla.bench.workload.grid import Point
from mla.bench.workload.workload_file import STANDARD
from mla.command import launcher
from mla.command.backend import OpenedBackend
from mla.config.presets import DEFAULT_CONFIG
from mla.parallel.layout import Layout

PROGRAM = ("python", "-m", "mla.bench")


def common_options(options: RunOptions, opened: OpenedBackend) -> list[str]:
    """Return the options that reproduce any case of this run."""
    config = DEFAULT_CONFIG if options.config is None else options.config
    flags: Sequence[tuple[str, object, object]] = (
        ("--device", opened.device, None),
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
    words = ["--backend", opened.name]
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
