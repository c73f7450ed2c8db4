"""A backend for a card nobody has heard of, as its vendor would add it: from outside, following the README.

`acme` is an emulated device on PrivateUse1. Its extension `torch_acme` is installed as a real one would be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from outcome import Outcome
from tiny_run import write_tiny_run
from torch.utils import backend_registration

from mla.bench import results
from mla.conformance.report import ConformanceReport

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch cannot take a device written in Python", allow_module_level=True)

HERE = Path(__file__).parent
DEVICE, EXTENSION = HERE.parents[1] / "backends" / "emulation" / "device", HERE / "torch_acme"
BENCH = ("-m", "mla.bench", "--backend", "acme", "--config", "tiny.json", "--workload", "tiny.toml")
BENCH += ("--cache", "warm")  # the device's caches are emulated elsewhere
# All are errors, but for that of an editable install of mla: its finder is imported before pytest is.
WARNINGS = ("-W", "error", "-W", "ignore:Module already imported so cannot be rewritten")
CONFORMANCE = ("-m", "mla.conformance", "--backend", "acme", "--quick", "--draws", "2")


@dataclass(frozen=True)
class Newcomer:
    """Somebody's folder with the generated project, and the installations beside it."""

    home: Path
    project: Path
    site: Path  # the project, installed
    vendor: Path  # what the vendor of the card ships, installed

    def run(self, *words: str, path: Sequence[Path] | None = None, **environment: str) -> Outcome:
        """Run Python beside the project, so that what is installed counts: both folders, or those given."""
        folders = [
            *map(str, (self.site, self.vendor) if path is None else path),
            os.environ.get("PYTHONPATH", ""),
        ]
        places = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.home,
            env={**os.environ, **places, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)


def pip_install(target: Path, *sources: Path) -> None:
    """Build wheels, without a network, and install them into a folder of their own."""
    flags = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    words = ["-m", "pip", "install", *flags, "--target", str(target), *map(str, sources)]
    subprocess.run([sys.executable, *words], check=True)


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    """Write the project with `new-backend`, outside of any checkout, and install it as it is."""
    work = tmp_path_factory.mktemp("work")
    place = Newcomer(work, work / "acme", work / "site", work / "vendor")
    command = [sys.executable, "-m", "mla.bench", "new-backend", "acme", "acme"]
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    shutil.copytree(DEVICE, place.vendor)
    pip_install(place.vendor, EXTENSION)
    pip_install(place.site, place.project)
    write_tiny_run(work, q_lora_rank=48)
    return place


@pytest.fixture
def copied(newcomer: Newcomer, tmp_path: Path) -> Path:
    """Return the package in a copy of the installation, to be changed."""
    return Path(shutil.copytree(newcomer.site, tmp_path / "site")) / "mla_backend_acme"


def test_the_doctor_finds_it_usable(newcomer: Newcomer) -> None:
    done = newcomer.run("-m", "mla.bench", "doctor", "acme")
    assert (done.code, done.err) == (0, "")
    assert "acme: usable (mla-backend-acme 0.1.0)" in done.out
    assert re.search(r"device +Acme One \(acme:0\)", done.out)
    assert "torch_acme of torch-acme 1.2" in done.out
    assert "acme_rms_norm: offered for rms_norm/1, not called by this config" in done.out


