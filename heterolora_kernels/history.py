"""What a search did, on disk: JSON lines, and the TOML tables in which the authors of the method published theirs.

Pure functions of the list of dictionaries that ``RankSearch.history`` is; keys that are not known here are kept. The published
layout is that of the ``reallocation_history_*.toml`` and ``reallocation_frequency_*.toml`` files beside the code of
arXiv 2406.14956.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from heterolora_kernels._env import how_to_install
from heterolora_kernels.config import SHORTCUT_SITES
from heterolora_kernels.files import decode, encode, field_of, write_file
from heterolora_kernels.names import split_path

#: Of an entry, what is read here and in the pictures.
_FIELDS = {"step": int, "warmup": bool, "scores": (dict, type(None)), "ranks": dict, "churn": (int, float),
           "active_parameters": int}


def describe_ranks(rows: Mapping[str, Sequence[bool]], before: Mapping[str, Sequence[bool]], sizes: Mapping[str, int],
                   scores: Mapping[str, float | Sequence[float]] | None, per_rank: bool) -> dict[str, object]:
    """What an entry says of a choice of ranks.

    Args:
        rows, before: which rows of each path are active now, and were.
        sizes: parameters of one row of each path.
        scores: by which they were chosen; None in the warm-up.
        per_rank: rows are ranked and counted, instead of paths.
    """
    # What is counted: paths, or rows where rows are ranked.
    units = {name: row if per_rank else (any(row),) for name, row in rows.items()}
    was = {name: row if per_rank else (any(row),) for name, row in before.items()}
    on = [(name, i) for name in rows for i, active in enumerate(units[name]) if active]
    fresh = [(name, i) for name, i in on if not was[name][i]]
    return {
        "scores": scores, "ranks": {name: sum(row) for name, row in rows.items()},
        "threshold": None if scores is None else min(scores[name][i] if per_rank else scores[name] for name, i in on),
        # Share of what is now on that was off before; at the first allocation everything was on.
        "churn": len(fresh) / len(on),
        "active_parameters": sum(sizes[name] * sum(row) for name, row in rows.items()),
    }


def _lines(entries: Iterable[Mapping]) -> bytes:
    # Infinities and NaN have no place in JSON; encoded they have, and come back.
    return "".join(json.dumps(encode(entry), allow_nan=False) + "\n" for entry in entries).encode()


def write_jsonl(path: str | os.PathLike, history: Iterable[Mapping]) -> None:
    """Replace a file by one JSON object a line, at once."""
    write_file(path, _lines(history))


def append_jsonl(path: str | os.PathLike, entries: Iterable[Mapping]) -> None:
    """Add one JSON object a line, and wait until they are on the disk; the file is made if it does not exist.

    What a killed process left of a last line is removed first, with a warning: it would spoil the next one.
    """
    content = _lines(entries)
    with open(path, "ab+") as file:
        file.seek(0)
        written = file.read()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            if _is_cut_off(written[whole:]):
                warnings.warn(f"{path}: the last line was cut off and is removed", stacklevel=2)
                file.truncate(whole)
            else:
                content = b"\n" + content
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_cut_off(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """What :func:`write_jsonl` and :func:`append_jsonl` wrote. A last line that was cut off is left out, with a warning.

    Raises:
        FileNotFoundError, ValueError: name the file, and the line and its field.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    history = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        # Whoever ends a line has written all of it.
        if number == len(lines) and _is_cut_off(line):
            warnings.warn(f"{where} was cut off and is left out", stacklevel=2)
            break
        try:
            entry = decode(json.loads(line), where)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no valid JSON: {error}") from error
        for name, kinds in _FIELDS.items():
            field_of(entry, name, kinds, where)
        for name in entry["ranks"]:
            field_of(entry["ranks"], name, int, f"{where}: field 'ranks'")
            if entry["scores"] is not None:
                field_of(entry["scores"], name, (int, float, list), f"{where}: field 'scores'")
        history.append(entry)
    return history


