"""Whether somebody else could have written a file that is about to be loaded into this process."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def distrust(path: Path, partly: bool = False) -> str | None:
    """Return why other users may have written or replaced what is at a path, or None.

    It goes from the root downwards, so that nobody else can replace a part once it has been examined.
    Symbolic links are a reason (use `os.path.realpath`), and so is a part that does not exist, since somebody
    else may be about to make it; with `partly`, the examination ends there without one. Root is trusted.
    """
    added_by_anybody = False
    for part in (*reversed(path.parents), path):
        try:
            found = part.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None if partly else f"'{part}' does not exist"
        except OSError as error:
            return f"'{part}' cannot be examined ({error.strerror})"
        above = part != path and not added_by_anybody
        if reason := _exposed(found, part, _root_and_me() | (_unmapped() if above else set())):
            return f"'{part}' {reason}"
        added_by_anybody = bool(found.st_mode & stat.S_ISVTX)
    return None


def distrust_open(descriptor: int) -> str | None:
    """Return why other users may have written an open file, or None."""
    return _exposed(os.fstat(descriptor), descriptor, _root_and_me())


def _root_and_me() -> set[int]:
    return {0, os.geteuid()}


def _unmapped() -> set[int]:
    """Return as whom Linux shows root in a user namespace that has no number for root; else nobody.

    It shows others without a number as the same user. Therefore this one is trusted only with folders above
    the file's own, and not where anybody may add folders.
    """
    try:
        numbers = Path("/proc/self/uid_map").read_text().splitlines()
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return set()
    return set() if any(line.split()[1] == "0" for line in numbers) else {overflow}


def _exposed(found: os.stat_result, where: Path | int, owners: set[int]) -> str | None:
    """Return how a user who is not among the owners may write to a file or in a folder."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if found.st_uid not in owners:
        return f"belongs to user {found.st_uid}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return None  # others may add files, but not replace those of this user
    if found.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if found.st_mode & stat.S_IWGRP:  # with an access list, the most that anybody named in it may do
        if _has_access_list(where):
            return "can be written by those in its access control list"
        if not _is_private(found.st_gid):
            return f"can be written by group {found.st_gid}"
    return None


def _has_access_list(where: Path | int) -> bool:
    try:
        return bool(os.getxattr(where, "system.posix_acl_access"))
    except OSError:
        return False


def _is_private(group: int) -> bool:
    """Return whether a group is this user's alone; where everybody has one, groups may write (umask 002)."""
    import grp  # not on Windows
    import pwd

    try:
        name, members = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return members.gr_name == name and set(members.gr_mem) <= {name}
