"""Which tensors the checkpoint of a transformers model holds, by its headers: no tensor is read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import nn

_SAFETENSORS, _INDEXES = "model.safetensors", ("model.safetensors.index.json", "pytorch_model.bin.index.json")
#: A header is a list of names; one of more bytes is none.
_MOST_BYTES = 100_000_000


def checkpoint_names(model: nn.Module) -> set[str] | None:
    """The names of the tensors in the checkpoint that a model was loaded from; None where it has none or none can be found.

    Looked for in the folder ``name_or_path`` and in the cache of the Hugging Face hub. Nothing is downloaded; files that cannot
    be read count as not there.
    """
    source = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "name_or_path", None)
    if not isinstance(source, str) or not source:
        return None
    for name in (*_INDEXES[:1], _SAFETENSORS, *_INDEXES[1:]):
        file = _find(source, name)
        names = None if file is None else _names_in(file)
        if names:
            return names
    return None


def _find(source: str, name: str) -> Path | None:
    if os.path.isdir(source):
        file = Path(source, name)
        return file if file.is_file() else None
    # Whoever loaded a model from the hub has imported it.
    hub = sys.modules.get("huggingface_hub")
    try:
        found = None if hub is None else hub.try_to_load_from_cache(source, name)
    except Exception:  # noqa: BLE001 - a name that is no repository
        return None
    return Path(found) if isinstance(found, str) else None


def _names_in(file: Path) -> set[str] | None:
    try:
        if file.suffix == ".json":
            return set(json.loads(file.read_bytes()[:_MOST_BYTES])["weight_map"])
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _MOST_BYTES else {}
        return set(header) - {"__metadata__"}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def new_modules(model: nn.Module) -> list[str] | None:
    """Outermost modules of which the checkpoint holds no tensor, so that they were drawn at random; None: it is not known.

    Names are compared with and without the prefix of the base model, which transformers adds and takes away. Where the base's own
    names do not fit, because transformers converts them, only what lies outside the base is judged.
    """
    held = checkpoint_names(model)
    if not held:
        return None
    prefix = getattr(model, "base_model_prefix", "")
    held |= {name.removeprefix(f"{prefix}.") for name in held} | {f"{prefix}.{name}" for name in held} if prefix else set()
    own: dict[str, list[int]] = {}
    known: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own.setdefault(name, []).append(id(parameter))
        if name in held:
            known.add(id(parameter))
    base = getattr(model, "base_model", model)
    inside = f"{prefix}." if base is not model and prefix else None
    missing = {name for name, (parameter, *_) in own.items() if parameter not in known}
    in_base = {name for name in own if inside is None or name.startswith(inside)}
    if len(missing & in_base) > len(in_base) / 2:
        return None
    if missing & in_base and held - {name for name in own} - {f"{prefix}.{name}" for name in own} - {
            name.removeprefix(f"{prefix}.") for name in own}:
        missing -= in_base
    return _outermost(model, own, missing)


def _outermost(model: nn.Module, own: dict[str, list[int]], missing: set[str]) -> list[str]:
    found: list[str] = []
    for module, _ in model.named_modules():
        if not module or any(module.startswith(f"{outer}.") for outer in found):
            continue
        below = [name for name in own if name.startswith(f"{module}.")]
        if below and missing.issuperset(below):
            found.append(module)
    return found
