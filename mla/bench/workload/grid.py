"""Points to run: a grid over scenarios, batch specs such as 16q1s4k, and single ops. Needs no torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mla.bench.workload.scenario import (
    MAX_COUNT,
    MAX_REQUESTS,
    UNITS,
    Positive,
    Scenario,
    check_lengths,
    repeated,
)
from mla.errors import UsageError, unknown
from mla.text import named_dtype
from mla_backends.api import OPS
from mla_backends.outside import shortened

if TYPE_CHECKING:
    from mla.config import MLAConfig

Value = int | str
Axes = dict[str, tuple[Value, ...]]

# More points are a typo, or should be several runs.
MAX_POINTS = 1000
# How selected tokens lie among those of a request: anywhere, last, in runs, or where scores tie.
SELECTIONS = ("random", "recent", "clustered", "tied")


def _format(item: str) -> str:
    from mla.cache.formats import find_format  # needs torch

    return find_format(item).name


def _index_format(item: str) -> str:
    from mla.cache.formats import INDEX_FORMATS  # needs torch

    return _one_of("index format", item, ("plain", *INDEX_FORMATS))


def _one_of(what: str, item: str, known: Sequence[str]) -> str:
    if item not in known:
        raise UsageError(unknown(what, item, known))
    return item


# Axis -> smallest and largest value, or what reads its names.
LENGTHS = {"batch": (1, MAX_REQUESTS), "kv": (0, MAX_COUNT), "q_len": (1, MAX_COUNT)}  # batch specs say these
AXES: dict[str, tuple[int, int] | Callable[[str], str]] = {
    **LENGTHS,
    "heads": (1, MAX_COUNT),
    "dtype": named_dtype,
    "page_size": (1, MAX_COUNT),
    "cache_format": _format,
    "index_format": _index_format,
    "topk": (1, MAX_COUNT),
    "selection": lambda item: _one_of("selection", item, SELECTIONS),
}
# Those that override what a run or a config says, each a field of `Point`; one of them may have an option.
OVERRIDES = tuple(AXES)[len(LENGTHS) + 1 :]


class Point(Scenario, frozen=True, kw_only=True):
    """A scenario to run: the workload's own, or one point of the grid over it."""

    base: str  # name of the workload's scenario
    point: dict[str, Value] = {}  # noqa: RUF012  # msgspec copies it
    dtype: str | None = None  # overrides the run's
    page_size: int | None = None  # overrides the run's
    cache_format: str | None = None  # of the latent cache; None: numbers of the dtype
    index_format: str | None = None  # of the index keys; None and "plain": numbers of the dtype
    topk: int | None = None  # tokens that each query of one op selects, in place of the config's
    selection: str | None = None  # how these lie, one of `SELECTIONS`
    source: str = "--scenario"  # the option that names `base`

    @property
    def op(self) -> str | None:
        """The role of the op that is timed alone; None: the whole layer."""
        return None

    @property
    def arguments(self) -> list[str]:
        """The command-line arguments that select this point alone."""
        return [self.source, self.base, *_words(self.point)]


def _words(axes: Mapping[str, Value]) -> list[str]:
    return [word for name, value in axes.items() for word in ("-a", f"{name}={value}")]


# ---------------------------------------------------------------------------------------------- axes

_NUMBER = r"(\d{1,12}[kKmM]?)"
_NUMBERS = re.compile(rf"{_NUMBER}(?:\.\.{_NUMBER}([*+]){_NUMBER})?")


def parse(words: Sequence[str]) -> Axes:
    """Read "kv=1k..64k*4" and the like. Raises `UsageError`."""
    axes: Axes = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"-a takes AXIS=VALUES, such as kv=1k..64k*4, got '{word}'.")
        if name in axes:
            raise UsageError(f"axis '{name}' is given twice: list all of its values in one -a.")
        axes[name] = _values(name, text)
    return axes


