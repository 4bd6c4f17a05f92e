"""HeteroLoraConfig: every choice of a run, checked when it is made."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import torch

SHORTCUT_SITES = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")
#: Names that transformers gives to heads that it makes anew for a task.
DEFAULT_HEADS = ("score", "classifier", "qa_outputs", "classification_head")

_MODES = ("lora_only", "combined", "separated")
_SEARCHES = ("dynamic", "static", "off")
_SCORES = (None, "probe", "in_step")
_UNITS = ("modules", "parameters")
_INITS = ("zeros", "kaiming_uniform")
_NORMALIZATIONS = ("none", "scale", "size", "type")

#: What the published runs have in common, and what its kinds of runs add (arXiv 2406.14956 and the authors' run logs).
_PAPER = {"r": 8, "lora_alpha": 16, "target_modules": ("q_proj", "v_proj"), "shortcuts": "all", "shortcut_r": None,
          "shortcut_alpha": 4, "budget": 0.25, "mode": "combined", "proxy": "grad_norm", "score": "probe", "num_batches": 32,
          "warmup": 0, "synflow_target": "loss"}
_PAPER_SETTINGS = {
    "dynamic": {"search": "dynamic", "interval": 0.2},
    "static": {"search": "static", "shortcuts": ()},
    # Here constant took the place of the proxy in the first two epochs: eight reallocations.
    "llama": {"search": "dynamic", "r": 64, "interval": 0.25, "budget": 0.33, "warmup": 8},
}


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    # Of an int that no float can hold nothing can be computed.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (isinstance(value, float) or abs(value) < 2**1000)


def check_budget(budget: float | int) -> None:
    """Refuse what is no share of the paths (float in (0, 1]) and no number of them (int >= 1)."""
    if not _is_number(budget) or (budget < 1 if _is_int(budget) else not 0 < budget <= 1):
        raise ValueError(f"budget must be a float in (0, 1] or an int >= 1, got {budget!r}")


@dataclass(frozen=True)
class Site:
    """Where a layer's shortcuts begin and end: names of modules relative to a layer.

    Args:
        h: the module whose input is the layer's input.
        f: the module whose input enters the feed-forward block.
        attention: the linear at the end of the attention: ``residual_1`` and ``shortcut_ffn`` join its output.
        feed_forward: the last linear of the feed-forward block: ``residual_2`` and ``shortcut_sa`` join its output.
        attention_norm, feed_forward_norm: a norm that stands between that linear and the residual addition; shortcuts
            then join the norm's output.
    """

    h: str
    f: str
    attention: str
    feed_forward: str
    attention_norm: str | None = None
    feed_forward_norm: str | None = None


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
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
        target_modules: ``"all-linear"`` (every linear but output embeddings and heads; a warning names what cannot be
            adapted), a list of names or name suffixes, or one regular expression that a whole name has to match.
        exclude_modules: the same forms; what matches gets no LoRA.
        layers_to_transform: number or numbers of the layers in which a list of ``target_modules`` selects; None: all.
        layers_pattern: names before the number of a layer; None: any.
        modules_to_save: ends of the names of modules that are trained as they are; None means heads that are made for a task:
            ``score``, ``classifier``, ``qa_outputs``, ``classification_head``, and whatever the checkpoint holds nothing of.
        rank_pattern, alpha_pattern: ``{name, suffix or regular expression: value}``; a rank of 0 leaves the module out.
        use_rslora: scaling ``lora_alpha / sqrt(r)``.
        adapter_dtype: torch dtype or its name; None: float32 under a 16-bit base, else the base's dtype.
        init_B: ``"zeros"`` (the model is unchanged at the start) or ``"kaiming_uniform"``.
        shortcuts: names out of ``residual_1``, ``residual_2``, ``shortcut_sa``, ``shortcut_ffn``, or ``"all"``.
        shortcut_r, shortcut_alpha: rank (None: r) and alpha of the shortcuts.
        budget: share (float in (0, 1]) or number (int) of what ``budget_unit`` counts.
        budget_unit: ``"modules"`` (paths; with graded ranks: rows) or ``"parameters"`` (trainable parameters; a share is one of
            all eligible paths' parameters at full rank). Never exceeded.
        mode: ``"lora_only"`` (no shortcut gets a rank), ``"combined"`` (one ranking), ``"separated"`` (a budget each).
        search: ``"dynamic"`` (ranks are chosen again and again), ``"static"`` (once, by ``RankSearch.start``) or ``"off"``.
        proxy: a registered proxy; see :func:`heterolora_kernels.proxies.available_proxies`.
        normalize: ``"none"``, ``"scale"`` (divide by s^degree), ``"size"`` (by the square root of the number of parameters) or
            ``"type"`` (z-score among modules of one name). Proxies of degree 0 are never normalised.
        score: ``"probe"`` (extra passes over the head of the data), ``"in_step"`` (statistics of the training steps
            themselves); None: in_step for dynamic, probe for static search.
        score_decay: weight in [0, 1) of the scores' moving average over reallocations; 0 takes each score as it is.
        ranks: a registered allocator; ``"binary"``: a path has rank 0 or its full rank; ``"graded"``: rows are ranked together.
        rank_step: graded: rows are switched in units of so many.
        min_rank: graded: rows that every eligible path keeps, paid from the budget; a multiple of ``rank_step``.
        hysteresis: what is on keeps its place until a rival's score is more than ``1 + hysteresis`` times its own.
        interval: between reallocations: optimizer steps (int) or part of an epoch (float).
        num_batches: batches of a probe (default 32) or optimizer steps of the in_step window (default 8).
        warmup: reallocations that cover all paths before the proxy decides; None: until every path was on once.
        on_reactivate: what is switched on again goes on with its optimizer state (``"keep"``) or with a fresh one
            (``"reset"``).
        synflow_target: ``"outputs"`` (the sum of the outputs) or ``"loss"`` (the task's loss, as published).
        pack: copies of frozen weights in the order in which a backend's kernels read them: ``"auto"`` (up to a quarter of the
            memory that is free at the first forward), ``"copy"`` (all of them) or ``"off"`` (packed anew in each call).
        sites: ``{class name: Site}`` for layers that are not in the table of :mod:`heterolora_kernels.sites`.
        group: ``"auto"``: linears that read the same x (q, k and v; gate and up) run as one op where that is faster;
            ``"off"``: each by itself. Outputs and the gradients of a linear's own parameters are the same bits; the gradient of
            x is rounded once instead of once for each linear.
        init_from: folder of a PEFT LoRA adapter to start from; targets, ranks and scalings of the LoRA paths are then its own.
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
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
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
    score_decay: float = 0.0
    ranks: str = "binary"
    rank_step: int = 1
    min_rank: int = 0
    hysteresis: float = 0.0
    interval: float | int = 0.2
    num_batches: int | None = None
    warmup: int | None = None
    on_reactivate: str = "keep"
    synflow_target: str = "outputs"
    pack: str = "auto"
    sites: Mapping[str, Site] | None = None
    group: str = "auto"
    init_from: str | None = None
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
        for name, site in (self.sites or {}).items():
            if not isinstance(name, str) or not (isinstance(site, Site) or callable(site)):
                raise TypeError(f"sites[{name!r}] must be a Site, or a function of the layer that returns one, got {site!r}")
        if self.init_from is not None:
            if not isinstance(self.init_from, (str, os.PathLike)):
                raise TypeError(f"init_from must be the path of a folder, got {type(self.init_from).__name__}")
            self.init_from = os.fspath(self.init_from)
        for name in ("r", "shortcut_r", "num_batches", "rank_step"):
            value = getattr(self, name)
            if value is None and name in ("shortcut_r", "num_batches"):
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
                              ("init_B", _INITS), ("normalize", _NORMALIZATIONS), ("on_reactivate", ("keep", "reset")),
                              ("synflow_target", ("outputs", "loss")), ("pack", ("auto", "copy", "off")),
                              ("group", ("auto", "off"))):
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
        self._check_layers()
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

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if layers is not None and not _is_int(layers):
            layers = tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else (layers,)
            if not all(map(_is_int, layers)):
                raise TypeError(f"layers_to_transform must be an int or a list of them, got {self.layers_to_transform!r}")
            self.layers_to_transform = layers
        if layers not in (None, ()) and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list of names: a regular expression or "
                             f"'all-linear' says itself which layers it means, got {self.target_modules!r}")
        if isinstance(pattern, str):
            pattern = (pattern,) if pattern else ()
        if pattern is not None:
            pattern = tuple(pattern) if isinstance(pattern, Iterable) else (pattern,)
            if not all(isinstance(entry, str) for entry in pattern):
                raise TypeError(f"layers_pattern must be a name or a list of names, got {self.layers_pattern!r}")
            for entry in pattern:
                _check_regex("layers_pattern", entry)
            if pattern and layers is None:
                raise ValueError("layers_pattern needs layers_to_transform, the numbers of the layers")
            self.layers_pattern = pattern

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
        if not _is_int(self.min_rank) or self.min_rank < 0 or self.min_rank % self.rank_step:
            raise ValueError(f"min_rank must be a multiple of rank_step ({self.rank_step}) and >= 0, got {self.min_rank!r}")
        if self.ranks == "binary" and (self.min_rank or self.rank_step != 1):
            raise ValueError("rank_step and min_rank need ranks='graded': binary ranks are 0 or the full rank")
        if not _is_number(self.hysteresis) or not 0 <= self.hysteresis < math.inf:
            raise ValueError(f"hysteresis must be a finite number >= 0, got {self.hysteresis!r}")
        if not _is_number(self.score_decay) or not 0 <= self.score_decay < 1:
            raise ValueError(f"score_decay must be in [0, 1), got {self.score_decay!r}")
        for name in ("proxy", "ranks"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a registered name, got {type(getattr(self, name)).__name__}")

    @classmethod
    def paper(cls, setting: str = "dynamic", **overrides) -> HeteroLoraConfig:
        """The settings of the published runs.

        Args:
            setting: ``"dynamic"`` (all shortcuts, ranks chosen every 0.2 epoch), ``"static"`` (LoRA alone, ranks chosen once)
                or ``"llama"`` (the runs on Llama and Qwen).
            overrides: fields that are to differ, such as ``target_modules`` where the model's linears have other names.

        Returns:
            The config.

        Raises:
            ValueError, TypeError: name the setting or the field.

        Source: arXiv 2406.14956 and the run logs that its authors published.
        """
        _choice("setting", setting, tuple(_PAPER_SETTINGS))
        return cls(**{**_PAPER, **_PAPER_SETTINGS[setting], **overrides})

    def to_dict(self) -> dict:
        """The fields as JSON and TOML can hold them; :meth:`from_dict` is the inverse.

        Returns:
            ``{field: value}`` of every field.

        Raises:
            ValueError: ``sites`` holds a function, which has no written form.
        """
        odd = [name for name, site in (self.sites or {}).items() if not isinstance(site, Site)]
        if odd:
            raise ValueError(f"sites[{odd[0]!r}] is no Site and cannot be written to a file")
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.adapter_dtype is not None:
            values["adapter_dtype"] = str(self.adapter_dtype).removeprefix("torch.")
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> HeteroLoraConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            values: ``{field: value}``; fields that are not named have their defaults.

        Returns:
            The config.

        Raises:
            ValueError, TypeError: name the field.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a dictionary of fields, got {type(values).__name__}")
        known = {entry.name for entry in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"HeteroLoraConfig has no field {unknown[0]!r}; its fields are {sorted(known)}")
        values = dict(values)
        if isinstance(values.get("sites"), Mapping):
            values["sites"] = {name: _as_site(name, site) for name, site in values["sites"].items()}
        return cls(**values)

    @property
    def heads(self) -> tuple[str, ...]:
        """Ends of the names of the modules that stay trainable; those made anew under other names are not among them."""
        return DEFAULT_HEADS if self.modules_to_save is None else tuple(self.modules_to_save)

    @property
    def resolved_score(self) -> str:
        """``score``, or its default for the kind of search."""
        return self.score or ("in_step" if self.search == "dynamic" else "probe")


def _as_site(name: str, value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    try:
        return Site(**value)
    except TypeError as error:
        raise ValueError(f"sites[{name!r}] must have the fields {[entry.name for entry in fields(Site)]}: {error}") from error


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None:
        return None
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"adapter_dtype must be a floating torch dtype of 16 bits or more, or its name, got {value!r}")
    return dtype
