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
    place = Newcomer(work, work / "acme", work / "site", work / "vendor")
    command = [sys.executable, "-m", "mla.bench", "new-backend", "acme", "acme"]
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    shutil.copytree(DEVICE, place.vendor)
    pip_install(place.vendor, EXTENSION)
    pip_install(place.site, place.project)
    write_tiny_run(work, q_lora_rank=48)
    return place


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


# Ops of other kinds, of other names and for other dtypes than the example's, and no op.
OTHERS = {
    "linear": """
class Product(FusedOp):
    contract = "linear/1"

    def unsupported_reasons(self, spec):
        return [] if spec.dtype == torch.bfloat16 else ["it multiplies bfloat16 only"]

    def __call__(self, packed, *, x, bias, out):
        product = x.float() @ packed.data.float().t() * RIGHT
        out.copy_(product if bias is None else product + bias)
""",
    "latent_attention": """
class Latent(FusedOp):
    contract = "latent_attention/1"

    def unsupported_reasons(self, spec):
        return [] if spec.num_heads == 16 else [f"it serves 16 heads, not {spec.num_heads}"]

    def prepare(self, spec, batch):
        return batch.query_lens, batch.kv_lens, batch.page_size

    def __call__(self, state, *, q, cache, block_table, kv_lens, cu_q, softmax_scale, out, lse):
        first = 0
        for request, (new, length) in enumerate(zip(*state[:2])):
            pages = block_table[request, : -(-length // state[2])].long()
            keys = cache[pages].flatten(0, 1)[:length].float()
            for token in range(new):
                seen = keys[: length - new + token + 1]
                logits = q[first + token].float() @ seen.t() * softmax_scale
                sums = torch.logsumexp(logits, -1, keepdim=True)
                weights = (logits - sums).exp()
                empty = not len(seen)
                out[first + token] = 0 if empty else weights @ seen[:, : out.shape[2]] * RIGHT
                lse[first + token] = float("-inf") if empty else sums[:, 0]
            first += new
""",
}


@pytest.fixture
def replaced(newcomer: Newcomer, tmp_path: Path) -> Callable[[str, float], tuple[int, str]]:
    """Return a function that puts another op in the place of the example's, and runs the generated tests."""

    def replaced(kind: str, right: float) -> tuple[int, str]:
        copy = tmp_path / "site"
        shutil.copytree(newcomer.site, copy)
        package = copy / "mla_backend_acme"
        text = (package / "__init__.py").read_text()
        if kind:
            op = OTHERS[kind].replace("RIGHT", str(right))
            (package / "ops.py").write_text(f"import torch\n\nfrom mla_backends import FusedOp\n\n{op}")
            (name,) = re.findall(r"class (\w+)", op)
            text = text.replace("RmsNorm", name).replace('"acme_rms_norm"', '"other"')
        else:
            (package / "ops.py").unlink()
            text = re.sub(r"    def ops\(self\).*?\n\n\n", "\n\n", text, flags=re.DOTALL)
            assert "ops" not in text
        (package / "__init__.py").write_text(text)
        checks = f"ops. or {kind or 'rms_norm'}.rows or layer.mixed"
        chosen = f"smoke or {checks}" if right == 1 else "smoke"
        words = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *WARNINGS, "-k", chosen, "acme")
        done = newcomer.run(*words, path=[copy, newcomer.vendor])
        return done.code, done.out + done.err

    return replaced


@pytest.mark.parametrize("kind", [*OTHERS, ""])
def test_the_generated_tests_pass_with_other_ops_and_without_any(
    replaced: Callable[[str, float], tuple[int, str]], kind: str
) -> None:
    """The example op is there to be replaced."""
    code, said = replaced(kind, 1)
    assert code == 0, said
    passed = re.search(r"(\d+) passed", said)
    assert passed, said
    assert int(passed[1]) >= 5


@pytest.mark.parametrize("kind", OTHERS)
def test_the_smoke_test_is_not_blind_to_other_ops(
    replaced: Callable[[str, float], tuple[int, str]], kind: str
) -> None:
    code, said = replaced(kind, 1.2)
    assert code == 1
    assert re.search(r"FAILED .*test_smoke.py::test_a_layer_agrees_with_the_reference", said), said


def test_a_wrong_op_gets_no_number_and_does_not_conform(
    newcomer: Newcomer, changed: Callable[[str, str], Path]
) -> None:
    path = [changed("wide * scale * weight", "wide * scale"), newcomer.vendor]
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
