"""The own format read back: ``heterolora.json``, the tensors that it speaks of, and nothing that it does not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import torch
from torch import Tensor

from heterolora_kernels import files
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.files import field_of
from heterolora_kernels.fingerprint import read_sample
from heterolora_kernels.saved_files import NATIVE_NAME
from heterolora_kernels.search_state import check_search_state
from heterolora_kernels.state import ADAPTER_NAMES

FORMAT, VERSION = "heterolora", 1
#: Dtypes that adapters have.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Saved:
    """What a folder holds, in the native format's terms; config, base and search of a native one only."""

    file: FilePath
    paths: dict[str, dict]
    tensors: dict[str, Tensor]
    heads: set[str]
    config: HeteroLoraConfig | None = None
    base: dict[str, tuple[torch.dtype, Tensor]] | None = None
    search: dict | None = None
    #: ``{name: shape}`` of what was trained beside adapters and heads; ``{name: name of a head's tensor}`` of other ends.
    others: dict[str, list] = field(default_factory=dict)
    tied: dict[str, str] | None = None


def read_record(file: FilePath) -> dict:
    record = files.read_json(file)
    for name, expected in (("format", FORMAT), ("format_version", VERSION)):
        if field_of(record, name, type(expected), file) != expected:
            raise ValueError(f"{file}: field {name!r} must be {expected!r}, got {record[name]!r}")
    return record


def search_of(record: dict, file: FilePath) -> dict | None:
    where = f"{file}: field 'search'"
    state = files.decode(field_of(record, "search", (dict, type(None)), file), where)
    if state is not None and not isinstance(state, dict):
        raise ValueError(f"{where} must be an object, got a {type(state).__name__}")
    if state is not None:
        check_search_state(state, where)
    return state


def read_native(folder: FilePath) -> Saved:
    file = folder / NATIVE_NAME
    record = read_record(file)
    values = {**field_of(record, "config", dict, file), "init_from": None}
    try:
        config = HeteroLoraConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: field 'config': {error}") from error
    paths = {name: _read_path(entry, f"{file}: path {name!r}") for name, entry in field_of(record, "paths", dict, file).items()}
    # Files of earlier versions have no "others" and no "tied".
    described = {kind: field_of({kind: {}, **record}, kind, dict, file) for kind in ("heads", "others")}
    heads, others = ({name: field_of(entry, "shape", list, f"{file}: {kind} {name!r}") for name, entry in entries.items()}
                     for kind, entries in described.items())
    tied = field_of({"tied": None, **record}, "tied", (dict, type(None)), file)
    base = field_of(field_of(record, "base", dict, file), "weights", dict, f"{file}: field 'base'")
    base = {name: read_sample(entry, f"{file}: base weight {name!r}") for name, entry in base.items()}
    search = search_of(record, file)
    where, weights = f"{file}: field 'weights'", field_of(record, "weights", dict, file)
    name = field_of(weights, "file", str, where)
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{where}: 'file' must be the name of a file in the same folder, got {name!r}")
    tensors = files.read_tensors(folder / name, field_of(weights, "sha256", str, where))
    _check_tensors(tensors, paths, {**heads, **others}, file, folder / name)
    for kind, entries in described.items():
        for tensor, entry in entries.items():
            _check_whole(tensors[tensor], field_of(entry, "dtype", str, f"{file}: {kind} {tensor!r}"),
                         f"{folder / name}: tensor {tensor!r}")
    return Saved(file, paths, tensors, set(heads), config, base, search, others, tied)


def _read_path(entry: object, where: str) -> dict:
    kinds = {"site": (str, type(None)), "r": int, "scaling": (int, float), "in_features": int, "out_features": int, "active": str}
    path = {name: field_of(entry, name, kind, where) for name, kind in kinds.items()}
    if len(path["active"]) != path["r"] or set(path["active"]) - {"0", "1"}:
        raise ValueError(f"{where}: field 'active' must be {path['r']} characters 0 or 1, got {path['active']!r}")
    return path


def _check_values(tensor: Tensor, where: str) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{where} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where} holds numbers that are not finite: was it saved after the loss had become nan?")


def _check_whole(tensor: Tensor, dtype: str, where: str) -> None:
    if str(tensor.dtype).removeprefix("torch.") != dtype:
        raise ValueError(f"{where} is {tensor.dtype}, and the record says {dtype}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise ValueError(f"{where} holds numbers that are not finite: was it saved after the loss had become nan?")


def _check_tensors(tensors: Mapping[str, Tensor], paths: Mapping[str, dict], heads: Mapping[str, list], file: FilePath,
                   weights: FilePath) -> None:
    """Hold the tensors to be those that the JSON speaks of."""
    expected = dict(heads)
    for name, path in paths.items():
        shapes = ([path["r"], path["in_features"]], [path["out_features"], path["r"]], [path["r"]])
        expected.update(zip((f"{name}.{leaf}" for leaf in ADAPTER_NAMES), shapes))
    odd = sorted(expected.keys() ^ tensors.keys())
    if odd:
        raise ValueError(f"{weights}: {len(odd)} tensors are missing or not in {file.name}: {odd[0]!r}")
    for name, shape in expected.items():
        if list(tensors[name].shape) != shape:
            raise ValueError(f"{weights}: tensor {name!r} has shape {list(tensors[name].shape)}, and {file.name} says {shape}")
    for name, path in paths.items():
        for leaf in ADAPTER_NAMES[:2]:
            _check_values(tensors[f"{name}.{leaf}"], f"{weights}: tensor '{name}.{leaf}'")
        if tensors[f"{name}.lora_mask"].dtype != torch.bool:
            raise ValueError(f"{weights}: tensor '{name}.lora_mask' must be bool, got {tensors[f'{name}.lora_mask'].dtype}")
        if tensors[f"{name}.lora_mask"].tolist() != [character == "1" for character in path["active"]]:
            raise ValueError(f"{weights}: tensor '{name}.lora_mask' is not what field 'active' of {file.name} says")
