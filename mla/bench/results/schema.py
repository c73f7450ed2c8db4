"""The result file: one schema, validated on write and on read. Reading it needs no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mla.parallel.layout import Line
from mla.verify.verdict import Check

# 2 added points of a grid, several timings and stages of a case, ceilings; 3 the status "doubtful", the
# spread of ceilings, and lengths never seen before; 4 throughput over the total time of all passes, not that
# of the median pass. Files of older versions still load, and their throughput is made again from the samples.
SCHEMA_VERSION = 4
# Of a file of `ceilings`.
CEILINGS_VERSION = 1

# What a measurement can be at all; `file` holds fields against each other. A femtosecond is shorter than
# any forward, and 1e12 ms are 30 years.
Number = Annotated[float, Meta(ge=0, le=1e18)]
Ratio = Annotated[float, Meta(ge=1e-12, le=1e12)]
Sample = Annotated[float, Meta(ge=0, le=1e12)]  # a coarse clock may not see one forward
Milliseconds = Annotated[float, Meta(ge=1e-9, le=1e12)]
Rate = Annotated[float, Meta(ge=1e-9, le=1e24)]  # tokens, bytes or FLOPs per second
Amount = Annotated[int, Meta(ge=0, le=10**18)]  # bytes or FLOPs
Length = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Interval = tuple[float, float]


class Latency(msgspec.Struct, kw_only=True):
    """Milliseconds per forward. `samples` holds every timed forward, pass after pass."""

    median: Milliseconds
    ci95: tuple[Sample, Sample] | None  # of the median over passes; None with fewer than 6 passes
    p10: Sample
    p90: Milliseconds
    samples: Annotated[list[Sample], Meta(min_length=1)]
    drift: Annotated[float, Meta(ge=-1e12, le=1e12)] | None = (
        None  # relative change over all passes: robust slope of their medians
    )
    outliers: Length | None = None  # samples that are outliers (`stats.outliers`), counted and kept


class Throughput(msgspec.Struct, kw_only=True):
    """New tokens per second: those of all passes over their total time, under the name `median`."""

    median: Rate
    ci95: tuple[Rate, Rate] | None  # over passes, and holds the rate itself; None with fewer than 6 passes


class Cost(msgspec.Struct, kw_only=True):
    """Work of one forward from the actual lengths, averaged over the steps of a pass."""

    flops: Amount
    bytes: Amount


class Roofline(msgspec.Struct, kw_only=True):
    """Distance to the device's limit. `bound` says which limit sets the floor: "memory" or "compute".

    A case faster than its floor has no `fraction`: `doubt` says that the limit or the time is in doubt.
    """

    floor_ms: Sample | None = None
    fraction: Number | None = None
    bound: Literal["memory", "compute"] | None = None
    peak_source: str | None = None
    doubt: str = ""


class Memory(msgspec.Struct, kw_only=True):
    """Bytes. `peak_bytes` is the high-water mark of the process so far; None if the stack does not report it.

    `transient_bytes` is the peak tensor memory of a pass's last forward beyond weights, cache and outputs,
    including scratch memory kept between forwards; None if no forward was run.
    """

    weight_bytes: Amount
    cache_bytes: Amount
    peak_bytes: Amount | None
    transient_bytes: Amount | None = None
    page_faults: Number | None = None  # minor ones per timed forward, where they were counted


class Timing(msgspec.Struct, kw_only=True):
    """One more way in which a case was timed, in addition to the headline (eager, warm, host clock)."""

    mode: Literal["eager", "graph"]
    cache: Literal["warm", "cold"]  # cold: the last-level cache was flushed before every forward
    clock: str  # label of the clock, "host" or the device's own
    passes: Length
    check: Check
    latency_ms: Latency | None
    method: str = ""  # what was flushed, captured, excluded from the timed region or not timed at every step


class NewLengths(msgspec.Struct, kw_only=True):
    """Forwards on lengths that nothing had seen before, next to forwards whose lengths repeat.

    Milliseconds, medians. A schedule or a compiled kernel that is kept per tuple of lengths shows as a gap.
    """

    forwards: Positive
    ms: Milliseconds  # a forward on new lengths, its planning included
    repeated_ms: Milliseconds  # the same on lengths that were seen before
    plan_ms: Sample  # planning alone, new lengths
    repeated_plan_ms: Sample


class Planned(msgspec.Struct, kw_only=True):
    """What the workload asks of a case. `due` are the passes it was given: a slow yardstick gets fewer."""

    passes: Positive
    steps: Positive  # of a pass
    due: Positive


class Stage(msgspec.Struct, kw_only=True):
    """A part of one forward, timed alone between synchronizations: stages add up to more than a forward."""

    name: str
    ms: Sample  # median over forwards
    cost: Cost | None = None
    roofline: Roofline | None = None


class RankFacts(msgspec.Struct, kw_only=True):
    """One rank's part of a case. Times are milliseconds."""

    rank: Length
    samples: Annotated[list[Sample], Meta(min_length=1)]  # of its own clock, from the common start
    collective_ms: Sample  # of a forward, waiting for other ranks included
    collective_bytes: Amount  # that it sent in a forward
    cache_bytes: Amount
    weight_bytes: Amount
    cost: Cost | None = None  # of its own share of a forward, what the layout repeats included


