"""What all implementations of a run share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mla.bench.workload.grid import Point, roles_of
from mla.bench.workload.implementations import EVERY, Named, parse_one
from mla.bench.workload.scenario import Scenario
from mla.cache.formats import Codec, IndexFp8, codec_of, index_codec, stored_format, stored_index_format
from mla.command.console import note, note_once
from mla.config import MLAConfig
from mla.errors import UnsupportedOps, UsageError
from mla.layer.ops import Ops, layer_roles, refusals
from mla.layer.packed_weights import SharedWeights
from mla.parallel.layout import Layout
from mla.verify.layer_oracle import State
from mla_backends.api import Backend

# Of layer 0, 1, ...: one state dict for each, shared by the implementations of one scenario.
ScenarioWeights = defaultdict[int, SharedWeights]

# Pages beyond what a scenario needs; they stay NaN, so that reading a wrong page shows.
SPARE_PAGES = 16

TAKES = "mla[ROLE=OP] takes as ROLE"  # what a wrong role is answered with


class Ranks(ABC):
    """The ranks of a run, of which every one has a part of the layer."""

    layout: Layout
    beside = 0  # further ranks that share this process's host
    assumed = ""  # what stands for ranks that are not there

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @abstractmethod
    def layer(self, setting: Setting, state: State, name: str, ops: str | None) -> Any:
        """Return the implementation that has all ranks do their part."""

    def timed(self, scenario: Scenario) -> list[int]:
        """Return the ranks that run one after the other on this device; none where each has its own."""
        return []

    def checker(self, setting: Setting, state: State, inputs: Any, beat: Callable[[], None]) -> Any:
        """Return what judges ranks on this device, each alone; None where their outputs are judged together.

        `inputs`: those of the scenario. `beat` is called after every forward of the reference.
        """
        return None

    def leave(self, reason: str, code: int) -> None:  # noqa: B027  # nobody else is there
        """Tell other ranks why this one ends, unless they know."""

    def behind(self) -> str:
        """Name the ranks that keep the others waiting; "" if none does."""
        return ""

    def when_lost(self, die: Callable[[Any], None]) -> None:  # noqa: B027
        """Have `die` end this process if another rank is lost while this one does something else."""


@dataclass(frozen=True)
class Setting:
    """What all implementations of a run share."""

    config: MLAConfig
    backend: Backend
    dtype: torch.dtype
    attention: str
    page_size: int
    seed: int
    ops: str = "auto"  # policy of `mla.layer.ops.choose`, for the implementation `mla`
    layers: int = 1
    overrides: tuple[tuple[str, str], ...] = ()  # role -> op, before the policy
    cache_format: str | None = None  # None: numbers of the dtype
    index_format: str | None = None  # of index keys; None: numbers of the dtype
    # Torch's host threads once the backend was set up, before an op ran: a plugin's code may change them.
    threads: int = field(default_factory=torch.get_num_threads, compare=False)
    weights: ScenarioWeights | None = field(default=None, compare=False, repr=False)
    ranks: Ranks | None = field(default=None, compare=False, repr=False)  # None: one device

    @property
    def codec(self) -> Codec | None:
        """What encodes the cache; None where it is plain. Raises `CacheFormatError`."""
        stored = stored_format(self.cache_format, self.dtype)
        return codec_of(stored, self.config.kv_lora_rank, self.config.qk_rope_head_dim)

    @property
    def index_codec(self) -> IndexFp8 | None:
        """What encodes index keys; None where they are plain."""
        return index_codec(stored_index_format(self.index_format), self.config.index_head_dim)

    @property
    def is_judged_after(self) -> bool:
        """Whether the truth of a forward depends on what it left in memory: a selection, or codes."""
        return bool(self.config.index_n_heads) or self.codec is not None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the cache of a layer."""
        codec = self.codec
        return codec.token_bytes if codec else self.config.latent_dim * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of a token in the index cache of a layer; 0 without an indexer."""
        if not self.config.index_n_heads:
            return 0
        codec = self.index_codec
        return codec.token_bytes if codec else self.config.index_head_dim * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """The device `setup` returned."""
        assert self.backend.device is not None
        return self.backend.device


def scenario_setting(setting: Setting, scenario: Point) -> Setting:
    """Return the setting a scenario runs in: with its own heads, top-k, dtype, page size and cache format."""
    config = setting.config.with_heads(scenario.heads) if scenario.heads else setting.config
    return replace(
        setting,
        config=replace(config, index_topk=scenario.topk) if scenario.topk else config,
        dtype=getattr(torch, scenario.dtype) if scenario.dtype else setting.dtype,
        page_size=scenario.page_size or setting.page_size,
        cache_format=scenario.cache_format,
        index_format=scenario.index_format,
        layers=scenario.layers,
    )


def implementation_setting(setting: Setting, named: Named) -> Setting:
    """Return the setting in which an implementation of ours is built: with its own policy and ops.

    Raises `UsageError` for a role that the layer lacks.
    """
    roles = layer_roles(setting.config, setting.dtype, setting.device)
    kinds = {role: kind for role, (kind, _) in roles.items()}
    single = [(key, op) for key, op in named.ops if key in kinds]
    whole = [pair for pair in named.ops if pair not in single]
    overrides = {
        role: op
        for key, op in [*whole, *single]  # a role says more than its kind
        for role in roles_of(key, setting.config, kinds, TAKES, "role")
    }
    policy = "reference" if named.base == "mla-reference" else setting.ops
    return replace(setting, ops=policy, overrides=tuple(overrides.items()))


def with_each_op(
    settings: Sequence[Setting], name: str, timed: Collection[str | None] = (None,)
) -> list[str]:
    """Return the names that `mla[ROLE=*]` stands for, one for each op that serves the role; else the name.

    `settings`: of the scenarios, in all of which an op must run, in every role that it stands for and that is
    `timed` (None: the whole layer). Others are named on stderr. Raises `UnsupportedOps` where none does, and
    `UsageError`.
    """
    named = parse_one(name)
    anything = [role for role, op in named.ops if op == EVERY]
    if not anything:
        return [name]
    if len(anything) > 1:
        raise UsageError(f"'{name}': one role takes `{EVERY}`; give the others an op.")
    specs: dict[Any, None] = {}  # in the order of scenarios
    for setting in settings:
        of = setting.config, setting.dtype, setting.device, 1, setting.cache_format, setting.index_format
        roles = layer_roles(*of)
        kinds = {role: kind for role, (kind, _) in roles.items()}
        for role in roles_of(anything[0], setting.config, kinds, TAKES, "role"):
            kind, spec = roles[role]
            if {role, None} & set(timed):
                specs[spec] = None
    serving, reasons = [], []
    for op_name, op in settings[0].backend.ops().items():
        if op.contract.partition("/")[0] != kind:
            continue
        if why := next(filter(None, (refusals(op_name, op, kind, spec, note) for spec in specs)), None):
            reasons.append(f"{op_name} is left out: {'; '.join(why)}")
        else:
            serving.append(op_name)
    if not serving:
        raise UnsupportedOps(f"no {kind} op runs here: {'; '.join(reasons) or 'none is offered'}.")
    for reason in reasons:
        note(reason)
    return [
        str(replace(named, ops=tuple(sorted({**dict(named.ops), anything[0]: op}.items())))) for op in serving
    ]


def make_ops(setting: Setting, role: str | None = None) -> Ops:
    """Return the ops that a layer of this setting chooses, or that of one role alone.

    What they compile is said on stderr before, and what they say of themselves afterwards.
    """
    offered, overrides = setting.backend.ops(), dict(setting.overrides)
    of = (setting.config, offered, setting.dtype, setting.device, setting.ops, overrides, note, role)
    ops = Ops(*of, cache_format=setting.cache_format, index_format=setting.index_format)
    say_remarks(ops.remarks())
    return ops


def say_remarks(remarks: Mapping[str, Sequence[str]]) -> None:
    """Say on stderr what ops say of how they run here, by their names; once in a process."""
    for name, sentences in remarks.items():
        for sentence in sentences:
            note_once(f"{name}: {sentence}")
