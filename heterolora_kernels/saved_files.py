"""Which files in a folder belong to an earlier save: a folder holds one adapter, or one merged model, in one format."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from heterolora_kernels.peft_format import CONFIG_NAME, WEIGHTS_NAME

NATIVE_NAME = "heterolora.json"

_MERGED, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: Fields of PEFT's own files that those written here do not have.
_FOREIGN_FIELDS = ("peft_version", "auto_mapping", "megatron_core", "loftq_config")


def replaced_by(format: str, folder: Path) -> Collection[str]:
    """Names of files that a save in ``format`` replaces, beside those that it writes; others stay.

    Of an adapter in another format both files go: ``load_adapter`` and PEFT would go on reading the old one. Of a merged model
    those
    that a reader would prefer, or that its index names.

    Raises:
        ValueError: the folder has an adapter that somebody else wrote, in another format.
    """
    goes: set[str] = set()
    if format != "native":
        record = _read(folder / NATIVE_NAME)
        weights = record.get("weights")
        file = weights.get("file") if isinstance(weights, dict) else None
        goes |= {NATIVE_NAME} | ({file} if isinstance(file, str) and file == os.path.basename(file) and record else set())
    if format in ("native", "merged") and (folder / CONFIG_NAME).exists():
        if any(field in _read(folder / CONFIG_NAME) for field in _FOREIGN_FIELDS):
            raise ValueError(f"directory: {folder} holds an adapter that PEFT wrote ({CONFIG_NAME}), and a folder holds one "
                             "adapter: name another folder, or remove it first")
        goes |= {CONFIG_NAME, WEIGHTS_NAME}
    if format == "merged":
        shards = _read(folder / _INDEX).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        goes |= {_MERGED, _INDEX, *(name for name in names if isinstance(name, str) and name == os.path.basename(name))}
    return goes


def _read(file: Path) -> dict:
    """A JSON object, or nothing where there is none: what cannot be read is nobody's."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
