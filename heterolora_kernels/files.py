"""Folders that are on disk as a whole or not at all, and what lies in them: JSON and safetensors. Nothing is ever unpickled.

A folder is written beside its place and takes it in one step, so that a reader, and whoever comes after a kill, finds either
what was there before or what was to be there. What a killed process left lying is cleared by the next one that writes there.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from heterolora_kernels.undo import put_back

# linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

#: Marks what JSON has no form for.
_KIND = "__kind__"

#: Temporary folders that this process is writing, by name: its number alone says nothing where numbers are used again.
_writing: set[str] = set()


def _beside(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}-{os.getpid()}-{secrets.token_hex(4)}")


def _left_lying(target: Path, purpose: str) -> list[Path]:
    """Folders for this purpose whose process is gone, the newest last."""
    pattern = re.compile(rf"{re.escape(f'.{target.name}.{purpose}-')}(\d+)-[0-9a-f]+")
    found = [target.with_name(name) for name in (os.listdir(target.parent) if target.parent.is_dir() else ())
             if (match := pattern.fullmatch(name)) and name not in _writing and not _is_alive(int(match[1]))]
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


def find_folder(directory: str | os.PathLike) -> Path:
    """The folder of that name; the one set aside if a kill came while it was being replaced in two steps.

    Raises:
        FileNotFoundError, ValueError: there is none, or a file of that name.
    """
    target = Path(os.path.realpath(directory))
    if target.is_dir():
        return target
    if target.exists():
        raise ValueError(f"directory must be a folder, and {target} is a file")
    aside = _left_lying(target, "aside")
    if not aside:
        raise FileNotFoundError(f"directory: there is no folder {target}")
    return aside[-1]


@contextmanager
def replaced_folder(directory: str | os.PathLike, stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A new folder to write into, which takes the place of ``directory`` when the block ends.

    Files that only the old folder has are taken over (as hard links, where the file system has them). Until the block has
    ended well and everything is on the disk, the old folder is what it was; after a failure too. Nobody else should write
    into the old one meanwhile.

    Args:
        stale: of a file's name: whether it is left behind.

    Raises:
        ValueError: directory is a file, a mount point, or holds the working directory, which would lose its place.
    """
    target = Path(os.path.realpath(directory))
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    folder = _beside(target, "saving")

    def clear() -> None:
        # After a failure it holds what is new, else what is old.
        shutil.rmtree(folder, ignore_errors=True)
        _writing.discard(folder.name)

    with put_back(clear):
        _writing.add(folder.name)
        folder.mkdir()
        yield folder
        if target.exists():
            folder.chmod(stat.S_IMODE(target.stat().st_mode))
            _take_over(target, folder, stale)
        _sync_tree(folder)
        _put_in_place(folder, target)


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory must be a folder, and {target} is a file")
    if os.path.ismount(target):
        raise ValueError(f"directory: {target} is a mount point, which cannot be replaced in one step; name a folder in it")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"directory: {target} holds the working directory, and is replaced as a whole; name a folder in it")


def _clear(target: Path) -> None:
    """Remove what killed processes left; a folder that one of them set aside and did not replace comes back."""
    aside = _left_lying(target, "aside")
    if aside and not target.exists():
        os.rename(aside.pop(), target)
    for folder in (*aside, *_left_lying(target, "saving")):
        shutil.rmtree(folder, ignore_errors=True)


def _take_over(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    for entry in os.scandir(old):
        place = new / entry.name
        if stale(entry.name) or os.path.lexists(place):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, place, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, place)


def _link(source: str, place: str | os.PathLike) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place, follow_symlinks=False)


def _sync(path: str | os.PathLike) -> None:
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


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            status = os.lstat(os.path.join(place, name))
            # What has a second name is the old folder's and was on the disk before.
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                _sync(os.path.join(place, name))
        _sync(place)


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


def _put_in_place(folder: Path, target: Path) -> None:
    """``target`` becomes ``folder`` and the other way round; as before if anything fails."""
    new, aside = _inode(folder), _beside(target, "aside")
    _writing.add(aside.name)
    try:
        if target.exists():
            _trade(folder, target, aside)
        else:
            os.rename(folder, target)
        _sync(target.parent)
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
        _writing.discard(aside.name)


def _trade(folder: Path, target: Path, aside: Path) -> None:
    if not _exchange(folder, target):
        os.rename(target, aside)
        os.rename(folder, target)
        os.rename(aside, folder)


def _exchange(first: Path, second: Path) -> bool:
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


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Replace one file at once: who reads it, and who comes after a kill, finds the old one or the new one."""
    target = Path(path)
    partial = _beside(target, "saving")
    try:
        partial.write_bytes(content)
        _sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping) -> None:
    """No line follows the last bracket: every shorter file is invalid."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: name the file.
    """
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON (was it cut off?): {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(content).__name__}")
    return content


def field_of(record: object, name: str, kinds: type | tuple[type, ...], where: object):
    """``record[name]``, held to be of these types (a bool is no number), and ``record`` to be a dictionary.

    Raises:
        ValueError: names ``where``, the file, and the field.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {record!r}")
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: field {name!r} must be {expected}, got {value!r}")
    return value


def encode(value):
    """Numbers, strings, lists, dictionaries and tensors as JSON can hold them; :func:`decode` gives the same bits."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_KIND: "float", "value": repr(float(value))}
    if isinstance(value, Tensor):
        content = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        return {_KIND: "tensor", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape),
                "data": base64.b64encode(bytes(content.tolist())).decode()}
    if isinstance(value, list):
        return [encode(entry) for entry in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != _KIND for key in value):
            return {key: encode(entry) for key, entry in value.items()}
        return {_KIND: "dict", "items": [[encode(key), encode(entry)] for key, entry in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def decode(value, where: str):
    """What :func:`encode` was given.

    Raises:
        ValueError: names ``where``, the file and the field.
    """
    if isinstance(value, list):
        return [decode(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: decode(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    try:
        if kind == "float":
            return float(value["value"])
        if kind == "tensor":
            data, dtype = bytearray(base64.b64decode(value["data"], validate=True)), getattr(torch, value["dtype"])
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
            return flat.reshape(value["shape"]).clone()
        if kind == "dict":
            return {decode(key, where): decode(entry, f"{where}[{key!r}]") for key, entry in value["items"]}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    raise ValueError(f"{where} is of the unknown kind {kind!r}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    # Copies: the format refuses tensors that share memory or have gaps.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    # safetensors makes files that only their owner can read; others get here what any file gets.
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(copies, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal digits."""
    return hashlib.sha256(_read(path)).hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Args:
        sha256: what the file's must be.

    Raises:
        FileNotFoundError, ValueError: name the file.
    """
    content = _read(path)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file that field 'sha256' describes: it was cut off, changed or exchanged")
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no valid safetensors file (was it cut off?): {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} must be a file, and is a folder") from error
