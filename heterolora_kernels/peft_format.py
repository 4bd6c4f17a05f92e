"""PEFT's LoRA adapters: what their two files say, and how the LoRA paths of a patched model are said in them.

PEFT itself is not imported. Which modules an adapter has is read from its tensors, never from ``target_modules``. Shortcuts have
no place in the format.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from heterolora_kernels.bases import is_conv1d
from heterolora_kernels.beside import peft_modules
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.distributed import full
from heterolora_kernels.files import field_of, read_json, read_tensors
from heterolora_kernels.folders import settled
from heterolora_kernels.heads import Heads
from heterolora_kernels.layers import Path
from heterolora_kernels.matching import pattern_value
from heterolora_kernels.peft_fields import check_fields, is_of_experts, meaning_of
from heterolora_kernels.peft_names import renamer
from heterolora_kernels.peft_tasks import task_type
from heterolora_kernels.state import ADAPTER_NAMES, HeteroLoraState
from heterolora_kernels.undo import undone_on_failure, values_of

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
#: What PEFT refuses in ``modules_to_save``.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
#: Heads that PEFT saves and expects with these tasks, named or not.
_TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class PeftModule:
    """One adapted module: lora_A [r, K], lora_B [N, r]; ``alpha`` as the file has it."""

    r: int
    alpha: float
    scaling: float
    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as PEFT saved it.

    Attributes:
        weights: its file of tensors, for errors.
        modules: by name.
        heads: tensors of ``modules_to_save``, by their names in the model's state dict.
        head_modules: names of the modules that these belong to.
        others: tensors that are neither, by name.
        config: ``adapter_config.json``, checked.
    """

    weights: FilePath
    modules: dict[str, PeftModule]
    heads: dict[str, Tensor]
    head_modules: tuple[str, ...]
    others: dict[str, Tensor]
    config: dict

    @property
    def dropout(self) -> float:
        return self.config.get("lora_dropout") or 0.0

    @property
    def is_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    def adopted_by(self, model: nn.Module, config: HeteroLoraConfig) -> HeteroLoraConfig:
        """``config`` with this adapter's modules, ranks, scalings and heads; they must all be in ``model``, not patched yet.

        Raises:
            ValueError: names the tensors that fit nowhere.
        """
        modules = dict(model.named_modules())
        lost = [name for name in self.modules if name not in modules]
        if lost:
            experts = any(re.search(r"\bexperts\b", name) for name in lost)
            raise ValueError(f"{self.weights} has tensors of {len(lost)} modules that the model does not have: "
                             f"{', '.join(f'{name}.lora_A' for name in lost[:3])}{', ...' if len(lost) > 3 else ''}"
                             f"{'; experts that this model stacks into one parameter cannot be loaded' if experts else ''}")
        self.check_others(model)
        names = self.head_entries(model)
        self._check_heads(model, names)
        heads = config.modules_to_save
        if names:
            heads = tuple(dict.fromkeys((*(heads or ()), *names)))

        def alpha(module: PeftModule) -> float:
            if config.use_rslora == self.is_rslora:
                return module.alpha
            return module.scaling * (math.sqrt(module.r) if config.use_rslora else module.r)

        return dataclasses.replace(
            config, init_from=None, target_modules=exact_targets(self.modules, modules), exclude_modules=(),
            rank_pattern=exact_pattern({name: module.r for name, module in self.modules.items()}, config.r),
            alpha_pattern=exact_pattern({name: alpha(module) for name, module in self.modules.items()}, config.lora_alpha),
            modules_to_save=heads)

    def named_as(self, model: nn.Module) -> PeftAdapter:
        """The same adapter under the names that the model has now for what an older transformers called otherwise."""
        modules, tensors = dict(model.named_modules(remove_duplicate=False)), model.state_dict()
        lost = [name for name in self.modules if name not in modules]
        if not lost and all(name in tensors for name in self.heads):
            return self
        rename = renamer(model)
        return dataclasses.replace(
            self, modules={rename(name, modules): module for name, module in self.modules.items()},
            **{field: {rename(name, tensors): tensor for name, tensor in getattr(self, field).items()} for field in ("heads",
                                                                                                                     "others")},
            head_modules=tuple(rename(name, modules) for name in self.head_modules))

    def head_entries(self, model: nn.Module) -> tuple[str, ...]:
        """The file's ``modules_to_save`` that select something in the model."""
        return Heads(model, self.config.get("modules_to_save") or ()).entries if self.heads else ()

    def check_others(self, model: nn.Module) -> None:
        """Base weights that PEFT saved beside the adapter may only repeat the model's."""
        tensors = model.state_dict(keep_vars=True)
        heads = {id(tensors[name]): tensor for name, tensor in self.heads.items() if name in tensors}
        for name, tensor in self.others.items():
            own = tensors.get(name.replace(".base_layer.", "."))
            if own is not None and self.config.get("ensure_weight_tying") and id(own) in heads:
                # The other end of a head, which PEFT has kept tied.
                own = heads[id(own)]
            if own is None or own.shape != tensor.shape or not torch.equal(own.to(tensor), tensor):
                meaning = meaning_of(name)
                if own is None and meaning is not None:
                    raise ValueError(f"{self.weights}: tensor {name!r} is neither LoRA of a linear nor of modules_to_save: "
                                     f"loading it would take {meaning}")
                raise ValueError(f"{self.weights}: tensor {name!r} is neither LoRA nor of modules_to_save, and "
                                 f"{'the model has none of that name' if own is None else 'the model has other values there'}")

    def _check_heads(self, model: nn.Module, names: Sequence[str]) -> None:
        own = own_tensors(model)
        heads = Heads(model, names)
        below = {name for name in own if heads.has(name)}
        odd = sorted(below ^ set(self.heads))
        if odd:
            raise ValueError(f"{self.weights}: tensors of modules_to_save do not fit the model: {odd[0]!r} is "
                             f"{'missing' if odd[0] in below else 'not in the model'}, {len(odd)} are in all")
        for name, tensor in self.heads.items():
            if own[name].shape != tensor.shape:
                raise ValueError(f"{self.weights}: tensor {name!r} has shape {list(tensor.shape)}, and the model takes "
                                 f"{list(own[name].shape)}")
        self.check_ties(model)

    def check_ties(self, model: nn.Module) -> None:
        """Hold the ends of a tied parameter to be in the file together, with one value: here they are one tensor, in PEFT two.

        Raises:
            ValueError: names both.
        """
        if not self.config.get("ensure_weight_tying"):
            check_unshared(model, self.heads)
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in self.heads:
                continue
            other = first.setdefault(id(parameter), name)
            if not torch.equal(self.heads[name], self.heads[other]):
                raise ValueError(f"{self.weights}: {other!r} and {name!r} have other values, and in this model they are one "
                                 "parameter: load the base with tie_word_embeddings=False")

    def copy_into(self, model: nn.Module, paths: Mapping[str, Path]) -> None:
        """Write the weights into the paths of the model, patched with :meth:`adopted_by`'s config, and into its heads.

        Raises:
            ValueError: names a tensor whose shape does not fit. Nothing is written then.
        """
        own = own_tensors(model)
        pairs = [(own[name], tensor) for name, tensor in self.heads.items()]
        for name, module in self.modules.items():
            for leaf in ("lora_A", "lora_B"):
                target, tensor = getattr(paths[name], leaf), getattr(module, leaf)
                if target.shape != tensor.shape:
                    raise ValueError(f"{self.weights}: tensor '{name}.{leaf}' has shape {list(tensor.shape)}, and the model "
                                     f"takes {list(target.shape)}")
                pairs.append((target, tensor))
        with undone_on_failure(values_of(target for target, _ in pairs)), torch.no_grad():
            for target, tensor in pairs:
                target.copy_(tensor)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the adapters' entries."""
    # The parameters themselves: ZeRO-3 leaves empty tensors in their copies.
    return {name: value for name, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and name.rpartition(".")[2] not in ADAPTER_NAMES}


