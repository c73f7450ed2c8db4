"""Preflight: asked before an op is chosen, once per process, op and spec; whatever it answers is a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla.errors import UnsupportedOps
from mla.layer.ops import Ops
from mla.reference import REFERENCE

LatentOp = type(REFERENCE["latent_attention"])
CPU = torch.device("cpu")


class Compiled(LatentOp):  # type: ignore[misc, valid-type]
    """Needs a compiler that is there or not; says what it was asked."""

    compiles = "it compiles"

    def __init__(self, answer: Any = (), odd_heads: bool = True) -> None:
        self.answer, self.odd_heads = answer, odd_heads
        self.asked: list[Any] = []

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [] if self.odd_heads or spec.num_heads % 2 == 0 else ["it needs an even head count"]

    def preflight(self, spec: Any) -> Any:
        self.asked.append(spec)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def ops(tiny: Any, offered: Any, policy: str = "auto", heads: int = 2, **more: Any) -> Ops:
    return Ops(tiny(num_attention_heads=heads), offered, torch.float32, CPU, policy, **more)


def test_a_preflight_that_fails_is_a_reason_and_the_next_op_is_taken(tiny: Any) -> None:
    bad, good = Compiled(["there is no compiler:\ninstall one"]), Compiled()
    chosen = ops(tiny, {"bad": bad, "good": good})["latent_attention"]
    assert chosen.name == "good"
    assert chosen.reasons == ("fused op 'bad' not used because there is no compiler: install one",)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("Ninja build failed.\n[1/2] nvcc ..."), "RuntimeError: Ninja build failed."),
        (SystemExit(1), "SystemExit: 1"),
        (OSError(), "OSError"),
    ],
)
def test_whatever_a_preflight_raises_is_a_reason(tiny: Any, error: BaseException, text: str) -> None:
    chosen = ops(tiny, {"bad": Compiled(error)})["latent_attention"]
    assert chosen.name == "reference"
    assert chosen.reasons == (f"fused op 'bad' not used because its preflight raised {text}",)


def test_an_answer_that_is_no_list_is_a_reason_too(tiny: Any) -> None:
    (reason,) = ops(tiny, {"bad": Compiled(None)})["latent_attention"].reasons
    assert reason.endswith("its preflight raised TypeError: 'NoneType' object is not iterable")


def test_an_op_that_is_required_fails_with_its_preflight(tiny: Any) -> None:
    for policy in ("fused", "bad"):
        with pytest.raises(UnsupportedOps, match="'bad' not used because there is no compiler"):
            ops(tiny, {"bad": Compiled(["there is no compiler"])}, policy)


def test_it_is_asked_once_per_op_and_spec(tiny: Any) -> None:
    first, other = Compiled(), Compiled(["no"])
    for _ in range(3):
        ops(tiny, {"one": first})
        ops(tiny, {"other": other})
    ops(tiny, {"one": first}, heads=4)
    assert [spec.num_heads for spec in first.asked] == [2, 4]
    assert len(other.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [["it finds too little memory (OutOfMemoryError: CUDA out of memory.)"], MemoryError("std::bad_alloc")],
)
def test_it_is_asked_again_where_memory_was_short(tiny: Any, answer: Any) -> None:
    op = Compiled(answer)
    assert ops(tiny, {"mine": op})["latent_attention"].name == "reference"
    op.answer = []
    for _ in range(2):
        assert ops(tiny, {"mine": op})["latent_attention"].name == "mine"
    assert len(op.asked) == 2


def test_only_an_op_that_would_be_chosen_is_asked(tiny: Any) -> None:
    """A minute of compiling for an op that does not run is a minute lost."""
    first, refusing, second = Compiled(), Compiled(odd_heads=False), Compiled()
    ops(tiny, {"refusing": refusing, "first": first, "second": second}, heads=3)
    assert (len(refusing.asked), len(first.asked), len(second.asked)) == (0, 1, 0)
    ops(tiny, {"second": second}, "reference")
    assert second.asked == []


def test_what_is_compiled_is_said_before_and_once(tiny: Any) -> None:
    said: list[tuple[str, int]] = []
    op = Compiled()
    for _ in range(2):
        ops(tiny, {"mine": op}, say=lambda line: said.append((line, len(op.asked))))
    assert said == [("preparing mine: it compiles", 0)]


def test_an_op_that_compiles_nothing_says_nothing(tiny: Any) -> None:
    quiet = Compiled()
    quiet.compiles = ""
    ops(tiny, {"mine": quiet, "plain": LatentOp()}, say=lambda line: pytest.fail(line))
    assert len(quiet.asked) == 1
