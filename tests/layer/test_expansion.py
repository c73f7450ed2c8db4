"""Contexts longer than the workspace: merged in rounds where the op can, else rebuilt at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import attention_case

from mla import MLA, LatentCache, MLAConfig
from mla.cases.played import Laid, Scene
from mla.layer.plan import rebuilt_bytes
from mla.reference import REFERENCE
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict
from mla_backends.testing import HostBackend

CONFIG = MLAConfig(hidden_size=48, num_attention_heads=3, kv_lora_rank=32)
PAST, NEW = 120, 30
PER_KEY = rebuilt_bytes(CONFIG, 4, 1)
HELD = (PAST + NEW) * PER_KEY
WORKSPACE = 40 * PER_KEY


class Unmergeable(type(REFERENCE["expanded_attention"])):  # type: ignore[misc]
    """An op without a log-sum-exp."""

    writes_lse = False

    def __call__(self, state: Any, *, lse: Any, **tensors: Any) -> None:
        super().__call__(state, lse=torch.empty(tensors["out"].shape[:2]), **tensors)
        if lse is not None:
            lse.fill_(torch.nan)


class Subject:
    """A layer on a cache with one request's history."""

    def __init__(self, op: Any, **options: Any) -> None:
        backend, config = HostBackend(ops={"mine": op}), CONFIG
        self.config = config
        self.layer = MLA(
            config,
            backend=backend,
            dtype=torch.float32,
            **{"attention": "expanded", "workspace_bytes": WORKSPACE, **options},
        )
        self.state = random_state_dict(config, 0, torch.float32)
        self.layer.load_state_dict(self.state)
        self.cache = LatentCache(config, max_tokens=64 * 4, dtype=torch.float32)
        self.ids = self.cache.new_sequences(1)
        generator = torch.Generator().manual_seed(1)
        self.past = tuple(torch.randn(PAST, width, generator=generator) for width in (32, 64))
        self.cache.load(self.ids[0], *self.past)
        self.hidden = torch.randn(NEW, 48, generator=generator)

    def plan(self, new: int = NEW) -> Any:
        return self.layer.plan(self.cache.extend(self.ids, [new])).expanded

    def check(self) -> None:
        out = self.layer(self.hidden, self.cache.extend(self.ids, [NEW]), self.cache.pages[0])
        truth = oracle(self.config, self.state, self.hidden, [NEW], [self.past])
        torch.testing.assert_close(out.double(), truth, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("op", "rounds"), [(Unmergeable(), 1), (REFERENCE["expanded_attention"], 4)])
def test_an_op_without_a_log_sum_exp_gets_the_whole_context_at_once(op: Any, rounds: int) -> None:
    Subject(op).check()
    assert len(Subject(op).plan().rounds) == rounds


def test_what_exceeds_the_workspace_is_not_kept_by_every_layer() -> None:
    small, large = (Subject(Unmergeable(), workspace_bytes=size) for size in (WORKSPACE, HELD))
    for subject in (small, large):
        subject.check()
    assert large.layer.scratch_bytes() - small.layer.scratch_bytes() >= HELD


# --------------------------------------------------------------------------------- test without lse
# The layer takes a log-sum-exp where it reads one, and from every op that cannot do without.

Latent, Expanded = (type(REFERENCE[kind]) for kind in ("latent_attention", "expanded_attention"))


class Noting:
    """Notes whether it was given an lse."""

    def __init__(self, optional: bool) -> None:
        self.lse_optional, self.given = optional, []

    def __call__(self, *args: Any, **tensors: Any) -> None:
        self.given.append(tensors["lse"] is not None)
        super().__call__(*args, **tensors)  # type: ignore[misc]


class NotingLatent(Noting, Latent):  # type: ignore[misc, valid-type]
    pass


class NotingExpanded(Noting, Expanded):  # type: ignore[misc, valid-type]
    pass


@pytest.mark.parametrize("optional", [True, False])
def test_on_the_absorbed_path_nobody_reads_it(make_case: Any, assert_rows_close: Any, optional: bool) -> None:
    op = NotingLatent(optional)
    case = make_case([1, 3, 1], [9, 40, 0], attention="absorbed", ops={"noting": op})
    assert_rows_close(case.run(), case.truth(), 1e-5)
    assert op.given == [not optional]
    assert ("lse" in case.layer._scratch._held) == (not optional)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_on_the_expanded_path_merging_reads_it(
    make_case: Any, assert_rows_close: Any, optional: bool, rounds: int
) -> None:
    op = NotingExpanded(optional)
    case = make_case([20, 60], [9, 0], attention="expanded", ops={"noting": op})
    case.layer.workspace_bytes = rebuilt_bytes(case.config, 4, 89 if rounds == 1 else 60)
    assert_rows_close(case.run(), case.truth(), 1e-5)
    assert len(case.layer.plan(case.batch).expanded.rounds) == rounds
    assert op.given == [not optional] if rounds == 1 else all(op.given)


def test_the_reference_gives_the_same_bits_without() -> None:
    case = attention_case("latent_attention", [3, 1, 9, 1], [40, 7, 30, 0])
    calls = [Laid(case, Latent(), Scene((case,), lse=lse)) for lse in (True, False)]
    assert [call.call() for call in calls] == ["", ""]
    assert torch.equal(*(call.results()["out"] for call in calls))
