"""The command line of `run` as typed values, its mistakes, and the lines that repeat or resume a run."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mla.bench.workload.grid import AFFECTED, READS_HISTORY, SPARSE, Axes, Point, ops_of
from mla.bench.workload.implementations import is_ours, parse
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

    @property
    def foreign(self) -> list[str]:
        """Those of `implementation_names` that do not run our layer."""
        return [name for name in self.implementation_names if not is_ours(name)]


# Options that reproduce any case of a run, in the order of its command; and values that need no words.
_REPEATED = (
    *("device", "threads", "config", "model_path", "layer", "workload", "runs", "passes", "warmups"),
    *("layers", "parallel", "link", "dtype", "attention", "page_size", "ops", "seed", "mode", "cache"),
    "clock",
)
_USUAL = {"workload": STANDARD, "dtype": DEFAULT_DTYPE, "page_size": DEFAULT_PAGE_SIZE}
_USUAL |= {"attention": "auto", "ops": "auto"}


def common_options(options: RunOptions, backend: str, device: int | None) -> list[str]:
    """Return the options that reproduce any case of this run on a backend, by its name."""
    config = DEFAULT_CONFIG if options.config is None else options.config
    values = {**vars(options), "device": device, "workload": options.workload_name}
    values |= {"config": None if options.model_path else config}
    values |= {"link": options.link if options.simulate else None}
    words = ["--backend", backend, *(word for option in options.backend_options for word in ("-O", option))]
    for name in _REPEATED:
        if values[name] is not None and values[name] != _USUAL.get(name):
            words += [f"--{name.replace('_', '-')}", str(values[name])]
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


# ------------------------------------------------------------------------------------------------ validation

# Every mistake shows here, before any work: `refuse` raises the first sentence that a generator below yields.
# Those of lengths, options and points need only the command line and the workload; the others also the
# layer or the device, which starts slowly.

SELECTS = ("topk", "selection")  # axes of ops that select
# Ranks of a prediction: the result has the samples of each.
MAX_SIMULATED = 256


def refuse(faults: Iterable[str]) -> None:
    """Raise `UsageError` with the first of these sentences, if there is one."""
    for fault in faults:
        raise UsageError(fault)


def _first(flags: Mapping[str, object]) -> str:
    """Return the first of some flags that was given; "" if none was."""
    return next((flag for flag, value in flags.items() if value), "")


def of_lengths(options: RunOptions) -> Iterator[str]:
    """Yield that a threshold has no run to compare with, and that lengths have two sources."""
    if options.baseline is None and options.fail_slower is not None:
        yield "--fail-slower needs a run to compare with: add --baseline FILE."
    if options.preset and options.workload:
        yield "--preset and --workload are mutually exclusive: a preset is a shipped workload."
    flag = options.workload_flag
    if options.batch_specs and flag:
        yield f"--batch-spec and {flag} are mutually exclusive: a batch spec is the scenario."
    lengths = [flag for flag, value in options.op_shape.items() if value is not None and flag != "--heads"]
    source = "--batch-spec" if options.batch_specs else flag
    if lengths and source:
        yield f"{lengths[0]} and {source} are mutually exclusive: both give the lengths of the requests."


def of_sparse(options: RunOptions, op_of_file: str | None) -> Iterator[str]:
    """Yield that an op selects nothing, on a workload whose ops, `op_of_file`, do."""
    ops = [] if options.op is None else ops_of(options.op)
    dense = next((op for op in ops if op not in SPARSE), None)
    if dense and op_of_file and not set(SPARSE).isdisjoint(ops_of(op_of_file)):
        yield (
            f"workload '{options.workload_name}' is for {', '.join(SPARSE)}, and {dense} selects nothing: "
            "leave --op out, or give its batches with --batch-spec."
        )


def of_options(options: RunOptions, axes: Axes, op_of_file: str | None = None) -> Iterator[str]:
    """Yield which options contradict each other or lack one that they need.

    `op_of_file`: the op to time, if the workload names it and the user does not. Raises `UsageError` for a
    name of an implementation that cannot be read.
    """
    options.implementation_names  # noqa: B018  # raises
    yield from _of_op(options, axes, op_of_file)
    if options.layer is not None and not options.model_path:
        yield "--layer chooses a layer of a checkpoint: it needs --model-path."
    if options.model_path and options.config is not None:
        yield "--config and --model-path are mutually exclusive: the checkpoint's own config.json is used."
    size, trace = options.page_size, options.profile
    if trace is not None and not trace.name.endswith((".json", ".json.gz")):
        yield f"--profile writes a Chrome trace, FILE.json or FILE.json.gz, got '{trace}'."
    files = {"-o": options.output, "--resume": options.resume, "--baseline": options.baseline}
    for flag, other in files.items():
        if trace and other and other.absolute() == trace.absolute():
            yield f"--profile and {flag} name the same file, '{trace}': give the trace its own."
    if size is not None and (not 1 <= size <= MAX_COUNT or size & (size - 1)):
        yield f"--page-size must be a power of two below 2^31, got {size}."
    yield from _of_ranks(options)


def _of_op(options: RunOptions, axes: Axes, op_of_file: str | None) -> Iterator[str]:
    """Yield which options of one op are without one, and which are about the whole layer with one."""
    given = [flag for flag, value in options.op_shape.items() if value is not None]
    for flag in given:
        if flag[2:].replace("-", "_") in axes:
            yield f"{flag} and an axis of that name are mutually exclusive: keep one."
    if options.op is None:
        if given and not options.batch_specs:
            yield f"{given[0]} shapes one op: it needs --op; a workload has its own lengths, and axes (-a)."
        return
    layer = {
        "--model-path": options.model_path,
        "--attention": options.attention != "auto",
        "--layers": options.layers is not None,
    }
    about = f"{_first(layer)} is about the whole layer"
    if _first(layer) and op_of_file:
        yield (
            f"{about}, and workload '{options.workload_name}' times one op, {op_of_file}: leave it out; "
            "--heads and --config apply."
        )
    shape = "the workload's batches, " if options.workload_flag else "--batch, --kv, --q-len, --batch-spec, "
    shape = "--batch-spec, " if options.batch_specs else shape
    if _first(layer):
        yield f"{about}: leave it out with --op, whose shape is {shape}--heads and --config."


def _of_ranks(options: RunOptions) -> Iterator[str]:
    """Yield what is not measured over ranks, and what simulates nothing or would be repeated by them."""
    layout = options.parallel
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
    if layout and (flag := _first(alone)):
        yield f"{flag} is for one device: leave it out with --parallel, or run without."
    if layout and layout.dcp > 1 and options.attention == "expanded":
        yield "dcp supports --attention absorbed only: leave out expanded, or dcp."
    if layout and options.foreign:
        yield f"{options.foreign[0]} runs on one device: --parallel times mla and mla-reference."
    if not options.simulate:
        if options.link is not None:
            yield "--link sets the link of a simulation: add --simulate."
        return
    if layout is None:
        yield "--simulate predicts the ranks of a layout: add --parallel, as in tp=8."
    elif (count := launcher.count() or 1) > 1:
        yield (
            f"--simulate predicts all ranks in one process, and {count} were started: start one, or leave "
            "--simulate out to measure the real ranks."
        )
    elif layout.world > MAX_SIMULATED:
        yield f"--simulate predicts ranks, {MAX_SIMULATED} at most, and layout '{layout}' has {layout.world}."


def of_points(options: RunOptions, points: Sequence[Point]) -> Iterator[str]:
    """Yield which options the scenarios contradict."""
    for flag, name in (("--dtype", "dtype"), ("--page-size", "page_size")):
        if getattr(options, name) is not None and any(name in point.point for point in points):
            yield f"{flag} and an axis {name} are mutually exclusive: list every value in the axis."
    for point in points:
        selects = next((name for name in SELECTS if getattr(point, name) is not None), None)
        if selects and point.op is None:
            yield (
                f"{selects} applies to one op: add --op sparse_latent_attention. A layer takes its config's "
                "index_topk."
            )
        if point.cache_format is not None and point.layers > 1:
            yield f"scenario '{point.name}': a cache format is measured with one layer."
    if options.foreign and any(point.cache_format is not None and point.op is None for point in points):
        yield (
            f"{options.foreign[0]} has a cache of its own, without formats: leave cache_format out, or list "
            "--implementations without it."
        )
    with_heads = [point.name for point in points if point.heads]
    if options.model_path and with_heads:
        yield f"scenario '{with_heads[0]}' sets heads, but a checkpoint's weights fix them."
    if not options.stages:
        return
    names = options.implementation_names
    if names and options.foreign == names:  # without names, `mla` is one of them
        yield "--stages times the parts of mla and mla-reference: run one of them."
    if options.op is not None:
        yield f"--stages times the parts of a layer, and {options.op} is one part alone."
    if any(point.layers > 1 for point in points):
        yield "--stages times one layer: leave out --layers."


def of_indexer(options: RunOptions, config: MLAConfig, points: Sequence[Point]) -> Iterator[str]:
    """Yield what is not measured of a layer with an indexer, or needs one."""
    if not config.index_n_heads and any(point.index_format not in (None, "plain") for point in points):
        yield f"--index-format stores index keys, and '{config.name}' has no indexer: omit it."
    if not config.index_topk or all(point.op for point in points):
        return
    if not config.index_n_heads:
        yield f"config '{config.name}' has index_topk but no indexer: set its index_n_heads."
    about, layout = "a layer with an indexer is judged by", options.parallel
    if layout and layout.dp > 1 and not options.simulate:
        yield f"{about} one selection, and each part of dp makes its own: leave out dp of --parallel."
    if options.implementations and options.foreign:
        yield f"{about} the selection that it reports: leave out {options.foreign[0]}."


def of_dtype(backend: Backend, dtype: object) -> Iterator[str]:
    """Yield that the device only emulates a dtype."""
    native = backend.dtypes()
    if dtype not in native:
        yield (
            f"backend '{backend.name}' does not compute {dtype_name(dtype)} natively; "
            f"choose --dtype from: {', '.join(map(dtype_name, native))}."
        )


def of_heads(config: MLAConfig, points: Sequence[Point]) -> Iterator[str]:
    """Yield a number of heads that no tensor-parallel rank of the model has."""
    whole = config.num_attention_heads
    for point in points:
        axis = point.point.get("heads")
        # One op alone may have any number of them.
        heads = point.heads if axis is None and point.op is None else axis
        if isinstance(heads, int) and (heads > whole or whole % heads):
            where = f"scenario '{point.name}', heads" if axis is None else "axis heads"
            problem = "are more than" if heads > whole else "do not divide"
            yield (
                f"{where}: {heads} {problem} the {whole} heads of {config.name}; a tensor-parallel rank "
                "has an equal share of them."
            )


def of_roles(
    options: RunOptions, points: Sequence[Point], overrides: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """Yield what changes none of the roles that `--op` times: lengths, heads, axes, and ops in brackets.

    `overrides`: implementation -> roles that it has ops of its own for.
    """
    roles = list(dict.fromkeys(point.op for point in points if point.op))
    if options.op is None:
        return
    unused = ["--kv"] * (options.kv is not None and READS_HISTORY.isdisjoint(roles))
    unused += ["--heads"] * (options.heads is not None and not any(point.heads for point in points))
    unused += [
        axis
        for axis, affected in AFFECTED.items()
        if affected.isdisjoint(roles) and any(getattr(point, axis) for point in points)
    ]
    if unused:
        have, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        yield f"{' and '.join(unused)} {have} no effect on {', '.join(roles)}: omit {them}."
    for name, overridden in overrides.items():
        if overridden and not any(role in overridden for role in roles):
            yield (
                f"--op times {', '.join(roles)} alone, and the brackets of '{name}' give it no op: name "
                f"{'one of them' if len(roles) > 1 else roles[0]} there, or leave '{name}' out."
            )