def check_unshared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse parameters that are also parameters of other names: writing one would change both.

    Raises:
        ValueError: names both.
    """
    names = set(names)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for shared in owners.values():
        inside = [name for name in shared if name in names]
        if inside and len(inside) < len(shared):
            outside = next(name for name in shared if name not in names)
            raise ValueError(f"modules_to_save: {inside[0]!r} is the same parameter as {outside!r}, which is not among them")


# ---- reading ----


def read_peft(directory: str | os.PathLike) -> PeftAdapter:
    """Read and check an adapter.

    Raises:
        FileNotFoundError, ValueError: name the file and the field or tensor.
    """
    return settled(directory, read_peft_files)


def read_peft_files(folder: FilePath) -> PeftAdapter:
    """:func:`read_peft` of a folder into which nobody writes."""
    config = _read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder / 'adapter_model.bin'} is a pickle, which is never read: save the adapter as safetensors")
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in read_tensors(weights).items():
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name)
        if match:
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            rest[name] = tensor
    if not factors:
        raise ValueError(f"{weights} has no tensor called '{_PREFIX}<module>.lora_A.weight': it is no LoRA adapter")
    modules = {name: _module(name, pair, config, weights) for name, pair in factors.items()}
    heads, head_modules = {}, {}
    for name in list(rest):
        owner = _head_of(name, config.get("modules_to_save") or ())
        if owner is not None:
            heads[name], head_modules[owner] = rest.pop(name), None
    return PeftAdapter(weights, modules, heads, tuple(head_modules), rest, config)


def _read_config(file: FilePath) -> dict:
    config = read_json(file)
    if field_of(config, "peft_type", str, file) != "LORA":
        raise ValueError(f"{file}: field 'peft_type' is {config['peft_type']!r}, and only LORA can be loaded")
    check_fields(config, file)
    optional = type(None)
    for name, kinds in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float, optional)),
                        ("use_rslora", (bool, optional)), ("rank_pattern", (dict, optional)), ("alpha_pattern", (dict, optional)),
                        ("modules_to_save", (list, optional))):
        if name in config or name in ("r", "lora_alpha"):
            field_of(config, name, kinds, file)
    if not 0 <= (config.get("lora_dropout") or 0.0) < 1:
        raise ValueError(f"{file}: field 'lora_dropout' must be in [0, 1), got {config['lora_dropout']!r}")
    if not all(isinstance(name, str) and name for name in config.get("modules_to_save") or ()):
        raise ValueError(f"{file}: field 'modules_to_save' must hold names, got {config['modules_to_save']!r}")
    for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for key, value in ((None, config[default]), *(config.get(name) or {}).items()):
            _check_size(f"{file}: field {default!r}" if key is None else f"{file}: field {name!r}: the value of {key!r}", value,
                        is_rank=default == "r")
            try:
                re.compile(key or "")
            except re.error as error:
                raise ValueError(f"{file}: field {name!r}: {key!r} is no regular expression: {error}") from error
    return config


def _check_size(where: str, value: object, is_rank: bool) -> None:
    is_number = isinstance(value, int if is_rank else (int, float)) and not isinstance(value, bool)
    if not is_number or not (1 if is_rank else 0) <= value < math.inf or value == 0:
        raise ValueError(f"{where} must be {'an int >= 1' if is_rank else 'a finite number > 0'}, got {value!r}")


def _module(name: str, pair: Mapping[str, Tensor], config: Mapping, weights: FilePath) -> PeftModule:
    for leaf in ("lora_A", "lora_B"):
        if leaf not in pair:
            raise ValueError(f"{weights}: tensor '{name}.{leaf}' is missing")
        if pair[leaf].dim() != 2 or not pair[leaf].is_floating_point() or pair[leaf].dtype.itemsize < 2:
            raise ValueError(f"{weights}: tensor '{name}.{leaf}' must be a floating matrix, got {pair[leaf].dtype} of shape "
                             f"{list(pair[leaf].shape)}; only linears can be adapted")
        if not bool(torch.isfinite(pair[leaf]).all()):
            raise ValueError(f"{weights}: tensor '{name}.{leaf}' holds numbers that are not finite")
    r = pattern_value(name, config.get("rank_pattern") or {}, config["r"])
    alpha = pattern_value(name, config.get("alpha_pattern") or {}, config["lora_alpha"])
    if is_of_experts((pair["lora_A"].shape, pair["lora_B"].shape), r):
        raise ValueError(f"{weights}: {name!r} has lora_A {list(pair['lora_A'].shape)} and lora_B "
                         f"{list(pair['lora_B'].shape)}, {pair['lora_A'].shape[0] // r} times the rank {r} of fields 'r' and "
                         "'rank_pattern': factors of stacked experts ('target_parameters'), which cannot be loaded, or a rank "
                         "that the fields do not say")
    if pair["lora_A"].shape[0] != r or pair["lora_B"].shape[1] != r:
        raise ValueError(f"{weights}: {name!r} has lora_A {list(pair['lora_A'].shape)} and lora_B "
                         f"{list(pair['lora_B'].shape)}, and fields 'r' and 'rank_pattern' give it rank {r}")
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return PeftModule(r, alpha, scaling, pair["lora_A"], pair["lora_B"])


def _head_of(name: str, heads: Sequence[str]) -> str | None:
    """The module of ``modules_to_save`` that a tensor belongs to, by PEFT's rule: its name ends in one of them."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((owner for owner in owners if owner.endswith(tuple(heads))), None)


