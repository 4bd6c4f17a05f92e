"""Kinds of paths, the pools in which they are ranked, and what each pool may spend."""

from __future__ import annotations

import math

MODES = ("combined", "separated", "lora_only")


def kind_of(path):
    return path.partition(".")[0]


def pools_of(scores, mode):
    """The lists of paths that are ranked together."""
    lora = [path for path in scores if kind_of(path) == "lora"]
    shortcuts = [path for path in scores if kind_of(path) == "shortcut"]
    return {"combined": [lora + shortcuts], "separated": [lora, shortcuts], "lora_only": [lora]}[mode]


def shares(budget, sizes):
    """What each pool may spend, by the rules of the documentation."""
    if isinstance(budget, float):
        return [math.floor(budget * size) for size in sizes]
    if len(sizes) == 1:
        return [budget]
    first = min(sizes[0], max(round(budget * sizes[0] / sum(sizes)), budget - sizes[1]))
    return [first, budget - first]
