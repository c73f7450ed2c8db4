"""`doctor`: torch and backends that abort, promise too much or are not there, and what it advises."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla.bench.cli import devices
from mla_backends.known import KNOWN

Bench = Callable[..., Any]

LOOSE = """
import os
from mla_backends import Availability, Backend, FusedOp

class Loose(Backend):
    name = "loose"
    api_version = 1

    def probe(self):
        PROBE
        return Availability(True, evidence={"card": "seen"})

    def setup(self, index=None):
        SETUP
        import torch
        return torch.device("cpu")

    def synchronize(self):
        pass

    def dtypes(self):
        import torch
        return (torch.float32,)

    def ops(self):
        return OPS

class Norm(FusedOp):
    contract = "rms_norm/1"
    def __call__(self, **tensors): ...

class Rotate(FusedOp):
    contract = "rotate_query/1"
    def unsupported_reasons(self, spec):
        return [f"it rotates float16 only, not {spec.dtype}"]
    def __call__(self, **tensors): ...

class Write(FusedOp):
    contract = "write_latent/1"
    remarks = ["one token at a time"]
    def __call__(self, **tensors): ...
"""


NO_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"


@pytest.fixture
def torch_that(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a folder in which `torch` is this code."""

    def torch_that(code: str) -> Path:
        (tmp_path / "torch.py").write_text(code)
        return tmp_path

    return torch_that


