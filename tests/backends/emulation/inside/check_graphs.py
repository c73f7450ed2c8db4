"""Graphs through the backend: on a side stream, warmed up, replayed on the same memory, and opt-out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import judged
from tiny_run import DIMS

import mla
from mla.bench.results import decode
from mla_backends import BackendError
from mla_backends.torch_backend import WARMUPS


@pytest.fixture
def capturing(name: str) -> Any:
    """Return the backend with graphs allowed."""
    return mla.load_backend(name, options={"graph": "on"})


@pytest.mark.only("nvidia")  # the suite looks at moore
def test_decode_in_plain_torch_is_replayed_as_its_lengths_grow(bench: Any, tmp_path: Path) -> None:
    """The history of the tiny run crosses the end of a page, and one graph follows it."""
    done = bench("--ops", "reference", "--scenario", "decode", "-O", "graph=on", "-o", "run.json")
    assert done.code == 0, done.err
    (case,) = decode((tmp_path / "run.json").read_bytes()).cases
    graphs = [timing for timing in case.timings if timing.mode == "graph"]
    assert {graph.check.status for graph in graphs} == {"ok"}
    assert len(graphs) == 4  # warm and cold, on both clocks
    assert graphs[0].method == "replay of one captured graph, its block table as wide as the pass needs"


@pytest.mark.only("nvidia")  # the suite looks at moore
def test_decode_of_a_layer_with_an_indexer_is_replayed(bench: Any, tmp_path: Path) -> None:
    """But not where it begins to select within a pass: that is decided on the host."""
    indexer = {"model_type": "deepseek_v32", "q_lora_rank": 24, "index_n_heads": 3, "index_head_dim": 16}
    for topk, reason in ((8, ""), (64, "selecting starts at 64 tokens, within the pass")):
        (tmp_path / "sparse.json").write_text(json.dumps({**DIMS, **indexer, "index_topk": topk}))
        words = ("--ops", "reference", "--scenario", "decode", "-O", "graph=on", "--config", "sparse.json")
        done = bench(*words, "-o", "run.json")
        assert done.code == 0, done.err
        (case,) = decode((tmp_path / "run.json").read_bytes()).cases
        assert case.check.status == "ok"
        graphs = [timing for timing in case.timings if timing.mode == "graph"]
        assert {(graph.check.status, graph.check.reason) for graph in graphs} == {
            ("not run" if reason else "ok", reason)
        }


@pytest.mark.only("nvidia")  # the suite looks at moore
def test_a_captured_call_of_the_reference_follows_its_batch(
    capturing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "ops", dict)  # a quick look has the reference where it is alone
    groups = ("select_latents", "latent", "sparse_latent_attention")
    results = judged(capturing, *(f"{group}.graph*[reference-*]" for group in groups), "layer.graph*")
    assert [(result.check, result.status, result.reason) for result in results] == [
        (f"{group}.{check}", "pass", "")
        for group in (*groups, "layer")
        for check in ("graph", "graph_lengths")
    ]
    assert not any(result.cases.refused for result in results)


def test_the_function_is_warmed_up_on_a_side_stream(
    capturing: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    stream, graph = module.stream, module.graph

    def entered(side: Any) -> Any:
        events.append("side stream")
        return stream(side)

    def captured(*arguments: Any) -> Any:
        events.append("capture")
        return graph(*arguments)

    monkeypatch.setattr(module, "stream", entered)
    monkeypatch.setattr(module, "graph", captured)
    capturing.graph(lambda: events.append("call"))
    assert events == ["side stream", *["call"] * WARMUPS, "capture", "call"]


def test_what_waits_cannot_be_captured(name: str, capturing: Any) -> None:
    x = torch.ones(3, device=capturing.device)
    with pytest.raises(BackendError, match="-O graph=off runs without graphs") as error:
        capturing.graph(lambda: x.sum().item())
    assert str(error.value).startswith(f"backend '{name}' cannot capture this into a graph (RuntimeError: ")
    assert x.sum().item() == 3


def test_graphs_can_be_forbidden(name: str) -> None:
    backend = mla.load_backend(name, options={"graph": "off"})
    assert backend.graph(lambda: pytest.fail("called")) is None
    assert backend.environment()["graphs"] == "off"


def test_graphs_are_opt_in_on_iluvatar_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENFORCE_CUDA_GRAPH", raising=False)
    offered = mla.load_backend(name).graph(lambda: None) is not None
    assert offered == (name != "iluvatar")
    monkeypatch.setenv("VLLM_ENFORCE_CUDA_GRAPH", "1")
    assert mla.load_backend(name).graph(lambda: None) is not None


def test_a_stack_without_graphs_offers_none(
    capturing: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, f"{capturing.device.type.upper()}Graph")
    assert capturing.graph(lambda: pytest.fail("called")) is None
    assert capturing.environment()["graphs"] == "none"
