"""Wrong uses of the command line: one line of cause and remedy, before any training."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from helpers_saving import classifier
from test_cli_train import WORDS, folder  # noqa: F401
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import heterolora_kernels as hlk
from heterolora_kernels.cli import main


def said(capsys, *arguments: str) -> str:
    """What the command that fails says, in one line."""
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("heterolora")]
    assert len(lines) == 1 and "Traceback" not in error, error
    output = Path(arguments[arguments.index("--output") + 1])
    assert not (output / "adapter").exists() and not list(output.glob("checkpoints/*")), "it trained"
    return lines[0]


def lines_of(labels, **more) -> str:
    return "\n".join(json.dumps({"a": "cat dog", "label": label, **more}) for label in labels)


DATA = {
    "mixed": (lines_of([0, 1, "two", 1]), r"'label' holds values of several kinds \(0, 'two'\): write all"),
    "mixed_late": (lines_of([0, 1] * 2000 + ["two"]), "values of several kinds"),
    "empty": ("", "--data: .* holds no example"),
    "blank": ("\n \n", "--data: .* (holds no example|cannot be read)"),
    "broken": (lines_of([0, 1]) + '\n{"a": \n', "--data: .* cannot be read: JSON parse error.*row 2"),
    "no_column": (lines_of([0, 1]).replace('"a"', '"b"'), "--data has no column 'a'; its columns are"),
    "gap": (lines_of([0, 1, None]), "--label-column 'label' must hold .* has an empty cell: leave such rows out"),
    "floats": (lines_of([0.5, 1.5]), "--label-column 'label' must hold .* has (0.5|1.5)"),
    "one_class": (lines_of([1, 1]), "must hold two classes or more"),
    "numbers_for_texts": (lines_of([0, 1]).replace('"cat dog"', "3"), "--text-columns: column 'a' must hold texts, and has 3"),
}


def training(folder, data, output, *more: str) -> list[str]:  # noqa: F811
    return ["train", "--model", f"{folder}/bert", "--data", str(data), "--text-columns", "a", "--label-column", "label",
            "--batch-size", "2", "--max-steps", "1", "--output", str(output), *more]


@pytest.mark.parametrize("content, expected", DATA.values(), ids=DATA)
def test_data(folder, content, expected, tmp_path, capsys):  # noqa: F811
    (tmp_path / "data.jsonl").write_text(content)
    line = said(capsys, *training(folder, tmp_path / "data.jsonl", tmp_path / "run"))
    assert re.search(expected, line), line


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good.jsonl").write_text(lines_of([0, 1] * 4))
    return tmp_path / "good.jsonl"


@pytest.mark.parametrize("more, expected", [
    (["--max-length", "2000"], "--max-length is 2000, and the model takes 512 tokens"),
    (["--proxy", "nothing"], "proxy must be one of"), (["--ranks", "nothing"], "ranks must be one of"),
    (["--target-modules", "nowhere,"], "matches no linear of the model"),
    (["--layers-to-transform", "0"], "layers_to_transform needs target_modules to be a list"),
    (["--modules-to-save", "nowhere,"], "modules_to_save: .*match no module"),
    (["--init-from", "/nowhere"], "init_from: .*nowhere"), (["--init-ranks", "/nowhere"], "--init-ranks: .*nowhere"),
])
def test_settings(folder, good, more, expected, tmp_path, capsys):  # noqa: F811
    line = said(capsys, *training(folder, good, tmp_path / "run", *more))
    assert re.search(expected, line), line


@pytest.mark.parametrize("written, expected", [("sites = {A = 3}", r"sites\['A'\] must be a Site"),
                                               ('sites = {A = {h = "x"}}', r"sites\['A'\] must have the fields")])
def test_sites_of_a_file(folder, good, written, expected, tmp_path, capsys):  # noqa: F811
    (tmp_path / "settings.toml").write_text(written)
    line = said(capsys, *training(folder, good, tmp_path / "run", "--config", str(tmp_path / "settings.toml")))
    assert re.search(expected, line), line
    assert not (tmp_path / "run" / "adapter").exists()


def test_models_that_are_none(folder, good, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    for model, expected in ((tmp_path / "nowhere", "there is no folder"), (tmp_path / "empty", "it has no config.json")):
        arguments = training(folder, good, tmp_path / "run")
        arguments[2] = str(model)
        assert expected in said(capsys, *arguments)


@pytest.fixture
def of_two_classes(tmp_path, folder):  # noqa: F811
    model = BertForSequenceClassification(BertConfig(vocab_size=21, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                     intermediate_size=24, num_labels=2, max_position_embeddings=16))
    model.save_pretrained(tmp_path / "two")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(tmp_path / "two")
    return tmp_path / "two"


def test_other_classes_than_the_checkpoints(folder, of_two_classes, tmp_path, capsys):  # noqa: F811
    (tmp_path / "data.jsonl").write_text(lines_of(range(20)))
    arguments = training(folder, tmp_path / "data.jsonl", tmp_path / "run")
    arguments[2] = str(of_two_classes)
    assert "classifies into 2 classes, and --label-column has 20: start from the model" in said(capsys, *arguments)


def test_long_texts_are_cut_to_what_the_model_takes(folder, of_two_classes, tmp_path, capsys):  # noqa: F811
    drawn = random.Random(0)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({
        "a": " ".join(drawn.choices(WORDS, k=40 if index < 3 else 4)), "label": index % 2}) for index in range(8)))
    arguments = training(folder, tmp_path / "data.jsonl", tmp_path / "run")
    arguments[2] = str(of_two_classes)
    assert main(arguments) == 0
    assert "3 of 8 texts have 16 tokens or more and are cut there (--max-length)" in capsys.readouterr().err


def test_blocks_longer_than_the_model_takes(folder, tmp_path, capsys):  # noqa: F811
    line = said(capsys, "train", "--model", f"{folder}/llama", "--data", f"{folder}/text.json", "--block-size", "128",
                "--max-steps", "1",
                "--output", str(tmp_path / "run"))
    assert "--block-size is 128, and the model takes 64 tokens" in line


@pytest.mark.parametrize("damage", ["cut", "no_weights", "other_json", "half_json", "sha", "nan"])
def test_damaged_adapters_of_an_export(damage, tmp_path, capsys):
    torch.manual_seed(0)
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    hlk.save_adapter(hlk.apply_heterolora(base, hlk.HeteroLoraConfig(r=2, search="off")), tmp_path / "adapter")
    weights, record = tmp_path / "adapter" / "adapter.safetensors", tmp_path / "adapter" / "heterolora.json"
    content = weights.read_bytes()
    {"cut": lambda: weights.write_bytes(content[:-40]), "no_weights": weights.unlink,
     "other_json": lambda: record.write_text("[]"),
     "half_json": lambda: record.write_bytes(record.read_bytes()[:200]),
     "sha": lambda: weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
     "nan": lambda: record.write_text(record.read_text().replace('"r": 2', '"r": NaN', 1))}[damage]()
    line = said(capsys, "export", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--format", "peft", "--output",
                str(tmp_path / "out"))
    assert "heterolora.json" in line or "adapter.safetensors" in line, line
    assert not (tmp_path / "out").exists()
