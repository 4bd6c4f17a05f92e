"""HeteroLoraConfig: what it takes, and what it says about what it does not take."""

from __future__ import annotations

import math

import pytest
import torch

import heterolora_kernels as hlk


@pytest.mark.parametrize("field, value", [
    ("r", 0), ("r", -1), ("r", 2.0), ("r", True), ("shortcut_r", 0), ("num_batches", 0),
    ("lora_alpha", 0), ("lora_alpha", -1), ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("shortcut_alpha", "4"),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("seed", -1), ("seed", 2**70),
    ("budget", 0), ("budget", 1.5), ("budget", 0.0), ("budget", math.nan), ("budget", "all"),
    ("interval", 0), ("interval", -0.5), ("interval", math.nan), ("warmup", -1), ("warmup", 1.5),
    ("budget_unit", "bytes"), ("mode", "both"), ("search", "on"), ("score", "exact"), ("normalize", "size?"), ("init_B", "ones"),
    ("shortcuts", ("residual_3",)), ("shortcuts", "residual_3"), ("target_modules", "("), ("exclude_modules", "*"),
    ("rank_pattern", {"q_proj": -1}), ("rank_pattern", {"q_proj": 2.0}), ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"q_proj": 0}), ("adapter_dtype", "int8"), ("adapter_dtype", "no_dtype"), ("adapter_dtype", torch.int64),
], ids=str)
def test_bad_value_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        hlk.HeteroLoraConfig(**{field: value})


@pytest.mark.parametrize("field, value", [
    ("proxy", 3), ("ranks", None), ("target_modules", None), ("target_modules", [1]), ("modules_to_save", "classifier"),
    ("rank_pattern", ["q_proj"]), ("alpha_pattern", {5: 2}), ("sites", [1]),
], ids=str)
def test_bad_type_names_the_field(field, value):
    with pytest.raises(TypeError, match=field):
        hlk.HeteroLoraConfig(**{field: value})


@pytest.mark.parametrize("field", ["exclude_modules", "shortcuts", "rank_pattern", "alpha_pattern"])
def test_none_means_nothing(field):
    assert len(getattr(hlk.HeteroLoraConfig(**{field: None}), field)) == 0


def test_nothing_to_adapt_is_an_error():
    with pytest.raises(ValueError, match="target_modules is empty"):
        hlk.HeteroLoraConfig(target_modules=())


def test_shortcuts_come_in_the_tables_order():
    config = hlk.HeteroLoraConfig(shortcuts=["shortcut_ffn", "residual_1"])
    assert config.shortcuts == ("residual_1", "shortcut_ffn")
    assert hlk.HeteroLoraConfig(shortcuts="residual_2").shortcuts == ("residual_2",)
    assert len(hlk.HeteroLoraConfig(shortcuts="all").shortcuts) == 4


@pytest.mark.parametrize("search, score, expected", [
    ("dynamic", None, "in_step"), ("static", None, "probe"), ("dynamic", "probe", "probe"), ("off", None, "probe"),
])
def test_score_defaults_to_what_the_search_can_have(search, score, expected):
    assert hlk.HeteroLoraConfig(search=search, score=score).resolved_score == expected


def test_static_search_cannot_score_in_steps():
    with pytest.raises(ValueError, match="score='in_step'"):
        hlk.HeteroLoraConfig(search="static", score="in_step")


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16], ids=["name", "dtype"])
def test_adapter_dtype_takes_names(given):
    assert hlk.HeteroLoraConfig(adapter_dtype=given).adapter_dtype is torch.bfloat16
