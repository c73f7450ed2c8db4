"""`--dump-failure`: which op made a result wrong, its call in a file, and the line that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from mla.bench.measure import passes as warmup
from mla.failures import file

Bench = Callable[..., Any]

FAULTY = ("--backend", "faulty_backend:FaultyBackend")
REST = ("--mode", "eager", "--clock", "host", "--dtype", "float32", "--dump-failure", "kept")


@pytest.fixture
def measure(bench: Bench, small: list[str]) -> Bench:
    """Return `bench` on the backend whose op of one kind has a fault."""

    def measure(kind: str, fault: str, *words: str) -> Any:
        return bench(*FAULTY, "-O", f"op={kind}", "-O", f"fault={fault}", *small, *REST, *words)

    return measure


def line(done: Any, contains: str) -> str:
    """Return the line of stderr that contains this."""
    return next(said for said in done.err.splitlines() if contains in said)


def replayed(bench: Bench, done: Any, *words: str) -> Any:
    """Run the line that was printed."""
    command = shlex.split(line(done, " with: python -m mla.bench replay").split(" with: ")[1])
    return bench(*command[3:], *words)


@pytest.mark.parametrize(
    ("kind", "scenario", "attention"),
    [
        ("latent_attention", "decode", "auto"),
        ("batched_linear", "decode", "auto"),
        ("expanded_attention", "prefill", "expanded"),
        ("write_latent", "prefill", "absorbed"),
    ],
)
def test_the_wrong_op_of_a_layer_is_named_kept_and_replayed(
    measure: Bench, bench: Bench, kind: str, scenario: str, attention: str
) -> None:
    done = measure(kind, "scale", "--scenario", scenario, "--attention", attention)
    assert done.code == 4
    role = "w_uk" if kind == "batched_linear" else kind
    said = line(done, "first wrong op")
    assert said.startswith(f"{scenario}, mla: {role} (op 'faulty') is the first wrong op of this forward; ")
    assert "its inputs were right. Its call is kept in 'kept/failure.safetensors'; replay it with: " in said
    again = replayed(bench, done)
    assert again.code == 4
    assert again.out.startswith(f"{role} (op 'faulty') on cpu: wrong: ")
    assert replayed(bench, done, "--op", "reference", "--runs", "3").out.endswith("right in 3 of 3 calls\n")


def test_the_file_is_plain_safetensors(measure: Bench) -> None:
    measure("latent_attention", "head", "--scenario", "decode")
    tensors = safetensors.torch.load_file(Path("kept", "failure.safetensors"))
    assert {"operand.q", "cache.pages", "cache.rows", "found.out", "expected.out"} <= set(tensors)
    origin = file.read(Path("kept")).document.origin
    assert origin.where == "decode, mla"
    assert origin.command.startswith("python -m mla.bench --backend faulty_backend:FaultyBackend -O op=")
    assert (origin.seed, origin.environment["torch"]) == (0, origin.environment["torch"])
    assert "head 3 of every row" in file.read(Path("kept")).document.reason


def test_only_the_first_failure_is_kept(measure: Bench) -> None:
    done = measure("linear", "scale")
    assert done.err.count("is the first wrong op") == 1
    assert file.read(Path("kept")).document.origin.where in ("prefill, mla", "decode, mla")


def test_a_right_run_keeps_nothing(measure: Bench, bench: Bench) -> None:
    assert measure("linear", "none", "--scenario", "decode").code == 0
    assert list(Path("kept").iterdir()) == []
    done = bench("replay", "kept")
    assert (done.code, done.error) == (
        2,
        "error: 'kept' holds no failure.safetensors: --dump-failure of a run writes one.",
    )


def test_a_failure_that_does_not_repeat_keeps_what_the_layer_wrote(
    measure: Bench, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faulty_backend import FaultyOp

    monkeypatch.setattr(
        warmup, "MAX_EXTRA", 0
    )  # or a busy machine would warm up beyond the forward that is wrong
    call = FaultyOp.__call__
    count = {"calls": 0}

    def once(self: FaultyOp, *leading: Any, **tensors: Any) -> None:
        """Be wrong in one forward, after the warm-up, whose outputs nobody judges."""
        count["calls"] += 1
        self._fault = "scale" if count["calls"] == 30 else "none"
        call(self, *leading, **tensors)

    monkeypatch.setattr(FaultyOp, "__call__", once)
    done = measure("latent_attention", "none", "--scenario", "decode")
    assert done.code == 4
    said = line(done, "did not repeat")
    assert "every op was right in 4 forwards repeated op by op. It may be a race, or depend on " in said
    tensors = safetensors.torch.load_file(Path("kept", "failure.safetensors"))
    assert set(tensors) == {"hidden", "output", "expected"}
    refused = bench("replay", "kept")
    assert refused.code == 2
    assert "holds tensors of a whole layer" in refused.error


@pytest.mark.parametrize(
    "op", ["latent_attention", "linear", "write_latent", "rms_norm", "expanded_attention"]
)
def test_one_op_is_kept_and_replayed(bench: Bench, small: list[str], tmp_path: Path, op: str) -> None:
    config = ["--config", "tiny.json"]
    Path("tiny.json").write_text(Path("tiny.json").read_text().replace("{", '{"q_lora_rank": 24, ', 1))
    role = "o_proj" if op == "linear" else op
    shape = ["--op", role, "--batch", "3", "--runs", "2", "--passes", "2", "--cache", "warm"]
    done = bench(*FAULTY, "-O", f"op={op}", "-O", "fault=half", *config, *shape, *REST)
    assert done.code == 4
    last = "position 1024" if op not in ("linear", "rms_norm") else "position "
    assert f"request 2, {last}" in done.out
    named = "q_a_layernorm" if op == "rms_norm" else role
    assert f"{named} (op 'faulty') is wrong again. Its call is kept" in line(done, "is wrong again")
    again = replayed(bench, done)
    assert (again.code, again.out.startswith(f"{named} (op 'faulty') on cpu: wrong: ")) == (4, True)


def test_a_folder_that_cannot_be_made_is_told_before_the_run(measure: Bench) -> None:
    Path("kept").write_text("")
    done = measure("linear", "none")
    assert (done.code, done.error) == (2, "error: cannot write to 'kept': it is a file, not a folder.")
