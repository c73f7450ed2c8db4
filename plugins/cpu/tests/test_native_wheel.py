"""Kernels inside a wheel: what is built when, and that they are used before anything else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_builds import PORTABLE, built
from native_cases import load

from mla_backend_cpu import cache, compilation
from mla_backend_cpu.compilation import LEVELS, LIBRARY, levels_of

PROJECT = Path(__file__).resolve().parents[1]
MACHINE = os.uname().machine
#: Prints what a run uses. What it imports is imported before the user changes, who may not read this Python.
RUN = """if True:
    import json, os
    import torch, mla
    from mla.weights import random_state_dict

    def run(**options):
        backend = mla.load_backend("cpu", options=options)
        config = mla.MLAConfig(hidden_size=64, num_attention_heads=2)
        layer = mla.MLA(config, backend=backend)
        layer.load_state_dict(random_state_dict(config))
        cache = mla.LatentCache(config, max_tokens=256, device=backend.device)
        batch = cache.extend(cache.new_sequences(1), [3])
        assert layer(torch.ones(3, 64).bfloat16(), batch, cache.pages[0]).isfinite().all()
        return {**backend.environment(), "remarks": list(backend.remarks())}

    run(native="off")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
    print(json.dumps(run()))"""


def build(folder: Path, target: str = "wheel", **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel as a frontend does, with the hatchling of this environment."""
    unset = ("MLA_CPU_KERNELS", "CPATH", "CPLUS_INCLUDE_PATH")
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=PROJECT,
        env={**{key: value for key, value in os.environ.items() if key not in unset}, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def kernels_in(folder: Path) -> tuple[str, set[str]]:
    """Return the tag of the one wheel in a folder, and the names of the kernels in it."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [Path(name) for name in archive.namelist()]
    kernels = {file.parent.name for file in files if file.name == LIBRARY}
    return wheel.stem.partition("-py3-")[2], kernels


@pytest.mark.usefixtures("no_level_named", "compiler")
def test_a_wheel_brings_every_level_and_needs_neither_compiler_nor_home(public: Path, tmp_path: Path) -> None:
    done = build(tmp_path, MLA_CPU_KERNELS="require")
    assert done.returncode == 0, done.stderr
    names = {compilation.kernels_name(level) for level in levels_of(MACHINE)}
    assert kernels_in(tmp_path) == (f"none-linux_{MACHINE}", names)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, public / "packages", "zip")
    there = public / "writable"
    there.mkdir()
    there.chmod(0o777)
    bare = {"PATH": "", "HOME": "/nonexistent", "PYTHONPATH": str(public / "packages")}
    unset = ("CXX", "MLA_CACHE_DIR", "XDG_CACHE_HOME")
    run = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=there,
        env={**{key: value for key, value in os.environ.items() if key not in unset}, **bare},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(run.stdout)
    assert facts["kernels"] == compilation.levels()[0].name
    assert facts["kernels_from"].startswith("came with this installation, ")
    assert facts["remarks"] == []
    assert os.listdir(there) == []


# ------------------------------------------------------------------------------------------ the build


@pytest.fixture
def pretended(tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a compiler of nothing, for a target; it fails with some flags."""

    def make(target: str, fails: str = "none", why: str = "", writes: str = "$*") -> str:
        path = tmp_path / "pretended"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in --version) echo pretended 1;; -dumpmachine) echo {target}-linux-gnu;;\n'
            f'*"{fails}"*) echo "{why}" >&2; exit 1;;\n'
            f'*) for last; do :; done; echo "{writes}" > "$last";; esac\n'
        )
        path.chmod(0o755)
        return str(path)

    return make


def test_a_cross_compiler_makes_the_wheel_of_its_target(
    pretended: Callable[..., str], tmp_path: Path
) -> None:
    for target, levels in (("aarch64", LEVELS[-1:]), ("x86_64", LEVELS)):
        folder = tmp_path / target
        done = build(folder, CXX=pretended(target), MLA_CPU_KERNELS="require")
        assert done.returncode == 0, done.stderr
        expected = {compilation.kernels_name(level, target) for level in levels}
        assert kernels_in(folder) == (f"none-linux_{target}", expected)


@pytest.mark.parametrize(
    "why", ["error: unrecognized command-line option '-mamx-bf16'", "fatal error: Killed signal (cc1plus)"]
)
def test_levels_that_do_not_compile_are_left_out_and_named(
    pretended: Callable[..., str], tmp_path: Path, why: str
) -> None:
    old = pretended("x86_64", fails="-mamx", why=why)
    done = build(tmp_path / "wheels", CXX=old)
    assert done.returncode == 0, done.stderr
    assert kernels_in(tmp_path / "wheels")[1] == {
        compilation.kernels_name(level, "x86_64") for level in LEVELS[1:]
    }
    said = f"no kernels for amx in this wheel, since the compiler '{old}' failed: {why}"
    assert (done.stdout + done.stderr).count(said) == 1
    done = build(tmp_path / "none", CXX=old, MLA_CPU_KERNELS="require")
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("none/*.whl"))