def _values(axis: str, text: str) -> tuple[Value, ...]:
    if axis not in AXES:
        raise UsageError(unknown("axis", axis, list(AXES)))
    kind = AXES[axis]
    values: list[Value] = []
    for item in map(str.strip, text.split(",")):
        values += (
            [kind(item)] if callable(kind) else itertools.islice(_numbers(axis, item, *kind), MAX_POINTS + 1)
        )
        if len(values) > MAX_POINTS:
            raise UsageError(f"axis {axis}: '{item}' exceeds {MAX_POINTS} values: give fewer.")
    return tuple(dict.fromkeys(values))


def _numbers(axis: str, item: str, low: int, high: int) -> Iterator[int]:
    """Yield the number, or those of the range; as soon as one is not allowed, raise `UsageError`."""
    match = _NUMBERS.fullmatch(item)
    if match is None:
        raise UsageError(
            f"axis {axis}: '{item}' is neither a number, such as 4k, nor a range, such as 1k..64k*4 or "
            "1..8+1."
        )
    value, last, by = map(_number, (match[1], match[2] or match[1], match[4] or "1"))
    times = match[3] == "*"
    if value > last or by < 1 or (times and (by < 2 or value < 1)):
        raise UsageError(f"axis {axis}: the range '{item}' does not ascend: write 1..8+1 or 1..8*2.")
    while value <= last:
        if not low <= value <= high:
            raise UsageError(f"axis {axis}: {value} is not between {low} and {high}.")
        if axis == "page_size" and value & (value - 1):
            raise UsageError(f"axis {axis}: {value} is not a power of two.")
        yield value
        value = value * by if times else value + by


def _number(text: str) -> int:
    digits = text.rstrip("kKmM")
    return int(digits) * UNITS[text[len(digits) :].lower()]


def points_of(scenarios: Sequence[Scenario], axes: Axes) -> list[Point]:
    """Return every point, scenario by scenario; the first axis varies slowest. Raises `UsageError`.

    Command-line axes replace a scenario's own axes of the same name.
    """
    grids = [(scenario, {**_own_axes(scenario), **axes}) for scenario in scenarios]
    count = sum(math.prod(map(len, grid.values())) for _, grid in grids)
    if count > MAX_POINTS:
        raise UsageError(
            f"these axes make {count} points, but a run has at most {MAX_POINTS}: give fewer values."
        )
    points = [
        _point(scenario, dict(zip(grid, values, strict=True)))
        for scenario, grid in grids
        for values in itertools.product(*grid.values())
    ]
    if twice := repeated(point.name for point in points):
        raise UsageError(f"two points are named '{twice}': rename the scenario of that name.")
    return points


def _own_axes(scenario: Scenario) -> Axes:
    lists = {name: value if isinstance(value, list) else [value] for name, value in scenario.axes.items()}
    try:
        return {name: _values(name, ",".join(map(str, values))) for name, values in lists.items()}
    except (UsageError, ValueError) as error:
        raise UsageError(f"scenario '{scenario.name}': {shortened(str(error), 400)}") from error


def _point(scenario: Scenario, values: Mapping[str, Any]) -> Point:
    """Return the scenario at one point: requests repeated or truncated to `batch`, with the given lengths."""
    axis = next((name for name in LENGTHS if name in values), None)
    if scenario.batch_spec and axis:
        raise UsageError(
            f"axis {axis}: the lengths of '{scenario.name}' come from a batch spec: list a spec for each "
            f"value of {axis}, or use the axes heads, {', '.join(OVERRIDES[:-1])} and {OVERRIDES[-1]}."
        )
    count = values.get("batch", len(scenario.query_lens))
    lengths = itertools.cycle(zip(scenario.query_lens, scenario.history, strict=True))
    requests = list(itertools.islice(lengths, count))
    changes = {
        "query_lens": tuple(values.get("q_len", new) for new, _ in requests),
        "history": tuple(values.get("kv", past) for _, past in requests),
        "heads": values.get("heads", scenario.heads),
        **{name: values.get(name) for name in OVERRIDES},
        "axes": {},
        "point": dict(values),
        "name": " ".join([scenario.name, *(f"{name}={value}" for name, value in values.items())]),
    }
    if not isinstance(scenario, Point):
        scenario = Point(base=scenario.name, **msgspec.structs.asdict(scenario))
    point = msgspec.structs.replace(scenario, **changes)
    check_lengths(f"scenario '{point.name}'", point)
    return point


