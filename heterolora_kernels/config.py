"""HeteroLoraConfig: every choice of a run, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

SHORTCUT_SITES = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")
DEFAULT_HEADS = ("score", "classifier")

_MODES = ("lora_only", "combined", "separated")
_SEARCHES = ("dynamic", "static", "off")
_SCORES = (None, "probe", "in_step")
_UNITS = ("modules",)
_INITS = ("zeros", "kaiming_uniform")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_budget(budget: float | int) -> None:
    """Refuse what is no share of the paths (float in (0, 1]) and no number of them (int >= 1)."""
    if not _is_number(budget) or (budget < 1 if _is_int(budget) else not 0 < budget <= 1):
        raise ValueError(f"budget must be a float in (0, 1] or an int >= 1, got {budget!r}")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from error


def _choice(name: str, value, choices: Sequence) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


@dataclass
class HeteroLoraConfig:
    """What is adapted, how large it may be, and how the ranks are chosen.

    Names that PEFT's ``LoraConfig`` has mean what they mean there.

    Args:
        r: full rank of every LoRA path, >= 1.
        lora_alpha: scaling is ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``) and stays so when fewer
            rows are active.
        lora_dropout: probability in [0, 1) of dropping an element of a path's source.
        target_modules: ``"all-linear"`` (every linear but output embeddings and heads), a list of names or name suffixes,
            or one regular expression that a whole name has to match.
        exclude_modules: the same forms; what matches gets no LoRA.
        modules_to_save: last parts of the names of modules that stay trainable; None means ``score`` and ``classifier``
            where the model has them.
        rank_pattern, alpha_pattern: ``{name, suffix or regular expression: value}``; a rank of 0 leaves the module out.
        adapter_dtype: torch dtype or its name; None: float32 under a 16-bit base, else the base's dtype.
        init_B: ``"zeros"`` (the model is unchanged at the start) or ``"kaiming_uniform"``.
        shortcuts: names out of ``residual_1``, ``residual_2``, ``shortcut_sa``, ``shortcut_ffn``, or ``"all"``.
        shortcut_r, shortcut_alpha: rank (None: r) and alpha of the shortcuts.
        budget: share (float in (0, 1]) or number (int) of paths that get ranks.
        budget_unit: ``"modules"``.
        mode: ``"lora_only"`` (no shortcut gets a rank), ``"combined"`` (one ranking), ``"separated"`` (a budget each).
        search: ``"dynamic"`` (ranks are chosen again and again), ``"static"`` (once, by ``RankSearch.start``) or ``"off"``.
        proxy: a registered proxy; see :func:`heterolora_kernels.proxies.available_proxies`.
        normalize: ``"none"``.
        score: ``"probe"`` (extra passes over the head of the data), ``"in_step"`` (statistics of the training steps
            themselves); None: in_step for dynamic, probe for static search.
        ranks: a registered allocator; ``"binary"``: a path has rank 0 or its full rank.
        interval: between reallocations: optimizer steps (int) or part of an epoch (float).
        num_batches: batches of a probe (default 32) or optimizer steps of the in_step window (default 8).
        warmup: reallocations that cover all paths before the proxy decides; None: until every path was on once.
        sites: ``{class name: Site}`` for layers that are not in the table of :mod:`heterolora_kernels.sites`.
        seed: of the initial adapters and of the allocator.

    Raises:
        ValueError, TypeError: name the field.

    Source: HeteroLoRA, arXiv 2406.14956.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    adapter_dtype: torch.dtype | str | None = None
    init_B: str = "zeros"
    shortcuts: str | Sequence[str] = ()
    shortcut_r: int | None = None
    shortcut_alpha: float = 4
    budget: float | int = 0.25
    budget_unit: str = "modules"
    mode: str = "combined"
    search: str = "dynamic"
    proxy: str = "grad_norm"
    normalize: str = "none"
    score: str | None = None
    ranks: str = "binary"
    interval: float | int = 0.2
    num_batches: int | None = None
    warmup: int | None = None
    sites: Mapping[str, object] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # None means "nothing" where PEFT has it as a default.
        for name, nothing in (("exclude_modules", ()), ("shortcuts", ()), ("rank_pattern", {}), ("alpha_pattern", {})):
            if getattr(self, name) is None:
                setattr(self, name, nothing)
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise TypeError(f"{name} must be a dictionary with names as keys, got {value!r}")
        if self.sites is not None and not isinstance(self.sites, Mapping):
            raise TypeError(f"sites must be a dictionary {{class name: Site}}, got {type(self.sites).__name__}")
        for name in ("r", "shortcut_r", "num_batches"):
            value = getattr(self, name)
            if value is None and name != "r":
                continue
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        for name in ("lora_alpha", "shortcut_alpha"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an int in [0, 2^63), got {self.seed!r}")
        for name, choices in (("budget_unit", _UNITS), ("mode", _MODES), ("search", _SEARCHES), ("score", _SCORES),
                              ("init_B", _INITS), ("normalize", ("none",))):
            _choice(name, getattr(self, name), choices)
        self._check_patterns()
        self._check_shortcuts()
        self._check_search()
        self.adapter_dtype = _as_dtype(self.adapter_dtype)

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is None and name == "modules_to_save":
                continue
            if name == "modules_to_save" and isinstance(value, str):
                raise TypeError(f"modules_to_save must be a list of names, got the string {value!r}")
            if isinstance(value, str):
                _check_regex(name, value)
            else:
                if not isinstance(value, Iterable):
                    raise TypeError(f"{name} must be a list of names or a regular expression, got {value!r}")
                value = tuple(value)
                if not all(isinstance(entry, str) for entry in value):
                    raise TypeError(f"{name} must hold strings, got {value!r}")
                setattr(self, name, value)
        if len(self.target_modules) == 0 and not self.shortcuts:
            raise ValueError("target_modules is empty and shortcuts are off: nothing would be adapted")
        for key, value in self.rank_pattern.items():
            _check_regex("rank_pattern", key)
            if not _is_int(value) or value < 0:
                raise ValueError(f"rank_pattern[{key!r}] must be an int >= 0, got {value!r}")
        for key, value in self.alpha_pattern.items():
            _check_regex("alpha_pattern", key)
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"alpha_pattern[{key!r}] must be a finite number > 0, got {value!r}")

    def _check_shortcuts(self) -> None:
        if self.shortcuts == "all":
            self.shortcuts = SHORTCUT_SITES
        elif isinstance(self.shortcuts, str):
            self.shortcuts = (self.shortcuts,)
        for name in self.shortcuts:
            _choice("shortcuts", name, SHORTCUT_SITES)
        # The table's order, whatever order was given: names, seeds and histories do not depend on it.
        self.shortcuts = tuple(name for name in SHORTCUT_SITES if name in self.shortcuts)

    def _check_search(self) -> None:
        check_budget(self.budget)
        if not _is_number(self.interval) or not 0 < self.interval < math.inf:
            raise ValueError(f"interval must be an int >= 1 (optimizer steps) or a float > 0 (part of an epoch), "
                             f"got {self.interval!r}")
        if self.warmup is not None and (not _is_int(self.warmup) or self.warmup < 0):
            raise ValueError(f"warmup must be None or an int >= 0, got {self.warmup!r}")
        if self.search == "static" and self.score == "in_step":
            raise ValueError("score='in_step' cannot be used with search='static': there are no steps yet; use 'probe'")
        for name in ("proxy", "ranks"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a registered name, got {type(getattr(self, name)).__name__}")

    @property
    def heads(self) -> tuple[str, ...]:
        """Last name parts of the modules that stay trainable."""
        return DEFAULT_HEADS if self.modules_to_save is None else tuple(self.modules_to_save)

    @property
    def resolved_score(self) -> str:
        """``score``, or its default for the kind of search."""
        return self.score or ("in_step" if self.search == "dynamic" else "probe")


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None:
        return None
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"adapter_dtype must be a floating torch dtype of 16 bits or more, or its name, got {value!r}")
    return dtype
