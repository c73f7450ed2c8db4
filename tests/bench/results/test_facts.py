"""What counts as a change of the program that measured."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mla.command.environment import build_digest


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of a package `measured_plugin` with a backend."""
    folder = tmp_path / "measured_plugin"
    (folder / "kernels" / "fast").mkdir(parents=True)
    (folder / "__init__.py").write_text("class Backend: pass\n")
    source, places = folder / "__init__.py", [str(folder)]
    spec = spec_from_file_location(folder.name, source, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, folder.name, module)
    spec.loader.exec_module(module)
    return folder


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("more.py", True),
        ("kernels/source.cpp", True),
        ("extension.so", True),
        ("README.md", False),
        ("kernels/fast/kernels.so", False),  # the same sources, built by another compiler
    ],
)
def test_sources_count_and_prebuilt_kernels_do_not(plugin: Path, file: str, counts: bool) -> None:
    backend = sys.modules[plugin.name].Backend()
    before = build_digest(backend)
    assert before is not None
    (plugin / file).write_text("new")
    assert (build_digest(backend) != before) == counts
