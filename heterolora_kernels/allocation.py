"""Sharing a budget out: pure functions from scores to ranks, without modules or models.

An allocator is a function registered by :func:`register_allocator` under the name of ``config.ranks``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from heterolora_kernels.config import check_budget

Allocator = Callable[..., dict[str, int]]
_allocators: dict[str, Allocator] = {}


def register_allocator(name: str) -> Callable[[Allocator], Allocator]:
    """Register ``f(scores, costs, budget, *, kinds, max_ranks, mode, generator) -> {path: rank}`` under a name."""
    def register(function: Allocator) -> Allocator:
        _allocators[name] = function
        return function
    return register


def available_allocators() -> list[str]:
    """Names that ``config.ranks`` can take."""
    return sorted(_allocators)


def get_allocator(name: str) -> Allocator:
    """The allocator of that name.

    Raises:
        ValueError: names those that exist.
    """
    if name not in _allocators:
        raise ValueError(f"ranks must be one of {available_allocators()}, got {name!r}")
    return _allocators[name]


def module_budget(budget: float | int, n_lora: int, n_shortcut: int) -> tuple[int, int]:
    """How many LoRA paths and how many shortcuts a budget in modules buys.

    A float p buys ``floor(p n_lora) + round(p n_shortcut)`` (the published counts); an int is shared out in proportion.
    """
    if isinstance(budget, float):
        return math.floor(budget * n_lora), round(budget * n_shortcut)
    if budget > n_lora + n_shortcut:
        raise ValueError(f"budget is {budget} modules, but there are only {n_lora + n_shortcut} paths")
    of_lora = min(n_lora, max(round(budget * n_lora / (n_lora + n_shortcut)), budget - n_shortcut))
    return of_lora, budget - of_lora


def ranking(scores: Mapping[str, float], generator: torch.Generator) -> list[str]:
    """Paths from the highest score to the lowest; ties in an order drawn once from ``generator``."""
    names = list(scores)
    drawn = torch.randperm(len(names), generator=generator).tolist()
    order = sorted(range(len(names)), key=lambda i: (-scores[names[i]], drawn[i]))
    return [names[i] for i in order]


def allocate(scores: Mapping[str, float], costs: Mapping[str, int], budget: float | int, *, kinds: Mapping[str, str],
             max_ranks: Mapping[str, int], mode: str = "combined", ranks: str = "binary",
             generator: torch.Generator) -> dict[str, int]:
    """Share ``budget`` out among paths by their scores.

    Args:
        scores: ``{path: score}``; higher is better. The dictionary's order is part of how ties are broken.
        costs: ``{path: trainable parameters at full rank}``.
        budget: float in (0, 1]: share of the paths; int: number of paths.
        kinds: ``{path: "lora" or "shortcut"}``.
        max_ranks: ``{path: full rank}``.
        mode: ``"lora_only"``, ``"combined"`` (one ranking) or ``"separated"`` (a budget each).
        ranks: name of a registered allocator.
        generator: breaks ties; exactly one draw.

    Returns:
        ``{path: rank}`` for every path, 0 included.

    Raises:
        ValueError: a score is not finite, an argument does not fit, or the budget selects nothing.
    """
    allocator = get_allocator(ranks)
    check_budget(budget)
    if mode not in ("lora_only", "combined", "separated"):
        raise ValueError(f"mode must be 'lora_only', 'combined' or 'separated', got {mode!r}")
    for name, mapping in (("costs", costs), ("kinds", kinds), ("max_ranks", max_ranks)):
        missing = [path for path in scores if path not in mapping]
        if missing:
            raise ValueError(f"{name} has no entry for {missing[0]!r}")
    bad = [path for path, score in scores.items() if not math.isfinite(score)]
    if bad:
        raise ValueError(f"scores must be finite, got {scores[bad[0]]} for {bad[0]!r} and {len(bad) - 1} others")
    return allocator(scores, costs, budget, kinds=kinds, max_ranks=max_ranks, mode=mode, generator=generator)


@register_allocator("binary")
def _binary(scores, costs, budget, *, kinds, max_ranks, mode, generator) -> dict[str, int]:
    """Rank 0 or the full rank; the budget counts paths."""
    order = ranking(scores, generator)
    lora = [path for path in order if kinds[path] == "lora"]
    shortcuts = [path for path in order if kinds[path] == "shortcut"]
    if mode == "lora_only":
        count, _ = module_budget(budget, len(lora), 0)
        chosen = set(lora[:count])
    else:
        n_lora, n_shortcuts = module_budget(budget, len(lora), len(shortcuts))
        chosen = set(order[:n_lora + n_shortcuts]) if mode == "combined" else {*lora[:n_lora], *shortcuts[:n_shortcuts]}
    if not chosen:
        raise ValueError(f"budget {budget} selects none of {len(lora)} LoRA paths and {len(shortcuts)} shortcuts "
                         f"(mode {mode!r}): raise budget")
    return {path: max_ranks[path] if path in chosen else 0 for path in scores}
