"""The ops on offer: each must name its contract, and refuse with reasons before anything is launched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mla.cache.formats import find_format, index_codec
from mla.cases import KINDS
from mla.config import MLAConfig
from mla.conformance.checks.borders import EXAMPLES, SMALL_SPEC
from mla.conformance.registry import check
from mla.conformance.trial import DTYPES, BackendUnderTest, Refused, Trial, expect, kind_of
from mla.layer.ops import Ops, preflight_reasons
from mla_backends.api import AttentionSpec, FusedOp, IndexerSpec, LinearSpec, NormSpec, claimed_formats

# What few layers have, in place of small widths of latents.
ODD: Mapping[type, Mapping[str, Any]] = {
    LinearSpec: {"in_features": 33, "out_features": 70},
    NormSpec: {"features": 33},
    IndexerSpec: {"head_dim": 30, "rope_head_dim": 14, "topk": 7},
    AttentionSpec: SMALL_SPEC,
}


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
                if KINDS[kind_of(op)].spec is IndexerSpec:
                    index_codec(claimed, 128)
                else:
                    find_format(f"{claimed}1" if claimed.endswith(":") else claimed)


@check("ops.reasons", catches="a support query that raises, launches work, or gives no list of reasons")
def reasons(trial: Trial) -> None:
    """For any layer, and any lengths, an op answers with a list of sentences, the same every time."""
    lengths = (((1,), (1,)), ((0, 1), (0, 0)), ((3, 1, 128), (3, 70_000, 200)), ((1,) * 300, (5,) * 300))
    for name, op in _some(trial.backend.ops()).items():
        with trial.case(name):
            for spec in specs(op, trial.subject):
                _expect_reasons("unsupported_reasons()", [op.unsupported_reasons(spec) for _ in range(2)])
                for batch in lengths if KINDS[kind_of(op)].prepares else ():
                    asked = [op.unsupported_batch(spec, *batch) for _ in range(2)]
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
    kind = kind_of(op)
    usual, odd = EXAMPLES[kind], ODD[KINDS[kind].spec]
    for dtype in (*DTYPES, torch.float64):
        for case in (usual, usual.but(**odd)):
            for heads in (1, 3, 16, 128):
                names = {"num_heads", "groups"} & {*vars(case.spec)} if kind != "linear" else ()
                yield case.but(dtype=dtype, device=subject.device, **dict.fromkeys(names, heads)).spec


def _expect_reasons(what: str, asked: list[Any]) -> None:
    for answer in asked:
        right = isinstance(answer, (list, tuple)) and all(
            isinstance(reason, str) and reason for reason in answer
        )
        expect(right, f"{what} returned {answer!r}, not a list of sentences")
    expect(list(asked[0]) == list(asked[1]), f"{what} returned {asked[0]!r} and then {asked[1]!r}")
