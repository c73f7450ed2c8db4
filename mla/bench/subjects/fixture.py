"""What a scenario runs on: the layer, or one op of it, behind one interface.

A fixture is cheap to make: its needs follow from lengths alone. Inputs, weights and the float64 oracle are
made at first use and shared by all implementations.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from mla.bench import results
from mla.bench.subjects import op as one_op
from mla.bench.subjects.base import METHODS, Foreign, Implementation, LayerChecker, called
from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.selected import TakenChecker
from mla.bench.subjects.setting import Setting, implementation_setting, make_ops
from mla.bench.subjects.transformers_layer import TransformersLayer
from mla.bench.workload.grid import Point
from mla.bench.workload.implementations import parse_one
from mla.cases.varied import Pool
from mla.checkpoint import LazyState
from mla.cost import Work, step_work
from mla.errors import UnsupportedBatch, UsageError, unknown
from mla.layer.ops import Ops
from mla.layer.plan import check_lengths
from mla.verify.layer_oracle import Held, State, TrueLayer
from mla.verify.selected import SelectionJudge
from mla.weights import random_state_dict
from mla_backends.errors import describe

# Name -> how to build it. Others are named by where their class is.
IMPLEMENTATIONS: dict[str, Callable[[Setting, State], Implementation]] = {
    "mla": lambda setting, state: _ours(setting, state, "mla", None),
    "mla-reference": lambda setting, state: _ours(setting, state, "mla-reference", "reference"),
    "transformers": TransformersLayer,
    "transformers-eager": lambda setting, state: TransformersLayer(setting, state, "eager"),
}


def _ours(setting: Setting, state: State, name: str, ops: str | None) -> Implementation:
    if setting.ranks is not None:
        return setting.ranks.layer(setting, state, name, ops)
    return MlaLayer(setting, state, name, ops)


def check_name(base: str) -> None:
    """Raise `UsageError` for a name that no implementation has; `package.module:Class` is imported."""
    if ":" in base:
        foreign_class(base)
    elif base not in IMPLEMENTATIONS:
        raise UsageError(unknown("implementation", base, list(IMPLEMENTATIONS), "There are"))


def foreign_class(path: str) -> Any:
    """Return the class that `package.module:Class` names. Raises `UsageError`."""
    module, _, name = path.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything
        raise UsageError(f"--implementations: '{path}' cannot be imported: {describe(error)}.") from error
    lacking = [method for method in METHODS if not callable(getattr(made, method, None))]
    if lacking:
        raise UsageError(
            f"--implementations: '{path}' lacks {', '.join(lacking)} (an implementation has {len(METHODS)} "
            f"methods: {', '.join(METHODS)})."
        )
    return made


def _make(base: str, setting: Setting, state: State) -> Implementation:
    """Return an implementation by the name of what it is, or by where its class is."""
    if ":" not in base:
        return IMPLEMENTATIONS[base](setting, state)
    made = called(base, foreign_class(base), setting, state)
    return made if isinstance(made, Implementation) else Foreign(setting, made, base)


class Fixture(ABC):
    """Inputs, oracle, implementations and work of one scenario."""

    op: str | None = None  # the role that is measured; None is the layer

    def __init__(self, setting: Setting, point: Point) -> None:
        """`setting`: that of the scenario, with its own heads, dtype and layers."""
        self.setting, self.point = setting, point

    @property
    def prepared(self) -> bool:
        """Whether anything large was made."""
        return "inputs" in vars(self)

    @cached_property
    def inputs(self) -> Any:
        """What `Implementation.load` takes."""
        raise NotImplementedError

    @cached_property
    def checker(self) -> Any:
        """What `Implementation.check` takes: with the oracle, which may take minutes."""
        raise NotImplementedError

    def prepare(self) -> tuple[Any, Any]:
        """Return what `Implementation.load` and `Implementation.check` take, made once."""
        return self.inputs, self.checker

    @abstractmethod
    def build(self, name: str) -> Implementation:
        """Return an implementation by name."""

    @abstractmethod
    def cost(self, steps: int | None = None) -> results.Cost:
        """Return the work of one forward: its mean over a pass, or so many first `steps` of it, per layer."""

    def ops(self, name: str) -> Ops:
        """Return the ops of an implementation of ours. Raises `UsageError` or `UnsupportedOps`."""
        return make_ops(implementation_setting(self.setting, parse_one(name)), self.op)

    def refusal(self, name: str) -> str:
        """Return why an op of an implementation of ours refuses the scenario's lengths; "" if none does."""
        try:
            self._check_lengths(self.ops(name))
        except UnsupportedBatch as error:
            return str(error)
        except Exception:  # noqa: BLE001  # what a plugin raises is told when the scenario runs
            return ""
        return ""

    @abstractmethod
    def _check_lengths(self, ops: Ops) -> None:
        """Raise `UnsupportedBatch`."""

    def repeated_as(self, name: str) -> str:
        """Return the implementation that runs what `name` runs here when nothing else does."""
        return name


