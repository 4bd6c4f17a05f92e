"""What the operating system is asked: names that are exchanged, mounts, what is really on the disk, whose process lives."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from pathlib import Path

# linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOUNTS = "/proc/self/mountinfo"

#: Temporary folders that this process is writing, by name: its number alone says nothing where numbers are used again.
writing: set[str] = set()


def beside(target: Path, purpose: str) -> Path:
    """A new name in the folder of ``target``, which says whose process it belongs to."""
    return target.with_name(f".{target.name}.{purpose}-{os.getpid()}-{secrets.token_hex(4)}")


def left_lying(folder: Path, name: str, purpose: str) -> list[Path]:
    """What :func:`beside` named so in a folder and whose process is gone, the newest last."""
    pattern = re.compile(rf"{re.escape(f'.{name}.{purpose}-')}(\d+)-[0-9a-f]+")
    found = [folder / entry for entry in (os.listdir(folder) if folder.is_dir() else ())
             if (match := pattern.fullmatch(entry)) and entry not in writing and not _is_alive(int(match[1]))]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def has_mounts(folder: Path) -> bool:
    """Tell whether a folder is a mount point or has one below it; a bind mount is one too."""
    try:
        with open(_MOUNTS, "rb") as stream:
            # Spaces and the like are written in octal digits.
            points = [re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split()[4]) for line in stream]
    except (OSError, IndexError):
        points = []
    own = os.fsencode(folder)
    return os.path.ismount(folder) or any(point == own or point.startswith(own + b"/") for point in points)


def link(source: str, place: str | os.PathLike) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place, follow_symlinks=False)


def sync(path: str | os.PathLike) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no such thing for folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            status = os.lstat(os.path.join(place, name))
            # What has a second name is the old folder's and was on the disk before.
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                sync(os.path.join(place, name))
        sync(place)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (renameat2); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
