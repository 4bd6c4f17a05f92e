"""What PEFT's adapters may hold beside plain LoRA, and what is said of it: the field, and what loading it would take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Fields that do not change what an adapter computes; ``*_config`` of ways to draw the first weights among them.
SILENT = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"))
READ = frozenset((
    "alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type",
    "r", "rank_pattern", "use_rslora"))
#: Ways to draw the first weights that leave the base as it is (the others, PiSSA's say, subtract the adapter from it).
INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_EXPERTS = "factors for every expert of a stacked parameter, which are no linear here"
#: ``{field: what it would take}``.
_NEEDS = {
    "use_dora": "DoRA's magnitudes, which scale the merged weight",
    "lora_bias": "a bias behind lora_B",
    "target_parameters": _EXPERTS,
    "trainable_token_indices": "rows of the embedding of their own",
    "layer_replication": "layers that the base does not have",
    "use_qalora": "pooled inputs (QALoRA)",
    "alora_invocation_tokens": "an adapter that begins at a token (aLoRA)",
    "use_bdlora": "block diagonal factors (BD-LoRA)",
    "megatron_config": "Megatron's parallel linears",
    "arrow_config": "a router among adapters (Arrow)",
}
_TENSORS = (
    (r"lora_magnitude_vector", "DoRA's magnitudes ('use_dora')"),
    (r"lora_embedding_[AB]", "an adapted embedding ('target_modules')"),
    (r"lora_[AB]\.bias", "a bias of a factor ('lora_bias')"),
    (r"token_adapter|trainable_tokens", "rows of an embedding ('trainable_token_indices')"),
    (r"lora_[AB]$", _EXPERTS + " ('target_parameters')"),
)


def check_fields(config: Mapping, file: Path) -> None:
    """Refuse fields that change what an adapter computes in a way that is not computed here.

    Raises:
        ValueError: names the file, the field and what it would take.
    """
    for name, value in config.items():
        if value and name not in SILENT and name not in READ:
            raise ValueError(f"{file}: field {name!r} is {value!r}, and what it stands for is not computed here"
                             f"{f': it would take {_NEEDS[name]}' if name in _NEEDS else ''}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: field 'bias' is {config['bias']!r}, and only 'none' can be loaded: biases stay as they are")
    if config.get("init_lora_weights", True) not in INITS:
        raise ValueError(f"{file}: field 'init_lora_weights' is {config['init_lora_weights']!r}, for which PEFT changes the "
                         "base's weights when it loads: it would take that other base; save the adapter converted to plain LoRA")


def meaning_of(tensor: str) -> str | None:
    """What a tensor that is no factor of a linear stands for in PEFT's files; None if nobody knows."""
    return next((meaning for pattern, meaning in _TENSORS if re.search(pattern, tensor)), None)


def is_of_experts(shapes: tuple[Sequence[int], Sequence[int]], r: int) -> bool:
    """Tell whether factors [E r, K] and [N, E r] are those of E stacked experts rather than of another rank."""
    rows, columns = shapes[0][0], shapes[1][1]
    return rows == columns and rows > r and rows % r == 0
