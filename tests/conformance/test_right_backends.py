"""What is right must pass: with the reference alone, and with ops that are written in another way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mla
from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult
from mla.conformance.trial import Drawing
from mla.reference import REFERENCE

Run = Callable[..., list[CheckResult]]
OF_OPS = ("ops.known", "ops.reasons", "ops.preflight")
PAGED = ("latent", "select_latents", "sparse_latent_attention")
GRAPHS = ("layer.graph", *(f"{op}.graph" for op in PAGED))
GRAPHS += ("layer.graph_lengths", *(f"{op}.graph_lengths" for op in PAGED))


def by_status(results: list[CheckResult]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for result in results:
        reasons.setdefault(result.status, []).append(f"{result.id}: {result.reason}")
    return reasons


@pytest.mark.usefixtures("smaller")
def test_a_backend_without_ops_passes_and_refuses_only_what_it_does_not_offer(judge: Run, sound: Any) -> None:
    plain = type("Plain", (sound,), {"graph": lambda self, fn: None})()
    results = judge(plain, drawing=Drawing(1))
    results += judge(plain, "*.drawn", "layer.mixed", dtypes=(torch.float16,), drawing=Drawing(1))
    results = [result for result in results if result.status != "incomplete"]  # as one draw leaves a check
    reasons = by_status(results)
    assert set(reasons) == {"pass", "refused"}, reasons.get("fail")
    refused = {result.check for result in results if result.status == "refused"}
    assert refused == {"device.graph", *OF_OPS, *GRAPHS}
    assert all(
        result.reason == "the backend offers no graphs" for result in results if result.check in GRAPHS[:4]
    )


def test_the_installed_cpu_backend_passes(judge: Run) -> None:
    """Its own ops, and layers of them, are judged with its kernels."""
    backend = mla.load_backend("cpu", threads=1)
    reasons = by_status(judge(backend, "device", "ops", dtypes=(torch.bfloat16,)))
    assert set(reasons) == {"pass", "refused"}, reasons.get("fail")


@pytest.mark.usefixtures("smaller")
def test_right_ops_pass_and_their_refusals_are_no_failures(judge: Run, sound: Any, right_ops: Any) -> None:
    patterns = [f"*[{name}-*" for name in right_ops]
    chosen = ("device", "ops", "layer", *patterns)
    results = judge(sound(ops=right_ops), *chosen, dtypes=(torch.bfloat16,), drawing=Drawing(0))
    reasons = by_status(results)
    assert set(reasons) == {"pass", "refused"}, reasons.get("fail")
    ids = {result.id: result for result in results}
    assert {result.check for result in results} == {check.id for check in all_checks()}
    assert ids["device.graph"].status == ids["latent.graph[looplatent-bfloat16]"].status == "pass"
    assert ids["latent.graph_lengths[denselatent-bfloat16]"].status == "pass"
    assert ids["latent.graph_lengths[looplatent-bfloat16]"].status == "refused"
    tiles = ids["latent.tiles[looplatent-bfloat16]"]
    assert (tiles.status, tiles.cases.refused) == ("pass", 5)
    assert tiles.refusals[0].reason == "it serves up to 64 heads, not 96"
    assert ids["layer.graph_lengths[auto-bfloat16]"].status == "pass"


def test_a_layer_counts_what_its_op_refuses(judge: Run, sound: Any, right_ops: Any) -> None:
    (lengths,) = judge(sound(ops={"loop": right_ops["looplatent"]}), "layer.graph_lengths")
    assert (lengths.status, "graph_safe" in lengths.reason) == ("refused", True)


def test_a_device_with_a_queue_passes_the_checks_of_clocks(judge: Run, sound: Any, asynchronous: Any) -> None:
    checks = ("device.synchronize", "device.timer*", "*.prepare")
    reasons = by_status(judge(sound(), *checks))
    assert set(reasons) == {"pass"}, reasons
    assert len(reasons["pass"]) == 6


@pytest.mark.parametrize("poll", [0.001, 0.03])
def test_a_wait_that_looks_now_and_then_passes_the_checks_of_clocks(
    judge: Run, sound: Any, asynchronous: Any, poll: float
) -> None:
    def synchronize(self: Any) -> None:
        while asynchronous.queued > 0:
            time.sleep(poll)
            asynchronous.queued = max(0.0, asynchronous.queued - poll)

    polls = type("Polls", (sound,), {"synchronize": synchronize})()
    reasons = by_status(judge(polls, "device.synchronize", "device.timer*"))
    assert set(reasons) == {"pass"}, reasons


def test_a_counter_that_moves_passes(judge: Run, sound: Any, allocated: None) -> None:
    (grown,) = judge(sound(), "device.memory")
    assert (grown.status, grown.note) == ("pass", "")


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.id)
def test_every_check_says_in_one_sentence_what_it_wants_and_what_it_is_for(check: Any) -> None:
    assert check.description.endswith(".")
    assert ". " not in check.description
    assert len(check.description) < 120
    assert check.catches
    assert not check.catches.endswith(".")


def test_an_op_of_another_contract_is_refused_and_never_called(judge: Run, sound: Any) -> None:
    class Later(type(REFERENCE["linear"])):  # type: ignore[misc]
        contract = "linear/2"

        def __call__(self, *state: Any, **tensors: Any) -> None:
            raise AssertionError("it has other arguments")

    results = [result for result in judge(sound(ops={"later": Later()}), "linear") if result.of == "later"]
    assert {result.status for result in results} == {"refused"}
    assert {result.reason for result in results} == {"it implements linear/2, but this suite checks linear/1"}


def test_an_op_whose_preflight_fails_is_refused_and_asked_once(judge: Run, sound: Any) -> None:
    class Uncompiled(type(REFERENCE["latent_attention"])):  # type: ignore[misc]
        compiles = "it compiles"
        asked = 0

        def preflight(self, spec: Any) -> list[str]:
            type(self).asked += 1
            return ["there is no compiler"]

    said: list[str] = []
    results = judge(sound(ops={"mine": Uncompiled()}), "latent.formula[mine-*]", say=said.append)
    assert [(result.status, result.reason) for result in results] == [("refused", "there is no compiler")]
    assert (Uncompiled.asked, said) == (1, ["preparing mine: it compiles"])


def test_what_a_preflight_compiles_is_said_before_it_is_checked(judge: Run, sound: Any) -> None:
    """A minute of silence looks like a hang; and its answer is kept for the checks that follow."""
    events: list[str] = []

    class Compiled(type(REFERENCE["latent_attention"])):  # type: ignore[misc]
        compiles = "it compiles"

        def preflight(self, spec: Any) -> list[str]:
            events.append(f"asked for {spec.num_heads} heads of {spec.kv_lora_rank}")
            return ["there is no compiler"]

    subject = sound(ops={"mine": Compiled()})
    for _ in range(2):
        (result,) = judge(subject, "ops.preflight", say=events.append)
        assert result.status == "pass", result.reason
    assert events[0] == "preparing mine: it compiles"
    assert len(events) == 1 + 3  # once for whoever asks, and once more for each check
    assert len(set(events)) == 2
