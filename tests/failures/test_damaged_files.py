"""A damaged failure is refused in one sentence, before any op is asked: what its table of operands says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from faulty_backend import FaultyOp

from mla.errors import OutOfMemory, ResultError
from mla.failures import file
from mla.failures.call import JudgedCall, Known, Made, expected, record
from mla.failures.file import CannotReplay, replay
from mla_backends.api import AttentionSpec, LinearSpec
from mla_backends.testing import HostBackend

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ORIGIN = file.Origin(backend="host", options=[], device="cpu", command="repeat", where="here", reason="wrong")
Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]  # of the call's facts, and the tensors


def linear() -> tuple[Known, dict[str, Any]]:
    weight = torch.ones(6, 4, dtype=BF16)
    known = Known("linear", "o_proj", "mine", LinearSpec(4, 6, 1, BF16, CPU), weight)
    out = torch.zeros(3, 6, dtype=BF16)
    return known, {"x": torch.ones(3, 4, dtype=BF16), "bias": None, "out": out}


def attention() -> tuple[Known, dict[str, Any]]:
    """Two requests with 1 and 2 new tokens, of 5 and 2 in pages of four."""
    known = Known(
        "latent_attention", "latent_attention", "mine", AttentionSpec(2, 4, 6, 2, 8, 0.5, BF16, CPU)
    )
    table, lengths = torch.tensor([[4, 0], [2, 0]]), torch.tensor([5, 2])
    return known, {
        "q": torch.ones(3, 2, 6, dtype=BF16),
        "cache": torch.ones(5, 4, 6, dtype=BF16),
        "block_table": table.int(),
        "kv_lens": lengths.int(),
        "cu_q": torch.tensor([0, 1, 3]).int(),
        "softmax_scale": 0.5,
        "out": torch.zeros(3, 2, 4, dtype=BF16),
        "lse": torch.zeros(3, 2),
    }


def write(folder: Path, made: tuple[Known, dict[str, Any]], damage: Damage) -> None:
    """Keep a call of a right op, and damage its file."""
    known, tensors = made
    call = record(known, tensors)
    file.write_call(folder, JudgedCall(call, Made({}), expected(call), "wrong"), ORIGIN)
    kept = safetensors.torch.load_file(folder / file.NAME)
    with safetensors.safe_open(folder / file.NAME, framework="pt") as opened:
        document = json.loads(opened.metadata()[file.KEY])
    damage(document["call"], kept)
    metadata = {file.KEY: json.dumps(document)}
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in kept.items()}, folder / file.NAME, metadata
    )


def change(name: str, number: int, value: int) -> Damage:
    """Return what puts a number into an operand."""
    return lambda facts, kept: kept[f"operand.{name}"].view(-1)[number].fill_(value)


def put(tensor: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda facts, kept: kept.update({tensor: make(kept[tensor])})


LINEAR: list[tuple[Damage, str]] = [
    (put("operand.x", lambda x: x.to(torch.uint8)), r"x is uint8 \[3, 4\], not bfloat16 \[T, i\]"),
    (put("operand.weight", lambda weight: weight[:5]), r"weight is bfloat16 \[5, 4\]"),
    (lambda facts, kept: facts["outputs"].update(out=[4, 6]), r"out is bfloat16 \[4, 6\]"),
    (lambda facts, kept: kept.pop("operand.x"), "it lacks the tensor 'operand.x'"),
    (lambda facts, kept: facts["outputs"].pop("out"), "the operands of linear are x, bias, out"),
    (lambda facts, kept: facts.update(in_place=True, outputs={}), "the operands of linear are"),
    (lambda facts, kept: kept.update({"operand.y": kept["operand.x"]}), "linear takes no 'operand.y'"),
    (lambda facts, kept: facts["scalars"].update(eps=1.0), "the scalars of linear are none"),
    (lambda facts, kept: facts["spec"].update(in_features=2**60), "in_features of its spec is not a size"),
    (lambda facts, kept: facts["spec"].update(dtype="load"), "no layer has the dtype of its spec"),
    (lambda facts, kept: facts.update(kind="matmul"), "there is no kind of op 'matmul'"),
    (lambda facts, kept: facts["gaps"].update(x=[0, -4, 0]), r"Expected `int` >= 0"),
]
ATTENTION: list[tuple[Damage, str]] = [
    (change("block_table", 1, 5), "block_table points outside the cache"),
    (change("block_table", 0, 3), "it does not hold the pages that the call reads"),
    (change("kv_lens", 0, 9), "kv_lens are not its lengths"),
    (change("cu_q", 1, 2**31 - 1), "cu_q does not count the new tokens"),
    (lambda facts, kept: facts.update(query_lens=[1, 2**40]), "its new tokens are not the rows of q"),
    (lambda facts, kept: facts.update(kv_lens=[5]), "it does not have two lengths of every request"),
    (
        put("cache.rows", lambda rows: rows[..., :5]),
        r"cache.rows is bfloat16 \[3, 4, 5\], not ",
    ),
    (lambda facts, kept: facts.update(pages=0), "its cache has no pages"),
    (put("cache.pages", lambda pages: pages + 1), "it does not hold the pages that the call reads"),
    (lambda facts, kept: facts["outputs"].update(lse=[2, 2]), r"lse is float32 \[2, 2\], not "),
]


def fewer_tokens(facts: dict[str, Any], kept: dict[str, torch.Tensor]) -> None:
    change("kv_lens", 1, 1)(facts, kept)
    facts.update(kv_lens=[5, 1])


ATTENTION.append((fewer_tokens, "a request has fewer tokens than new ones"))
CASES = [(linear, *row) for row in LINEAR] + [(attention, *row) for row in ATTENTION]


@pytest.mark.parametrize(("make", "damage", "reason"), CASES, ids=[reason for _, _, reason in CASES])
def test_a_damaged_failure_is_refused(
    tmp_path: Path, make: Callable[[], tuple[Known, dict[str, Any]]], damage: Damage, reason: str
) -> None:
    write(tmp_path, make(), damage)
    with pytest.raises(ResultError, match=f"is not a failure that --dump-failure kept: .*{reason}"):
        file.read(tmp_path)


@pytest.mark.parametrize("make", [linear, attention])
def test_an_undamaged_one_is_read(tmp_path: Path, make: Callable[[], tuple[Known, dict[str, Any]]]) -> None:
    write(tmp_path, make(), lambda facts, kept: None)
    kept = file.read(tmp_path)
    assert replay(kept, HostBackend(), "reference") == [""]


def test_a_cache_that_does_not_fit_is_not_made(tmp_path: Path) -> None:
    write(tmp_path, attention(), lambda facts, kept: facts.update(pages=2**40))
    with pytest.raises(
        OutOfMemory, match=r"this call needs 4.92e\+04 GiB of memory, and .* are free: free more\."
    ):
        replay(file.read(tmp_path), HostBackend(), "reference")


def test_gaps_that_do_not_fit_are_not_made(tmp_path: Path) -> None:
    write(tmp_path, linear(), lambda facts, kept: facts["gaps"].update(x=[0, 2**40, 0]))
    with pytest.raises(OutOfMemory, match=r"this call needs .* GiB of memory, and .* are free: free more\."):
        replay(file.read(tmp_path), HostBackend(), "reference")


def test_an_op_that_writes_lse_is_not_blamed_for_a_call_without_one(tmp_path: Path) -> None:
    known, tensors = attention()
    write(tmp_path, (known, {**tensors, "lse": None}), lambda facts, kept: None)
    kept, op = file.read(tmp_path), FaultyOp("latent_attention", "none")
    assert replay(kept, HostBackend(), "reference") == [""]
    with pytest.raises(CannotReplay, match="op 'other' needs an lse to write to, and the kept call has none"):
        replay(kept, HostBackend(ops={"other": op}), "other")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / file.NAME)
    with pytest.raises(ResultError, match="kept: it is not a regular file"):
        file.read(tmp_path)
    with pytest.raises(ResultError, match="kept: it is not a regular file"):
        file.read(tmp_path / file.NAME)


def test_a_document_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, linear(), lambda facts, kept: None)
    kept = safetensors.torch.load_file(tmp_path / file.NAME)
    metadata = {file.KEY: json.dumps({"version": 1, "call": {"views": {}}})}  # as it was then, in part
    safetensors.torch.save_file(kept, tmp_path / file.NAME, metadata)
    said = "its version is 1, and this program reads version 2: run the command that kept it again"
    with pytest.raises(ResultError, match=said):
        file.read(tmp_path)