# ------------------------------------------------------------------------------------------ batch specs
# The grammar of benchmarks/attention_benchmarks/batch_spec.py of github.com/vllm-project/vllm at 04028200.

FORM = "[COUNT]qLEN[k][sLEN[k]], such as 16q1s4k"
_DIGITS = "[0-9]{1,20}"
_SEGMENT = re.compile(rf"({_DIGITS})?q({_DIGITS})(k?)(?:s({_DIGITS})(k?))?")
PASSES = 10  # over which the 100 forwards of a spec on the command line are spread, as those of a prefill


def parse_batch_spec(spec: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the new tokens and the history of each request of, say, 4q8s2049_16q1s3072.

    Segments [COUNT]qLEN[k][sLEN[k]] are joined with "_": COUNT requests (one without) with q new tokens each.
    s counts *all* tokens of a request, the new ones included; without it there is no history. k is 1024.
    Raises ValueError, which names the place.
    """
    query_lens: list[int] = []
    history: list[int] = []
    place = 1
    for number, segment in enumerate(spec.split("_"), 1):
        try:
            count, new, total = _segment(segment)
            if len(query_lens) + count > MAX_REQUESTS:
                raise ValueError(f"makes more than {MAX_REQUESTS} requests")
        except ValueError as error:
            where = f"segment {number}, '{shortened(segment)}' (character {place}),"
            raise ValueError(f"batch spec '{shortened(spec)}': {where} {error}") from None
        query_lens += [new] * count
        history += [total - new] * count
        place += len(segment) + 1
    return tuple(query_lens), tuple(history)


def _segment(text: str) -> tuple[int, int, int]:
    """Return count, new tokens and all tokens of a segment. Raises ValueError, without a subject."""
    match = _SEGMENT.fullmatch(text)
    if match is None:
        hint = " (q, s and k are lower-case)" if _SEGMENT.fullmatch(text.lower()) else ""
        raise ValueError(f"is not {FORM}{hint}")
    count = int(match[1] or 1)
    new = int(match[2]) * UNITS[match[3]]
    total = int(match[4]) * UNITS[match[5]] if match[4] else new
    faults = {
        "has no requests: count from 1": count < 1,
        "has no new tokens: count from 1": new < 1,
        f"has s{total} for q{new}: s counts all tokens of a request, the new ones included": total < new,
        f"has a request of more than {MAX_COUNT} tokens": total > MAX_COUNT,
    }
    for fault, present in faults.items():
        if present:
            raise ValueError(fault)
    return count, new, total


def batch_scenarios(words: Iterable[str]) -> list[Point]:
    """Return a scenario for each spec in comma-separated lists. Raises `UsageError`."""
    specs = [spec for word in words for spec in re.split(r"\s*,\s*|\s+", word.strip())]
    if not all(specs):
        raise UsageError(f"--batch-spec takes specs of the form {FORM}, comma-separated; one is empty.")
    if twice := repeated(specs):
        raise UsageError(f"--batch-spec lists '{twice}' twice: it is measured once.")
    try:
        lengths = list(map(parse_batch_spec, specs))
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    shared: dict[str, Any] = {"mode": "prefill", "passes": PASSES, "source": "--batch-spec"}
    return [
        Point(name=spec, base=spec, batch_spec=spec, query_lens=new, history=past, **shared)
        for spec, (new, past) in zip(specs, lengths, strict=True)
    ]


# ------------------------------------------------------------------------------------ one op of the contract

# Roles that only a layer with an indexer has.
SPARSE = ("write_index_key", "select_latents", "sparse_latent_attention")
# Roles whose work depends on the history; the others only see new tokens.
READS_HISTORY = frozenset({"kv_b_proj", "write_latent", "latent_attention", "expanded_attention", *SPARSE})
# Axis -> the only roles that it affects.
AFFECTED = {
    "cache_format": frozenset({"write_latent", "latent_attention", "sparse_latent_attention"}),
    "index_format": frozenset(SPARSE[:2]),
    "topk": frozenset(SPARSE[1:]),
    "selection": frozenset(SPARSE[1:]),
}
# Roles without a head count, beside the joined projection: an indexer has heads of its own.
_HEADLESS = ("q_a_layernorm", "write_latent", *SPARSE[:2])
DEFAULT_BATCH, DEFAULT_HISTORY, DEFAULT_QUERY = 16, 1024, 1
SPARSE_HISTORY = 8192  # the default of an op that selects: beyond what published models select
# What an op takes over from the batch spec that it runs on.
_SHARED = ("query_lens", "history", "runs", "passes", "warmups", "batch_spec")
# Ops and roles that not all layers have -> why a layer lacks them, and a preset that does not.
_NO_LORA = ("it does not compress its queries", "deepseek-r1")
LACKED = {"rms_norm": _NO_LORA, "q_a_layernorm": _NO_LORA, "q_b_proj": _NO_LORA}
LACKED["g_proj"] = ("it has no output gate", "kimi-k3")
LACKED["rotate_query"] = ("it has no rotary channels", "deepseek-r1")
LACKED |= dict.fromkeys(SPARSE, ("it has no indexer", "deepseek-v3.2"))


class OpScenario(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One op on one prepared batch: a pass is `runs` identical calls. `role` as in `mla.layer.ops`."""

    role: str  # before `expand_ops`, also names of ops, comma-separated, each of which means all of its roles
    mode: Literal["prefill", "decode"] = "prefill"
    passes: Positive = 10
    batch: str = ""  # name of the scenario whose lengths it takes; "": its own

    @property
    def op(self) -> str:
        """The role that is timed."""
        return self.role

    @property
    def steps(self) -> int:
        """Number of calls in one pass."""
        return self.runs

    @property
    def rounds(self) -> int:
        """Number of timed passes."""
        return self.passes

    @property
    def arguments(self) -> list[str]:
        """The command-line arguments that select this scenario."""
        lengths = ["--batch", str(len(self.query_lens)), "--q-len", str(self.query_lens[0])]
        lengths += ["--kv", str(self.history[0])] * (self.role in READS_HISTORY)
        words = ["--op", self.role, *([self.source, self.batch] if self.batch else lengths)]
        words += ["--heads", str(self.heads)] if self.heads else []
        return words + _words({name: self.point[name] for name in OVERRIDES if name in self.point})


def ops_of(words: str) -> list[str]:
    """Return the ops of a comma-separated list."""
    return [op.strip() for op in words.split(",")]


def op_scenario(
    op: str, batch: int | None, kv: int | None, q_len: int | None, heads: int | None
) -> OpScenario:
    """Return `batch` requests of `kv` cached and `q_len` new tokens; None is the default."""
    requests = DEFAULT_BATCH if batch is None else batch
    if kv is None:
        kv = DEFAULT_HISTORY if set(SPARSE).isdisjoint(ops_of(op)) else SPARSE_HISTORY
    new, past = (q_len or DEFAULT_QUERY,) * requests, (kv,) * requests
    return OpScenario(name=op, base=op, role=op, query_lens=new, history=past, heads=heads)


def op_of_batch(op: str, batch: Scenario, heads: int | None) -> OpScenario:
    """Return one op on the lengths of a batch spec, with `heads` instead of the scenario's if they are given.

    Raises `UsageError` for a scenario that is no batch spec, or that has several layers.
    """
    if batch.batch_spec is None:
        raise UsageError(
            f"--op takes the lengths of batch specs, and scenario '{batch.name}' has none: give the op's own "
            "with --batch, --kv and --q-len, or with --batch-spec."
        )
    if batch.layers > 1:
        raise UsageError(
            f"scenario '{batch.name}' has layers = {batch.layers}, and {op} is timed alone: leave one out."
        )
    shared = {name: getattr(batch, name) for name in _SHARED}
    return OpScenario(
        name=f"{op} {batch.name}",
        base=batch.name,
        role=op,
        batch=batch.name,
        source=batch.source if isinstance(batch, Point) else "--scenario",
        heads=heads or batch.heads,
        axes={name: values for name, values in batch.axes.items() if heads is None or name != "heads"},
        **shared,
    )


def expand_ops(scenarios: Sequence[Point], config: MLAConfig, kinds: Mapping[str, str]) -> list[Point]:
    """Replace each op with its roles in a layer of `config`, named after their shape; keep other scenarios.

    One that an axis of other roles leaves as it is comes once. `kinds`: role -> op. Raises `UsageError` for
    an op that is unknown or that this layer lacks.
    """
    expanded: list[Point] = []
    for scenario in scenarios:
        if not isinstance(scenario, OpScenario):
            expanded.append(scenario)
            continue
        roles = [roles_of(op, config, kinds, "--op takes") for op in ops_of(scenario.role)]
        for role in itertools.chain(*roles):
            point = _of_role(scenario, role, config)
            idle = any(getattr(point, axis) and role not in affected for axis, affected in AFFECTED.items())
            if not idle or all(point.name != other.name for other in expanded):
                expanded.append(point)
    if twice := repeated(scenario.name for scenario in expanded):
        raise UsageError(f"'{twice}' would be measured twice: it is unaffected by the axes you vary.")
    return expanded


def roles_of(op: str, config: MLAConfig, kinds: Mapping[str, str], takes: str, what: str = "op") -> list[str]:
    """Return the roles that the name of a role or an op stands for.

    `takes`: start of the list of names in the `UsageError` for an unknown one, which is called `what`.
    """
    idle = op == "rotate_query" and not config.qk_rope_head_dim
    roles = [] if idle else [op] if op in kinds else [role for role, kind in kinds.items() if kind == op]
    if not roles and op in LACKED:
        why, preset = LACKED[op]
        raise UsageError(
            f"a layer of config '{config.name}' has no {op}, because {why}: "
            f"choose a config that does, such as --config {preset}."
        )
    if not roles:
        raise UsageError(unknown(what, op, list(dict.fromkeys([*OPS, *kinds])), takes))
    return roles


def _of_role(scenario: OpScenario, role: str, config: MLAConfig) -> OpScenario:
    """Return the scenario for one role, without the values that do not affect it, named after the others.

    A batch spec names its lengths.
    """
    history, spec = scenario.history, scenario.batch_spec
    shape: dict[str, Value] = {}
    if not spec:
        if role not in READS_HISTORY:
            history = (DEFAULT_HISTORY,) * len(history)
        shape["batch"] = len(history)
        shape |= {"kv": history[0]} if role in READS_HISTORY else {}
        shape["q_len"] = scenario.query_lens[0]
    has_heads = role not in _HEADLESS and not (role == "qkv_a_proj" and config.q_lora_rank)
    if has_heads:
        shape["heads"] = scenario.heads or config.num_attention_heads
    affects = [name for name in OVERRIDES if role in AFFECTED.get(name, (role,))]
    shape |= {name: scenario.point[name] for name in affects if name in scenario.point}
    base = f"{role} {scenario.base}" if spec else role
    shown = [f"{name}={value}" for name, value in shape.items() if (name, value) != ("q_len", DEFAULT_QUERY)]
    return msgspec.structs.replace(
        scenario,
        role=role,
        base=base,
        history=history,
        heads=scenario.heads if has_heads else None,
        point=shape,
        name=" ".join([base, *shown]),
    )
