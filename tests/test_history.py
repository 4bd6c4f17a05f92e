"""Histories on disk: JSON lines that survive a kill, and the published tables."""

from __future__ import annotations

import json
import math
import sys

import pytest
from helpers_search import build, net_batch, train_step

from heterolora_kernels.history import (
    append_jsonl,
    published_frequency,
    published_history,
    read_jsonl,
    turn_on_frequency,
    write_jsonl,
    write_toml,
)

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj",
         "model.layers.1.self_attn.v_proj", "model.layers.0.residual_1", "model.layers.0.shortcut_sa",
         "model.layers.1.residual_1", "model.layers.1.shortcut_sa"]


def entry(step: int, scores: list | None, on: list[int], **more) -> dict:
    """One reallocation over NAMES."""
    return {"step": step, "warmup": scores is None, "proxy": "constant" if scores is None else "grad_norm", "score": None,
            "statistics": None, "batches": 0, "scores": None if scores is None else dict(zip(NAMES, scores)),
            "ranks": {name: 8 * (i in on) for i, name in enumerate(NAMES)}, "threshold": None, "churn": 0.25,
            "active_parameters": 512, **more}


HISTORY = [entry(0, None, [0, 4]), entry(25, [4.5, 0.25, 3.0, 1.0, 0.5, 2.0, 0.125, 2.5], [0, 2])]

# As the authors' files look, written by hand.
PUBLISHED = """
[dyrealloc_0]
epoch = 0
step = 0
turn_on = [
    [0, "q_proj", 1.0, true],
    [0, "v_proj", 1.0, false],
    [1, "q_proj", 1.0, false],
    [1, "v_proj", 1.0, false],
    [0, "residual_1", 1.0, true],
    [0, "shortcut_sa", 1.0, false],
    [1, "residual_1", 1.0, false],
    [1, "shortcut_sa", 1.0, false],
]

[dyrealloc_1]
epoch = 2
step = 5
turn_on = [
    [0, "q_proj", 4.5, true],
    [0, "v_proj", 0.25, false],
    [1, "q_proj", 3.0, true],
    [1, "v_proj", 1.0, false],
    [0, "residual_1", 0.5, false],
    [0, "shortcut_sa", 2.0, false],
    [1, "residual_1", 0.125, false],
    [1, "shortcut_sa", 2.5, false],
]
"""

PUBLISHED_FREQUENCY = """
total_reallocation_number = 2

[layer_0]
q_proj = 2
v_proj = 0
residual_1 = 1
shortcut_sa = 0

[layer_1]
q_proj = 1
v_proj = 0
residual_1 = 0
shortcut_sa = 0
"""


def with_ranks(ranks: dict[str, int], scores: dict | None = None) -> list[dict]:
    return [{**entry(0, None, []), "warmup": scores is None, "ranks": ranks, "scores": scores}]


def rows(history: list[dict]) -> list[list]:
    """What the first reallocation's table says of each path."""
    return published_history(history)["dyrealloc_0"]["turn_on"]


# ---- JSON lines ----

def test_jsonl_comes_back_unknown_keys_included(tmp_path):
    history = [*HISTORY, entry(50, [[1.0, 2.0]] * 8, [1], note={"seconds": 1.5})]
    write_jsonl(tmp_path / "h.jsonl", history)
    assert read_jsonl(tmp_path / "h.jsonl") == history
    lines = (tmp_path / "h.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0]) == HISTORY[0]


def test_jsonl_of_nothing_is_an_empty_file(tmp_path):
    write_jsonl(tmp_path / "h.jsonl", [])
    assert (tmp_path / "h.jsonl").read_bytes() == b"" and read_jsonl(tmp_path / "h.jsonl") == []


def test_jsonl_infinite_score_stays_valid_json(tmp_path):
    write_jsonl(tmp_path / "h.jsonl", [entry(1, [math.inf, *[1.0] * 7], [0])])

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "h.jsonl").read_text(), parse_constant=refuse)
    assert read_jsonl(tmp_path / "h.jsonl")[0]["scores"][NAMES[0]] == math.inf


def test_write_jsonl_leaves_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "h.jsonl"
    write_jsonl(file, HISTORY)
    with pytest.raises(TypeError):
        write_jsonl(file, [{"step": object()}])
    assert read_jsonl(file) == HISTORY and list(tmp_path.iterdir()) == [file]


def test_append_jsonl_adds_to_what_is_there(tmp_path):
    append_jsonl(tmp_path / "h.jsonl", HISTORY[:1])
    append_jsonl(tmp_path / "h.jsonl", HISTORY[1:])
    assert read_jsonl(tmp_path / "h.jsonl") == HISTORY