def test_a_run_is_right_and_uses_the_op(newcomer: Newcomer, tmp_path: Path) -> None:
    """With autoload off, so that it is the plugin that brings the device."""
    done = newcomer.run(*BENCH, "-o", str(tmp_path / "run.json"), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.code == 0, done.err
    run = results.decode((tmp_path / "run.json").read_bytes())
    assert (run.backend.name, run.backend.version, run.backend.device) == ("acme", "0.1.0", "Acme One")
    cases = {(case.scenario, case.implementation): case for case in run.cases}
    assert all(case.check.status == "ok" for case in cases.values())
    for scenario in ("prefill", "decode"):
        assert cases[scenario, "mla"].ops["q_a_layernorm"] == "acme_rms_norm"
        assert cases[scenario, "mla-reference"].ops["q_a_layernorm"] == "reference"


def test_it_conforms(newcomer: Newcomer, tmp_path: Path) -> None:
    """In what is its own: the rest are the reference's ops on the host, which are checked elsewhere."""
    words = ("--xfails", "acme/xfails.txt", "--report", str(tmp_path / "card.json"))
    only = [word for group in ("device", "ops", "rms_norm", "layer") for word in ("--only", group)]
    done = newcomer.run(*CONFORMANCE, *words, *only)
    assert done.code == 0, done.out
    card = msgspec.json.decode((tmp_path / "card.json").read_bytes(), type=ConformanceReport)
    counts = card.counts()
    assert (counts["fail"], counts["xfail"], counts["xpass"]) == (0, 0, 0)
    assert counts["pass"] > 35
    passed = {check.check for check in card.checks if check.of == "acme_rms_norm" and check.status == "pass"}
    assert {"rms_norm.formula", "rms_norm.grid"} <= passed


def test_its_own_tests_pass(newcomer: Newcomer) -> None:
    """The pytest form of the suite; more of it runs above, so a part will do."""
    chosen = "smoke or rms_norm"
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *WARNINGS, "-k", chosen, "acme")
    done = newcomer.run(*words)
    assert done.code == 0, done.out + done.err
    passed = re.search(r"(\d+) passed", done.out)
    assert passed
    assert int(passed[1]) >= 6


# An op of another kind, of another name and for other dtypes than the example's.
OTHER = """
import torch

from mla_backends import FusedOp

class Product(FusedOp):
    contract = "linear/1"

    def unsupported_reasons(self, spec):
        return [] if spec.dtype == torch.bfloat16 else ["it multiplies bfloat16 only"]

    def __call__(self, packed, *, x, bias, out):
        product = x.float() @ packed.data.float().t() * RIGHT
        out.copy_(product if bias is None else product + bias)
"""


@pytest.mark.parametrize("right", [1, 1.2, None], ids=["another op", "a wrong one", "no op"])
def test_the_generated_tests_judge_what_is_in_the_examples_place(
    newcomer: Newcomer, copied: Path, right: float | None
) -> None:
    """The example op is there to be replaced."""
    text = (copied / "__init__.py").read_text()
    if right is None:
        (copied / "ops.py").unlink()
        text = re.sub(r"    def ops\(self\).*?\n\n\n", "\n\n", text, flags=re.DOTALL)
        assert "ops" not in text
    else:
        (copied / "ops.py").write_text(OTHER.replace("RIGHT", str(right)))
        text = text.replace("RmsNorm", "Product").replace('"acme_rms_norm"', '"other"')
    (copied / "__init__.py").write_text(text)
    chosen = "smoke" if right == 1.2 else "smoke or ops. or linear.rows or layer.mixed"
    words = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *WARNINGS, "-k", chosen, "acme")
    done = newcomer.run(*words, path=[copied.parent, newcomer.vendor])
    said = done.out + done.err
    if right == 1.2:
        assert done.code == 1
        assert re.search(r"FAILED .*test_smoke.py::test_a_layer_agrees_with_the_reference", said), said
        return
    passed = re.search(r"(\d+) passed", said)
    assert done.code == 0, said
    assert passed
    assert int(passed[1]) >= 5


def test_a_wrong_op_gets_no_number_and_does_not_conform(newcomer: Newcomer, copied: Path) -> None:
    text = (copied / "ops.py").read_text()
    assert text.count("wide * scale * weight") == 1
    (copied / "ops.py").write_text(text.replace("wide * scale * weight", "wide * scale"))
    path = [copied.parent, newcomer.vendor]
    done = newcomer.run(*BENCH, "--scenario", "prefill", path=path)
    assert done.code == 4
    assert "wrong result: 1 case got no number" in done.err
    done = newcomer.run(*CONFORMANCE, "--only", "rms_norm.formula", path=path)
    assert done.code == 4
    assert "rms_norm.formula[acme_rms_norm-bfloat16]" in done.out


def test_without_the_vendors_extension_one_sentence_says_what_to_install(newcomer: Newcomer) -> None:
    done = newcomer.run(*BENCH, path=[newcomer.site])
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        "error: backend 'acme' has no usable device: torch_acme is not installed; install torch_acme and the "
        "torch build that it was made for.\n"
    )
