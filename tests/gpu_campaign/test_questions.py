"""The probes on the host, with stand-ins for libraries: right answers, wrong ones, and "not installed"."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import ask
from benchmarks.gpu.questions import asking, copies, device, flashinfer, launches
from benchmarks.gpu.questions.latent import LatentBatch
from mla_backends import FusedOp
from mla_backends.api import OPS
from mla_backends.kernels import FlashInferMla
from mla_backends.kernels import flashinfer as adapter_module

FAKES = Path(__file__).resolve().parents[1] / "fakes" / "kernels"
CPU = torch.device("cpu")


class Timer:
    """A clock that takes a millisecond per round."""

    def start(self) -> None: ...

    def stop(self) -> float:
        return 1.0


def backend(**changes: Any) -> Any:
    """Return what probes need of a backend, on the host; graphs replay by calling."""
    facts = {
        "name": "acme", "device": CPU, "ops": dict, "timer": Timer, "device_timer": Timer,
        "memory": lambda: SimpleNamespace(free=None), "graph": lambda call: call,
        "synchronize": lambda: None, "sensors": dict, "environment": dict,
        "device_info": lambda: SimpleNamespace(cache_bytes=1 << 20),
    }  # fmt: skip
    return SimpleNamespace(**{**facts, **changes})


def forget() -> None:
    for name in [
        module for module in sys.modules if module.partition(".")[0] in ("flashinfer", "fake_kernels")
    ]:
        del sys.modules[name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the fake FlashInfer what an import finds."""
    forget()
    monkeypatch.setattr(adapter_module, "WORKSPACE_BYTES", 1024)
    for folder in ("flashinfer", "common"):
        monkeypatch.syspath_prepend(str(FAKES / folder))
    yield importlib.import_module("flashinfer.mla")
    forget()


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    ask.load()