def write_toml(path: str | os.PathLike, values: Mapping) -> None:
    """Replace a file by a TOML document, at once; fields that are None are left out, for TOML has no word for them.

    Raises:
        ImportError: tomli-w is not installed.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError(f"TOML files need the extra 'train' ({how_to_install('train')}): {error}") from error
    write_file(path, tomli_w.dumps(_without_none(values)).encode())


def _without_none(values: Mapping) -> dict:
    return {name: _without_none(value) if isinstance(value, Mapping) else value
            for name, value in values.items() if value is not None}


def turn_on_frequency(history: Sequence[Mapping], include_warmup: bool = True) -> dict[str, int]:
    """``{path: number of reallocations that gave it a rank}``."""
    counts = dict.fromkeys((name for entry in history for name in entry["ranks"]), 0)
    for entry in history:
        if include_warmup or not entry["warmup"]:
            for name, rank in entry["ranks"].items():
                counts[name] += rank > 0
    return counts


class _Places:
    """Layer, table and short name of every path, in the order of the published tables.

    Args:
        paths: names, those of one kind in the order of the model's modules.

    Attributes:
        paths: LoRA first, layer by layer, then the shortcuts, layer by layer; what lies in no layer behind its kind.
        layer: ``{path: index}``, -1 for what lies in none.
        table: ``{path: "layer_<index>"}``, "no_layer" for what lies in none.
        module: ``{path: last part of its name}``, the whole name within the layer where two of a layer end alike.
        prefix: ``{path: "<stack>."}`` where the model has several stacks, whose layers are numbered alike; else "".
    """

    def __init__(self, paths: Iterable[str]):
        parts = {path: split_path(path) for path in paths}
        stacks = list(dict.fromkeys(stack for stack, layer, _ in parts.values() if layer))
        endings = Counter((stack, layer, module.rpartition(".")[2]) for stack, layer, module in parts.values())
        self.layer: dict[str, int] = {}
        self.table: dict[str, str] = {}
        self.module: dict[str, str] = {}
        self.prefix: dict[str, str] = {}
        order = {}
        for path, (stack, layer, module) in parts.items():
            last = module.rpartition(".")[2]
            self.layer[path] = int(layer) if layer else -1
            self.prefix[path] = f"{stack}." if layer and len(stacks) > 1 else ""
            self.table[path] = f"{self.prefix[path]}layer_{layer}" if layer else "no_layer"
            # BERT has three "dense" in a layer.
            self.module[path] = last if endings[stack, layer, last] == 1 else module
            is_shortcut = last in SHORTCUT_SITES
            order[path] = (is_shortcut, stacks.index(stack) if layer else len(stacks), self.layer[path],
                           SHORTCUT_SITES.index(last) if is_shortcut else 0)
        self.paths = sorted(parts, key=order.__getitem__)


def _one_number(score: float | Sequence[float]) -> float:
    return float(sum(score) if isinstance(score, (list, tuple)) else score)


def published_history(history: Sequence[Mapping], steps_per_epoch: int | None = None) -> dict[str, dict]:
    """One table per reallocation: ``{"dyrealloc_0": {"epoch", "step", "turn_on": [[layer, module, score, chosen], ...]}, ...}``.

    LoRA comes before shortcuts, each layer by layer. A warm-up has the scores of the constant proxy, 1; scores of rows are
    summed; a path in no layer has layer -1; modules have their stack before their name where the model has several.

    Args:
        steps_per_epoch: splits optimizer steps into ``epoch`` and ``step`` within it; None: everything is in epoch 0.

    Raises:
        ValueError: names the argument.
    """
    if steps_per_epoch is not None and (not isinstance(steps_per_epoch, int) or steps_per_epoch < 1):
        raise ValueError(f"steps_per_epoch must be None or an int >= 1, got {steps_per_epoch!r}")
    tables = {}
    for index, entry in enumerate(history):
        places, ranks = _Places(entry["ranks"]), entry["ranks"]
        epoch, step = divmod(entry["step"], steps_per_epoch) if steps_per_epoch else (0, entry["step"])
        scores = dict.fromkeys(ranks, 1.0) if entry["scores"] is None else entry["scores"]
        tables[f"dyrealloc_{index}"] = {"epoch": epoch, "step": step, "turn_on": [
            [places.layer[path], places.prefix[path] + places.module[path], _one_number(scores[path]), ranks[path] > 0]
            for path in places.paths]}
    return tables


def published_frequency(history: Sequence[Mapping]) -> dict[str, int | dict[str, int]]:
    """``{"total_reallocation_number": N, "layer_0": {module: times on, ...}, ...}``, warm-up included.

    Modules stand in the order of :func:`published_history`, paths in no layer last, in the table ``no_layer``. Where the model
    has several stacks, tables are called ``<stack>.layer_0``.
    """
    counts = turn_on_frequency(history)
    places = _Places(counts)
    tables: dict[str, dict[str, int]] = {}
    for path in sorted(places.paths, key=lambda path: places.layer[path] < 0):
        tables.setdefault(places.table[path], {})[places.module[path]] = counts[path]
    return {"total_reallocation_number": len(history), **tables}
