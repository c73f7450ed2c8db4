"""What only a process can show: torch's autoload, a broken vendor package, and the command line itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import DIMS, HEADLINE

from mla.bench import results

WORKLOAD = """
[[scenario]]
name = "decode"
mode = "decode"
query_lens = ["1*2"]
history = [5, 62]
runs = 3
passes = 2
warmups = 1
"""


@pytest.fixture
def run(emulate: Any, tmp_path: Path) -> Any:
    """Return a function that runs `python -m mla.bench` for a backend with a tiny config and workload."""
    (tmp_path / "tiny.json").write_text(json.dumps(DIMS))
    (tmp_path / "tiny.toml").write_text(WORKLOAD)

    def run(backend: str, *words: str, **environment: str) -> Any:
        small = ("--backend", backend, "--config", "tiny.json", "--workload", "tiny.toml", *HEADLINE)
        done = emulate(backend, "-m", "mla.bench", *small, *words, **environment)
        assert "Traceback" not in done.out + done.err, done.err
        return done

    return run


def test_the_command_line_writes_a_checked_result_and_says_what_it_cannot_trace(
    run: Any, tmp_path: Path
) -> None:
    done = run("nvidia", "--profile", "trace.json", "-o", "run.json")
    assert done.code == 0, done.err
    assert re.search(
        r"^profile    \d passes, eager, with \d+ operators of torch and no kernels of ",
        done.err,
        re.MULTILINE,
    )
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"decode / mla", "latent_attention (reference)"} <= names
    checked(tmp_path, "nvidia")


def checked(tmp_path: Path, backend: str) -> results.Run:
    """Return a run of a backend whose outputs were right."""
    written = results.decode((tmp_path / "run.json").read_bytes())
    assert {case.check.status for case in written.cases} == {"ok"}
    assert written.backend.name == backend
    assert written.backend.version == written.environment["mla"]
    assert written.environment["backend.device_count"] == "2"
    return written


def test_each_task_takes_the_device_of_its_local_number(run: Any, tmp_path: Path) -> None:
    done = run("nvidia", "-o", "run-%t.json", SLURM_LOCALID="1", SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="6")
    assert done.code == 0, done.err
    assert done.err.startswith("device 1 of 2, from SLURM_LOCALID\n")
    written = results.decode((tmp_path / "run-5.json").read_bytes())
    assert all(" --device 1 " in case.repro for case in written.cases)


def test_moore_does_not_need_autoload(run: Any, tmp_path: Path) -> None:
    """With autoload off, torch knows no musa until the plugin imports torch_musa."""
    done = run("moore", "-o", "run.json", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.code == 0, done.err
    environment = checked(tmp_path, "moore").environment
    assert environment["backend.TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert environment["backend.torch_musa"] == "2.7.1"


def test_a_torch_musa_that_does_not_import_is_a_sentence(run: Any) -> None:
    done = run("moore", EMULATED_FAULT="import", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.code == 3
    assert (
        "importing torch and torch_musa raised ImportError: torch_musa 2.7.1 needs torch 2.7.1;" in done.error
    )
    assert "install torch and torch_musa from Moore Threads" in done.error


def test_a_torch_musa_that_breaks_torch_itself_names_the_switch(run: Any) -> None:
    """torch imports vendors' packages by itself, and one that fails takes torch down with it."""
    done = run("moore", EMULATED_FAULT="import")
    assert done.code == 3
    assert "Failed to load the backend extension: torch_musa" in done.err
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.error


def test_a_state_is_found_out_in_a_child_process(emulate: Any) -> None:
    """`list` shows each backend as it is on this emulated host."""
    done = emulate("metax", "-m", "mla.bench", "list", "--json", EMULATED_COUNT="0")
    assert done.code == 0, done.err
    states = {record["name"]: record for record in json.loads(done.out)}
    assert states["cpu"]["state"] == "usable"
    for name in ("moore", "nvidia", "metax", "iluvatar"):
        assert states[name]["state"] == "no device"
    assert "torch.cuda.is_available() is False" in states["metax"]["reason"]
    assert "use `--backend metax`" in states["nvidia"]["hint"]
    assert "torch_musa is not installed" in states["moore"]["reason"]
