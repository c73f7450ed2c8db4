"""Whose cache of built kernels is used: that of this user, wherever it is, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from native_builds import built

from mla_backend_cpu import cache
from mla_backend_cpu.compilation import BuildError

Script = Callable[[str], Path]
# ------------------------------------------------------------------------------------------ which folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLA_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/cpu"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/mla/cpu"),
        ({"XDG_CACHE_HOME": "b", "HOME": "/c"}, "/c/.cache/mla/cpu"),
        ({"HOME": "/c"}, "/c/.cache/mla/cpu"),
    ],
)
def test_the_folder_is_the_first_that_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("MLA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.folder()) == expected


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MLA_CACHE_DIR": "kernels"}, "MLA_CACHE_DIR must be an absolute path, but is 'kernels'"),
        ({"HOME": "here"}, r"this user has no home folder to keep built kernels in \(set MLA_CACHE_DIR to"),
    ],
)
def test_a_folder_that_depends_on_the_working_directory_is_refused(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in ("MLA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=reason):
        built()
    assert list(Path().iterdir()) == []
