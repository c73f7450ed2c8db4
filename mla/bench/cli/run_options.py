"""The options of `run`, in the order of its help."""

from __future__ import annotations

import click

from mla.bench.plan.options import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE
from mla.bench.terminal.run_table import FORMATS
from mla.bench.workload.op_scenario import DEFAULT_BATCH, DEFAULT_HISTORY, DEFAULT_QUERY
from mla.bench.workload.quantities import duration, size
from mla.bench.workload.scenario import MAX_COUNT, MAX_LAYERS, MAX_REQUESTS
from mla.bench.workload.workload_file import PRESETS, STANDARD
from mla.command.backend import MEASURED_BACKEND_HELP, backend_options
from mla.command.options import DETAIL, FILE, Command, add_options, parsed_by, percent, result_path
from mla.config.presets import DEFAULT_CONFIG
from mla.parallel.layout import Layout
from mla.text import DTYPES

# One op of the layer alone, and its shape.
OP = (
    click.option(
        "--op",
        metavar="NAME",
        help="Time one op of the contract without the layer, on lengths below or of batch specs: its name, "
        "or its role (see --list-ops).",
    ),
    click.option(
        "--batch",
        type=click.IntRange(1, MAX_REQUESTS),
        metavar="N",
        help=f"--op: requests.  [default: {DEFAULT_BATCH}]",
    ),
    click.option(
        "--kv",
        callback=parsed_by(size),
        metavar="LEN",
        help=f"--op: tokens per request cached before the new ones (4k).  [default: {DEFAULT_HISTORY}]",
    ),
    click.option(
        "--q-len",
        type=click.IntRange(1, MAX_COUNT),
        metavar="N",
        help=f"--op: new tokens per request.  [default: {DEFAULT_QUERY}]",
    ),
    click.option(
        "--heads",
        type=click.IntRange(1, MAX_COUNT),
        metavar="N",
        help="--op, --batch-spec: heads, instead of the config's.",
    ),
)


# What is measured.
WORKLOAD = (
    click.option(
        "--config",
        metavar="NAME|PATH",
        show_default=DEFAULT_CONFIG,
        help="Preset, or a config.json (or its folder).",
    ),
    click.option(
        "--model-path",
        metavar="DIR",
        type=FILE,
        help="Checkpoint folder: config.json and safetensors of one layer or more, instead of --config.",
    ),
    click.option(
        "--layer",
        metavar="N",
        help="Layer of the checkpoint: 3, or 3.1 for the second of two attentions. Default: the only one.",
    ),
    click.option(
        "--preset",
        metavar="NAME",
        type=click.Choice(PRESETS),
        help="A shipped workload instead of --workload: smoke takes seconds, or minutes where torch has no "
        f"fast bf16; full adds sweeps; published ones are {', '.join(PRESETS[3:])} (`list --workloads`).",
    ),
    click.option(
        "--workload",
        metavar="NAME|FILE",
        show_default=STANDARD,
        help="Scenarios to run: a TOML file of [[scenario]] tables with name, mode, query_lens, "
        "history (or batch_spec), runs, passes, warmups, heads, layers, axes.",
    ),
    click.option(
        "--scenario",
        "scenarios",
        metavar="NAME",
        multiple=True,
        help="Run only this scenario of the workload; may be repeated.",
    ),
    click.option(
        "--batch-spec",
        "--batch-specs",
        "batch_specs",
        metavar="SPEC,...",
        multiple=True,
        help="Time one forward over a batch, instead of a workload: vLLM's [COUNT]qLEN[k][sLEN[k]], joined "
        "with _, such as 4q8s2049_16q1s3072. q: new tokens of a request; s: all of its tokens, the new ones "
        "included; may be repeated.",
    ),
)

