"""Whether somebody else could have written a file that is about to be loaded into this process."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def distrust(path: Path) -> str | None:
    """Return why other users may have written or replaced what is at a path, or None.

    The path must be free of symbolic links (`os.path.realpath`). Parts that do not exist yet are trusted as
    far as the folder they will be made in. Root is trusted, since it can do everything anyway.
    """
    for part in (path, *path.parents):
        try:
            found = part.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"'{part}' cannot be examined ({error.strerror})"
        if reason := _writable(found):
            return f"'{part}' {reason}"
    return None


def _writable(found: os.stat_result) -> str | None:
    """Return how a user other than this one and root may write to a file or in a folder."""
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to user {found.st_uid}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return None  # others may add files, but not replace those of this user
    if found.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        return f"can be written by group {found.st_gid}"
    return None


def _is_private(group: int) -> bool:
    """Return whether a group is this user's alone; where everybody has one, groups may write (umask 002)."""
    import grp  # not on Windows
    import pwd

    try:
        name, members = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return members.gr_name == name and set(members.gr_mem) <= {name}