@pytest.mark.parametrize(
    ("pretends", "variables", "target", "why"),
    [
        (
            {"writes": "__kmpc_fork_call"},
            {},
            "wheel",
            "LLVM's OpenMP, but torch loads GNU's (set CXX to g++)",
        ),
        ({"fails": " -c ", "why": "fatal error: Killed"}, {}, "wheel", "failed: fatal error: Killed"),
        ({}, {"CXX": "g++-none"}, "wheel", "no C++ compiler 'g++-none' was found (install g++, or set CXX)"),
        ({}, {"CXX": "false"}, "wheel", "the compiler 'false' failed"),
        ({}, {"CXX": "g++-none", "MLA_CPU_KERNELS": "off"}, "wheel", ""),
        ({}, {"CXX": "g++-none", "MLA_CPU_KERNELS": "require"}, "wheel:editable", ""),
    ],
    ids=["another OpenMP", "no level compiles", "no compiler", "it fails", "off", "editable"],
)
def test_a_wheel_without_a_kernel_that_would_load_is_a_pure_one_or_an_error(
    pretended: Callable[..., str], tmp_path: Path, pretends: dict[str, str], variables: dict[str, str],
    target: str, why: str,
) -> None:  # fmt: skip
    variables = {"CXX": pretended("x86_64", **pretends), **variables}
    done = build(tmp_path / "wheels", target, **variables)
    assert done.returncode == 0, done.stderr
    assert kernels_in(tmp_path / "wheels") == ("none-any", set())
    said = done.stdout + done.stderr
    assert said.count("no kernels") == bool(why)
    assert why in said.partition("no kernels in this wheel, since ")[2]
    if why:
        done = build(tmp_path / "none", target, **variables, MLA_CPU_KERNELS="require")
        assert done.returncode == 1
        assert why in done.stdout + done.stderr
        assert "(MLA_CPU_KERNELS=require)." in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("none/*"))


def test_a_misspelt_choice_ends_the_build(tmp_path: Path) -> None:
    done = build(tmp_path, MLA_CPU_KERNELS="yes")
    assert done.returncode == 1
    assert "MLA_CPU_KERNELS must be auto, require or off, but is 'yes'." in done.stdout + done.stderr


@pytest.mark.usefixtures("compiler")
def test_the_same_sources_make_the_same_bytes_in_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []
    for name in ("one", "another"):
        shutil.copytree(compilation.SOURCES, tmp_path / name / "native")
        monkeypatch.setattr(compilation, "SOURCES", tmp_path / name / "native")
        (tmp_path / name / "made").mkdir()
        compilation.make_kernels(compilation.find_compiler(), PORTABLE, tmp_path / name / "made")
        made.append({file.name: file.read_bytes() for file in (tmp_path / name / "made").iterdir()})
    assert made[0] == made[1]


# ------------------------------------------------------------------------------------------ the installation


CAME = "those that came with this installation"


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return kernels of level portable, compiled in a hurry."""
    folder = tmp_path_factory.mktemp("portable")
    hurried = folder / "compiler.sh"
    hurried.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    hurried.chmod(0o755)
    (folder / "made").mkdir()
    compilation.make_kernels((str(hurried),), PORTABLE, folder / "made")
    return folder / "made"


@pytest.fixture
def came(portable: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return kernels that came with a package, beside a compiler that copies them and an empty cache."""
    folder = tmp_path / "prebuilt" / compilation.kernels_name(PORTABLE)
    shutil.copytree(portable, folder)
    copying = tmp_path / "copying"
    copying.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo copying && exit\n'
        f'for last; do :; done\ncp {portable}/{LIBRARY} "$last"\n'
    )
    copying.chmod(0o755)
    monkeypatch.setenv("CXX", str(copying))
    monkeypatch.setenv("MLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PREBUILT", folder.parent)
    return folder


def change(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-1] + b"x")


def misbuild(folder: Path) -> None:
    """As built for another system: whole, but not to be loaded here."""
    foreign = b"of another system"
    (folder / LIBRARY).write_bytes(foreign)
    (folder / "sha256").write_text(hashlib.sha256(foreign).hexdigest())


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("cached", [True, False])
def test_kernels_that_came_are_used_before_all_others(
    came: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cached: bool
) -> None:
    if cached:
        built()
    else:
        monkeypatch.setenv("MLA_CACHE_DIR", "/proc/none")
    monkeypatch.setenv("CXX", "g++-none")
    capfd.readouterr()
    kernels = load("portable")
    assert kernels.origin == f"came with this installation, {(came / 'compiler').read_text()}"
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda came: os.truncate(came / LIBRARY, 5000), f"{CAME} are damaged: "),
        (lambda came: change(came / LIBRARY), f"{CAME} are damaged: "),
        (lambda came: (came / LIBRARY).unlink(), f"{CAME} are damaged: "),
        (misbuild, f"{CAME} cannot be loaded ("),
        (
            lambda came: came.rename(came.with_name("avx2-0123")),
            "this installation came with kernels, but not ",
        ),
        (lambda came: shutil.rmtree(came.parent), "no kernels came with this installation"),
    ],
    ids=["truncated", "changed", "lost", "built elsewhere", "others", "none"],
)
def test_kernels_that_cannot_serve_are_built_here_and_the_reason_is_said(
    came: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], None], why: str
) -> None:
    spoil(came)
    assert load("portable").origin.startswith("built here, ")
    said = capfd.readouterr().err
    assert said.startswith("building the CPU kernels for portable, once, with ")
    assert f", since {why}" in said
    assert said.count("\n") == 1