# How it is measured.
METHOD = (
    click.option(
        "-a",
        "--axis",
        "axes",
        metavar="AXIS=VALUES",
        multiple=True,
        help="Lay a grid over every scenario; may be repeated. Axes: batch, kv (history), q_len (new tokens "
        "of a request), heads, dtype, page_size. Values: 1,8,64 or 1k..64k*4 or 1..8+1; k is 1024.",
    ),
    click.option(
        "--implementations",
        metavar="A,B",
        help="What to time, interleaved: mla, mla-reference, transformers, transformers-eager. "
        "mla[ROLE=OP,...] is mla with these ops, as --list-ops names them, or reference. Default: mla, and "
        "mla-reference where a fused op makes it differ.",
    ),
    click.option(
        "--runs",
        type=click.IntRange(1, MAX_COUNT),
        help="Prefill: timed forwards, rounded up to equal passes. Decode: steps of a pass. "
        "--op: calls of a pass.  [workload: 100]",
    ),
    click.option(
        "--passes",
        type=click.IntRange(1, MAX_COUNT),
        help="Passes per implementation, interleaved; a 95% interval needs 6.  [workload: 10 and 6]",
    ),
    click.option(
        "--layers",
        type=click.IntRange(1, MAX_LAYERS),
        help="Layers with weights and caches of their own, one after the other, as in a model; numbers are "
        "per layer.  [workload: 1]",
    ),
    click.option(
        "--warmups",
        type=click.IntRange(0, MAX_COUNT),
        help="Untimed forwards first, and more until latencies settle; 0: none. Those of a workload end "
        "after 2 s; a count given here is run whatever it takes.  [workload: 10]",
    ),
    click.option(
        "--parallel",
        metavar="LAYOUT",
        is_eager=True,  # -o asks whether it was given
        callback=parsed_by(Layout.parse),
        help="Spread the layer over the processes of torchrun or srun: tp=2 (heads), dcp=2 (tokens of the "
        "context), dp=2 (requests), or a combination such as tp=2,dcp=2. One result, of the slowest rank.",
    ),
    click.option(
        "--simulate",
        is_flag=True,
        help="Predict --parallel on one device, without other processes: all ranks are run here and merged, "
        "each that differs is timed alone, and collectives are added from --link.",
    ),
    click.option(
        "--link",
        metavar="MODEL|FILE",
        help="The link that --simulate assumes: alpha=5us,beta=300GB/s (latency of a message, bandwidth of a "
        "rank), the result file of a run over real ranks, which measures both, or ideal: collectives take "
        "no time.  [default: ideal]",
    ),
    click.option(
        "--mode",
        metavar="A,B",
        help="How forwards are launched: eager, graph (replayed). Default: both, if the backend has graphs.",
    ),
    click.option(
        "--cache",
        metavar="A,B",
        help="Caches before a forward: warm, cold (flushed). Default: both.",
    ),
    click.option(
        "--clock",
        metavar="A,B",
        help="host, device. Default: both, if the device has a timer. Every combination of the three is "
        "timed; eager, warm, host is the headline and always is.",
    ),
    click.option(
        "--dtype",
        type=click.Choice([*DTYPES.values()]),
        show_default=DEFAULT_DTYPE,
        help="Dtype of weights, cache and activations.",
    ),
    click.option(
        "--attention",
        type=click.Choice(["auto", "absorbed", "expanded"]),
        default="auto",
        show_default=True,
        help="Path of attention; auto takes the one with fewer FLOPs per request.",
    ),
    click.option("--page-size", type=int, show_default=str(DEFAULT_PAGE_SIZE), help="Tokens per cache page."),
    click.option(
        "--ops",
        metavar="POLICY",
        default="auto",
        show_default=True,
        help="auto: the backend's fused ops where they fit; reference: none; fused: an error where one is "
        "offered and does not fit; or names of ops to insist on, comma-separated (see --list-ops).",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**32 - 1),
        default=0,
        show_default=True,
        help="Seed of weights, inputs, page order and the order of scenarios.",
    ),
)

# Where the result goes, what a run resumes from, and what ends it.
CONTROL = (
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        type=FILE,
        callback=result_path,
        help="Write the complete result as JSON. %t is the task's number under srun or torchrun, %j the "
        "job's.",
    ),
    click.option(
        "--resume",
        metavar="FILE",
        type=FILE,
        callback=result_path,
        help="Resume the run in this result file: its complete cases are kept; without -o the file is "
        "rewritten.",
    ),
    click.option(
        "--budget",
        metavar="TIME",
        callback=parsed_by(duration),
        help="Stay within this time, such as 90s, 10m or 1h; what does not fit is skipped.",
    ),
    click.option(
        "--hang-after",
        metavar="TIME",
        callback=parsed_by(duration),
        default="10m",
        show_default=True,
        help="Abort the run, keeping the results so far, if no forward finishes for this long.",
    ),
    click.option(
        "--baseline",
        metavar="FILE",
        type=FILE,
        help="Compare with this result file after the run.",
    ),
    click.option(
        "--fail-slower",
        metavar="PERCENT",
        callback=parsed_by(percent),
        help="With --baseline: exit 1 if the whole interval of a case's time ratio lies above this.",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="Exit 6 if a headline is unreliable: its interval is wider than its number, or missing because "
        "there was time for few passes only.",
    ),
)

# What is printed.
OUTPUT = (
    *DETAIL,
    click.option(
        "--format",
        "kind",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="Format of what is printed on stdout.",
    ),
    click.option(
        "--stages",
        is_flag=True,
        help="Afterwards time every op of the layer alone, and print where a forward's time goes.",
    ),
    click.option(
        "--profile",
        metavar="FILE",
        type=FILE,
        callback=result_path,
        help="Afterwards record an untimed pass of every case with torch.profiler, and write them as one "
        "Chrome trace (FILE.json or FILE.json.gz) with a range for every op.",
    ),
    click.option(
        "--dump-failure",
        metavar="DIR",
        type=FILE,
        callback=result_path,
        help="If a result is wrong, find the op and keep its call in DIR (operands, output, expected rows) "
        "for `python -m mla.bench replay DIR`.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Run a forward of each case, after another that warms it up, print its memory and estimated "
        "time on stderr, and stop.",
    ),
    click.option("--list-ops", is_flag=True, help="Print which op runs where, and why, and stop."),
)


def run_options(command: Command) -> Command:
    """Add the options of `run` to a click command."""
    others = add_options((*WORKLOAD, *OP, *METHOD, *CONTROL, *OUTPUT))
    return backend_options(MEASURED_BACKEND_HELP)(others(command))
