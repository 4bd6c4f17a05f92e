"""The map of ranks."""

from __future__ import annotations

from heterolora_kernels.plotting import rank_map, split_path


def test_split_path_finds_the_layer():
    assert split_path("model.layers.11.self_attn.q_proj") == ("model.layers", "11", "self_attn.q_proj")
    assert split_path("model.layers.3.shortcut_sa") == ("model.layers", "3", "shortcut_sa")
    assert split_path("bert.pooler.dense") == ("", "", "bert.pooler.dense")


def test_rank_map_tells_off_learnt_and_missing_apart():
    ranks = {"m.0.q": 8, "m.1.q": 0, "m.10.q": 0, "m.1.shortcut_ffn": 16}
    assert rank_map(ranks, learnt={"m.1.q"}).splitlines() == [
        "layer         0  1 10",
        "q             8  o  .",
        "shortcut_ffn    16",
    ]


def test_rank_map_keeps_stacks_apart():
    assert rank_map({"encoder.block.0.q": 8, "decoder.block.0.q": 0}).splitlines()[1:] == [
        "encoder.block: q  8",
        "decoder.block: q  .",
    ]


def test_rank_map_of_nothing_is_empty():
    assert rank_map({}) == ""
