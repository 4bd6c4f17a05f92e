"""Sharing a budget out: pure functions from scores to ranks or row masks, without modules or models.

An allocator is a function registered by :func:`register_allocator` under the name of ``config.ranks``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from heterolora_kernels.config import check_budget

_UNITS = {"modules": "paths", "parameters": "trainable parameters"}


@dataclass(frozen=True)
class Allocator:
    """One registered allocator.

    Attributes:
        name: what ``config.ranks`` says.
        function: ``f(scores, costs, budget, *, ...) -> {path: rank or row mask}``. Of the keywords of :func:`allocate`
            (``kinds, max_ranks, mode, budget_unit, rank_step, min_rank, generator``) it gets those that it names.
        per_rank: whether it wants a score per row of every path.
    """

    name: str
    function: Callable[..., dict]
    per_rank: bool = False

    def __call__(self, scores, costs, budget, **options) -> dict:
        parameters = inspect.signature(self.function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            named = {parameter.name for parameter in parameters}
            options = {name: value for name, value in options.items() if name in named}
        return self.function(scores, costs, budget, **options)


_allocators: dict[str, Allocator] = {}


def register_allocator(name: str, per_rank: bool = False):
    """Register ``f(scores, costs, budget, *, ...) -> {path: rank or row mask}``; see :class:`Allocator`.

    Args:
        name: what ``config.ranks`` will say.
        per_rank: whether f wants a score per row of every path.

    Returns:
        A decorator, which gives back the function.
    """
    def register(function):
        _allocators[name] = Allocator(name, function, per_rank)
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


def module_budget(budget: float | int, n_lora: int, n_shortcut: int, what: str = "paths") -> tuple[int, int]:
    """How many LoRA paths and how many shortcuts a budget in modules buys.

    A float p buys ``floor(p n_lora) + round(p n_shortcut)`` (the published counts); an int is shared out in proportion.
    """
    if isinstance(budget, float):
        return math.floor(budget * n_lora), round(budget * n_shortcut)
    if budget > n_lora + n_shortcut:
        raise ValueError(f"budget is {budget}, but there are only {n_lora + n_shortcut} {what}")
    of_lora = min(n_lora, max(round(budget * n_lora / (n_lora + n_shortcut)), budget - n_shortcut))
    return of_lora, budget - of_lora


def _pools(paths: Iterable[str], kinds: Mapping[str, str], mode: str, budget: float | int, size: Callable[[str], int],
           what: str, published: bool = False) -> list[tuple[list[str], int]]:
    """``(paths, limit)`` of every ranking that ``mode`` asks for; ``size`` says what a path counts at full rank.

    A share is rounded down; ``published`` rounds that of the shortcuts as :func:`module_budget` does.
    """
    lora = [path for path in paths if kinds[path] == "lora"]
    shortcuts = [path for path in paths if kinds[path] == "shortcut"] if mode != "lora_only" else []
    sizes = [sum(map(size, pool)) for pool in (lora, shortcuts)]
    if published or not isinstance(budget, float):
        limits = module_budget(budget, *sizes, what)
        together = sum(limits)
    else:
        limits, together = [math.floor(budget * total) for total in sizes], math.floor(budget * sum(sizes))
    if not together:
        raise ValueError(f"budget {budget} buys none of {sum(sizes)} {what}, those of {len(lora)} LoRA paths and "
                         f"{len(shortcuts)} shortcuts (mode {mode!r}): raise budget")
    return [([*lora, *shortcuts], together)] if mode == "combined" else [(lora, limits[0]), (shortcuts, limits[1])]


Scores = Mapping[str, float | Sequence[float]]


def _each(function: Callable[..., float], *scores: float | Sequence[float]) -> float | list[float]:
    """Of the numbers of one path, or row by row."""
    return function(*scores) if isinstance(scores[0], (int, float)) else [function(*row) for row in zip(*scores)]


def averaged(average: Scores, scores: Scores, decay: float) -> dict[str, float | list[float]]:
    """The moving average ``decay * average + (1 - decay) * scores``; a path without an average begins with its score."""
    return {name: _each(lambda old, new: decay * old + (1 - decay) * new, average.get(name, score), score)
            for name, score in scores.items()}


def by_turns(times_on: Mapping[str, Sequence[int]], sizes: Mapping[str, int], per_rank: bool) -> Scores:
    """Scores by which who was on least comes first: no path, or row, twice before every one once.

    Args:
        times_on: how often each row was on, or with binary ranks the path; names that are missing never were.
        sizes: ``{path: full rank}``.
    """
    counts = {name: times_on.get(name, [0] * (r if per_rank else 1)) for name, r in sizes.items()}
    scores = {name: [-float(times) for times in each] for name, each in counts.items()}
    return scores if per_rank else {name: first for name, (first,) in scores.items()}


def steadied(scores: Scores, rows: Mapping[str, Sequence[bool]], hysteresis: float) -> dict[str, float | list[float]]:
    """The scores of what is on, ``rows``, raised by ``hysteresis`` times their size; the others as they are."""
    def lifted(score: float, on: bool) -> float:
        return score + hysteresis * abs(score) if on else score

    return {name: _each(lifted, score, any(rows[name]) if isinstance(score, (int, float)) else rows[name])
            for name, score in scores.items()}


def ranking(scores: Mapping[str, float], generator: torch.Generator) -> list[str]:
    """Paths from the highest score to the lowest; ties in an order drawn once from ``generator``."""
    names = list(scores)
    drawn = torch.randperm(len(names), generator=generator, device="cpu").tolist()
    order = sorted(range(len(names)), key=lambda i: (-scores[names[i]], drawn[i]))
    return [names[i] for i in order]


def _rows(score: float | Sequence[float], rank: int) -> list[float]:
    """A score per row; one number for a path counts for each of its rows."""
    return [float(score)] * rank if isinstance(score, (int, float)) else [float(value) for value in score]


def allocate(scores: Mapping[str, float | Sequence[float]], costs: Mapping[str, int], budget: float | int, *,
             kinds: Mapping[str, str], max_ranks: Mapping[str, int], mode: str = "combined", ranks: str = "binary",
             budget_unit: str = "modules", rank_step: int = 1, min_rank: int = 0,
             generator: torch.Generator) -> dict[str, int | list[bool]]:
    """Share ``budget`` out among paths, or among their rows, by scores.

    Args:
        scores: ``{path: score}``, or for graded ranks ``{path: [score of each row]}``; higher is better. The dictionary's
            order is part of how ties are broken.
        costs: ``{path: trainable parameters at full rank}``.
        budget: float in (0, 1]: a share; int: a number.
        kinds: ``{path: "lora" or "shortcut"}``.
        max_ranks: ``{path: full rank}``.
        mode: ``"lora_only"``, ``"combined"`` (one ranking) or ``"separated"`` (a budget each).
        ranks: name of a registered allocator.
        budget_unit: what is shared out: ``"modules"`` (paths; rows for graded ranks) or ``"parameters"``: taken in the order
            of the scores, what does not fit is left out, never above the budget.
        rank_step: graded: rows are taken in units of so many.
        min_rank: graded: best rows that every eligible path has in any case, within the budget.
        generator: breaks ties; exactly one draw.

    Returns:
        ``{path: rank}`` for every path, 0 included; of graded ranks ``{path: [whether each row is active]}``.

    Raises:
        ValueError: a score is not finite, an argument does not fit, or the budget selects nothing.
    """
    allocator = get_allocator(ranks)
    check_budget(budget)
    if mode not in ("lora_only", "combined", "separated"):
        raise ValueError(f"mode must be 'lora_only', 'combined' or 'separated', got {mode!r}")
    if budget_unit not in ("modules", "parameters"):
        raise ValueError(f"budget_unit must be 'modules' or 'parameters', got {budget_unit!r}")
    if rank_step < 1 or min_rank < 0 or min_rank % rank_step:
        raise ValueError(f"rank_step must be >= 1 and min_rank a multiple of it, got {rank_step} and {min_rank}")
    for name, mapping in (("costs", costs), ("kinds", kinds), ("max_ranks", max_ranks)):
        missing = [path for path in scores if path not in mapping]
        if missing:
            raise ValueError(f"{name} has no entry for {missing[0]!r}")
    rows = {path: [score] if isinstance(score, (int, float)) else list(score) for path, score in scores.items()}
    for path, values in rows.items():
        if not isinstance(scores[path], (int, float)) and (not allocator.per_rank or len(values) != max_ranks[path]):
            wanted = f"a number or {max_ranks[path]} numbers" if allocator.per_rank else "a number"
            raise ValueError(f"scores[{path!r}] must be {wanted} for ranks={ranks!r}, got {len(values)} numbers")
    bad = [path for path, values in rows.items() if not all(map(math.isfinite, values))]
    if bad:
        raise ValueError(f"scores must be finite, got {scores[bad[0]]} for {bad[0]!r} and {len(bad) - 1} others")
    return allocator(scores, costs, budget, kinds=kinds, max_ranks=max_ranks, mode=mode, budget_unit=budget_unit,
                     rank_step=rank_step, min_rank=min_rank, generator=generator)


@register_allocator("binary")
def _binary(scores, costs, budget, *, kinds, max_ranks, mode, budget_unit, generator) -> dict[str, int]:
    """Rank 0 or the full rank."""
    place = {path: i for i, path in enumerate(ranking(scores, generator))}
    cost = dict.fromkeys(scores, 1) if budget_unit == "modules" else costs
    pools = _pools(scores, kinds, mode, budget, cost.__getitem__, _UNITS[budget_unit], published=budget_unit == "modules")
    chosen = set()
    for pool, limit in pools:
        for path in sorted(pool, key=place.__getitem__):
            if cost[path] <= limit:
                chosen.add(path)
                limit -= cost[path]
    if not chosen:
        smallest = min(cost[path] for pool, _ in pools for path in pool)
        raise ValueError(f"budget {budget} selects no path: the smallest costs {smallest} {_UNITS[budget_unit]}; raise budget")
    return {path: max_ranks[path] if path in chosen else 0 for path in scores}


@register_allocator("graded", per_rank=True)
def _graded(scores, costs, budget, *, kinds, max_ranks, mode, budget_unit, rank_step, min_rank,
            generator) -> dict[str, list[bool]]:
    """All rows of all paths in one order, the best first, in units of ``rank_step``.

    A path's rows are ordered by score and cut into units, whose score is their mean. A path whose next unit does not fit
    takes no later one either: its rank is a multiple of the step, or its full rank.
    """
    drawn = torch.randperm(sum(max_ranks[path] for path in scores), generator=generator, device="cpu").tolist()
    cost = {path: 1 if budget_unit == "modules" else costs[path] // max_ranks[path] for path in scores}
    units: dict[str, list[tuple[float, int, list[int]]]] = {}
    first = 0
    for path, score in scores.items():
        values, r = _rows(score, max_ranks[path]), max_ranks[path]
        order = sorted(range(r), key=lambda j: (-values[j], drawn[first + j]))
        units[path], mean = [], math.inf
        for rows in (order[i:i + rank_step] for i in range(0, r, rank_step)):
            # No larger than the unit before it, which rounding of equal scores may make it.
            mean = min(mean, sum(values[j] for j in rows) / len(rows))
            units[path].append((mean, drawn[first + rows[0]], rows))
        first += r
    masks = {path: [False] * max_ranks[path] for path in scores}
    pools = _pools(scores, kinds, mode, budget, lambda path: cost[path] * max_ranks[path],
                   "rows" if budget_unit == "modules" else _UNITS[budget_unit])
    kept = min_rank // rank_step
    for pool, limit in pools:
        floor = sum(cost[path] * len(rows) for path in pool for _, _, rows in units[path][:kept])
        if floor > limit:
            raise ValueError(f"min_rank {min_rank} costs {floor} for {len(pool)} paths, more than the {limit} that budget "
                             f"{budget} buys: lower min_rank or raise budget")
        # Units of a path stand in the order of their scores, so its floor comes first.
        order = sorted(((i >= kept, -score, tie, path, rows) for path in pool
                        for i, (score, tie, rows) in enumerate(units[path])), key=lambda unit: unit[:3])
        closed = set()
        for _, _, _, path, rows in order:
            if path in closed or cost[path] * len(rows) > limit:
                closed.add(path)
                continue
            limit -= cost[path] * len(rows)
            for j in rows:
                masks[path][j] = True
    if not any(map(any, masks.values())):
        raise ValueError(f"budget {budget} selects no row in units of {rank_step}: raise budget")
    return masks
