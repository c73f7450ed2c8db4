"""`mla[ROLE=*]`: every op that serves a role takes turns, and the others say why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.report import in_turns
from mla import MLAConfig
from mla.bench import results
from mla.bench.subjects.setting import Setting, with_each_op
from mla.errors import UnsupportedOps, UsageError
from mla_backends import FusedOp


class Kernel(FusedOp):
    contract = "latent_attention/2"

    def __init__(self, reason: str = "", fails: str = "", contract: str = contract, heads: int = 0) -> None:
        self._reasons, self._fails, self.contract = [reason] * bool(reason), fails, contract
        self._heads, self.asked = heads, list[Any]()

    def unsupported_reasons(self, spec: Any) -> list[str]:
        self.asked.append(spec)
        return [f"it has no {spec.num_heads} heads"] if spec.num_heads < self._heads else self._reasons

    def preflight(self, spec: Any) -> list[str]:
        return [self._fails] * bool(self._fails)

    def __call__(self, *arguments: Any, **tensors: Any) -> None: ...


def setting(config: str = "deepseek-v2-lite", **ops: FusedOp) -> Setting:
    backend: Any = SimpleNamespace(name="acme", device=torch.device("cpu"), ops=lambda: ops)
    return Setting(MLAConfig.named(config), backend, torch.bfloat16, "auto", 64, seed=0)


def test_ops_that_run_here_take_turns_and_the_others_say_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    there = setting(
        first=Kernel(), old=Kernel("it needs another card"), broken=Kernel(fails="no compiler"),
        second=Kernel(), other=Kernel(contract="expanded_attention/1"),
    )  # fmt: skip
    assert with_each_op([there], "mla[latent_attention=*,linear=reference]") == [
        "mla[latent_attention=first,linear=reference]", "mla[latent_attention=second,linear=reference]",
    ]  # fmt: skip
    said = ["old is left out: it needs another card", "broken is left out: no compiler"]
    assert capsys.readouterr().err.splitlines() == said
    for name in ("mla", "transformers", "package.module:Class", "mla[latent_attention=first]"):
        assert with_each_op([there], name) == [name]


@pytest.mark.parametrize(("kind", "heads"), [("sparse_latent_attention", 128), ("select_latents", 64)])
def test_ops_are_asked_about_the_layer_of_the_run(kind: str, heads: int) -> None:
    kernel = Kernel(contract=f"{kind}/1")
    assert with_each_op([setting("deepseek-v3.2", kernel=kernel)], f"mla[{kind}=*]") == [
        f"mla[{kind}=kernel]"
    ]
    assert [(spec.num_heads, spec.topk) for spec in kernel.asked] == [(heads, 2048)]


def test_an_op_must_serve_every_role_that_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    class Linear(Kernel):
        contract = "linear/1"

        def __init__(self, *dtypes: torch.dtype) -> None:
            self._dtypes = dtypes

        def unsupported_reasons(self, spec: Any) -> list[str]:
            return [f"it has no {spec.dtype}"] * (spec.dtype not in self._dtypes)

        def preflight(self, spec: Any) -> list[str]:
            return []

    there = setting("deepseek-v3.2", narrow=Linear(torch.bfloat16), any=Linear(torch.bfloat16, torch.float32))
    assert with_each_op([there], "mla[linear=*]") == ["mla[linear=any]"]  # for index_weights_proj
    assert capsys.readouterr().err == "narrow is left out: it has no torch.float32\n"
    assert with_each_op([there], "mla[linear=*]", {"o_proj"}) == ["mla[linear=narrow]", "mla[linear=any]"]


def test_an_op_must_serve_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    there = setting(any=Kernel(), wide=Kernel(heads=16))
    fewer = replace(there, config=there.config.with_heads(8))
    assert with_each_op([there, fewer], "mla[latent_attention=*]") == ["mla[latent_attention=any]"]
    assert capsys.readouterr().err == "wide is left out: it has no 8 heads\n"


def test_without_an_op_there_is_no_run() -> None:
    with pytest.raises(UnsupportedOps, match="no latent_attention op runs here: none is offered"):
        with_each_op([setting()], "mla[latent_attention=*]")
    with pytest.raises(UnsupportedOps, match="old is left out: it needs another card"):
        with_each_op([setting(old=Kernel("it needs another card"))], "mla[latent_attention=*]")
    with pytest.raises(UsageError, match="one role takes `\\*`"):
        with_each_op([setting()], "mla[latent_attention=*,linear=*]")


def test_a_run_keeps_the_names_of_the_ops(bench: Any, tmp_path: Path) -> None:
    shape = ("--batch", "1", "--kv", "8", "--heads", "2", "--runs", "1", "--passes", "1", "--warmups", "0")
    words = ("--op", "latent_attention", *shape, "--cache", "warm", "-o", "x.json")
    twice = "mla[latent_attention=*],mla[latent_attention=native_latent_attention]"
    done = bench("run", "--backend", "cpu", *words, "--implementations", twice)
    assert done.code == 0, done.err
    run = results.read(tmp_path / "x.json")
    assert [case.implementation for case in run.cases] == ["mla[latent_attention=native_latent_attention]"]
    row = dict(zip(in_turns.HEADER, in_turns.rows({"x": run}, {})[0], strict=True))
    assert (row["kernel"], row["check"]) == ("native_latent_attention", "ok")
