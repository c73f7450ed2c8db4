"""Processes whose torch has an emulated device: PrivateUse1 can be renamed once per process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome, run_python
from torch.utils import backend_registration

HERE = Path(__file__).parent
collect_ignore = ["inside", "interpreted", "device", "torch_musa", "cuda_builds"]  # for those processes
# backend -> (distribution that brings its device, environment)
DEVICES = {
    "moore": ("torch_musa", {}),
    "nvidia": ("cuda_builds", {"EMULATED_BUILD": "nvidia"}),
    "metax": ("cuda_builds", {"EMULATED_BUILD": "metax"}),
    "iluvatar": ("cuda_builds", {"EMULATED_BUILD": "iluvatar"}),
}


Emulate = Callable[..., Outcome]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Install the emulated device and what brings it to torch, each into a folder of its own."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot take a device written in Python")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("device", "torch_musa", "cuda_builds")}
    flags = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    for name, target in folders.items():
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(HERE / name)]
        subprocess.run(command, check=True)
    return folders


@pytest.fixture
def emulate(installed: dict[str, Path], tmp_path: Path) -> Emulate:
    """Return a function that runs Python with the emulated device of a backend."""

    def emulate(backend: str, *words: str, **environment: str) -> Outcome:
        brings, variables = DEVICES[backend]
        folders = (installed["device"], installed[brings])
        return run_python(*words, cwd=tmp_path, folders=folders, **{**variables, **environment})

    return emulate
