"""The options of `run`, in the order of its help."""

from __future__ import annotations

import click

from mla.bench.plan.options import DEFAULT_PAGE_SIZE
from mla.bench.terminal.run_table import FORMATS
from mla.bench.workload.grid import AXES, DEFAULT_BATCH, DEFAULT_HISTORY, DEFAULT_QUERY, SELECTIONS
from mla.bench.workload.scenario import MAX_COUNT, MAX_LAYERS, MAX_REQUESTS, duration, size
from mla.bench.workload.workload_file import PRESETS, STANDARD
from mla.command.options import (
    DETAIL,
    FILE,
    MEASURED_BACKEND_HELP,
    Command,
    Dtype,
    add_options,
    backend_options,
    evidence,
    how,
    output,
    parsed_by,
    percent,
    result_path,
    scale,
    what_to_run,
)
from mla.config.presets import DEFAULT_CONFIG
from mla.parallel.layout import Layout
from mla.text import DTYPES

WHAT_TO_RUN = (
    what_to_run(
        "--config", metavar="NAME|PATH", common=True, show_default=DEFAULT_CONFIG,
        help="Preset (`list --configs`), config.json, or its folder.",
    ),
    what_to_run(
        "--model-path", metavar="DIR", type=FILE, common=True,
        help="Checkpoint (config.json, safetensors), in place of --config.",
    ),
    what_to_run(
        "--layer", show_default="the only one",
        help="Checkpoint layer: 3, or 3.1 for the second of two attentions.",
    ),
    what_to_run(
        "--batch-spec", "--batch-specs", "batch_specs", metavar="SPEC,...", multiple=True, common=True,
        help="Your own batch (vLLM's --batch-specs), such as 4q8s2049_16q1s3072: [COUNT]qNEW[sTOTAL].",
    ),
    what_to_run(
        "--preset", metavar="NAME", type=click.Choice(PRESETS),
        help="Shipped workload (`list --workloads`): smoke takes seconds, full adds sweeps.",
    ),
    what_to_run(
        "--workload", metavar="NAME|FILE", show_default=STANDARD,
        help="TOML file of scenarios (name, mode, query_lens, history, ...).",
    ),
    what_to_run(
        "--scenario", "scenarios", metavar="NAME", multiple=True,
        help="Run only this scenario of the workload; repeatable.",
    ),
    what_to_run(
        "--op", metavar="NAME,...", common=True, help="Single ops by name or role; --list-ops names them."
    ),
    what_to_run(
        "--batch", type=click.IntRange(1, MAX_REQUESTS), show_default=str(DEFAULT_BATCH),
        help="Requests of --op.",
    ),
    what_to_run(
        "--kv", callback=parsed_by(size), metavar="LEN", show_default=str(DEFAULT_HISTORY),
        help="Cached tokens per request of --op, such as 4k.",
    ),
    what_to_run(
        "--q-len", type=click.IntRange(1, MAX_COUNT), show_default=str(DEFAULT_QUERY),
        help="New tokens per request of --op.",
    ),
    what_to_run(
        "--heads", type=click.IntRange(1, MAX_COUNT), show_default="the config's",
        help="Heads of --op or --batch-spec.",
    ),
    what_to_run(
        "--topk", type=click.IntRange(1, MAX_COUNT), show_default="the config's",
        help="Tokens that a query of --op selects; short for -a topk=N.",
    ),
    what_to_run(
        "--selection", metavar="NAME", type=click.Choice(SELECTIONS), show_default=SELECTIONS[0],
        help=f"How selected tokens lie: {', '.join(SELECTIONS)}; short for -a selection=NAME.",
    ),
    what_to_run(
        "--implementations", metavar="A,B", common=True,
        help="Any of mla, mla-reference, transformers, transformers-eager, mla[ROLE=OP,...].",
    ),
)  # fmt: skip

