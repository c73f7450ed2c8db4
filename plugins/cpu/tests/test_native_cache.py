"""Whose cache of built kernels is used: that of this user, wherever it is, and no other one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from native_builds import built

from mla_backend_cpu import cache
from mla_backend_cpu.compilation import BuildError

Script = Callable[[str], Path]
Judge = Callable[..., str]
OTHER = 12345  # a user and a group without a name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
#: Becomes a user and judges a path; what is imported is imported before, since he may not read this Python.
JUDGE = """if True:
    import ctypes, grp, os, pathlib, pwd, sys
    from mla_backend_cpu import cache
    from mla_backend_cpu.cache import distrust

    user, group, path, namespace = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:]
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    if namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: it may write its own uid_map
        assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWUSER
        pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    print(distrust(path))"""


@pytest.fixture
def account() -> Judge:
    """Return a function that judges a path as another user, and returns what is said."""

    def judge(user: str, path: Path, *namespace: str) -> str:
        ids = (str(OTHER), str(OTHER))
        if user != "nameless":
            import pwd

            entry = pwd.getpwnam(user)
            ids = (str(entry.pw_uid), str(entry.pw_gid))
        command = [sys.executable, "-c", JUDGE, *ids, str(path), *namespace]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return judge


@as_root
def test_a_private_group_may_write(account: Judge, public: Path) -> None:
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


def _namespaces() -> bool:
    """Say whether a user may make a user namespace here; some systems and containers do not let him."""
    code = "import ctypes, os; os.setuid(12345); raise SystemExit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
    return os.geteuid() == 0 and subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not _namespaces(), reason="needs root, and a system where users may make namespaces")
def test_a_namespace_without_root_leaves_the_folders_above_trusted(account: Judge, public: Path) -> None:
    """Root's "/" and "/tmp" belong to an overflow user there. So does what a third user made in "/tmp"."""
    mine, kept = public / "mine", public / "mine" / "cpu"
    kept.mkdir(parents=True)
    for folder in (public, mine, kept):
        os.chown(folder, OTHER, OTHER)
    assert account("nameless", kept, "in a namespace") == "None"
    os.chown(kept, 0, 0)
    assert account("nameless", kept) == "None"
    assert account("nameless", kept, "in a namespace") == f"'{kept}' belongs to user 65534"
    os.chown(kept, OTHER, OTHER)
    os.chown(public, OTHER + 1, OTHER)
    assert account("nameless", kept, "in a namespace") == f"'{public}' belongs to user 65534"


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