class LinkLine(msgspec.Struct, kw_only=True):
    """What one kind of collective costs: see `mla.parallel.layout`."""

    collective: Literal["all-reduce", "all-gather", "all-to-all"]
    alpha_s: Annotated[float, Meta(ge=0, le=1e6)]  # seconds of a message without bytes
    beta: Rate | None  # bytes per second; None: bytes cost nothing

    @classmethod
    def of(cls, kind: Any, line: Line) -> LinkLine:
        """Return a line of a model as it is written."""
        return cls(collective=kind, alpha_s=line.alpha, beta=None if math.isinf(line.beta) else line.beta)

    def line(self) -> Line:
        """Return the line of the model."""
        return Line(self.alpha_s, math.inf if self.beta is None else self.beta)


class Spread(msgspec.Struct, kw_only=True):
    """How a case was spread over ranks: its samples are those of the slowest rank, forward by forward.

    Collectives were clocked in a pass of their own, with a wait for the device around each.

    Where it is `predicted`, ranks ran one after the other on one device: samples are those of the slowest
    share alone, and collectives, which a model of the link adds. Ranks that are alike have the same samples.
    """

    layout: str  # as in "tp=2,dcp=2"
    library: str  # that torch.distributed used
    ranks: Annotated[list[RankFacts], Meta(min_length=1)]
    predicted: bool = False
    timed_ranks: list[Length] = []  # of a prediction: those that were timed, each for all that are alike
    link: list[LinkLine] = []  # measured among the ranks; or what the prediction used: none for an ideal link
    link_source: str = ""  # where the link's numbers are from
    compute_ms: Sample | None = None  # of a prediction: the slowest share, median, without collectives


class Agreement(msgspec.Struct, kw_only=True):
    """Another implementation of the same scenario, weights and inputs, compared with this one."""

    implementation: str
    relative_difference: Number  # ||this - other|| / ||other|| over all outputs of a pass
    speed_ratio: Ratio | None  # how many times as fast this one is; None without both numbers


