"""`ceilings`: what the command measures, prints and stores, and what it refuses."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_variables import launched

from mla.bench import results
from mla.bench.limits.microbench import Microbenchmark
from mla.bench.results.file import decode_any
from mla.bench.results.schema import Ceiling, CeilingRun
from mla.bench.run import ceilings as ceilings_command

__all__ = ["launched"]
Bench = Callable[..., Any]
CPU = ("ceilings", "--backend", "cpu")


def test_the_command_measures_stores_and_shows_the_same(bench: Bench, quick_ceilings: None) -> None:
    done = bench(*CPU, "--dtype", "fp32", "-o", "c.json")
    assert done.code == 0
    assert done.err == ""
    run = decode_any(Path("c.json").read_bytes())
    assert [measurement.work for measurement in run.measured[:4]] == ["read", "read", "copy", "copy"]
    assert {measurement.footprint_bytes for measurement in run.measured[:4]} == {1 << 18, 1 << 20}
    products = [measurement.source.rpartition(", ")[2] for measurement in run.measured[4:]]
    assert products[:2] == ["16 x 16 x 16 float32", "32 x 32 x 32 float32"]
    assert products[2:4] == ["2 x 2048 x 3648 float32", "3 x 2048 x 3648 float32"]
    assert len(products) == 2 + 3 * 2
    assert all(measurement.value > 0 for measurement in run.measured)
    assert run.environment["torch_threads"] == str(torch.get_num_threads())
    assert not run.interrupted
    assert bench("show", "c.json").out == done.out
    assert "The backend declares no peaks for this device." in done.out


@pytest.mark.parametrize("words", [("-o", "c.json", "--format", "json"), ("-o", "/dev/stdout")])
def test_json_on_stdout_is_the_file_alone(bench: Bench, quick_ceilings: None, words: tuple[str, ...]) -> None:
    done = bench(*CPU, "--dtype", "fp32", *words)
    assert not decode_any(done.out.encode()).interrupted
    assert not Path("c.json").exists() or done.out == Path("c.json").read_text()


def test_the_default_is_what_the_device_computes_natively(bench: Bench, quick_ceilings: None) -> None:
    run = bench("ceilings", "--backend", "fake-float32-only", "--format", "json", fakes=["float32_only"])
    dtypes = {measurement.dtype for measurement in decode_any(run.out.encode()).measured}
    assert dtypes == {None, "float32"}


def test_what_a_device_refuses_is_named_and_left_out(
    bench: Bench, quick_ceilings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Microbenchmark, size: int) -> Ceiling:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(Microbenchmark, "copy", refuse)
    done = bench(*CPU, "--dtype", "fp32", "--format", "json")
    assert done.code == 0
    assert done.err.splitlines() == [
        "skipped: copy of 256 KiB: RuntimeError: out of memory",
        "skipped: copy of 1 MiB: RuntimeError: out of memory",
    ]
    assert "copy" not in {measurement.work for measurement in decode_any(done.out.encode()).measured}


@pytest.mark.parametrize(
    ("number", "code", "by"), [(signal.SIGINT, 130, ""), (signal.SIGHUP, 129, " by SIGHUP")]
)
def test_a_signal_keeps_what_was_measured(
    bench: Bench,
    quick_ceilings: None,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    by: str,
) -> None:
    def interrupt(self: Microbenchmark, size: int) -> Ceiling:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr(Microbenchmark, "copy", interrupt)
    done = bench(*CPU, "-o", "c.json")
    assert done.code == code
    assert done.error == f"interrupted{by}: the result holds what was measured until then"
    run = decode_any(Path("c.json").read_bytes())
    assert [measurement.work for measurement in run.measured] == ["read", "read"]
    assert run.interrupted


def test_nothing_measured_is_exit_code_5(
    bench: Bench, quick_ceilings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Microbenchmark, "_timed", lambda self, ways, work: 1 / 0)
    assert bench(*CPU).code == 5


def test_what_is_not_begun_in_time_is_left_out_and_named(
    bench: Bench, quick_ceilings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings_command, "MOST_SECONDS", 0)
    done = bench(*CPU, "--dtype", "fp32")
    assert done.code == 5
    assert done.error.startswith("skipped after 0 s: read of 256 KiB, read of 1 MiB, copy of 256 KiB, ")
    assert done.error.endswith(", float32 product 3 x 2048 x 2048")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dtype", "bf61"], 2, "Error: Invalid value for '--dtype': unknown dtype 'bf61'. Did you mean "),
        (["--dtype", "bf16, fp32,"], 2, "Error: Invalid value for '--dtype': unknown dtype ''. Choose "),
        (["-O", "x=1"], 2, "error: backend 'cpu' has no option 'x'; it knows: threads"),
        (["--device", "7"], 3, "error: backend 'cpu' has no device 7: it has 1, numbered from 0."),
        (["-o", "no/c.json"], 2, "error: cannot write 'no/c.json': there is no folder 'no'."),
        (["--format", "csv"], 2, "Error: Invalid value for '--format': 'csv' is not one of"),
    ],
)
def test_a_mistake_gets_its_sentence(bench: Bench, words: list[str], code: int, message: str) -> None:
    done = bench(*CPU, *words)
    assert done.code == code
    assert done.out == ""
    assert done.error.startswith(message)


def test_show_refuses_a_format_that_ceilings_do_not_have(bench: Bench, ceiling_run: CeilingRun) -> None:
    Path("c.json").write_bytes(results.encode(ceiling_run))
    done = bench("show", "c.json", "--format", "csv")
    assert (done.code, done.error) == (2, "error: ceilings cannot be printed as csv: use table, md or json.")