# ---- names ----


def exact_targets(names: Iterable[str], others: Iterable[str]) -> list[str] | str:
    """``target_modules`` that select exactly ``names`` out of ``others``.

    An entry of a list also selects what ends in it, such as ``model.score`` for ``score``: then it is one regular expression.
    """
    wanted = set(names)

    def is_caught(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in wanted for i in range(1, len(parts)))

    if any(is_caught(name) for name in others if name not in wanted):
        return "|".join(map(re.escape, names))
    return list(names)


def exact_pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """``{module: value}`` as a ``rank_pattern`` or ``alpha_pattern``, by which every module gets its own value.

    The first key counts that matches the end of a name, a dot any character. So longer names come first, and among those of
    one length the one with fewer dots; and modules of the default value are named too where another's key would match them.
    """
    keys = {name: name if re.fullmatch(r"[\w.-]+", name) else re.escape(name) for name in values}
    odd = "|".join(keys[name] for name, value in values.items() if value != default)
    caught = re.compile(rf"(.*\.)?({odd})$") if odd else None
    ordered = sorted(values, key=lambda name: (-len(name), name.count(".")))
    return {keys[name]: values[name] for name in ordered if caught is not None and caught.match(name)}


# ---- writing ----


def name_of(model: nn.Module) -> str | None:
    """Where a transformers model was loaded from."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def class_names(model: nn.Module) -> list[str]:
    """Names of the classes of a transformers classifier, in the order of its outputs; none of any other model."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or not type(model).__name__.endswith("Classification"):
        return []
    return [str(labels[index]) for index in sorted(labels)]