@pytest.fixture
def extension(tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that installs a distribution which torch imports by itself, with that code."""

    def extension(name: str, code: str) -> Path:
        folder = tmp_path / name
        facts = folder / f"{name}-2.5.dist-info"
        facts.mkdir(parents=True)
        (folder / f"{name}.py").write_text(f"{code}\ndef autoload(): ...\n")
        (facts / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 2.5\n"
        )
        (facts / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {name}:autoload\n")
        return folder

    return extension


@pytest.fixture
def loose(tmp_path: Path) -> Callable[..., None]:
    """Return a function that writes an unpackaged backend, loose:Loose, with that probe, setup and ops."""

    def loose(probe: str = "pass", setup: str = "pass", ops: str = "{}") -> None:
        code = LOOSE.replace("PROBE", probe).replace("SETUP", setup).replace("OPS", ops)
        (tmp_path / "loose.py").write_text(code)

    return loose


def blocks(text: str) -> dict[str, list[str]]:
    """Return title -> lines of the report."""
    parts = [block.splitlines() for block in text.split("\n\n")]
    return {title: [" ".join(line.split()) for line in lines] for title, *lines in parts}


def test_every_backend_gets_a_block_and_one_that_works_suffices(isolated: Bench) -> None:
    done = isolated("doctor", fakes=["good", "no_device", "crash", "duplicate_a", "duplicate_b"])
    assert (done.code, done.err) == (0, "")
    by_title = blocks(done.out)
    assert by_title["fake-no-device: no device (mla-backend-fake-no-device 1.0)"] == [
        "reason no card on the bus",
        "evidence cards: 0",
        "fix plug one in",
    ]
    crash = by_title["fake-crash: no answer (mla-backend-fake-crash 1.0)"]
    assert crash[0] == "reason the probe died with signal SIGABRT"
    twin = by_title["fake-twin: duplicate"]
    assert twin[1].startswith("fix uninstall one of them: `pip uninstall mla-backend-fake-duplicate-a` or ")
    good = by_title["fake-good: usable (mla-backend-fake-good 1.0)"]
    assert {"evidence device: host", "device fake-good (cpu)", "memory unknown"} <= set(good)
    assert {"ops for deepseek-v2-lite in bfloat16:", "latent_attention: reference"} <= set(good)
    assert set(KNOWN) <= {title.partition(": not installed")[0] for title in by_title}
    assert not [title for title in by_title if title.startswith("torch: ")], "fake-good is enough"
    assert done.out.splitlines()[-1] == "usable: fake-good"


def test_where_nothing_is_usable_the_backend_without_a_plugin_is_tried(isolated: Bench) -> None:
    done = isolated("doctor", fakes=["no_device"])
    (block,) = [lines for title, lines in blocks(done.out).items() if title.startswith("torch: no device")]
    assert block[0].startswith("reason torch ")
    assert "-O device=NAME" in block[1]


def test_options_belong_to_the_backend_that_is_named(bench: Bench) -> None:
    done = bench("doctor", "-O", "native=off")
    said = "error: -O is an option of one backend: name it, as in `doctor torch -O device=cpu`.\n"
    assert (done.code, done.out, done.err) == (2, "", said)
    done = bench("doctor", "torch", "-O", "devise=cpu")
    assert done.code == 2
    (block,) = [lines for title, lines in blocks(done.out).items() if title.startswith("torch: bad option")]
    assert block == [
        "reason backend 'torch' has no option 'devise'; it knows: device, import, graph, threads."
    ]


def test_two_names_of_one_distribution_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "distribution_version", {"mla": "0.1.0", "mla-bench": "0.1.0"}.get)
    said = bench("doctor", "-O", "native=off").err
    assert said.startswith("`mla` (the old name) and `mla-bench` are both installed and own the same files: ")
    assert "run `pip uninstall mla mla-bench`, then install again\n" in said


def test_json_holds_the_same_for_machines(process: Bench, torch_that: Any) -> None:
    path = [torch_that(NO_TORCH)]
    done = process("doctor", "fake-no-device", "--json", fakes=["no_device", "good"], path=path)
    assert (done.code, done.err) == (3, "")
    diagnosed = json.loads(done.out)
    assert diagnosed["host"]["python"].endswith(f"({sys.executable})")
    (backend,) = diagnosed["backends"]
    assert backend == {
        "name": "fake-no-device",
        "state": "no device",
        "distribution": "mla-backend-fake-no-device",
        "version": "1.0",
        "reason": "no card on the bus",
        "evidence": {"cards": "0"},
        "facts": {},
        "fixes": ["plug one in"],
    }
    assert diagnosed["usable"] == []


def test_a_name_that_nobody_offers_is_a_sentence(bench: Bench) -> None:
    done = bench("doctor", "cup")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: unknown backend 'cup' (did you mean 'cpu'?); installed: ")
    assert len(done.err.splitlines()) == 1


def test_a_known_name_that_is_not_installed_gets_its_pip_line(isolated: Bench) -> None:
    done = isolated("doctor", "cpu")
    assert (done.code, done.err) == (3, "")
    assert blocks(done.out)["cpu: not installed"] == [
        "reason no installed distribution offers it (any CPU that PyTorch runs on)",
        "fix run `pip install . ./backends ./plugins/cpu` in a checkout (once released, "
        f"`pip install mla-backend-cpu`), with torch from {KNOWN['cpu'].torch_source}",
    ]
    assert done.out.endswith("\n\nusable: none\n")


# ------------------------------------------------------------------------------------- beyond the probe


def test_ops_are_listed_with_every_reason_for_the_default_config(process: Bench, loose: Any) -> None:
    loose(ops="{'norm': Norm(), 'turn': Rotate(), 'put': Write()}")
    done = process("doctor", "loose:Loose")
    assert done.code == 0
    (lines,) = (lines for title, lines in blocks(done.out).items() if title == "loose:Loose: usable")
    assert "dtypes float32" in lines
    at = lines.index("ops for deepseek-v2-lite in float32:")
    assert "rotate_query: reference" in lines[at:]
    reason = lines[lines.index("rotate_query: reference") + 1]
    assert reason == "fused op 'turn' not used because it rotates float16 only, not torch.float32"
    assert lines[-2] == "put: one token at a time"
    assert lines[-1] == "norm: offered for rms_norm/1, not called by this config"


def test_what_triton_cannot_compile_is_a_reason_with_its_cure(process: Bench, loose: Any) -> None:
    tiles = "{1: Tile(16, 16, 4, 1)}"
    loose(ops=f"triton_ops(Tuning({tiles}, {tiles}), None)")
    with open("loose.py", "a") as file:
        file.write("from mla_backends.triton_ops import Tile, Tuning, triton_ops\n")
    done = process("doctor", "loose:Loose")
    assert done.code == 0
    (lines,) = (lines for title, lines in blocks(done.out).items() if title == "loose:Loose: usable")
    why = "fused op 'triton_write_latent' not used because the Triton kernel raises"
    assert any(line.startswith(why) and "TRITON_CACHE_DIR" in line for line in lines)


@pytest.mark.parametrize(
    ("broken", "state", "reason", "fix"),
    [
        (
            {"setup": "os.abort()"},
            "no answer",
            "the probe succeeds, but a process that sets up the device died with signal SIGABRT",
            "`python -X faulthandler -m mla.bench.doctor.diagnosis backend loose:Loose` shows where it stops",
        ),
        (
            {"setup": "raise RuntimeError('driver too old')"},
            "no device",
            "setup(None) raised RuntimeError: driver too old",
            "`python -X dev -m mla.bench --backend loose:Loose --list-ops` shows the traceback",
        ),
        (
            {"ops": "1 / 0"},
            "error",
            "the device starts, but querying the backend raised ZeroDivisionError: division by zero",
            "report it to the backend's authors with the output of "
            "`python -X dev -m mla.bench --backend loose:Loose --list-ops`",
        ),
    ],
    ids=["abort", "setup", "ops"],
)
def test_a_probe_that_promises_too_much_is_found_out(
    process: Bench, loose: Any, broken: dict[str, str], state: str, reason: str, fix: str
) -> None:
    loose(**broken)
    done = process("doctor", "loose:Loose", "--json")
    assert done.code == 3
    (diagnosis,) = json.loads(done.out)["backends"]
    assert (diagnosis["state"], diagnosis["reason"], diagnosis["fixes"]) == (state, reason, [fix])
    assert diagnosis["evidence"] == {"card": "seen"}


# ------------------------------------------------------------------------------------------------ torch


def test_without_torch_it_says_so_and_where_to_get_it(process: Bench, torch_that: Any) -> None:
    done = process("doctor", "cpu", path=[torch_that(NO_TORCH)])
    assert (done.code, done.err) == (3, "")
    by_title = blocks(done.out)
    assert by_title["torch: does not import"] == [
        "reason torch is not installed",
        "autoload on",
        f"fix for backend 'cpu', install torch from {KNOWN['cpu'].torch_source}",
    ]
    assert any("No module named 'torch'" in line for lines in by_title.values() for line in lines)


def test_a_torch_that_is_broken_itself_blames_no_extension(
    process: Bench, extension: Any, torch_that: Any
) -> None:
    why = "OSError: libvendor.so: cannot open shared object file"
    broken = torch_that("raise OSError('libvendor.so: cannot open shared object file')\n")
    done = process("doctor", "cpu", "--json", path=[broken, extension("torch_fine", "")])
    assert done.code == 3
    torch = json.loads(done.out)["torch"]
    assert torch["problem"] == why
    assert torch["extensions"] == ["torch_fine of torch-fine 2.5"]
    assert torch["fixes"][0] == "reinstall torch in a build that fits this system"


@pytest.mark.skipif(
    not hasattr(torch, "_is_device_backend_autoload_enabled"), reason="torch before 2.5 loads no extensions"
)
def test_an_extension_that_breaks_torch_is_told_from_a_broken_torch(
    process: Bench, extension: Any, loose: Any
) -> None:
    path = [extension("torch_late", "raise ImportError('needs torch 2.1\\nplease downgrade')")]
    loose(probe="import torch")
    done = process("doctor", "loose:Loose", "--json", path=path)
    assert done.code == 3
    diagnosed = json.loads(done.out)
    torch = diagnosed["torch"]
    assert torch["problem"].startswith("RuntimeError: Failed to load the backend extension: torch_late.")
    assert torch["autoload"]
    assert torch["extensions"] == ["torch_late of torch-late 2.5"]
    assert torch["version"]
    assert torch["fixes"] == [
        f"install a version of the extension that fits torch {torch['version']}, or remove it",
        "or run with TORCH_DEVICE_BACKEND_AUTOLOAD=0, so that torch autoloads no extensions; backends import "
        "their own",
    ]
    (backend,) = diagnosed["backends"]
    assert "Failed to load the backend extension: torch_late" in backend["reason"]


def test_with_autoload_off_a_broken_extension_does_no_harm(process: Bench, extension: Any) -> None:
    path = [extension("torch_late", "raise ImportError('needs torch 2.1')")]
    done = process("doctor", "cpu", path=path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.code == 0
    said = "autoload off (TORCH_DEVICE_BACKEND_AUTOLOAD)", "extension torch_late of torch-late 2.5"
    assert [tuple(lines[-2:]) for title, lines in blocks(done.out).items() if "torch " in title] == [said]


def test_it_needs_no_torch_in_its_own_process(process: Bench) -> None:
    """A torch that hangs or aborts must not take the doctor along."""
    blocker = "import sys; sys.modules['torch'] = None; "
    code = blocker + "from mla.bench.cli.main import main; sys.exit(main(sys.argv[3:]))"
    done = process("doctor", "fake-good", flags=("-c", code), fakes=["good"])
    assert done.code == 0
    assert done.out.splitlines()[-1] == "usable: fake-good"
