"""A card that nobody wrote a plugin for, from the command line: its first checked number, or a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mla.bench import results

INSIDE = Path(__file__).parent / "inside"
REQUIRED = "is_available,device_count,set_device,synchronize"


def read(tmp_path: Path) -> results.Run:
    return results.decode((tmp_path / "run.json").read_bytes())


def test_a_device_torch_reports_gets_a_checked_number(bench: Any, tmp_path: Path) -> None:
    """Nothing but its package is named; torch says which accelerator it has."""
    done = bench("-O", "import=torch_acme", "-o", "run.json")
    assert done.code == 0, done.err
    said = done.err.splitlines()
    assert said[0] == "device acme:0: the accelerator that torch reports (-O device= chooses)"
    assert " | torch: Acme One (acme) | " in done.out
    run = read(tmp_path)
    assert {case.check.status for case in run.cases} == {"ok"}
    assert all(set(case.ops.values()) == {"reference"} for case in run.cases)
    assert run.backend.name == "torch"
    facts = {key.removeprefix("backend."): value for key, value in run.environment.items()}
    assert facts["torch_acme"] == "4.5.6"
    assert (facts["device"], facts["device_type"], facts["ops"]) == ("acme:0", "acme", "reference only")
    assert facts["dtypes"].startswith("bfloat16, float16, float32 (tried;")
    assert (facts["device_clock"], facts["graphs"]) == ("events", "off")
    assert "acme events" in {timing.clock for case in run.cases for timing in case.timings}


def test_a_stack_that_offers_the_least_gets_one_too(bench: Any, tmp_path: Path) -> None:
    """No events, no properties, no counters; the user's index counts more than the launcher's number."""
    words = ("-O", "device=acme:1", "-o", "run.json")
    done = bench(*words, ACME_HAS=REQUIRED, SLURM_LOCALID="0")
    assert done.code == 0, done.err
    run = read(tmp_path)
    assert {case.check.status for case in run.cases} == {"ok"}
    assert {timing.clock for case in run.cases for timing in case.timings} <= {"host"}
    assert all(" -O device=acme:1 " in case.repro for case in run.cases)
    assert run.environment["backend.device"] == "acme:1"
    assert run.environment["backend.device_clock"] == "none: torch.acme has no Event"


def test_a_missing_kernel_names_the_operator_and_the_device(bench: Any) -> None:
    done = bench("-O", "device=acme", ACME_REFUSES="aten::bmm")
    assert done.code == 3
    assert done.error.startswith(
        "error: scenario 'prefill' failed: NotImplementedError: Could not run 'aten::bmm' with "
        "arguments from the 'acme' backend"
    )
    assert "op 'reference' of " in done.error
    assert "registered at" not in done.err


def test_doctor_sets_the_device_up(acme: Any) -> None:
    done = acme("-m", "mla.bench", "doctor", "torch", "-O", "device=acme", "--json")
    assert done.code == 0, done.err
    (diagnosis,) = json.loads(done.out)["backends"]
    assert (diagnosis["state"], diagnosis["facts"]["device"]) == ("usable", "acme:0")
    assert diagnosis["evidence"]["device"] == "acme, named by -O device=acme"
    assert diagnosis["evidence"]["extension"] == "torch_acme"
    assert {choice["implementation"] for choice in diagnosis["facts"]["ops"].values()} == {"reference"}


def test_whatever_a_stack_lacks_it_runs_or_says_why(acme: Any) -> None:
    """One process for all: the device of a process cannot be replaced."""
    configuration = ("-c", str(INSIDE / "pytest.ini"), f"--confcutdir={INSIDE}", "-p", "no:cacheprovider")
    done = acme("-m", "pytest", *configuration, str(INSIDE))
    assert done.code == 0, done.out + done.err
    match = re.search(r"(\d+) passed", done.out)
    assert match, done.out
    assert int(match[1]) > 100