def heads_to_save(model: nn.Module, state: HeteroLoraState, paths: Sequence[Path]) -> list[str]:
    """``modules_to_save`` for PEFT: the heads, modules that share a parameter with one or were trained beside the adapters,
    and heads
    that PEFT expects with the task unless a path is in them.

    Raises:
        ValueError: names what PEFT cannot save.
    """
    expected = [head for head in _task_heads(model) if not any(_is_in(path.name, _heads(model, [head])) for path in paths)]
    names = [path.name for path in paths]
    beside, lost = peft_modules(model, state.beside.tensors(model, state.is_own), names)
    if lost:
        raise ValueError(f"format 'peft' cannot hold {lost[0]!r} ({len(lost)} in all), which was trained beside the adapters: "
                         "PEFT saves whole modules without adapters; use format='native' or 'merged', or drop_heads=True for "
                         "the base's own")
    ends = state.heads.other_ends(model)
    if ends:
        warnings.warn(f"{', '.join(ends)}: tied to a head ({', '.join(sorted(set(ends.values())))}), and saved as often as it "
                      "has names: PEFT loads separate tensors, equal until they are trained on", stacklevel=5)
    tied, impossible = peft_modules(model, ends, names)
    if impossible:
        raise ValueError(f"format 'peft' cannot hold {impossible[0]!r}, which is tied to the head {ends[impossible[0]]!r} and "
                         "has an adapter; use format='native'")
    return list(dict.fromkeys((*_uncontained(model, state.heads.entries), *tied, *beside, *expected)))


def _uncontained(model: nn.Module, entries: Iterable[str]) -> list[str]:
    """The entries, with what lies in a list in its place: PEFT wraps modules that are called, which lists are not."""
    found = []
    for entry in entries:
        selected = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name
                    and name.endswith(entry)]
        if not any(isinstance(module, _CONTAINERS) for _, module in selected):
            found.append(entry)
            continue
        while selected:
            name, module = selected.pop(0)
            if isinstance(module, _CONTAINERS):
                selected += [(f"{name}.{child}", each) for child, each in module.named_children()]
            elif any(True for _ in module.parameters()):
                found.append(name)
    return found


