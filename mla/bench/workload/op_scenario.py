"""One op of the contract as a scenario: the lengths of its requests, and its role. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from mla.bench.workload.grid import Point, Value
from mla.bench.workload.scenario import Positive, Scenario
from mla.errors import UsageError, did_you_mean
from mla_backends.api import OPS

if TYPE_CHECKING:
    from mla.config import MLAConfig

# Roles whose work depends on the history; the others only see new tokens.
READS_HISTORY = frozenset({"kv_b_proj", "write_latent", "latent_attention", "expanded_attention"})
DEFAULT_BATCH, DEFAULT_HISTORY, DEFAULT_QUERY = 16, 1024, 1
# Axes that are not part of an op's shape and have no option of their own here.
_ELSEWHERE = ("dtype", "page_size")
# What an op takes over from the batch spec that it runs on.
_SHARED = ("query_lens", "history", "runs", "passes", "warmups", "batch_spec")
# Ops and roles that only layers with a query LoRA have.
QUERY_LORA = frozenset({"rms_norm", "q_a_layernorm", "q_b_proj"})


class OpScenario(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One op on one prepared batch: a pass is `runs` identical calls. `role` as in `mla.layer.ops`."""

    role: str  # before `expand`, also the name of an op, which means all of its roles
    mode: Literal["prefill", "decode"] = "prefill"
    passes: Positive = 10
    words: tuple[str, ...] = ()  # what chooses the lengths of a batch spec on the command line

    @property
    def op(self) -> str:
        """The role that is timed."""
        return self.role

    def expand(self, config: MLAConfig, kinds: Mapping[str, str]) -> list[Point]:
        """Return one scenario per role of the op. Raises `UsageError` for an op that this layer lacks."""
        return [_of_role(self, role, config) for role in roles_of(self.role, config, kinds, "--op takes")]

    @property
    def steps(self) -> int:
        """Number of calls in one pass."""
        return self.runs

    @property
    def rounds(self) -> int:
        """Number of timed passes."""
        return self.passes

    @property
    def selection(self) -> list[str]:
        """The command-line arguments that select this scenario."""
        words = ["--op", self.role, *(self.words or self._equal_lengths())]
        words += ["--heads", str(self.heads)] if self.heads else []
        return words + [word for name in _ELSEWHERE if name in self.point for word in self._axis(name)]

    def _equal_lengths(self) -> list[str]:
        words = ["--batch", str(len(self.query_lens)), "--q-len", str(self.query_lens[0])]
        return words + ["--kv", str(self.history[0])] * (self.role in READS_HISTORY)

    def _axis(self, name: str) -> list[str]:
        return ["-a", f"{name}={self.point[name]}"]


def op_scenario(
    op: str, batch: int | None, kv: int | None, q_len: int | None, heads: int | None
) -> OpScenario:
    """Return `batch` requests of `kv` cached and `q_len` new tokens; None is the default."""
    requests = DEFAULT_BATCH if batch is None else batch
    return OpScenario(
        name=op,
        base=op,
        role=op,
        query_lens=(DEFAULT_QUERY if q_len is None else q_len,) * requests,
        history=(DEFAULT_HISTORY if kv is None else kv,) * requests,
        heads=heads,
    )


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
    listed = isinstance(batch, Point)
    return OpScenario(
        name=f"{op} {batch.name}",
        base=batch.name,
        role=op,
        words=("--batch-spec" if listed else "--scenario", batch.name),
        heads=heads or batch.heads,
        axes={name: values for name, values in batch.axes.items() if heads is None or name != "heads"},
        **shared,
    )


def expand_ops(scenarios: Sequence[Point], config: MLAConfig, kinds: Mapping[str, str]) -> list[Point]:
    """Replace each op with its roles in a layer of `config`, named after their shape; keep other scenarios.

    `kinds`: role -> op. Raises `UsageError` for an op that is unknown or that this layer lacks.
    """
    expanded = [point for scenario in scenarios for point in scenario.expand(config, kinds)]
    names = [scenario.name for scenario in expanded]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"'{twice}' would be measured twice: it is unaffected by the axes you vary.")
    return expanded


def roles_of(op: str, config: MLAConfig, kinds: Mapping[str, str], takes: str, what: str = "op") -> list[str]:
    """Return the roles that the name of a role or an op stands for.

    `takes`: start of the list of names in the `UsageError` for an unknown one, which is called `what`.
    """
    if op in kinds:
        return [op]
    roles = [role for role, kind in kinds.items() if kind == op]
    if not roles and op in QUERY_LORA:
        raise UsageError(
            f"a layer of config '{config.name}' has no {op}, because it does not compress its queries: "
            "choose a config that does, such as --config deepseek-r1."
        )
    if not roles:
        known = list(dict.fromkeys([*OPS, *kinds]))
        raise UsageError(f"unknown {what} '{op}'.{did_you_mean(op, known)} {takes}: {', '.join(known)}.")
    return roles


def _of_role(scenario: OpScenario, role: str, config: MLAConfig) -> OpScenario:
    """Return the scenario for one role, without the values that do not affect it."""
    history = scenario.history
    if role not in READS_HISTORY and not scenario.batch_spec:
        history = (DEFAULT_HISTORY,) * len(history)
    point = _shape(scenario, role, config)
    shown = {name: value for name, value in point.items() if (name, value) != ("q_len", DEFAULT_QUERY)}
    base = f"{role} {scenario.base}" if scenario.batch_spec else role
    return msgspec.structs.replace(
        scenario,
        role=role,
        base=base,
        history=history,
        heads=scenario.heads if _has_heads(role, config) else None,
        point=point,
        name=" ".join([base, *(f"{name}={value}" for name, value in shown.items())]),
    )


def _shape(scenario: OpScenario, role: str, config: MLAConfig) -> dict[str, Value]:
    """Return axis -> value for everything a role depends on, except the lengths of a batch spec."""
    shape: dict[str, Value] = {}
    if not scenario.batch_spec:
        shape["batch"] = len(scenario.query_lens)
        if role in READS_HISTORY:
            shape["kv"] = scenario.history[0]
        shape["q_len"] = scenario.query_lens[0]
    if _has_heads(role, config):
        shape["heads"] = scenario.heads or config.num_attention_heads
    return shape | {name: scenario.point[name] for name in _ELSEWHERE if name in scenario.point}


def _has_heads(role: str, config: MLAConfig) -> bool:
    """Return whether a role's shape depends on the head count."""
    return role not in ("q_a_layernorm", "write_latent") and not (role == "qkv_a_proj" and config.q_lora_rank)
