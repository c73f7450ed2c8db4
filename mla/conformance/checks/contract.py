"""The ops on offer: each must name its contract, and refuse with reasons before anything is launched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mla.cache.formats import find_format
from mla.cache.index_formats import index_codec
from mla.cases import KINDS
from mla.config import MLAConfig
from mla.conformance.checks.borders import DEEPSEEK, SMALL_SPEC, SPEC
from mla.conformance.registry import check
from mla.conformance.trial import DTYPES, BackendUnderTest, Refused, Trial, expect
from mla.layer.ops import Ops, preflight_reasons
from mla_backends.api import FusedOp, IndexerSpec, LinearSpec, NormSpec, claimed_formats


@check("ops.known", catches="an op with a misspelt contract or cache format, which would silently never run")
def known(trial: Trial) -> None:
    """Every op has a unique name, a known contract, and claims known cache formats."""
    offered = trial.backend.ops()
    expect(isinstance(offered, Mapping), f"ops() returned a {type(offered).__name__}, not a mapping")
    expect(list(offered) == list(trial.backend.ops()), "ops() returns different names when called again")
    for name, op in _some(offered).items():
        with trial.case(str(name)):
            expect(isinstance(name, str) and bool(name), f"an op is named {name!r}")
            Ops(MLAConfig(256, 16), {name: op}, torch.float32, trial.device)
            expect(isinstance(op.nan_safe_tail, bool), f"nan_safe_tail is {op.nan_safe_tail!r}")
            for claimed in claimed_formats(op):
                if KINDS[_kind(op)].spec is IndexerSpec:
                    index_codec(claimed, 128)
                else:
                    find_format(f"{claimed}1" if claimed.endswith(":") else claimed)


@check("ops.reasons", catches="a support query that raises, launches work, or gives no reason")
def reasons(trial: Trial) -> None:
    """For any layer, an op answers with a list of sentences, the same every time."""
    for name, op in _some(trial.backend.ops()).items():
        with trial.case(name):
            for spec in specs(op, trial.subject):
                asked = [op.unsupported_reasons(spec) for _ in range(2)]
                _expect_reasons("unsupported_reasons()", asked)


@check("ops.batch_reasons", catches="a support query for lengths that raises, or answers yes or no")
def batch_reasons(trial: Trial) -> None:
    """For any lengths, an op that prepares a batch answers with a list of sentences."""
    lengths = (((1,), (1,)), ((0, 1), (0, 0)), ((3, 1, 128), (3, 70_000, 200)), ((1,) * 300, (5,) * 300))
    for name, op in _some(trial.backend.ops()).items():
        if not KINDS[_kind(op)].prepares:
            continue
        with trial.case(name):
            for spec in specs(op, trial.subject):
                for query_lens, kv_lens in lengths:
                    asked = [op.unsupported_batch(spec, query_lens, kv_lens) for _ in range(2)]
                    _expect_reasons("unsupported_batch()", asked)


@check("ops.preflight", catches="a preflight that raises, or answers yes or no; remarks that are not a list")
def preflight(trial: Trial) -> None:
    """Asked for a layer that it supports, an op says with lists of sentences whether and how it runs here."""
    for name, op in _some(trial.backend.ops()).items():
        with trial.case(name):
            served = (spec for spec in specs(op, trial.subject) if not op.unsupported_reasons(spec))
            for spec in itertools.islice(served, 1):  # it may compile
                preflight_reasons(name, op, spec, trial.subject.say)  # says so, and keeps the answer
                _expect_reasons("preflight()", [op.preflight(spec)] * 2)
                _expect_reasons("remarks", [op.remarks] * 2)


def _some(offered: Mapping[str, FusedOp]) -> Mapping[str, FusedOp]:
    if not offered:
        raise Refused("the backend offers no ops")
    return offered


def specs(op: FusedOp, subject: BackendUnderTest) -> Iterator[Any]:
    """Yield specs of the op's kind, common and odd ones."""
    kind = _kind(op)
    for dtype in (*DTYPES, torch.float64):
        if kind in ("linear", "batched_linear"):
            for groups in (1,) if kind == "linear" else (1, 3, 128):
                yield LinearSpec(33, 70, groups, dtype, subject.device)
        elif kind == "rms_norm":
            yield from (NormSpec(features, dtype, subject.device) for features in (1, 33, 1536))
        elif KINDS[kind].spec is IndexerSpec:
            for width, topk in ((128, 2048), (64, 64), (30, 7)):
                sizes = ((heads, width, width // 2, topk) for heads in (1, 3, 64))
                yield from (IndexerSpec(*size, dtype, subject.device) for size in sizes)
        else:
            topk = 0 if "k" not in KINDS[kind].letters else 64
            spec = replace(SPEC, topk=topk, dtype=dtype, device=subject.device)
            for widths in (DEEPSEEK, SMALL_SPEC):
                yield from (replace(spec, **widths, num_heads=heads) for heads in (1, 3, 16, 128))


def _kind(op: FusedOp) -> str:
    return op.contract.partition("/")[0]


def _expect_reasons(what: str, asked: list[Any]) -> None:
    for answer in asked:
        right = isinstance(answer, (list, tuple)) and all(
            isinstance(reason, str) and reason for reason in answer
        )
        expect(right, f"{what} returned {answer!r}, not a list of sentences")
    expect(list(asked[0]) == list(asked[1]), f"{what} returned {asked[0]!r} and then {asked[1]!r}")