def _task_heads(model: nn.Module) -> list[str]:
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [head for head in _TASK_HEADS.get(task_type(model), ()) if head in present]


def open_paths(paths: Iterable[Path]) -> list[Path]:
    """LoRA paths of which at least one row is active."""
    return [path for path in paths if path.site is None and any(path.active_rows())]


def describe(model: nn.Module, paths: Sequence[Path], dropout: float, heads: Sequence[str]) -> dict:
    """``adapter_config.json`` of the active rows of LoRA paths.

    alpha is the scaling times the rank, so that PEFT's ``alpha / r`` is the scaling again.

    Args:
        heads: names of ``modules_to_save``.

    Raises:
        ValueError: a path lies in a head.
    """
    ranks = {path.name: sum(path.active_rows()) for path in paths}
    alphas = {path.name: _neat(path.scaling * ranks[path.name]) for path in paths}
    inside = next((name for name in ranks if _is_in(name, _heads(model, heads))), None)
    if inside is not None:
        raise ValueError(f"the path {inside!r} lies in a head of modules_to_save ({list(heads)}), and PEFT adapts a module or "
                         "saves it; format='native' and 'merged' hold both")
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        # With its task PEFT would look for the task's heads.
        "peft_type": "LORA", "task_type": task_type(model) if set(_task_heads(model)) <= set(heads) else None,
        "base_model_name_or_path": name_of(model),
        "r": r, "lora_alpha": alpha, "rank_pattern": exact_pattern(ranks, r), "alpha_pattern": exact_pattern(alphas, alpha),
        "target_modules": exact_targets(ranks, [name for name, _ in model.named_modules()]), "exclude_modules": None,
        "modules_to_save": list(heads) or None, "lora_dropout": dropout, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": any(is_conv1d(path.holder) for path in paths), "init_lora_weights": True, "inference_mode": False,
    }


def _neat(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _heads(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Modules that PEFT saves whole: their names end in one of these, with or without a dot before it."""
    return [name for name, _ in model.named_modules(remove_duplicate=False) if heads and name.endswith(tuple(heads))]


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def peft_tensors(model: nn.Module, paths: Sequence[Path], heads: Sequence[str]) -> dict[str, Tensor]:
    """``adapter_model.safetensors`` of the active rows, and of the heads.

    Raises:
        ValueError: a head's parameter also belongs to another module.
    """
    tensors = {}
    for path in paths:
        tensors[f"{_PREFIX}{path.name}.lora_A.weight"] = full(path.lora_A)[path.mask]
        tensors[f"{_PREFIX}{path.name}.lora_B.weight"] = full(path.lora_B)[:, path.mask]
    modules = _heads(model, heads)
    saved = {name: full(tensor) for name, tensor in own_tensors(model).items() if _is_in(name, modules)}
    check_unshared(model, saved)
    return {**tensors, **{f"{_PREFIX}{name}": tensor for name, tensor in saved.items()}}


def as_uniform(config: dict, tensors: Mapping[str, Tensor], paths: Sequence[Path]) -> tuple[dict, dict[str, Tensor]]:
    """The same adapter with one rank and scaling 1: B takes the scaling, rows of zeros fill up to the largest rank.

    What servers read that know neither patterns nor heads (vLLM).
    """
    r = max(sum(path.active_rows()) for path in paths)
    uniform = {}
    for path in paths:
        A, B = (tensors[f"{_PREFIX}{path.name}.{leaf}.weight"] for leaf in ("lora_A", "lora_B"))
        missing = r - A.shape[0]
        dtype = torch.float64 if B.dtype == torch.float64 else torch.float32
        uniform[f"{_PREFIX}{path.name}.lora_A.weight"] = nn.functional.pad(A, (0, 0, 0, missing))
        uniform[f"{_PREFIX}{path.name}.lora_B.weight"] = nn.functional.pad((path.scaling * B.to(dtype)).to(B.dtype), (0, missing))
    return {**config, "r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}}, uniform
