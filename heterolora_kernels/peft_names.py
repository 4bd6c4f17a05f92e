"""Names in adapters of older models: transformers has moved modules since, and keeps a list of what moved where."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable, Container, Iterable

from torch import nn


def renamer(model: nn.Module) -> Callable[[str, Container[str]], str]:
    """A function of a name in a file and of the names that the model has: the model's name for it, or the one in the file.

    What the model knows by the file's name keeps it. Old ones are mapped as PEFT maps them: by the model's
    ``_checkpoint_conversion_mapping``, or by the renamings of ``transformers.conversion_mapping``.

    Source: ``PeftModel.from_pretrained`` and ``peft.utils.transformers_weight_conversion``, PEFT 0.21.
    """
    patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    renamings = _renamings(model)

    def rename(name: str, known: Container[str]) -> str:
        if name in known:
            return name
        for pattern, replacement in patterns.items():
            mapped, count = re.subn(pattern, replacement, name)
            if count:
                return mapped if mapped in known else name
        # Their patterns are those of tensors.
        mapped = f"{name}.weight"
        for renaming in renamings:
            mapped = renaming.rename_source_key(mapped)[0]
        mapped = mapped.removesuffix(".weight")
        return mapped if mapped in known else name
    return rename


def _renamings(model: nn.Module) -> list:
    # Whoever has a model of transformers has imported it.
    if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    except (ImportError, AttributeError, TypeError):
        # Another release keeps its list elsewhere; names that it has moved are then refused by name.
        return []


#: Last parts of names that PEFT takes for experts which transformers 5 has stacked, by the kind of model.
#: Source: ``_MOE_TARGET_MODULE_MAPPING`` of ``peft.utils.transformers_weight_conversion``, PEFT 0.21.
_OF_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def check_names_stay(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to export paths whose names PEFT would change when it loads them: it applies the renamings of every part to the
    whole.

    Raises:
        ValueError: names one, and what it becomes.
    """
    renamings = []
    for entry in _renamings(model):
        unscoped = copy.copy(entry)
        with contextlib.suppress(AttributeError):
            unscoped.scope_prefix = None
        renamings.append(unscoped)
    for name in names:
        key = mapped = f"base_model.model.{name}.lora_A.weight"
        for renaming in renamings:
            mapped = renaming.rename_source_key(mapped)[0]
        # PEFT takes back what only leaves a prefix away.
        if mapped != key and not key.endswith(mapped):
            raise ValueError(f"format 'peft' cannot hold {name!r}: PEFT takes it for a name of an older "
                             f"{model.config.model_type!r} model and looks for "
                             f"{mapped.removeprefix('base_model.model.').removesuffix('.lora_A.weight')!r}, which this model "
                             "does not have; use format='native' or 'merged'")


def check_not_of_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to export paths that PEFT would take for experts: it renames targets by their last part, whatever they are.

    Raises:
        ValueError: names one.
    """
    conversions = sys.modules.get("transformers.conversion_mapping")
    kind = getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {}).get(getattr(getattr(model, "config", None), "model_type",
                                                                                None))
    taken = [name for name in names if name.rpartition(".")[2] in _OF_EXPERTS.get(kind, ())]
    if taken:
        raise ValueError(f"format 'peft' cannot hold {taken[0]!r} ({len(taken)} in all): in a {model.config.model_type!r} "
                         f"model PEFT takes every target called {taken[0].rpartition('.')[2]!r} for the stacked experts; "
                         "leave such modules out (exclude_modules), or use format='native' or 'merged'")