def layer_checker(
    setting: Setting,
    state: State,
    inputs: Inputs,
    make_reference: Callable[[], MlaLayer],
    beat: Callable[[], None],
    held: Held | None = None,
) -> LayerChecker | TakenChecker:
    """Return what judges a layer with these weights, which attends the positions that are `held`.

    `make_reference` returns the loaded layer whose error bounds that of fused ops; it runs once, if it is
    needed, with `beat` after every forward.
    """
    config, dtype, codecs = setting.config, setting.dtype, (setting.codec, setting.index_codec)
    if setting.is_judged_after:
        judge = SelectionJudge(TrueLayer(config, state), dtype, *codecs, held)
        return TakenChecker(judge, inputs.stored(*codecs), make_reference)

    def reference_outputs() -> torch.Tensor:
        reference, outputs = make_reference(), list[torch.Tensor]()
        for index in range(inputs.scenario.inputs):
            reference.before(index)
            reference.step(index)
            outputs.append(reference.out[0].cpu())
            reference.after(index)
            beat()
        return torch.stack(outputs)

    return LayerChecker(config, state, inputs, dtype, reference_outputs, held)


class LayerFixture(Fixture):
    """The whole layer, on random weights or those of a checkpoint (`state`)."""

    def __init__(
        self, setting: Setting, point: Point, state: State | None, after_forward: Callable[[], None]
    ) -> None:
        super().__init__(replace(setting, weights=defaultdict(WeakValueDictionary)), point)
        self._given, self._after_forward = state, after_forward

    @cached_property
    def weights(self) -> State:
        """The layer's weights, by their Hugging Face names."""
        if self._given is None:
            return random_state_dict(self.setting.config, self.setting.seed, self.setting.dtype)
        if isinstance(self._given, LazyState):  # of which a rank reads its part, and rounds that
            return self._given
        return {name: weight.to(self.setting.dtype) for name, weight in self._given.items()}

    @cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.setting.config, self.point, self.setting.seed, self.setting.dtype)

    @cached_property
    def checker(self) -> Any:
        setting, state, beat = self.setting, self.weights, self._after_forward
        if setting.ranks is not None and (made := setting.ranks.checker(setting, state, self.inputs, beat)):
            return made
        return layer_checker(setting, state, self.inputs, self._reference, beat)

    def _reference(self) -> MlaLayer:
        reference = MlaLayer(replace(self.setting, layers=1), self.weights, "mla-reference", "reference")
        reference.load(self.point, self.inputs)
        return reference

    def build(self, name: str) -> Implementation:
        named = parse_one(name)
        if self.setting.cache_format is not None and named.base not in ("mla", "mla-reference"):
            raise UsageError(f"{name} has a cache of its own, without formats: leave cache_format out.")
        made = _make(named.base, implementation_setting(self.setting, named), self.weights)
        made.name = name
        return made

    def cost(self, steps: int | None = None) -> results.Cost:
        """Return the mean work of the first forwards of a pass, counted for our layer's paths."""
        setting, point = self.setting, self.point
        count = min(point.inputs, steps or point.inputs)
        lengths = [(point.query_lens, point.kv_lens(step)) for step in range(count)]
        cached = setting.token_bytes, setting.index_bytes
        size, path = setting.dtype.itemsize, setting.attention
        layers = range(point.layers if setting.config.indexer_types else 1)  # else all are alike
        works = [
            step_work(setting.config.of_layer(layer), *each, size, path, *cached)
            for layer in layers
            for each in lengths
        ]
        flops, moved = (round(total / len(works)) for total in sum(works, Work()))
        return results.Cost(flops=flops, bytes=moved)

    def _check_lengths(self, ops: Ops) -> None:
        point, setting = self.point, self.setting
        for step in {0, point.inputs - 1}:  # lengths grow in between
            lengths = (point.query_lens, point.kv_lens(step))
            check_lengths(setting.config, ops, *lengths, setting.page_size, setting.attention)


class OpFixture(Fixture):
    """One op of the layer alone. Its reference runs on the host."""

    op: str

    def __init__(self, setting: Setting, point: Point) -> None:
        super().__init__(setting, point)
        assert point.op is not None
        self.op, self.pool = point.op, one_op.op_problem(setting, point)

    @cached_property
    def inputs(self) -> Pool:
        self.pool.draw()
        return self.pool

    @property
    def checker(self) -> Pool:
        return self.inputs

    def build(self, name: str) -> Implementation:
        setting = implementation_setting(self.setting, parse_one(name))
        return one_op.OpImplementation(setting, self.pool, self.op, name)

    def cost(self, steps: int | None = None) -> results.Cost:
        return results.Cost(**self.pool.case.work._asdict())

    def _check_lengths(self, ops: Ops) -> None:
        one_op.check_lengths(ops[self.op], self.pool.case)

    def repeated_as(self, name: str) -> str:
        named = parse_one(name)
        overrides = dict(implementation_setting(self.setting, named).overrides)
        return name if self.op in overrides else named.base


def make_fixture(
    setting: Setting,
    point: Point,
    state: State | None = None,
    after_forward: Callable[[], None] = lambda: None,
) -> Fixture:
    """Return what a scenario runs on; `after_forward` is called after every forward of the reference."""
    if point.op is None:
        return LayerFixture(setting, point, state, after_forward)
    return OpFixture(setting, point)
