"""Nothing is loaded that another user could have written, and no cache is made where nobody looks for one."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_builds import PORTABLE, built

from mla_backend_cpu import cache, compilation, library
from mla_backend_cpu.cache import distrust
from mla_backend_cpu.compilation import BuildError

Script = Callable[[str], Path]
OTHER = 12345  # a user and a group without a name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which only root can")


@pytest.fixture
def kept(small: Path) -> Path:
    """Return kernels that were built into an empty cache, two folders below `tmp_path / "cache"`."""
    return built()


def give_away(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, OTHER)
    path.chmod(0o775)


spoils = (pytest.param(give_away, marks=as_root), open_to_all, pytest.param(open_to_a_group, marks=as_root))


@pytest.mark.parametrize("spoil", spoils)
@pytest.mark.parametrize("above", [0, 1], ids=["file", "folder"])
def test_kernels_that_others_could_have_written_are_built_again(
    kept: Path, spoil: Callable[[Path], None], above: int
) -> None:
    before = kept.stat().st_ino
    spoil((kept, *kept.parents)[above])
    assert built() == kept
    assert kept.stat().st_ino != before
    assert not any(distrust(path.stat()) for path in (kept, *kept.parents[:2]))


@pytest.mark.parametrize("spoil", spoils)
def test_a_cache_that_others_can_write_is_not_used(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Nor where a link leads to it."""
    folder, link = kept.parents[1], tmp_path / "link"
    link.symlink_to(folder.parent)
    spoil(folder)
    why = "can be written by others" if folder.stat().st_uid != OTHER else f"belongs to user {OTHER}"
    said = f"the cache of built kernels is not used: '{folder}' {why} "
    said += "(set MLA_CACHE_DIR to a folder that only you can write)"
    for place in (folder.parent, link):
        monkeypatch.setenv("MLA_CACHE_DIR", str(place))
        with pytest.raises(BuildError) as caught:
            built()
        assert str(caught.value) == said


@as_root
def test_folders_above_decide_nothing(kept: Path, tmp_path: Path) -> None:
    """Who can write them may take the cache away, but none that is this user's can take its place."""
    before = kept.stat().st_ino
    for spoil in (open_to_all, open_to_a_group, give_away):
        spoil(tmp_path / "cache")
        assert built().stat().st_ino == before
    (tmp_path / "cache" / "cpu").rename(tmp_path / "cache" / "mine")
    shutil.copytree(tmp_path / "cache" / "mine", tmp_path / "cache" / "cpu")
    for place in (tmp_path / "cache" / "cpu").rglob("*"):
        give_away(place)
    give_away(tmp_path / "cache" / "cpu")
    assert cache.find(PORTABLE) is None
    with pytest.raises(BuildError, match=f"/cache/cpu' belongs to user {OTHER}"):
        built()


def test_a_cache_that_is_replaced_while_it_is_examined_is_not_loaded(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By who can write a folder above: what lies there need not be theirs, as they may link to any file."""
    before, mine, theirs = kept.stat().st_ino, kept.parents[1], tmp_path / "theirs"
    shutil.copytree(mine, theirs)
    open_to_all(theirs)

    def examine(status: os.stat_result) -> str:
        why = distrust(status)
        if theirs.exists():
            mine.rename(tmp_path / "mine")
            theirs.rename(mine)
        return why

    monkeypatch.setattr(cache, "distrust", examine)
    artifact = cache.find(PORTABLE)
    assert artifact is not None
    assert os.fstat(artifact.descriptor).st_ino == before
    assert artifact.path == kept
    assert cache.find(PORTABLE) is None


@pytest.mark.parametrize("spoil", spoils)
def test_a_folder_that_others_make_during_a_build_is_not_used(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """They make it after it was found to be missing, and before this process can."""
    compiler(f"touch {tmp_path}/compiled")

    def others_first(folder: Path, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        if folder == tmp_path / "cache" / "cpu":
            spoil(folder)

    monkeypatch.setattr(cache.os, "makedirs", others_first)
    with pytest.raises(BuildError, match="the cache of built kernels is not used: "):
        built()
    assert not (tmp_path / "compiled").exists()
    assert list((tmp_path / "cache" / "cpu").iterdir()) == []


@pytest.mark.usefixtures("small")
def test_no_umask_makes_a_cache_that_is_distrusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLA_CACHE_DIR", str(tmp_path / "new" / "cache"))
    umask = os.umask(0)
    try:
        before = built().stat().st_ino
    finally:
        os.umask(umask)
    assert built().stat().st_ino == before
    assert not cache.distrust((tmp_path / "new").stat())
    assert not cache.distrust((tmp_path / "new" / "cache").stat())


def test_what_was_checked_is_what_is_loaded(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file is replaced between the check and the load, and the number of its descriptor is used again."""
    values = []
    monkeypatch.setattr(library, "Library", lambda level, functions, *facts: functions)
    for value in (1, 2):
        source = tmp_path / "sources" / "api.cpp"
        source.write_text(source.read_text().replace(f"return {value - 1};", f"return {value};"))
        built()
        artifact = cache.find(PORTABLE)
        assert isinstance(artifact, compilation.Artifact)
        path = Path(os.readlink(f"/proc/self/fd/{artifact.descriptor}"))
        path.unlink()
        path.write_bytes(kept.read_bytes())
        values.append(library._library(PORTABLE, artifact, "", {}).mla_dot_bf16())
    assert values == [1, 2]
    assert ctypes.CDLL(str(kept)).mla_dot_bf16() == 0


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
