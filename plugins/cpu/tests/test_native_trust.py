"""Nothing is loaded that another user could have written, and no cache is made where nobody looks for one."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from native_builds import built, small_sources

from mla_backend_cpu import cache, library
from mla_backend_cpu.compilation import artifact
from mla_backend_cpu.compilation import compiler as compiling
from mla_backend_cpu.compilation.levels import BuildError
from mla_backend_cpu.trust import distrust

Script = Callable[[str], Path]
OTHER = 12345  # a user and a group without a name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which only root can")


@pytest.fixture
def kept(compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return kernels that were built into an empty cache, two folders below `tmp_path / "cache"`."""
    monkeypatch.setattr(compiling, "SOURCES", small_sources(tmp_path / "sources"))
    return built()


def give_away(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, OTHER)
    path.chmod(0o775)


@as_root
@pytest.mark.parametrize("spoil", [give_away, open_to_all, open_to_a_group])
@pytest.mark.parametrize("above", [0, 1], ids=["file", "folder"])
def test_kernels_that_others_could_have_written_are_built_again(
    kept: Path, spoil: Callable[[Path], None], above: int
) -> None:
    before = kept.stat().st_ino
    spoil((kept, *kept.parents)[above])
    assert built() == kept
    assert kept.stat().st_ino != before
    assert distrust(kept) is None


@as_root
@pytest.mark.parametrize("above", [2, 3], ids=["cache", "above"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (give_away, f"belongs to user {OTHER}"),
        (open_to_all, "can be written by everybody"),
        (open_to_a_group, f"can be written by group {OTHER}"),
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
        f"built kernels are not kept where others can change them: '{folder}' {why} "
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


def test_no_umask_makes_a_cache_that_is_distrusted(
    compiler: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiling, "SOURCES", small_sources(tmp_path / "sources"))
    umask = os.umask(0)
    try:
        before = built().stat().st_ino
    finally:
        os.umask(umask)
    assert built().stat().st_ino == before


@pytest.fixture
def account() -> Iterator[Callable[[str, Path], str]]:
    """Return a function that judges a path as another user, and returns what is said."""

    def judge(user: str, path: Path) -> str:
        code = (
            "import grp, os, pwd, sys\nfrom pathlib import Path\nfrom mla_backend_cpu.trust import distrust\n"
            "os.setgroups([])\nos.setgid(int(sys.argv[2]))\nos.setuid(int(sys.argv[1]))\n"
            "print(distrust(Path(sys.argv[3])))"
        )
        found = (str(OTHER), str(OTHER))
        if user != "nameless":
            import pwd

            entry = pwd.getpwnam(user)
            found = (str(entry.pw_uid), str(entry.pw_gid))
        command = [sys.executable, "-c", code, *found, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return judge


@as_root
def test_a_private_group_may_write(account: Callable[[str, Path], str], public: Path) -> None:
    """`daemon` has a group of its own name; a user without an entry has nothing that says so."""
    import pwd

    daemon = pwd.getpwnam("daemon")
    mine, shared = public / "mine", public / "shared"
    for folder, group in ((mine, daemon.pw_gid), (shared, 100)):
        folder.mkdir()
        os.chown(folder, daemon.pw_uid, group)
        folder.chmod(0o775)
    assert account("daemon", mine) == "None"
    assert account("daemon", shared) == f"'{shared}' can be written by group 100"
    assert account("nobody", mine) == f"'{mine}' belongs to user {daemon.pw_uid}"
    os.chown(mine, OTHER, OTHER)
    assert account("nameless", mine) == f"'{mine}' can be written by group {OTHER}"


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
        ({"MLA_CACHE_DIR": "kernels"}, "MLA_CACHE_DIR is an absolute path, not 'kernels'"),
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


@as_root
def test_a_user_without_an_entry_and_home_is_told_to_name_a_folder(tmp_path: Path) -> None:
    """As `docker run --user 12345` starts one: "~" stays what it is."""
    code = (
        "import os, pwd\nfrom mla_backend_cpu import cache\n"
        f"os.setgroups([])\nos.setgid({OTHER})\nos.setuid({OTHER})\n"
        "try:\n    print(cache.folder())\nexcept cache.BuildError as error:\n    print(error)"
    )
    named = ("HOME", "XDG_CACHE_HOME", "MLA_CACHE_DIR")
    clean = {key: value for key, value in os.environ.items() if key not in named}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("this user has no home folder to keep built kernels in (set MLA_CACHE_DIR")


# ------------------------------------------------------------------------------------------ what is loaded


def test_what_was_checked_is_what_is_loaded(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file is replaced between the check and the load, and the number of its descriptor is used again."""
    values = []
    for value in (1, 2):
        source = tmp_path / "sources" / "api.cpp"
        source.write_text(source.read_text().replace(f"return {value - 1};", f"return {value};"))
        built()
        found = cache.find(library.instruction_sets.choose_level("portable"))
        assert isinstance(found, artifact.Artifact)
        path = Path(os.readlink(f"/proc/self/fd/{found.descriptor}"))
        path.unlink()
        path.write_bytes(kept.read_bytes())
        values.append(library._open(found).mla_dot_bf16())
    assert values == [1, 2]
    assert ctypes.CDLL(str(kept)).mla_dot_bf16() == 0
