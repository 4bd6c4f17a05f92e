"""Folders that are on disk as a whole or not at all.

A folder is written beside its place and takes it in one step, so that a reader, and whoever comes after a kill, finds either
what was there before or what was to be there. Where a folder cannot be replaced (a mount point, the working directory, a parent
that may not be written), its files are written inside it and committed in one step, after which they take their places one by
one: a kill in between is made good by the next one that reads or writes there. What a killed process left lying is cleared by the
next one that writes there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from heterolora_kernels.disk import beside, exchange, has_mounts, left_lying, link, sync, sync_tree, writing
from heterolora_kernels.undo import put_back, undone_on_failure

#: Of the names in a folder, those that a save leaves behind.
Stale = Callable[[Path], Collection[str]]
Result = TypeVar("Result")

#: The name of what is written inside a folder, and in it the list of what has to go.
_INSIDE, _GOES = "heterolora", ".goes.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ATTEMPTS, _PAUSE = 20, 0.05


def _nothing(folder: Path) -> Collection[str]:
    return ()


def find_folder(directory: str | os.PathLike) -> Path:
    """The folder of that name; the one set aside if a kill came while it was being replaced in two steps.

    What a kill left half way inside it is finished.

    Raises:
        FileNotFoundError, ValueError: there is none, or a file of that name.
    """
    target = Path(os.path.realpath(directory))
    if target.is_dir():
        _finish_inside(target)
        return target
    if target.exists():
        raise ValueError(f"directory must be a folder, and {target} is a file")
    aside = left_lying(target.parent, target.name, "aside")
    if not aside:
        raise FileNotFoundError(f"directory: there is no folder {target}")
    return aside[-1]


def settled(directory: str | os.PathLike, read: Callable[[Path], Result]) -> Result:
    """Read files that belong together from a folder: all of one save, while others may be saving.

    Args:
        read: function of the folder, called again where the files were exchanged under its hands.

    Raises:
        ValueError: they are exchanged all the time; else what ``read`` raises.
    """
    for _ in range(_ATTEMPTS):
        folder = find_folder(directory)
        before = _stamp(folder)
        try:
            found = read(folder)
        except (OSError, ValueError):
            if before == _stamp(folder):
                raise
        else:
            if before == _stamp(folder):
                return found
        time.sleep(_PAUSE)
    raise ValueError(f"directory: another process is writing {directory} all the time: load it when it is done")


def _stamp(folder: Path) -> list[tuple]:
    """Changes when a file in the folder is exchanged, or the folder is."""
    try:
        entries = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)]
        whole = os.stat(folder).st_ino
    except FileNotFoundError:
        return []
    return [("", whole)] + sorted((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in entries
                                  if stat.S_ISREG(status.st_mode) or name.startswith(f".{_INSIDE}.ready-"))


@contextmanager
def replaced_folder(directory: str | os.PathLike, stale: Stale = _nothing) -> Iterator[Path]:
    """A new folder to write into, whose files are those of ``directory`` when the block ends.

    Files that only the old folder has stay. Until the block has ended well and everything is on the disk, the old folder is
    what it was; after a failure too. Nobody else should write into the old one meanwhile.

    Args:
        stale: of the old folder: names of files that go.

    Raises:
        ValueError: directory is a file.
        OSError: no space is left; it names the folder.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory must be a folder, and {target} is a file")
    way = _whole if _can_be_replaced(target) else _piece_by_piece
    try:
        with way(target, stale) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"directory: no space is left for {target}, which is as it was") from error
        raise


@contextmanager
def updated_folder(directory: str | os.PathLike, stale: Stale = _nothing) -> Iterator[Path]:
    """The same without replacing the folder, which may hold others' folders and be written by others."""
    target = Path(os.path.realpath(directory))
    with _piece_by_piece(target, stale) as folder:
        yield folder


def _can_be_replaced(target: Path) -> bool:
    if not target.exists():
        return True
    return (not has_mounts(target) and not Path.cwd().is_relative_to(target)
            and os.access(target.parent, os.W_OK | os.X_OK))


# ---- in one step ----


