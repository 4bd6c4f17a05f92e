"""What lies in a folder: JSON and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from heterolora_kernels._env import available_memory
from heterolora_kernels.disk import beside, sync

#: Bytes of a JSON file: the record of a model of many thousand paths has a hundredth of it.
_MOST_JSON = 1 << 30
#: Marks what JSON has no form for.
_KIND = "__kind__"


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Replace one file at once: who reads it, and who comes after a kill, finds the old one or the new one."""
    target = Path(path)
    partial = beside(target, "saving")
    try:
        partial.write_bytes(content)
        sync(partial)
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
        content = json.loads(_read(path, _MOST_JSON))
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


def _read(path: Path, most: int | None = None) -> bytes:
    """A regular file's content. most: bytes; by default what memory there is."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{path} must be a file, and is a pipe or a device")
        limit = most or available_memory(torch.device("cpu"))
        if limit is not None and status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size:,} bytes, and may have "
                             f"{limit:,}{'' if most else ', the memory that is available'}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} must be a file, and is a folder") from error
