"""The command line of `run` as typed values, its mistakes, and the lines that repeat or resume a run."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from mla.bench.terminal.run_table import FORMATS
from mla.bench.workload.grid import (
    AFFECTED,
    AXES,
    DEFAULT_BATCH,
    DEFAULT_HISTORY,
    DEFAULT_QUERY,
    READS_HISTORY,
    SELECTIONS,
    SPARSE,
    Axes,
    Point,
    ops_of,
)
from mla.bench.workload.implementations import is_ours, parse
from mla.bench.workload.scenario import MAX_COUNT, MAX_LAYERS, MAX_REQUESTS, duration, size
from mla.bench.workload.workload_file import PRESETS, STANDARD
from mla.command import launcher
from mla.command.options import (
    DETAIL,
    DTYPE,
    FILE,
    BackendOptions,
    Read,
    add_options,
    evidence,
    how,
    output,
    percent,
    result_path,
    scale,
    what_to_run,
)
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError
from mla.parallel.layout import Layout
from mla.text import DTYPES, dtype_name

if TYPE_CHECKING:
    from mla.config import MLAConfig
    from mla_backends.api import Backend

DEFAULT_DTYPE = "bfloat16"
DEFAULT_PAGE_SIZE = 64
PROGRAM = ("python", "-m", "mla.bench")


@dataclass(frozen=True)
class RunOptions(BackendOptions):
    """The options of `run`, one field each, in the order of its help. None: not given."""

    # fmt: off
    config: Annotated[str | None, what_to_run(
        "--config", metavar="NAME|PATH", common=True, show_default=DEFAULT_CONFIG,
        help="Preset (`list --configs`), config.json, or its folder.",
    )]
    model_path: Annotated[Path | None, what_to_run(
        "--model-path", metavar="DIR", type=FILE, common=True,
        help="Checkpoint (config.json, safetensors), in place of --config.",
    )]
    layer: Annotated[str | None, what_to_run(
        "--layer", show_default="the only one",
        help="Checkpoint layer: 3, or 3.1 for the second of two attentions.",
    )]
    batch_specs: Annotated[tuple[str, ...], what_to_run(
        "--batch-spec", "--batch-specs", "batch_specs", metavar="SPEC,...", multiple=True, common=True,
        help="Your own batch (vLLM's --batch-specs), such as 4q8s2049_16q1s3072: [COUNT]qNEW[sTOTAL].",
    )]
    preset: Annotated[str | None, what_to_run(
        "--preset", metavar="NAME", type=click.Choice(PRESETS),
        help="Shipped workload (`list --workloads`): smoke takes seconds, full adds sweeps.",
    )]
    workload: Annotated[str | None, what_to_run(
        "--workload", metavar="NAME|FILE", show_default=STANDARD,
        help="TOML file of scenarios (name, mode, query_lens, history, ...).",
    )]
    scenarios: Annotated[tuple[str, ...], what_to_run(
        "--scenario", "scenarios", metavar="NAME", multiple=True,
        help="Run only this scenario of the workload; repeatable.",
    )]
    op: Annotated[str | None, what_to_run(
        "--op", metavar="NAME,...", common=True, help="Single ops by name or role; --list-ops names them."
    )]
    batch: Annotated[int | None, what_to_run(
        "--batch", type=click.IntRange(1, MAX_REQUESTS), show_default=str(DEFAULT_BATCH),
        help="Requests of --op.",
    )]
    kv: Annotated[int | None, what_to_run(
        "--kv", type=Read(size), metavar="LEN", show_default=str(DEFAULT_HISTORY),
        help="Cached tokens per request of --op, such as 4k.",
    )]
    q_len: Annotated[int | None, what_to_run(
        "--q-len", type=click.IntRange(1, MAX_COUNT), show_default=str(DEFAULT_QUERY),
        help="New tokens per request of --op.",
    )]
    heads: Annotated[int | None, what_to_run(
        "--heads", type=click.IntRange(1, MAX_COUNT), show_default="the config's",
        help="Heads of --op or --batch-spec.",
    )]
    topk: Annotated[int | None, what_to_run(
        "--topk", type=click.IntRange(1, MAX_COUNT), show_default="the config's",
        help="Tokens that a query of --op selects; short for -a topk=N.",
    )]
    selection: Annotated[str | None, what_to_run(
        "--selection", metavar="NAME", type=click.Choice(SELECTIONS), show_default=SELECTIONS[0],
        help=f"How selected tokens lie: {', '.join(SELECTIONS)}; short for -a selection=NAME.",
    )]
    implementations: Annotated[str | None, what_to_run(
        "--implementations", metavar="A,B", common=True,
        help="Any of mla, mla-reference, transformers, transformers-eager, mla[ROLE=OP,...], mla[ROLE=*].",
    )]
    dtype: Annotated[str | None, how(
        "--dtype", metavar="DTYPE", type=DTYPE, common=True, show_default="bf16",
        help=f"Dtype of weights, cache and activations: {', '.join(DTYPES)}.",
    )]
    budget: Annotated[float | None, how(
        "--budget", metavar="TIME", type=Read(duration), common=True,
        help="Time limit: 90s, 10m or 1h; what does not fit is skipped.",
    )]
    attention: Annotated[str, how(
        "--attention", metavar="PATH", type=click.Choice(["auto", "absorbed", "expanded"]), default="auto",
        show_default=True, help="absorbed, expanded, or auto: fewer FLOPs per request.",
    )]
    ops: Annotated[str, how(
        "--ops", metavar="POLICY", default="auto", show_default=True,
        help="auto (fused ops that fit), fused (fail where one does not), reference, or op names.",
    )]
    page_size: Annotated[int | None, how(
        "--page-size", type=int, show_default=str(DEFAULT_PAGE_SIZE), help="Tokens per cache page."
    )]
    cache_format: Annotated[str | None, how(
        "--cache-format", metavar="NAME", show_default="the dtype",
        help="What the cache holds, such as fp8_ds_mla; short for -a cache_format=NAME.",
    )]
    index_format: Annotated[str | None, how(
        "--index-format", metavar="NAME", show_default="plain",
        help="What index keys are held in: plain or fp8; short for -a index_format=NAME.",
    )]
    mode: Annotated[str | None, how(
        "--mode", metavar="A,B", show_default="both, if the backend has graphs",
        help="Launch mode: eager, graph.",
    )]
    cache: Annotated[str | None, how(
        "--cache", metavar="A,B", show_default="both",
        help="Device caches before a forward: warm, cold (flushed).",
    )]
    clock: Annotated[str | None, how(
        "--clock", metavar="A,B", show_default="both, if the device has a timer",
        help="Timer: host, device. The headline is eager, warm, host.",
    )]
    runs: Annotated[int | None, how(
        "--runs", type=click.IntRange(1, MAX_COUNT), show_default="workload's, 100",
        help="Forwards (prefill), steps per pass (decode), calls per pass (--op).",
    )]
    passes: Annotated[int | None, how(
        "--passes", type=click.IntRange(1, MAX_COUNT), show_default="workload's, 10 or 6",
        help="Interleaved passes; a 95% interval needs 6.",
    )]
    warmups: Annotated[int | None, how(
        "--warmups", type=click.IntRange(0, MAX_COUNT), show_default="workload's, 10",
        help="Least number of untimed forwards first; 0: none.",
    )]
    seed: Annotated[int, how(
        "--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True,
        help="Seed of weights, inputs, page order and scenario order.",
    )]
    axes: Annotated[tuple[str, ...], scale(
        "-a", "--axis", "axes", metavar="AXIS=VALUES", multiple=True,
        help=f"Sweep {', '.join(AXES)}: 1,8 or 1k..64k*4; repeatable.",
    )]
    layers: Annotated[int | None, scale(
        "--layers", type=click.IntRange(1, MAX_LAYERS), show_default="workload's, 1",
        help="Layers in a row, each with its own cache; numbers are per layer.",
    )]
    parallel: Annotated[Layout | None, scale(
        "--parallel", metavar="LAYOUT",
        is_eager=True,  # -o asks whether it was given
        type=Read(Layout.parse),
        help="Spread over torchrun or srun: tp=2 (heads), dcp=2 (context), dp=2 (requests), tp=2,dcp=2.",
    )]
    simulate: Annotated[bool, scale(
        "--simulate", is_flag=True,
        help="Predict --parallel on one device: time each distinct rank, add collectives from --link.",
    )]
    link: Annotated[str | None, scale(
        "--link", metavar="MODEL|FILE",
        help="Link of --simulate: ideal (default), alpha=5us,beta=300GB/s, or a result file.",
    )]
    output: Annotated[Path | None, output(
        "-o", "--output", metavar="FILE", type=FILE, callback=result_path, common=True,
        help="Save the result as JSON; %t is the task number under srun or torchrun, %j the job's.",
    )]
    detail: Annotated[str | None, add_options(DETAIL)]  # "verbose" or "quiet"
    kind: Annotated[str, output(
        "--format", "kind", metavar="FORMAT", type=click.Choice(FORMATS), default="table", show_default=True,
        help=f"Format of stdout: {', '.join(FORMATS)}.",
    )]
    list_ops: Annotated[bool, output(
        "--list-ops", is_flag=True, help="Print which op runs where, and why; then exit.",
    )]
    dry_run: Annotated[bool, output(
        "--dry-run", is_flag=True,
        help="Run one forward per case, print memory and estimated time on stderr; then exit.",
    )]
    hang_after: Annotated[float, evidence(
        "--hang-after", metavar="TIME", type=Read(duration), default="10m", show_default=True,
        help="Abort if no forward finishes for this long; results so far are kept.",
    )]
    resume: Annotated[Path | None, evidence(
        "--resume", metavar="FILE", type=FILE, callback=result_path,
        help="Resume the run in this result file; without -o, rewrite it.",
    )]
    baseline: Annotated[Path | None, evidence(
        "--baseline", metavar="FILE", type=FILE, help="Compare with this result file after the run.",
    )]
    fail_slower: Annotated[float | None, evidence(
        "--fail-slower", metavar="PERCENT", type=Read(percent),
        help="With --baseline: exit 1 if the whole interval of a case's time ratio lies above this.",
    )]
    strict: Annotated[bool, evidence(
        "--strict", is_flag=True,
        help="Exit 6 if a headline is unreliable: no interval, or one wider than its number.",
    )]
    stages: Annotated[bool, evidence(
        "--stages", is_flag=True, help="Afterwards, time every op alone: where a forward's time goes.",
    )]
    profile: Annotated[Path | None, evidence(
        "--profile", metavar="FILE", type=FILE, callback=result_path,
        help="Afterwards, record an untimed pass per case: a Chrome trace, .json or .json.gz.",
    )]
    dump_failure: Annotated[Path | None, evidence(
        "--dump-failure", metavar="DIR", type=FILE, callback=result_path,
        help="Keep the call of the op that made a result wrong in DIR, for `replay DIR`.",
    )]
    # fmt: on
    link_source: str = ""  # where its numbers are from (`mla.bench.plan.resolve`)

    @property
    def workload_name(self) -> str:
        """The workload to load: a preset is a shipped one."""
        return self.preset or self.workload or STANDARD

    @property
    def workload_flag(self) -> str:
        """The flag that chose the workload; "": the standard one, which nobody asked for."""
        return _given(self, _SOURCES[1:])

    @property
    def is_first_look(self) -> bool:
        """Whether nobody chose what is measured: the standard scenarios of the default config run."""
        flags = ("--implementations", "--model-path", "--op", "--parallel", "--axes", "--stages", "--layers")
        return not _given(self, (*_SOURCES, *flags)) and self.config in (None, DEFAULT_CONFIG)

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
# Those of options and points need only the command line and the workload; the others also the layer or the
# device, which starts slowly.

SELECTS = ("topk", "selection")  # axes of ops that select
# Ranks of a prediction: the result has the samples of each.
MAX_SIMULATED = 256


def refuse(faults: Iterable[str]) -> None:
    """Raise `UsageError` with the first of these sentences, if there is one."""
    for fault in faults:
        raise UsageError(fault)


_LENGTHS, _SOURCES = ("--batch", "--kv", "--q-len"), ("--batch-spec", "--preset", "--workload", "--scenario")
# Options of which one of the first and one of the second exclude each other, and why.
_EXCLUSIVE = (
    (("--batch-spec",), _SOURCES[1:], "a batch spec is the scenario"),
    (_LENGTHS, _SOURCES, "both give the lengths of the requests"),
    (("--config",), ("--model-path",), "the checkpoint's own config.json is used"),
)
_OF_LAYERS = ("--model-path", "--attention", "--layers", "--stages", "--parallel")
_OF_ONE_DEVICE: tuple[str, ...] = ("--layers", "--stages", "--profile", "--dump-failure")
_OF_ONE_DEVICE += ("--mode", "--cache", "--clock")
# Values that are as good as none, and options that are not called like their fields.
_AS_NONE = {"attention": "auto", "mode": "eager", "cache": "warm", "clock": "host", "layers": 1}
_AS_NONE |= {"workload": STANDARD}
_FLAGS = {"batch_specs": "--batch-spec", "scenarios": "--scenario"}


def _given(options: RunOptions, flags: Iterable[str]) -> str:
    """Return the first of some flags that was given; "" if none was."""
    values = {name: value for name, value in vars(options).items() if value is not False}  # 0 is given
    given = [name for name, value in values.items() if value not in (None, (), _AS_NONE.get(name))]
    named = [_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in given]
    return next((flag for flag in flags if flag in named), "")


def of_options(options: RunOptions, axes: Axes, op_of_file: str | None) -> Iterator[str]:
    """Yield which options exclude or contradict each other, or lack one that they need.

    `op_of_file`: the op that the workload names. Raises `UsageError` for a name of an implementation that
    cannot be read.
    """
    if options.baseline is None and options.fail_slower is not None:
        yield "--fail-slower needs a run to compare with: add --baseline FILE."
    if options.preset and options.workload:
        yield "--preset and --workload are mutually exclusive: a preset is a shipped workload."
    for flags, others, why in _EXCLUSIVE:
        if (flag := _given(options, flags)) and (other := _given(options, others)):
            yield f"{flag} and {other} are mutually exclusive: {why}."
    op, of_file = options.op or op_of_file, f"workload '{options.workload_name}'"
    dense = next((each for each in ops_of(options.op or "") if each not in SPARSE), "")
    if dense and op_of_file and not set(SPARSE).isdisjoint(ops_of(op_of_file)):
        yield (
            f"{of_file} is for {', '.join(SPARSE)}, and {dense} selects nothing: leave --op out, or give its "
            "batches with --batch-spec."
        )
    options.implementation_names  # noqa: B018  # raises
    shape = [flag for flag, value in options.op_shape.items() if value is not None]
    for flag in shape:
        if flag[2:].replace("-", "_") in axes:
            yield f"{flag} and an axis of that name are mutually exclusive: keep one."
    if shape and op is None and not options.batch_specs:
        yield f"{shape[0]} shapes one op: it needs --op; a workload has its own lengths, and axes (-a)."
    if op is not None and (flag := _given(options, _OF_LAYERS)):
        where = "" if options.op else f" by {of_file}"
        yield f"{flag} is about the whole layer, and {op} is timed alone{where}: leave one out."
    if options.layer is not None and not options.model_path:
        yield "--layer chooses a layer of a checkpoint: it needs --model-path."
    size, trace = options.page_size, options.profile
    if trace is not None and not trace.name.endswith((".json", ".json.gz")):
        yield f"--profile writes a Chrome trace, FILE.json or FILE.json.gz, got '{trace}'."
    if trace is not None and options.target is not None and trace.resolve() == options.target.resolve():
        yield f"--profile and the result would both write '{trace}': name another file."
    if size is not None and (not 1 <= size <= MAX_COUNT or size & (size - 1)):
        yield f"--page-size must be a power of two below 2^31, got {size}."
    yield from _of_ranks(options)


def _of_ranks(options: RunOptions) -> Iterator[str]:
    """Yield what is not measured over ranks, and what simulates nothing or would be repeated by them."""
    layout, started = options.parallel, launcher.count() or 1
    if layout and (flag := _given(options, _OF_ONE_DEVICE)):
        yield f"{flag} is for one device: leave it out with --parallel, or run without."
    if layout and layout.dcp > 1 and options.attention == "expanded":
        yield "dcp supports --attention absorbed only: leave out expanded, or dcp."
    if layout and options.foreign:
        yield f"{options.foreign[0]} runs on one device: --parallel times mla and mla-reference."
    if options.link is not None and not options.simulate:
        yield "--link sets the link of a simulation: add --simulate."
    if options.simulate and layout is None:
        yield "--simulate predicts the ranks of a layout: add --parallel, as in tp=8."
    if options.simulate and started > 1:
        yield (
            f"--simulate predicts all ranks in one process, and {started} were started: start one, or leave "
            "--simulate out to measure the real ranks."
        )
    if options.simulate and layout and layout.world > MAX_SIMULATED:
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
    if any(point.layers > 1 for point in points):
        yield "--stages times one layer: leave out --layers."


def of_layer(options: RunOptions, config: MLAConfig, points: Sequence[Point]) -> Iterator[str]:
    """Yield what the layer contradicts, and what is not measured of one with an indexer, or needs one.

    Heads divide those of the model, as a tensor-parallel rank's do; one op alone may have any number.
    """
    whole, layers = config.num_attention_heads, [point for point in points if point.op is None]
    for point in layers:
        if point.heads and whole % point.heads:
            yield (
                f"scenario '{point.name}': {point.heads} heads do not divide the {whole} heads of "
                f"{config.name}; a tensor-parallel rank has an equal share of them."
            )
    if not config.index_n_heads and any(point.index_format not in (None, "plain") for point in points):
        yield f"--index-format stores index keys, and '{config.name}' has no indexer: omit it."
    if not config.index_topk or not layers:
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