@contextmanager
def _whole(target: Path, stale: Stale) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    folder = beside(target, "saving")

    def clear() -> None:
        # After a failure it holds what is new, else what is old.
        shutil.rmtree(folder, ignore_errors=True)
        writing.discard(folder.name)

    with put_back(clear):
        writing.add(folder.name)
        folder.mkdir()
        yield folder
        if target.exists():
            _finish_inside(target)
            folder.chmod(stat.S_IMODE(target.stat().st_mode))
            _take_over(target, folder, stale(target))
        sync_tree(folder)
        _put_in_place(folder, target)


def _clear(target: Path) -> None:
    """Remove what killed processes left; a folder that one of them set aside and did not replace comes back."""
    aside = left_lying(target.parent, target.name, "aside")
    if aside and not target.exists():
        os.rename(aside.pop(), target)
    for folder in (*aside, *left_lying(target.parent, target.name, "saving")):
        shutil.rmtree(folder, ignore_errors=True)


def _take_over(old: Path, new: Path, stale: Collection[str]) -> None:
    left = {path.name for path in left_lying(old, _INSIDE, "saving")}
    for entry in os.scandir(old):
        place = new / entry.name
        if entry.name in stale or entry.name in left or os.path.lexists(place):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, place, symlinks=True, copy_function=link)
        else:
            link(entry.path, place)


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


def _put_in_place(folder: Path, target: Path) -> None:
    """``target`` becomes ``folder`` and the other way round; as before if anything fails."""
    new, aside = _inode(folder), beside(target, "aside")
    writing.add(aside.name)
    try:
        if target.exists():
            _trade(folder, target, aside)
        else:
            os.rename(folder, target)
        sync(target.parent)
    except BaseException:
        # An interrupt may come between any two steps: what has happened is read from the disk.
        if _inode(target) == new and folder.exists():
            _trade(folder, target, aside)
        elif _inode(target) == new:
            os.rename(target, folder)
        if aside.exists():
            os.rename(aside, target)
        raise
    finally:
        writing.discard(aside.name)


def _trade(folder: Path, target: Path, aside: Path) -> None:
    if not exchange(folder, target):
        os.rename(target, aside)
        os.rename(folder, target)
        os.rename(aside, folder)


# ---- file by file ----


@contextmanager
def _piece_by_piece(target: Path, stale: Stale) -> Iterator[Path]:
    target.mkdir(parents=True, exist_ok=True)
    _finish_inside(target)
    for left in left_lying(target, _INSIDE, "saving"):
        shutil.rmtree(left, ignore_errors=True)
    folder, ready = (beside(target / _INSIDE, purpose) for purpose in ("saving", "ready"))

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if not ready.exists():
            writing.difference_update((folder.name, ready.name))

    with put_back(clear):
        writing.update((folder.name, ready.name))
        folder.mkdir()
        yield folder
        new = set(os.listdir(folder))
        taken = [name for name in new if (target / name).is_dir()]
        if taken:
            raise ValueError(f"directory: {target} has a folder called {taken[0]!r}, where a file has to be written")
        goes = sorted(name for name in stale(target) if name not in new)
        (folder / _GOES).write_text(json.dumps(goes), encoding="utf-8")
        sync_tree(folder)
        with undone_on_failure(lambda: _finish(ready, target)):
            # From here on it is the new one: what interrupts it is raised when every file has its place.
            os.rename(folder, ready)
            sync(target)
            _finish(ready, target)


def _finish(ready: Path, target: Path) -> None:
    """Give files that were committed their places; records after the weights that they speak of. May be called again."""
    if not ready.exists():
        return
    try:
        goes = json.loads((ready / _GOES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        goes = []
    for name in sorted(os.listdir(ready), key=lambda name: (name.endswith(".json"), name)):
        if name != _GOES:
            os.replace(ready / name, target / name)
    for name in goes:
        if name == os.path.basename(name):
            (target / name).unlink(missing_ok=True)
    sync(target)
    (ready / _GOES).unlink(missing_ok=True)
    ready.rmdir()
    writing.discard(ready.name)


def _finish_inside(target: Path) -> None:
    """Finish what a killed process had committed.

    Raises:
        ValueError: this process may not.
    """
    for ready in left_lying(target, _INSIDE, "ready"):
        try:
            _finish(ready, target)
        except PermissionError as error:
            raise ValueError(f"directory: a save into {target} was killed half way, and this process may not finish it: {error}"
                             ) from error