@pytest.mark.parametrize("kept", [1, 40, -2], ids=["one-byte", "middle", "without-the-bracket"])
def test_a_line_that_was_cut_off_is_dropped_with_a_warning(tmp_path, kept):
    file = tmp_path / "h.jsonl"
    write_jsonl(file, HISTORY)
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second[:kept])
    with pytest.warns(UserWarning, match=r"h\.jsonl, line 2 was cut off"):
        assert read_jsonl(file) == HISTORY[:1]
    with pytest.warns(UserWarning, match="the last line was cut off and is removed"):
        append_jsonl(file, HISTORY[1:])
    assert read_jsonl(file) == HISTORY


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path, recwarn):
    file = tmp_path / "h.jsonl"
    write_jsonl(file, HISTORY[:1])
    file.write_bytes(file.read_bytes()[:-1])
    assert read_jsonl(file) == HISTORY[:1]
    append_jsonl(file, HISTORY[1:])
    assert read_jsonl(file) == HISTORY and not recwarn.list


@pytest.mark.parametrize("damage,message", [
    (lambda line: line[:30] + b"\n", "is no valid JSON"),
    (lambda line: b"\xff\xfe" + line, "is no valid JSON"),
    (lambda line: b"[1, 2]\n", "must be an object"),
    (lambda line: line.replace(b'"ranks"', b'"sknar"'), "field 'ranks' is missing"),
    (lambda line: line.replace(b'"churn": 0.25', b'"churn": "much"'), "field 'churn' must be int or float"),
    (lambda line: line.replace(b'q_proj": 8', b'q_proj": null'), "field 'ranks': field 'model.layers.0.self_attn.q_proj'"),
    (lambda line: line.replace(b'"scores": null', b'"scores": {}'), "field 'scores': field 'model.layers.0.self_attn.q_proj'"),
    (lambda line: line.replace(b"null", b'{"__kind__": "float", "value": "x"}', 1), "is damaged"),
], ids=["cut", "bytes", "list", "no-ranks", "churn", "rank", "scores", "float"])
def test_other_damage_names_file_and_line(tmp_path, damage, message):
    file = tmp_path / "h.jsonl"
    write_jsonl(file, [HISTORY[0]] * 3)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + damage(lines[1]) + lines[2])
    with pytest.raises(ValueError, match=r"h\.jsonl, line 2") as caught:
        read_jsonl(file)
    assert message in str(caught.value)


def test_read_jsonl_without_a_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"h\.jsonl is missing"):
        read_jsonl(tmp_path / "h.jsonl")


# ---- the published layout ----

def test_published_history_is_the_published_file(tmp_path):
    write_toml(tmp_path / "h.toml", published_history(HISTORY, steps_per_epoch=10))
    assert tomllib.loads((tmp_path / "h.toml").read_text()) == tomllib.loads(PUBLISHED)


def test_published_history_types_are_those_of_the_layout():
    tables = published_history([entry(3, [1] * 8, [0])], steps_per_epoch=2)
    assert (tables["dyrealloc_0"]["epoch"], tables["dyrealloc_0"]["step"]) == (1, 1)
    assert [type(value) for value in tables["dyrealloc_0"]["turn_on"][0]] == [int, str, float, bool]


def test_published_history_without_epochs_keeps_the_step():
    tables = published_history(HISTORY)
    assert [(table["epoch"], table["step"]) for table in tables.values()] == [(0, 0), (0, 25)]


@pytest.mark.parametrize("steps", [0, -3, 2.5, "10"], ids=str)
def test_published_history_refuses_odd_epochs(steps):
    with pytest.raises(ValueError, match="steps_per_epoch must be None or an int >= 1"):
        published_history(HISTORY, steps_per_epoch=steps)


def test_graded_scores_are_summed():
    assert rows(with_ranks({"m.0.q": 1, "m.0.v": 0}, {"m.0.q": [0.5, 1.5, 2.0], "m.0.v": [0.25, 0.0, 0.5]})) == [
        [0, "q", 4.0, True], [0, "v", 0.75, False]]


def test_lora_comes_before_shortcuts_layer_by_layer_whatever_the_order():
    ranks = dict.fromkeys(
        ["m.1.shortcut_ffn", "m.10.q", "m.0.shortcut_sa", "m.2.q", "m.0.residual_2", "m.2.k", "m.0.residual_1"], 8)
    assert [row[:2] for row in rows(with_ranks(ranks))] == [
        [2, "q"], [2, "k"], [10, "q"], [0, "residual_1"], [0, "residual_2"], [0, "shortcut_sa"], [1, "shortcut_ffn"]]


def test_modules_that_end_alike_keep_their_names_within_the_layer():
    ranks = {"bert.layer.0.attention.self.query": 8, "bert.layer.0.attention.output.dense": 8, "bert.layer.0.output.dense": 0,
             "bert.layer.1.output.dense": 8}
    assert [row[:2] for row in rows(with_ranks(ranks))] == [
        [0, "query"], [0, "attention.output.dense"], [0, "output.dense"], [1, "dense"]]
    assert published_frequency(with_ranks(ranks)) == {
        "total_reallocation_number": 1,
        "layer_0": {"query": 1, "attention.output.dense": 1, "output.dense": 0}, "layer_1": {"dense": 1}}


