"""The command line of `run` as typed values, its mistakes, and the lines that repeat or resume a run."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mla.bench.workload import implementations
from mla.bench.workload.grid import AFFECTED, READS_HISTORY, SPARSE, Axes, Point, ops_of
from mla.bench.workload.implementations import parse
from mla.bench.workload.scenario import MAX_COUNT
from mla.bench.workload.workload_file import STANDARD
from mla.command import launcher
from mla.command.options import BackendOptions
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError
from mla.parallel.layout import Layout
from mla.text import dtype_name

if TYPE_CHECKING:
    from mla.config import MLAConfig
    from mla_backends.api import Backend

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
    cache_format: str | None
    index_format: str | None
    topk: int | None
    selection: str | None
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
    def is_first_look(self) -> bool:
        """Whether nobody chose what is measured: the standard scenarios of the default config run."""
        chosen = (
            self.implementations,
            self.config not in (None, DEFAULT_CONFIG),
            self.model_path,
            self.workload_flag,
            self.op,
            self.parallel,
        )
        return not any((*chosen, self.batch_specs, self.axes, self.stages, self.layers not in (None, 1)))

    @property
    def counted(self) -> bool:
        """Whether the user said how many passes or forwards to time: none is dropped to save time."""
        return (self.runs, self.passes) != (None, None)

    @property
    def target(self) -> Path | None:
        """The file to write: a resumed run goes back where it came from."""
        return self.output or self.resume

    @property
    def op_shape(self) -> dict[str, int | None]:
        """Flag -> value of the options that shape one op."""
        return {"--batch": self.batch, "--kv": self.kv, "--q-len": self.q_len, "--heads": self.heads}

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
            raise UsageError("--implementations is empty: leave it out, or list what to time.")
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
    return command([*common, *point.arguments, "--implementations", implementation])


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


def short_axes(options: RunOptions) -> list[str]:
    """Return the axes that options stand for."""
    values = {name: getattr(options, name) for name in ("cache_format", "index_format", *SELECTS)}
    return [f"{name}={value}" for name, value in values.items() if value is not None]


# ------------------------------------------------------------------------------------------------ validation

# Every mistake shows here, before any work. `check_gate`, `check_lengths`, `check_options` and `check_points`
# need only the command line and the workload; the others also the layer or the device, which starts slowly.

SELECTS = ("topk", "selection")  # axes of ops that select
# Ranks of a prediction: the result has the samples of each.
MAX_SIMULATED = 256


def _first(flags: Mapping[str, object]) -> str:
    """Return the first of some flags that was given; "" if none was."""
    return next((flag for flag, value in flags.items() if value), "")


def check_gate(options: RunOptions) -> None:
    """Raise `UsageError` for a threshold without a run to compare with."""
    if options.baseline is None and options.fail_slower is not None:
        raise UsageError("--fail-slower needs a run to compare with: add --baseline FILE.")


def check_lengths(options: RunOptions) -> None:
    """Raise `UsageError` for two sources of lengths."""
    if options.preset and options.workload:
        raise UsageError("--preset and --workload are mutually exclusive: a preset is a shipped workload.")
    if options.batch_specs and options.workload_flag:
        raise UsageError(
            f"--batch-spec and {options.workload_flag} are mutually exclusive: a batch spec is the scenario."
        )
    lengths = [flag for flag, value in options.op_shape.items() if value is not None and flag != "--heads"]
    source = "--batch-spec" if options.batch_specs else options.workload_flag
    if lengths and source:
        raise UsageError(
            f"{lengths[0]} and {source} are mutually exclusive: both give the lengths of the requests."
        )


def check_sparse(options: RunOptions, op_of_file: str | None) -> None:
    """Raise `UsageError` for an op that selects nothing on a workload whose ops, `op_of_file`, do."""
    ops = [] if options.op is None else ops_of(options.op)
    dense = next((op for op in ops if op not in SPARSE), None)
    if dense and op_of_file and not set(SPARSE).isdisjoint(ops_of(op_of_file)):
        raise UsageError(
            f"workload '{options.workload_name}' is for {', '.join(SPARSE)}, and {dense} selects nothing: "
            "leave --op out, or give its batches with --batch-spec."
        )


def check_options(options: RunOptions, axes: Axes, op_of_file: str | None = None) -> None:
    """Raise `UsageError` for options that contradict each other or lack one that they need.

    `op_of_file`: the op to time, if the workload names it and the user does not.
    """
    options.implementation_names  # noqa: B018  # raises for a name that cannot be read
    _check_op_shape(options, axes)
    _check_op_alone(options, op_of_file)
    _check_checkpoint(options)
    _check_profile(options)
    _check_page_size(options.page_size)
    _check_parallel(options)
    _check_simulation(options)


def _check_parallel(options: RunOptions) -> None:
    """Raise `UsageError` for what is not measured over several ranks."""
    if options.parallel is None:
        return
    alone = {
        "--op": options.op,
        "--layers": options.layers not in (None, 1),
        "--stages": options.stages,
        "--profile": options.profile,
        "--dump-failure": options.dump_failure,
        "--mode": options.mode not in (None, "eager"),
        "--cache": options.cache not in (None, "warm"),
        "--clock": options.clock not in (None, "host"),
    }
    if flag := _first(alone):
        raise UsageError(f"{flag} is for one device: leave it out with --parallel, or run without.")
    if options.parallel.dcp > 1 and options.attention == "expanded":
        raise UsageError("dcp supports --attention absorbed only: leave out expanded, or dcp.")
    foreign = [name for name in options.implementation_names if not implementations.is_ours(name)]
    if foreign:
        raise UsageError(f"{foreign[0]} runs on one device: --parallel times mla and mla-reference.")


def _check_simulation(options: RunOptions) -> None:
    """Raise `UsageError` for a simulation of nothing, and for one that several processes would repeat."""
    if not options.simulate:
        if options.link is not None:
            raise UsageError("--link is what a simulation assumes of the ranks' link: add --simulate.")
        return
    if options.parallel is None:
        raise UsageError("--simulate predicts the ranks of a layout: add --parallel, as in tp=8.")
    count = launcher.count() or 1
    if count > 1:
        raise UsageError(
            f"--simulate predicts all ranks in one process, and {count} were started: start one, or leave "
            "--simulate out to measure the real ranks."
        )
    if options.parallel.world > MAX_SIMULATED:
        raise UsageError(
            f"--simulate predicts ranks, {MAX_SIMULATED} at most, and layout '{options.parallel}' has "
            f"{options.parallel.world}."
        )


def _check_op_shape(options: RunOptions, axes: Axes) -> None:
    given = [flag for flag, value in options.op_shape.items() if value is not None]
    for flag in given:
        if flag[2:].replace("-", "_") in axes:
            raise UsageError(f"{flag} and an axis of that name are mutually exclusive: keep one.")
    if options.op is None and given and not options.batch_specs:
        raise UsageError(
            f"{given[0]} shapes one op: it needs --op; a workload has its own lengths, and axes (-a)."
        )


def _check_op_alone(options: RunOptions, op_of_file: str | None) -> None:
    """Raise `UsageError` for options about the whole layer where one op is timed."""
    if options.op is None:
        return
    layer = {
        "--model-path": options.model_path,
        "--attention": options.attention != "auto",
        "--layers": options.layers is not None,
    }
    if not (flag := _first(layer)):
        return
    about = f"{flag} is about the whole layer"
    if op_of_file:
        raise UsageError(
            f"{about}, and workload '{options.workload_name}' times one op, {op_of_file}: leave it out; "
            "--heads and --config apply."
        )
    shape = "the workload's batches, " if options.workload_flag else "--batch, --kv, --q-len, --batch-spec, "
    shape = "--batch-spec, " if options.batch_specs else shape
    raise UsageError(f"{about}: leave it out with --op, whose shape is {shape}--heads and --config.")


def _check_checkpoint(options: RunOptions) -> None:
    if options.layer is not None and not options.model_path:
        raise UsageError("--layer chooses a layer of a checkpoint: it needs --model-path.")
    if options.model_path and options.config is not None:
        raise UsageError(
            "--config and --model-path are mutually exclusive: the checkpoint's own config.json is used."
        )


def _check_profile(options: RunOptions) -> None:
    file = options.profile
    if file is None:
        return
    if not file.name.endswith((".json", ".json.gz")):
        raise UsageError(f"--profile writes a Chrome trace, FILE.json or FILE.json.gz, got '{file}'.")
    files = {"-o": options.output, "--resume": options.resume, "--baseline": options.baseline}
    for flag, other in files.items():
        if other is not None and other.absolute() == file.absolute():
            raise UsageError(f"--profile and {flag} name the same file, '{file}': give the trace its own.")


def _check_page_size(size: int | None) -> None:
    if size is not None and (not 1 <= size <= MAX_COUNT or size & (size - 1)):
        raise UsageError(f"--page-size must be a power of two below 2^31, got {size}.")


def check_points(options: RunOptions, points: Sequence[Point]) -> None:
    """Raise `UsageError` for options that the scenarios contradict."""
    for flag, name in (("--dtype", "dtype"), ("--page-size", "page_size")):
        if getattr(options, name) is not None and any(name in point.point for point in points):
            raise UsageError(
                f"{flag} and an axis {name} are mutually exclusive: list every value in the axis."
            )
    for point in points:
        selects = next((name for name in SELECTS if getattr(point, name) is not None), None)
        if selects and point.op is None:
            raise UsageError(
                f"{selects} is that of one op: add --op sparse_latent_attention. A layer selects by itself, "
                "as many as its config's index_topk."
            )
        if point.cache_format is not None and point.layers > 1:
            raise UsageError(f"scenario '{point.name}': a cache format is measured with one layer.")
    foreign = [name for name in options.implementation_names if not implementations.is_ours(name)]
    if foreign and any(point.cache_format is not None and point.op is None for point in points):
        raise UsageError(
            f"{foreign[0]} has a cache of its own, without formats: leave cache_format out, or list "
            "--implementations without it."
        )
    with_heads = [point.name for point in points if point.heads]
    if options.model_path and with_heads:
        raise UsageError(f"scenario '{with_heads[0]}' sets heads, but a checkpoint's weights fix them.")
    _check_stages(options, points)


def _check_stages(options: RunOptions, points: Sequence[Point]) -> None:
    """Raise `UsageError` where `--stages` has nothing to time, or more than one layer."""
    if not options.stages:
        return
    names = options.implementation_names
    if names and not any(map(implementations.is_ours, names)):  # without names, `mla` is one of them
        raise UsageError("--stages times the parts of mla and mla-reference: run one of them.")
    if options.op is not None:
        raise UsageError(f"--stages times the parts of a layer, and {options.op} is one part alone.")
    if any(point.layers > 1 for point in points):
        raise UsageError("--stages times one layer: leave out --layers.")


def check_indexer(options: RunOptions, config: MLAConfig, points: Sequence[Point]) -> None:
    """Raise `UsageError` for what is not measured of a layer with an indexer, or needs one."""
    if not config.index_n_heads and any(point.index_format for point in points):
        raise UsageError(f"--index-format stores index keys, and '{config.name}' has no indexer: omit it.")
    if not config.index_topk or all(point.op for point in points):
        return
    if not config.index_n_heads:
        raise UsageError(f"config '{config.name}' selects and has no indexer: give it index_n_heads.")
    foreign = [name for name in options.implementation_names if not implementations.is_ours(name)]
    layout = options.parallel
    refused = (
        (
            layout and layout.dp > 1 and not options.simulate,
            "is judged by one selection, and each part of dp makes its own",
            "dp of --parallel",
        ),
        (
            options.implementations and foreign,
            "is judged by its own selection, if that is ours",
            *foreign[:1],
        ),
    )
    for given, why, *what in refused:
        if given:
            raise UsageError(f"a layer with an indexer {why}: leave out {what[0]}.")


def check_dtype(backend: Backend, dtype: object) -> None:
    """Raise `UsageError` for a dtype that the device only emulates."""
    native = backend.dtypes()
    if dtype not in native:
        raise UsageError(
            f"backend '{backend.name}' does not compute {dtype_name(dtype)} natively; "
            f"choose --dtype from: {', '.join(map(dtype_name, native))}."
        )


def check_heads(config: MLAConfig, points: Sequence[Point]) -> None:
    """Raise `UsageError` for a number of heads that no tensor-parallel rank of the model has."""
    whole = config.num_attention_heads
    for point in points:
        axis = point.point.get("heads")
        # One op alone may have any number of them.
        heads = point.heads if axis is None and point.op is None else axis
        if isinstance(heads, int) and (heads > whole or whole % heads):
            where = f"scenario '{point.name}', heads" if axis is None else "axis heads"
            problem = "are more than" if heads > whole else "do not divide"
            raise UsageError(
                f"{where}: {heads} {problem} the {whole} heads of {config.name}; a tensor-parallel rank "
                "has an equal share of them."
            )


def check_op_uses_shape(options: RunOptions, points: Sequence[Point]) -> None:
    """Raise `UsageError` for `--kv`, `--heads` and other axes that change none of the op's roles."""
    if options.op is None:
        return
    roles = list(dict.fromkeys(point.op for point in points if point.op))
    unused = []
    if options.kv is not None and not any(role in READS_HISTORY for role in roles):
        unused.append("--kv")
    if options.heads is not None and not any(point.heads for point in points):
        unused.append("--heads")
    unused += [
        axis
        for axis, affected in AFFECTED.items()
        if affected.isdisjoint(roles) and any(getattr(point, axis) for point in points)
    ]
    if unused:
        have, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        raise UsageError(f"{' and '.join(unused)} {have} no effect on {', '.join(roles)}: omit {them}.")


def check_own_ops(
    options: RunOptions, points: Sequence[Point], overrides: Mapping[str, Collection[str]]
) -> None:
    """Raise `UsageError` for ops in brackets none of which `--op` times: they would change nothing.

    `overrides`: implementation -> roles that it has ops of its own for.
    """
    roles = list(dict.fromkeys(point.op for point in points if point.op))
    for name, overridden in overrides.items():
        if options.op is not None and overridden and not any(role in overridden for role in roles):
            raise UsageError(
                f"--op times {', '.join(roles)} alone, and the brackets of '{name}' give it no op: name "
                f"{'one of them' if len(roles) > 1 else roles[0]} there, or leave '{name}' out."
            )
