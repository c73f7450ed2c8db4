"""Nothing is loaded that another user could have written, and no cache is made where nobody looks for one."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from native_builds import PORTABLE, built, small_sources

from mla_backend_cpu import cache, compilation, library
from mla_backend_cpu.cache import distrust, distrust_open
from mla_backend_cpu.compilation import BuildError

Script = Callable[[str], Path]
OTHER = 12345  # a user and a group without a name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which only root can")


@pytest.fixture
def kept(compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return kernels that were built into an empty cache, two folders below `tmp_path / "cache"`."""
    monkeypatch.setattr(compilation, "SOURCES", small_sources(tmp_path / "sources"))
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
    assert distrust(kept) is None


@pytest.mark.parametrize("above", [2, 3], ids=["cache", "above"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(give_away, f"belongs to user {OTHER}", marks=as_root),
        (open_to_all, "can be written by everybody"),
        pytest.param(open_to_a_group, f"can be written by group {OTHER}", marks=as_root),
    ],
)
def test_a_cache_that_others_can_write_is_not_used(
    kept: Path, spoil: Callable[[Path], None], why: str, above: int
) -> None:
    folder = (kept, *kept.parents)[above]
    spoil(folder)
    with pytest.raises(BuildError) as caught:
        built()
    assert str(caught.value) == (
        f"the cache of built kernels is not used: '{folder}' {why} "
        "(set MLA_CACHE_DIR to a folder that only you can write)"
    )


def test_where_all_may_add_but_not_replace_the_owner_counts(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").chmod(0o1777)  # as /tmp is
    before = kept.stat().st_ino
    assert built().stat().st_ino == before


def test_a_link_leads_to_what_is_examined(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A link is no way around the examination of the folder that it leads to."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "cache")
    monkeypatch.setenv("MLA_CACHE_DIR", str(link))
    assert built() == kept
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(BuildError, match=r"/cache' can be written by everybody"):
        built()


def test_a_link_in_the_cache_is_not_followed(kept: Path, tmp_path: Path) -> None:
    shutil.move(kept, tmp_path / "elsewhere.so")
    kept.symlink_to(tmp_path / "elsewhere.so")
    assert built() == kept
    assert not kept.is_symlink()


@pytest.mark.parametrize("spoil", spoils)
def test_a_cache_that_appears_after_its_examination_is_not_used(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Whoever can make the folder shows it, hides it while it is examined, and shows it again."""
    folder = tmp_path / "cache"
    spoil(folder)

    def examine(path: Path, *partly: bool) -> str | None:
        folder.rename(tmp_path / "hidden")
        try:
            return distrust(path, *partly)
        finally:
            (tmp_path / "hidden").rename(folder)

    monkeypatch.setattr(cache, "distrust", examine)
    assert cache.find(PORTABLE) is None


@pytest.mark.parametrize("spoil", spoils)
def test_a_folder_that_others_make_during_a_build_is_not_used(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """They make it after it was found to be missing, and before this process can."""
    compiler(f"touch {tmp_path}/compiled")

    def others_first(folder: Path) -> None:
        folder.mkdir(parents=True)
        spoil(folder)

    monkeypatch.setattr(cache, "_make_folders", others_first)
    with pytest.raises(BuildError, match="the cache of built kernels is not used: "):
        built()
    assert not (tmp_path / "compiled").exists()
    assert list((tmp_path / "cache" / "cpu").iterdir()) == []


def test_an_open_file_is_judged_as_it_is(kept: Path) -> None:
    """Whatever its name leads to by now."""
    with kept.open("rb") as file:
        assert distrust_open(file.fileno()) is None
        kept.chmod(0o666)
        kept.unlink()
        assert distrust_open(file.fileno()) == "can be written by everybody"


def test_a_link_to_the_cache_is_followed(kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clusters have one at ~/.cache/mla, to a scratch disk."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mla").symlink_to(tmp_path / "cache")
    monkeypatch.delenv("MLA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert built() == kept
    assert distrust(tmp_path / "home" / "mla" / "cpu") == f"'{tmp_path}/home/mla' is a symbolic link"


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """Return a POSIX access control list, as Linux stores it, of (tag, permissions, user or group)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_an_access_control_list_that_lets_others_write_is_seen(kept: Path) -> None:
    nobody = 0xFFFFFFFF
    for may, said in ((7, f"'{kept.parent}' can be written by those in its access control list"), (5, None)):
        listed = access_list(
            (1, 7, nobody), (2, may, OTHER), (4, 5, nobody), (0x10, may, nobody), (0x20, 5, nobody)
        )
        try:
            os.setxattr(kept.parent, "system.posix_acl_access", listed)
        except OSError as error:
            pytest.skip(f"the file system of temporary folders has no access control lists: {error}")
        assert distrust(kept) == said


def test_a_cache_that_cannot_be_read_is_named(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = os.lstat

    def refuse(path: str | Path, **options: int) -> os.stat_result:
        if Path(path) == tmp_path / "cache":
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(cache.Path, "lstat", refuse)
    monkeypatch.setenv("CXX", "g++-none")
    with pytest.raises(BuildError) as caught:
        built()
    assert str(caught.value) == (
        "no C++ compiler 'g++-none' was found (install g++, or set CXX), and the cache of built kernels "
        f"is not used: '{tmp_path}/cache' cannot be examined (Permission denied) "
        "(set MLA_CACHE_DIR to a folder that only you can write)"
    )


def test_no_umask_makes_a_cache_that_is_distrusted(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compilation, "SOURCES", small_sources(tmp_path / "sources"))
    umask = os.umask(0)
    try:
        before = built().stat().st_ino
    finally:
        os.umask(umask)
    assert built().stat().st_ino == before


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
        artifact = cache.find(library.instruction_sets.choose_level("portable"))
        assert isinstance(artifact, compilation.Artifact)
        path = Path(os.readlink(f"/proc/self/fd/{artifact.descriptor}"))
        path.unlink()
        path.write_bytes(kept.read_bytes())
        values.append(library._library(PORTABLE, artifact, "", {}).mla_dot_bf16())
    assert values == [1, 2]
    assert ctypes.CDLL(str(kept)).mla_dot_bf16() == 0