def test_paths_in_no_layer_come_after_the_layers():
    ranks = {"embed.proj": 0, "m.0.q": 8, "pooler.dense": 8, "head.dense": 8, "m.0.residual_1": 8, "m.1.residual_1": 0}
    assert rows(with_ranks(ranks)) == [
        [0, "q", 1.0, True], [-1, "proj", 1.0, False], [-1, "pooler.dense", 1.0, True], [-1, "head.dense", 1.0, True],
        [0, "residual_1", 1.0, True], [1, "residual_1", 1.0, False]]
    frequency = published_frequency(with_ranks(ranks))
    assert frequency == {"total_reallocation_number": 1, "layer_0": {"q": 1, "residual_1": 1}, "layer_1": {"residual_1": 0},
                         "no_layer": {"proj": 0, "pooler.dense": 1, "head.dense": 1}}
    assert list(frequency) == ["total_reallocation_number", "layer_0", "layer_1", "no_layer"]


def test_several_stacks_do_not_collide(tmp_path):
    ranks = {"encoder.layers.0.q": 8, "encoder.layers.1.q": 0, "decoder.layers.0.q": 0, "decoder.layers.0.v": 8, "head.out": 8}
    assert [row[:2] for row in rows(with_ranks(ranks))] == [
        [0, "encoder.layers.q"], [1, "encoder.layers.q"], [0, "decoder.layers.q"], [0, "decoder.layers.v"], [-1, "out"]]
    write_toml(tmp_path / "f.toml", published_frequency(with_ranks(ranks)))
    assert tomllib.loads((tmp_path / "f.toml").read_text()) == {
        "total_reallocation_number": 1, "encoder.layers.layer_0": {"q": 1}, "encoder.layers.layer_1": {"q": 0},
        "decoder.layers.layer_0": {"q": 0, "v": 1}, "no_layer": {"out": 1}}


def test_published_frequency_is_the_published_file(tmp_path):
    write_toml(tmp_path / "f.toml", published_frequency(HISTORY))
    written = tomllib.loads((tmp_path / "f.toml").read_text())
    expected = tomllib.loads(PUBLISHED_FREQUENCY)
    assert written == expected
    assert [list(table) for table in (written, written["layer_0"])] == [list(table) for table in (expected, expected["layer_0"])]


def test_turn_on_frequency_counts_with_and_without_the_warmup():
    assert turn_on_frequency(HISTORY) == dict(zip(NAMES, [2, 0, 1, 0, 1, 0, 0, 0]))
    assert turn_on_frequency(HISTORY, include_warmup=False) == dict(zip(NAMES, [1, 0, 1, 0, 0, 0, 0, 0]))
    assert turn_on_frequency(HISTORY[:1], include_warmup=False) == dict.fromkeys(NAMES, 0)


def test_turn_on_frequency_of_graded_ranks_counts_any_row():
    history = with_ranks({"m.0.q": 3, "m.0.v": 0}) + with_ranks({"m.0.q": 1, "m.0.v": 0})
    assert turn_on_frequency(history) == {"m.0.q": 2, "m.0.v": 0}


def test_empty_histories_have_empty_tables(tmp_path):
    assert published_history([]) == {} and turn_on_frequency([]) == {}
    assert published_frequency([]) == {"total_reallocation_number": 0}
    write_toml(tmp_path / "h.toml", {})
    assert tomllib.loads((tmp_path / "h.toml").read_text()) == {}


# ---- TOML ----

def test_write_toml_leaves_out_what_is_none(tmp_path):
    write_toml(tmp_path / "c.toml", {"r": 8, "warmup": None, "sites": {"Layer": {"h": "norm", "attention_norm": None}}})
    assert tomllib.loads((tmp_path / "c.toml").read_text()) == {"r": 8, "sites": {"Layer": {"h": "norm"}}}


def test_write_toml_replaces_at_once(tmp_path):
    file = tmp_path / "c.toml"
    write_toml(file, {"r": 8})
    with pytest.raises(TypeError):
        write_toml(file, {"r": object()})
    assert tomllib.loads(file.read_text()) == {"r": 8} and list(tmp_path.iterdir()) == [file]


def test_write_toml_without_tomli_w_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(ImportError, match="extra 'train'"):
        write_toml(tmp_path / "c.toml", {})
    assert not list(tmp_path.iterdir())


def test_a_search_writes_what_is_read_back(tmp_path):
    model, optimizer, search = build(interval=2, ranks="graded", shortcuts=())
    for step in range(8):
        train_step(model, optimizer, net_batch(step), search)
    assert len(search.history) > 2 and not search.history[-1]["warmup"]
    write_jsonl(tmp_path / "h.jsonl", search.history)
    assert read_jsonl(tmp_path / "h.jsonl") == search.history
    write_toml(tmp_path / "h.toml", published_history(search.history, steps_per_epoch=3))
    tables = tomllib.loads((tmp_path / "h.toml").read_text())
    assert list(tables) == [f"dyrealloc_{i}" for i in range(len(search.history))]
    assert [chosen for *_, chosen in tables[f"dyrealloc_{len(tables) - 1}"]["turn_on"]] == [
        rank > 0 for rank in search.ranks.values()]
