"""The command itself, with tiny sizes on the host: real runs, real results, and a second time."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import campaign
from benchmarks.gpu.record import FILE
from mla.bench import results
from mla.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "campaign.sh"


def run(folder: Path, *words: str, **variables: str) -> Any:
    done = subprocess.run(
        [str(SCRIPT), *words],
        cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_sections_run_and_a_second_campaign_keeps_them(tmp_path: Path) -> None:
    words = ("--smoke", "--backend", "cpu", "--out", "out", "--only", "grid,libraries")
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["grid", "heads-4", "ok"]
    assert all("skipped" in line and "about nvidia only" in line for line in lines[2:] if line.strip())
    (path,) = (tmp_path / "out" / "grid").glob("cpu-*-heads-4.json")
    found = results.read(path)
    assert [(case.check.status, case.heads) for case in found.cases] == [("ok", 4), ("ok", 4)]
    facts = json.loads((tmp_path / "out" / FILE).read_bytes())["facts"]
    assert {"torch", "device", "installed.mla"} <= set(facts)
    assert "latent_attention batch=2 kv=64 heads=4" in (tmp_path / "out" / "table.md").read_text()
    again = run(tmp_path, *words)
    assert again.returncode == 0
    assert again.stdout.splitlines()[1].split()[:4] == ["grid", "heads-4", "ok", "(kept)"]


def test_ops_are_compared_inside_the_layer_and_a_profile_stays_with_the_results(tmp_path: Path) -> None:
    done = run(tmp_path, "--smoke", "--backend", "cpu", "--out", "out", "--only", "prepare,choices")
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split()[:3] for line in done.stdout.splitlines()[1:] if line.strip()]
    assert ran[:4] == [
        ["prepare", "ops", "ok"],
        ["prepare", "ops-deepseek-r1", "ok"],
        ["prepare", "other-ops", "ok"],
        ["choices", "profile", "ok"],
    ]
    folder = tmp_path / "out" / "choices"
    (trace,) = folder.glob("cpu-*-profile.json.trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    (path,) = folder.glob("cpu-*-native-latent-attention.json")
    used = {case.implementation: case.ops["latent_attention"] for case in results.read(path).cases}
    mine = "native_latent_attention"
    assert used == {
        "mla": mine,
        f"mla[latent_attention={mine}]": mine,
        "mla[latent_attention=reference]": "reference",
    }


def test_a_device_that_is_not_there_ends_soon_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, "--backend", "metax", "--only", "standard,grid", "--out", "out")
    assert done.returncode == 5
    assert "the backend is not usable: " in done.stdout
    assert "ok" not in done.stdout.split()


def test_the_list_and_wrong_names(tmp_path: Path) -> None:
    done = run(tmp_path, "--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["prepare", "facts", "standard"]
    wrong = run(tmp_path, "--only", "standart")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: there is no section 'standart'. Did you mean 'standard'?")
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_without_the_project_is_a_sentence(tmp_path: Path) -> None:
    for python, said in (("no-such-python", "there is no 'no-such-python'"), ("false", "'false' has no mla")):
        done = run(tmp_path, "--list", PYTHON=python)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {said}")


def test_a_machine_that_takes_the_process_down_is_not_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "facts.py").write_text("import os; os.abort()")
    monkeypatch.setattr(campaign, "HERE", tmp_path)
    found = campaign.ask_machine("acme")
    assert (found.usable, found.card) == (False, "unknown")
    assert found.reason.startswith("setting up the device ended with code -6")


def test_a_budget_is_that_of_the_whole_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the two minutes that the first setup of a device may take."""
    monkeypatch.setattr(campaign, "BEGAN", time.monotonic() - 100)
    monkeypatch.setattr(campaign, "ask_machine", lambda name: campaign.Machine(name, "Card", True))
    words = ["--smoke", "--backend", "cpu", "--only", "grid", "--budget", "100s", "--out", str(tmp_path)]
    assert campaign.campaign.main(words, standalone_mode=False) == 5
    assert "the budget is used up" in capsys.readouterr().out


def test_only_keeps_the_order_of_value() -> None:
    every = campaign.sections(campaign.Machine("cpu"))
    assert [one.name for one in campaign.chosen(every, "grid, facts")] == ["facts", "grid"]
    with pytest.raises(UsageError):
        campaign.chosen(every, "facts,nothing")