class Case(msgspec.Struct, kw_only=True):
    """One scenario run by one implementation. No latency when the check failed or nothing was timed."""

    scenario: str
    mode: Literal["prefill", "decode"]
    implementation: str
    query_lens: Annotated[list[Length], Meta(min_length=1)]
    history: Annotated[list[Length], Meta(min_length=1)]
    steps_per_pass: Positive
    passes: Length = 0
    warmups: Length = 0  # forwards run before timing, not counting the checked ones
    interleaved_with: list[str] = []
    check: Check
    latency_ms: Latency | None = None
    tokens_per_s: Throughput | None = None
    plan_ms: Sample | None = None  # prefill: planning the batch, outside the timed region
    switch_steps: list[Length] = []  # indices into samples of forwards that followed another implementation
    cost: Cost
    roofline: Roofline = msgspec.field(default_factory=Roofline)
    memory: Memory
    ops: dict[str, str] = {}
    agreement: list[Agreement] = []
    clock: str = "none"
    interrupted: bool = False
    repro: str
    base: str = ""  # the workload's scenario that a grid expands; `scenario` also names the point
    point: dict[str, Length | str] = {}  # axis -> value, for a point of a grid
    dtype: str = ""
    heads: Positive | None = None
    layers: Positive = 1  # latencies are per layer
    op: str | None = None  # one op of the contract alone, without the layer
    batch_spec: str | None = None  # what the lengths were given as, such as 4q8s2049_16q1s3072
    timings: list[Timing] = []
    launch_bound: bool | None = None  # the host takes longer to launch than the device to compute
    stages: list[Stage] = []
    device_state: list[dict[str, str]] = []  # sensors before and after the timed passes, if any
    settled: bool | None = None  # whether the warm-up saw latencies settle; None: there was none, or too few
    new_lengths: NewLengths | None = None
    planned: Planned | None = None  # `passes` and `steps_per_pass` are what was run
    op_remarks: dict[str, list[str]] = {}  # op -> what it said of how it ran, such as a smaller tile
    format_error: Number | None = None  # of what the cache gives back, relative; None where it is plain
    spread: Spread | None = None  # over several ranks; None: one device


class Ceiling(msgspec.Struct, kw_only=True):
    """The best the device reached on one kind of work; `lowest` is the lowest of repeated measurements."""

    work: Literal["read", "copy", "matmul"]
    value: Rate  # bytes per second, or FLOP per second
    source: str  # how it was measured, or where it is published
    dtype: str | None = None
    footprint_bytes: Amount | None = None
    lowest: Rate | None = None
    ours: bool = False  # our own op is the best known way: no judge from outside


class BackendFacts(msgspec.Struct, kw_only=True):
    """The backend and device that ran the cases."""

    name: str
    version: str | None
    device: str
    memory_bytes: Amount | None
    cache_bytes: Amount | None
    build: str | None = None  # of the program and the backend, see `build_digest`


class Plan(msgspec.Struct, kw_only=True):
    """What a run was asked for: `--resume` continues only the same plan."""

    options: list[str]  # as every `repro` repeats them
    scenarios: list[str]  # in the workload's order
    implementations: list[str]
    digest: str  # of the lengths and counts of all scenarios


class Run(msgspec.Struct, kw_only=True):
    """One invocation of the runner."""

    schema_version: Positive
    argv: list[str]
    created: str  # ISO 8601, UTC
    git_commit: str | None  # "-dirty" appended when the work tree had changes; None outside one
    backend: BackendFacts
    environment: dict[str, str]
    config: dict[str, Any]
    dtype: str
    attention: str
    page_size: Positive
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    cases: list[Case]
    ceilings: list[Ceiling] = []
    plan: Plan | None = None


class CeilingRun(msgspec.Struct, kw_only=True):
    """One invocation of `ceilings`."""

    report: Literal["ceilings"]
    schema_version: Positive
    argv: list[str]
    created: str  # ISO 8601, UTC
    git_commit: str | None
    backend: BackendFacts
    environment: dict[str, str]
    measured: list[Ceiling]
    declared: list[Ceiling]  # the backend's own peaks, with the source they are published in
    interrupted: bool = False

    def fraction(self, ceiling: Ceiling) -> float | None:
        """Return a measured ceiling over the declared peak of the same work; None if there is none.

        Bandwidths are declared for memory, so a footprint that fits the last-level cache has none.
        """
        if ceiling.work != "matmul" and (ceiling.footprint_bytes or 0) <= (self.backend.cache_bytes or 0):
            return None
        kind = ("matmul", ceiling.dtype) if ceiling.work == "matmul" else ("read", None)
        peak = next((peak for peak in self.declared if (peak.work, peak.dtype) == kind), None)
        return ceiling.value / peak.value if peak else None