HOW = (
    how(
        "--dtype", metavar="DTYPE", type=Dtype(), common=True, show_default="bf16",
        help=f"Dtype of weights, cache and activations: {', '.join(DTYPES)}.",
    ),
    how(
        "--budget", metavar="TIME", callback=parsed_by(duration), common=True,
        help="Time limit: 90s, 10m or 1h; what does not fit is skipped.",
    ),
    how(
        "--attention", metavar="PATH", type=click.Choice(["auto", "absorbed", "expanded"]), default="auto",
        show_default=True, help="absorbed, expanded, or auto: fewer FLOPs per request.",
    ),
    how(
        "--ops", metavar="POLICY", default="auto", show_default=True,
        help="auto (fused ops that fit), fused (fail where one does not), reference, or op names.",
    ),
    how("--page-size", type=int, show_default=str(DEFAULT_PAGE_SIZE), help="Tokens per cache page."),
    how(
        "--cache-format", metavar="NAME", show_default="the dtype",
        help="What the cache holds, such as fp8_ds_mla; short for -a cache_format=NAME.",
    ),
    how(
        "--index-format", metavar="NAME", show_default="plain",
        help="What index keys are held in: plain or fp8; short for -a index_format=NAME.",
    ),
    how(
        "--mode", metavar="A,B", show_default="both, if the backend has graphs",
        help="Launch mode: eager, graph.",
    ),
    how(
        "--cache", metavar="A,B", show_default="both",
        help="Device caches before a forward: warm, cold (flushed).",
    ),
    how(
        "--clock", metavar="A,B", show_default="both, if the device has a timer",
        help="Timer: host, device. The headline is eager, warm, host.",
    ),
    how(
        "--runs", type=click.IntRange(1, MAX_COUNT), show_default="workload's, 100",
        help="Forwards (prefill), steps per pass (decode), calls per pass (--op).",
    ),
    how(
        "--passes", type=click.IntRange(1, MAX_COUNT), show_default="workload's, 10 or 6",
        help="Interleaved passes; a 95% interval needs 6.",
    ),
    how(
        "--warmups", type=click.IntRange(0, MAX_COUNT), show_default="workload's, 10",
        help="Least number of untimed forwards first; 0: none.",
    ),
    how(
        "--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True,
        help="Seed of weights, inputs, page order and scenario order.",
    ),
)  # fmt: skip

SCALE = (
    scale(
        "-a", "--axis", "axes", metavar="AXIS=VALUES", multiple=True,
        help=f"Sweep {', '.join(AXES)}: 1,8 or 1k..64k*4; repeatable.",
    ),
    scale(
        "--layers", type=click.IntRange(1, MAX_LAYERS), show_default="workload's, 1",
        help="Layers in a row, each with its own cache; numbers are per layer.",
    ),
    scale(
        "--parallel", metavar="LAYOUT",
        is_eager=True,  # -o asks whether it was given
        callback=parsed_by(Layout.parse),
        help="Spread over torchrun or srun: tp=2 (heads), dcp=2 (context), dp=2 (requests), tp=2,dcp=2.",
    ),
    scale(
        "--simulate", is_flag=True,
        help="Predict --parallel on one device: time each distinct rank, add collectives from --link.",
    ),
    scale(
        "--link", metavar="MODEL|FILE",
        help="Link of --simulate: ideal (default), alpha=5us,beta=300GB/s, or a result file.",
    ),
)  # fmt: skip

OUTPUT = (
    output(
        "-o", "--output", metavar="FILE", type=FILE, callback=result_path, common=True,
        help="Save the result as JSON; %t is the task number under srun or torchrun, %j the job's.",
    ),
    *DETAIL,
    output(
        "--format", "kind", metavar="FORMAT", type=click.Choice(FORMATS), default="table", show_default=True,
        help=f"Format of stdout: {', '.join(FORMATS)}.",
    ),
    output("--list-ops", is_flag=True, help="Print which op runs where, and why; then exit."),
    output(
        "--dry-run", is_flag=True,
        help="Run one forward per case, print memory and estimated time on stderr; then exit.",
    ),
)  # fmt: skip

EVIDENCE = (
    evidence(
        "--hang-after", metavar="TIME", callback=parsed_by(duration), default="10m", show_default=True,
        help="Abort if no forward finishes for this long; results so far are kept.",
    ),
    evidence(
        "--resume", metavar="FILE", type=FILE, callback=result_path,
        help="Resume the run in this result file; without -o, rewrite it.",
    ),
    evidence("--baseline", metavar="FILE", type=FILE, help="Compare with this result file after the run."),
    evidence(
        "--fail-slower", metavar="PERCENT", callback=parsed_by(percent),
        help="With --baseline: exit 1 if the whole interval of a case's time ratio lies above this.",
    ),
    evidence(
        "--strict", is_flag=True,
        help="Exit 6 if a headline is unreliable: no interval, or one wider than its number.",
    ),
    evidence("--stages", is_flag=True, help="Afterwards, time every op alone: where a forward's time goes."),
    evidence(
        "--profile", metavar="FILE", type=FILE, callback=result_path,
        help="Afterwards, record an untimed pass per case: a Chrome trace, .json or .json.gz.",
    ),
    evidence(
        "--dump-failure", metavar="DIR", type=FILE, callback=result_path,
        help="Keep the call of the op that made a result wrong in DIR, for `replay DIR`.",
    ),
)  # fmt: skip


def run_options(command: Command) -> Command:
    """Add the options of `run` to a click command."""
    ours = add_options((*WHAT_TO_RUN, *HOW, *SCALE, *OUTPUT, *EVIDENCE))
    return backend_options(MEASURED_BACKEND_HELP)(ours(command))
