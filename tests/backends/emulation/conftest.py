"""Processes whose torch has an emulated device: PrivateUse1 can be renamed once per process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_distribution import install
from outcome import Outcome, run_python
from torch.utils import backend_registration

HERE = Path(__file__).parent
collect_ignore = ["inside", "interpreted", "device", "torch_musa", "cuda_builds"]  # for those processes
# What brings the device to torch: folder -> package, distribution and version.
BRINGERS = {
    "torch_musa": ("torch_musa", "torch-musa", "2.7.1"),
    "cuda_builds": ("emulated_cuda_build", "emulated-cuda-build", "1.0"),
}
# backend -> (folder of what brings its device, environment)
DEVICES = {
    "moore": ("torch_musa", {}),
    "nvidia": ("cuda_builds", {"EMULATED_BUILD": "nvidia"}),
    "metax": ("cuda_builds", {"EMULATED_BUILD": "metax"}),
    "iluvatar": ("cuda_builds", {"EMULATED_BUILD": "iluvatar"}),
}


Emulate = Callable[..., Outcome]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Install what brings the emulated device to torch, each into a folder of its own."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot take a device written in Python")
    folders = {name: tmp_path_factory.mktemp(name) for name in BRINGERS}
    for name, target in folders.items():
        package, *facts = BRINGERS[name]
        install(HERE / name, target, *facts, "torch.backends", {package: f"{package}:_autoload"})
    return folders


@pytest.fixture
def emulate(installed: dict[str, Path], tmp_path: Path) -> Emulate:
    """Return a function that runs Python with the emulated device of a backend."""

    def emulate(backend: str, *words: str, **environment: str) -> Outcome:
        brings, variables = DEVICES[backend]
        folders = (HERE / "device", installed[brings])
        return run_python(*words, cwd=tmp_path, folders=folders, **{**variables, **environment})

    return emulate
