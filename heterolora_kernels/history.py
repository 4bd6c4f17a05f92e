"""What a search did, on disk: JSON lines, and the TOML tables in which the authors of the method published theirs.

Pure functions of the list of dictionaries that ``RankSearch.history`` is. The published layout is that of the
``reallocation_history_*.toml`` and ``reallocation_frequency_*.toml`` files beside the code of arXiv 2406.14956.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from heterolora_kernels.config import SHORTCUT_SITES
from heterolora_kernels.files import write_file
from heterolora_kernels.names import split_path


def write_jsonl(path: str | os.PathLike, history: Iterable[Mapping]) -> None:
    """Replace a file by one JSON object a line, at once."""
    lines = (json.dumps(entry, allow_nan=False) + "\n" for entry in history)
    write_file(path, "".join(lines).encode())


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The inverse of :func:`write_jsonl`. A last line that was cut off is left out, with a warning.

    Raises:
        FileNotFoundError, ValueError: name the file and the line.
    """
    history = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                warnings.warn(f"{path}: line {number} was cut off and is left out", stacklevel=2)
                break
            raise ValueError(f"{path}: line {number} is no valid JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("ranks"), dict):
            raise ValueError(f"{path}: line {number} is no entry of a history: it has no 'ranks'")
        history.append(entry)
    return history


def write_toml(path: str | os.PathLike, values: Mapping) -> None:
    """Replace a file by a TOML table, at once; values that are None are left out, for TOML has none.

    Raises:
        ImportError: tomli-w is not installed.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError(f"TOML files need the extra 'train' (pip install 'heterolora-kernels[train]'): {error}") from error
    write_file(path, tomli_w.dumps({name: value for name, value in values.items() if value is not None}).encode())


def turn_on_frequency(history: Sequence[Mapping], include_warmup: bool = True) -> dict[str, int]:
    """``{path: reallocations after which it had a rank}``."""
    counted = [entry for entry in history if include_warmup or not entry["warmup"]]
    names = counted[0]["ranks"] if counted else {}
    return {name: sum(entry["ranks"].get(name, 0) > 0 for entry in counted) for name in names}


class _Places:
    """Layer and short name of every path, LoRA first and by layers, as in the published tables."""

    def __init__(self, paths: Iterable[str]):
        paths = list(paths)
        parts = {path: split_path(path) for path in paths}
        stacks = dict.fromkeys(stack for stack, layer, _ in parts.values() if layer)
        lasts = Counter((stack, layer, module.rpartition(".")[2]) for stack, layer, module in parts.values())
        order = {}
        self.table: dict[str, str] = {}
        self.layer: dict[str, int] = {}
        self.module: dict[str, str] = {}
        for place, path in enumerate(paths):
            stack, layer, module = parts[path]
            last = module.rpartition(".")[2]
            # Two modules of a layer may end alike, BERT's "dense".
            self.module[path] = last if lasts[stack, layer, last] == 1 else module
            self.layer[path] = int(layer) if layer else -1
            prefix = f"{stack}." if len(stacks) > 1 else ""
            self.table[path] = f"{prefix}layer_{layer}" if layer else "no_layer"
            is_shortcut = module in SHORTCUT_SITES
            order[path] = (is_shortcut, list(stacks).index(stack) if layer else len(stacks), not layer, int(layer or 0), place)
        self.paths = sorted(paths, key=order.__getitem__)


def _plain_score(score: float | Sequence[float]) -> float:
    return float(sum(score)) if isinstance(score, (list, tuple)) else float(score)


def published_history(history: Sequence[Mapping], steps_per_epoch: int | None = None) -> dict[str, dict]:
    """One table per reallocation: ``{"dyrealloc_0": {"epoch", "step", "turn_on": [[layer, module, score, chosen], ...]}, ...}``.

    Args:
        steps_per_epoch: splits optimizer steps into ``epoch`` and ``step`` within it; None: everything is in epoch 0.

    A warm-up has the score 1 of the constant proxy, graded scores are summed, and a path in no layer has layer -1.
    """
    tables = {}
    for index, entry in enumerate(history):
        places = _Places(entry["ranks"])
        epoch, step = divmod(entry["step"], steps_per_epoch) if steps_per_epoch else (0, entry["step"])
        scores = entry["scores"] or dict.fromkeys(entry["ranks"], 1.0)
        tables[f"dyrealloc_{index}"] = {"epoch": epoch, "step": step, "turn_on": [
            [places.layer[path], places.module[path], _plain_score(scores[path]), entry["ranks"][path] > 0]
            for path in places.paths]}
    return tables


def published_frequency(history: Sequence[Mapping]) -> dict:
    """``{"total_reallocation_number": N, "layer_0": {module: times on, ...}, ...}``."""
    counts = turn_on_frequency(history)
    places = _Places(counts)
    tables: dict[str, dict] = {}
    for path in places.paths:
        tables.setdefault(places.table[path], {})[places.module[path]] = counts[path]
    return {"total_reallocation_number": len(history), **tables}
