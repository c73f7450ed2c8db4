"""A backend for a card nobody has heard of, as its vendor would add it: from outside, following the README.

`acme` is an emulated device on PrivateUse1. Its extension `torch_acme` is installed as a real one would be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import write_tiny_run
from torch.utils import backend_registration

from mla.bench import results
from mla.conformance import report

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch cannot take a device written in Python", allow_module_level=True)

HERE = Path(__file__).parent
VENDOR = (HERE.parents[1] / "backends" / "emulation" / "device", HERE / "torch_acme")
BENCH = ("-m", "mla.bench", "--backend", "acme", "--config", "tiny.json", "--workload", "tiny.toml")
CONFORMANCE = ("-m", "mla.conformance", "--backend", "acme", "--quick")


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    code: int
    out: str
    err: str


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
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.home,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, folders)),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
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
    found = Newcomer(work, work / "acme", work / "site", work / "vendor")
    command = [sys.executable, "-m", "mla.bench", "new-backend", "acme", "acme"]
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    pip_install(found.vendor, *VENDOR)
    pip_install(found.site, found.project)
    write_tiny_run(work, q_lora_rank=48)
    return found


@pytest.fixture
def changed(newcomer: Newcomer, tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that changes the op in a copy of the installation."""

    def changed(before: str, after: str) -> Path:
        copy = tmp_path / "site"
        shutil.copytree(newcomer.site, copy)
        ops = copy / "mla_backend_acme" / "ops.py"
        text = ops.read_text()
        assert text.count(before) == 1
        ops.write_text(text.replace(before, after))
        return copy

    return changed


def test_the_doctor_finds_it_usable(newcomer: Newcomer) -> None:
    done = newcomer.run("-m", "mla.bench", "doctor", "acme")
    assert (done.code, done.err) == (0, "")
    assert "acme: usable (mla-backend-acme 0.1.0)" in done.out
    assert re.search(r"device +Acme One \(acme:0\)", done.out)
    assert "torch_acme of torch-acme 1.2" in done.out
    assert "acme_rms_norm: offered for rms_norm/1, which this config does not call" in done.out


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
    words = ("--xfails", "acme/xfails.txt", "--report", str(tmp_path / "card.json"))
    done = newcomer.run(*CONFORMANCE, *words)
    assert done.code == 0, done.out
    found = report.decode((tmp_path / "card.json").read_bytes())
    counts = found.counts()
    assert (counts["fail"], counts["xfail"], counts["xpass"]) == (0, 0, 0)
    assert counts["pass"] > 100
    passed = {one.check for one in found.checks if one.of == "acme_rms_norm" and one.status == "pass"}
    assert {"rms_norm.formula", "rms_norm.eps", "rms_norm.large", "rms_norm.strided"} <= passed


def test_its_own_tests_pass(newcomer: Newcomer) -> None:
    """The pytest form of the suite; all of it runs above, so a part will do."""
    chosen = "smoke or rms_norm"
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-k", chosen, "acme")
    done = newcomer.run(*words)
    assert done.code == 0, done.out + done.err
    passed = re.search(r"(\d+) passed", done.out)
    assert passed
    assert int(passed[1]) >= 6


LINEAR = """
import torch
from mla_backends import FusedOp


class AcmeLinear(FusedOp):
    contract = "linear/1"

    def unsupported_reasons(self, spec):
        return [] if spec.dtype == torch.bfloat16 else ["it multiplies bfloat16 only"]

    def __call__(self, packed, *, x, bias, out):
        out.copy_(x.float() @ packed.data.t().float() * SCALE)
"""


@pytest.mark.parametrize(
    ("offered", "scale", "right"),
    [("{'acme_linear': AcmeLinear()}", 1, True), ("{'mine': AcmeLinear()}", 1.1, False), ("{}", 1, True)],
    ids=["another op", "a wrong op", "no op"],
)
def test_the_smoke_test_follows_the_ops(
    newcomer: Newcomer, tmp_path: Path, offered: str, scale: float, right: bool
) -> None:
    """The example op is there to be replaced; the test that came with it must neither fail nor go blind."""
    copy = tmp_path / "site"
    shutil.copytree(newcomer.site, copy)
    package = copy / "mla_backend_acme"
    (package / "ops.py").write_text(LINEAR.replace("SCALE", str(scale)))
    text = (package / "__init__.py").read_text()
    text = text.replace("ops import RmsNorm", "ops import AcmeLinear")
    (package / "__init__.py").write_text(text.replace('{"acme_rms_norm": RmsNorm()}', offered))
    words = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "acme/tests/test_smoke.py")
    done = newcomer.run(*words, path=[copy, newcomer.vendor])
    assert (done.code == 0) == right, done.out
    assert ("2 passed" if right else "1 failed, 1 passed") in done.out


def test_a_wrong_op_gets_no_number_and_does_not_conform(
    newcomer: Newcomer, changed: Callable[[str, str], Path]
) -> None:
    path = [changed("wide * scale * weight", "wide * scale"), newcomer.vendor]
    done = newcomer.run(*BENCH, "--scenario", "prefill", path=path)
    assert done.code == 4
    assert "wrong result" in done.err
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