def test_a_library_that_loses_a_key_is_called_wrong_unless_the_adapter_refuses(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake loses it as releases before 0.7 do."""
    cut = "20 heads, 40 heads, 48 heads, 96 heads"
    answer = flashinfer.heads(backend())
    assert not answer.wrong
    assert answer.answer == f"nothing wrong goes unnoticed; refused beforehand: {cut}"
    assert set(answer.evidence) == {f"{count} heads" for count in flashinfer.CUT}
    assert "(wrong)" not in answer.evidence["16 heads"]
    monkeypatch.setattr(FlashInferMla, "unsupported_batch", lambda *arguments: [])
    answer = flashinfer.heads(backend())
    assert answer.wrong, answer.evidence
    assert answer.answer == f"wrong or failing without a refusal: {cut}"


def test_what_a_library_raises_is_the_answer(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(library.BatchMLAPagedAttentionWrapper, "plan", refuse)
    assert flashinfer.first_plan(backend()).answer == "RuntimeError: Could not find nvcc"
    assert flashinfer.first_plan(backend()).wrong


@pytest.mark.parametrize(
    ("plan", "listing", "answer", "wrong"),
    [
        (None, None, "the first plan took more than 45 s, so it may have found a compiler; "
         "--list-ops did not answer within 45 s", False),
        (None, "latent_attention: flashinfer", "the first plan took more than 45 s, so it may have found a "
         "compiler; --list-ops chooses it", False),
        ('{"answer":"RuntimeError: no nvcc"}', "latent_attention: flashinfer",
         "no plan without one; --list-ops chooses it", True),
        ('{"answer":"3.1 s"}', None, "it works without one; --list-ops did not answer within 45 s", False),
    ],
)  # fmt: skip
def test_a_library_that_keeps_compiling_is_an_answer(
    library: Any, monkeypatch: pytest.MonkeyPatch, plan: str | None, listing: str | None,
    answer: str, wrong: bool,
) -> None:  # fmt: skip
    printed = iter([plan, listing])

    def process(command: list[str], *, timeout: float, **more: Any) -> Any:
        if (said := next(printed)) is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(stdout=said, stderr="")

    monkeypatch.setattr(flashinfer.subprocess, "run", process)
    replied = flashinfer.compiler(backend())
    assert (replied.answer, replied.wrong) == (answer, wrong)


def test_the_first_plan_is_timed(library: Any) -> None:
    assert flashinfer.first_plan(backend()).answer.endswith(" s")


def test_replanning_between_replays(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = flashinfer.graph(backend())
    assert answer.answer == "yes"
    plans = library.BatchMLAPagedAttentionWrapper.plan
    once: list[Any] = []

    def stale(self: Any, *arguments: Any, **more: Any) -> None:
        if not once:
            plans(self, *arguments, **more)
        once.append(self)

    monkeypatch.setattr(library.BatchMLAPagedAttentionWrapper, "plan", stale)
    assert flashinfer.graph(backend()).answer == "no, replays are wrong"
    with pytest.raises(asking.NotHere, match="no graphs"):
        flashinfer.graph(backend(graph=lambda call: None))


def test_pages_far_away_need_memory(library: Any) -> None:
    with pytest.raises(asking.NotHere, match=r"needs .* MiB of free memory, and 1024 are free"):
        flashinfer.pages(backend(memory=lambda: SimpleNamespace(free=1 << 30)))


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(asking.NotHere, match="flashinfer"):
        flashinfer.heads(backend())


class Exact(FusedOp):
    """Absorbed attention of one request at a time, in float64, by another formula than the probe's oracle."""

    contract = OPS["latent_attention"]

    def __call__(self, state: Any, *, q: Any, cache: Any, block_table: Any, kv_lens: Any, cu_q: Any,
                 softmax_scale: float, out: Any, lse: Any) -> None:  # fmt: skip
        for i, (start, end) in enumerate(itertools.pairwise(cu_q)):
            for t in range(int(start), int(end)):
                seen = int(kv_lens[i]) - (int(end) - 1 - t)
                rows = torch.stack([cache[block_table[i, s // 64], s % 64] for s in range(seen)]).double()
                weights = torch.softmax(q[t].double() @ rows.T * softmax_scale, -1)
                out[t] = (weights @ rows[:, :512]).to(out.dtype)


@pytest.mark.parametrize("more", [{}, {"first_page": 3}, {"shared": True}, {"pages_each": 4}])
def test_the_batch_and_its_oracle_agree_with_another_formula(more: dict[str, Any]) -> None:
    batch = LatentBatch((1, 3), (20, 130), 2, CPU, **more)
    out, _ = batch.run(Exact())
    assert batch.error(out) < 5e-3
    out[-1] *= 1.1
    assert batch.error(out) > 5e-2
    assert batch.error(out, [0]) < 5e-3
    assert batch.error(out * float("nan")) == float("inf")


def test_batches_of_other_lengths_share_a_cache() -> None:
    long, short = (LatentBatch((1, 1), (keys, keys), 2, CPU, pages_each=4) for keys in (200, 65))
    assert torch.equal(long.cache, short.cache)
    assert torch.equal(long.q, short.q)
    assert short.pages == [[0, 1], [4, 5]]


def test_tf32_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.tf32(backend()).answer == "yes"
    plain = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != torch.float32:
            return plain(a, b)
        bits = [
            (factor.view(torch.int32) & ~0x1FFF).view(torch.float32) for factor in (a, b)
        ]  # 10 bits of mantissa
        return plain(*bits)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    answer = device.tf32(backend())
    assert answer.wrong
    assert answer.answer.startswith("no, ")


def test_a_copy_that_loses_its_source_is_counted() -> None:
    assert copies._lost(CPU, torch.clone, 20) == 0
    sent: list[torch.Tensor] = []

    def late(host: torch.Tensor) -> torch.Tensor:
        sent.append(host.clone())
        return sent[-2] if len(sent) == 7 else sent[-1]

    assert copies._lost(CPU, late, 20) == 1


def test_launches_are_divided_by_their_number() -> None:
    answer = launches.launch(backend())
    assert answer.evidence["add of one element us"] == 20.0  # a round of 50 takes a millisecond
    assert answer.evidence["add as a node of a graph us"] == 2.0  # five replays of a hundred
    assert launches.launch(backend(graph=lambda call: None)).answer.endswith("this stack has no graphs")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("bmm-strided", 0, "equal to bmm and a copy"),
        ("copies", 3, "needs a device with events of its own"),
        ("event-gap", 3, "needs a device with events of its own"),
        ("flashinfer-heads", 3, "needs CUDA"),
        ("flash-mla", 3, "the cpu backend offers no FlashMLA"),
    ],
)
def test_the_host_is_answered_truthfully(name: str, code: int, said: str) -> None:
    answer, exit_code = ask.answer(name, "cpu")
    assert exit_code == code
    assert answer.answer.startswith(said)
    assert answer.question == asking.QUESTIONS[name].text


def test_a_probe_that_raises_is_no_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(opened: Any) -> Any:
        raise IndexError("off by one")

    monkeypatch.setitem(asking.QUESTIONS, "broken", asking.Question("Why?", broken, False))
    answer, code = ask.answer("broken", "cpu")
    assert code == 1
    assert answer.answer.startswith("it raised IndexError: off by one")
