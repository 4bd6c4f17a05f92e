"""The commands train, search, export and plot on tiny models and files of their own."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import sys

import datasets
import pytest
import torch
import transformers
from helpers_search import same_bits
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import heterolora_kernels as hlk
from heterolora_kernels.cli import main
from heterolora_kernels.cli.options import CONFIG_FLAGS, config_from, parse_names
from heterolora_kernels.history import read_jsonl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORDS = "a the cat dog sat ran on under mat tree red blue fast slow and then".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``bert`` and ``llama`` with tokenizers; pairs.csv, pairs.parquet, text.json."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    models = {
        "bert": BertForSequenceClassification(BertConfig(
            vocab_size=21, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)).bert,
        "llama": LlamaForCausalLM(LlamaConfig(
            vocab_size=21, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64))}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    drawn = random.Random(0)
    rows = [{"a": " ".join(drawn.choices(WORDS, k=4)), "b": " ".join(drawn.choices(WORDS, k=4)),
             "label": drawn.choice(["no", "yes"])} for _ in range(48)]
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["a", "b", "label"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "pairs.parquet"))
    (folder / "text.json").write_text("\n".join(json.dumps({"text": " ".join(drawn.choices(WORDS, k=20))}) for _ in range(30)))
    return folder


def pairs(folder, output, *more: str) -> list[str]:
    return ["--model", f"{folder}/bert", "--data", f"{folder}/pairs.csv", "--text-columns", "a,b", "--label-column", "label",
            "--validation-split", "0.25", "--batch-size", "4", "--lr", "0.01", "--interval", "2", "--output", str(output), *more]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run of two epochs, 18 steps, with shortcuts."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *pairs(folder, output, "--epochs", "2", "--shortcuts", "all", "--mode", "separated", "--debug")]) == 0
    return output


def fails(capsys, *arguments: str) -> str:
    """The one line that a command says when it fails."""
    assert main(list(arguments)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("heterolora ")]
    return line


# ---- train ----


def test_a_run_leaves_everything_in_its_folder(run):
    assert {entry.name for entry in run.iterdir()} == {
        "adapter", "checkpoints", "run.toml", "history.jsonl", "reallocation_history.toml", "reallocation_frequency.toml",
        "metrics.json", "ranks.png", "frequency.png", "churn.png", "README.md"}
    history = read_jsonl(run / "history.jsonl")
    # The one that would be due at the last step is not made.
    assert [entry["step"] for entry in history] == list(range(0, 18, 2))
    published = tomllib.loads((run / "reallocation_history.toml").read_text())
    assert [(table["epoch"], table["step"]) for table in published.values()] == [divmod(step, 9) for step in range(0, 18, 2)]
    assert tomllib.loads((run / "reallocation_frequency.toml").read_text())["total_reallocation_number"] == 9
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 18 and 0 <= metrics["after_accuracy"] <= 1 and metrics["peak_memory_mib"] > 0
    assert metrics["paths_on"] == sum(rank > 0 for rank in history[-1]["ranks"].values())
    assert metrics["adapter_parameters_on"] == history[-1]["active_parameters"]
    card = (run / "README.md").read_text()
    assert f"{metrics['paths_on']} of {metrics['paths']} paths" in card and "residual_1" in card and "grad_norm" in card
    settings = tomllib.loads((run / "run.toml").read_text())
    assert settings["lr"] == 0.01 and settings["task"] == "classification" and settings["shortcuts"] == "all"


def test_the_adapter_of_a_run_loads_and_computes_what_was_measured(folder, run):
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    hlk.load_adapter(model, run / "adapter")
    saved = load_file(run / "adapter" / "adapter.safetensors")
    assert same_bits(saved, {name: model.state_dict()[name] for name in saved})
    assert hlk.RankSearch(model).config.shortcuts
    checkpoint = load_file(run / "checkpoints" / "checkpoint-18" / "model.safetensors")
    assert same_bits(checkpoint, saved)


@pytest.mark.parametrize("step", [5, 9, 13], ids=["in the first epoch", "at its end", "in the second"])
def test_ctrl_c_and_resume_give_the_unbroken_run(folder, run, tmp_path, monkeypatch, capsys, step):
    output, steps, train = tmp_path / "broken", [], transformers.Trainer.training_step

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    arguments = pairs(folder, output, "--epochs", "2", "--shortcuts", "all", "--mode", "separated")
    assert main(["train", *arguments, "--debug"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"stopped after {step} of 18 steps" in (out := capsys.readouterr().out)
    assert f"heterolora train --resume --output {output}" in out
    model = BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    hlk.load_adapter(model, output / "adapter")
    assert len(read_jsonl(output / "history.jsonl")) == 1 + step // 2
    assert main(["train", "--resume", "--output", str(output), "--debug"]) == 0
    for name in ("history.jsonl", "reallocation_history.toml", "reallocation_frequency.toml", "adapter/adapter.safetensors"):
        assert (output / name).read_bytes() == (run / name).read_bytes(), name
    found, expected = (json.loads((place / "metrics.json").read_text()) for place in (output, run))
    for name in ("before_loss", "before_accuracy", "after_loss", "after_accuracy"):
        assert found[name] == expected[name], name


def test_a_causal_language_model(folder, tmp_path):
    output = tmp_path / "lm"
    text = f"{folder}/text.json"
    assert main(["train", "--model", f"{folder}/llama", "--data", text, "--validation", text, "--block-size", "16",
                 "--batch-size", "4", "--max-steps", "8", "--interval", "2", "--ranks", "graded", "--budget",
                 "1000", "--budget-unit", "parameters", "--dtype", "bfloat16", "--checkpointing", "--output", str(output),
                 "--debug"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after_loss"] < metrics["before_loss"]
    assert 0 < metrics["adapter_parameters_on"] <= 1000
    config = json.loads((output / "adapter" / "heterolora.json").read_text())["config"]
    assert config["ranks"] == "graded"
    assert load_file(output / "adapter" / "adapter.safetensors")["model.layers.0.mlp.up_proj.lora_A"].dtype == torch.float32


def test_one_column_parquet_a_toml_file_and_flags_that_win(folder, tmp_path):
    (tmp_path / "run.toml").write_text(f'model = "{folder}/bert"\ndata = "{folder}/pairs.parquet"\ntext-columns = "a"\n'
                                       'label_column = "label"\nmax_steps = 3\nr = 4\nsearch = "off"\nbatch_size = 8\n'
                                       '[rank_pattern]\nquery = 2\n')
    output = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--output", str(output), "--r", "3", "--debug"]) == 0
    paths = json.loads((output / "adapter" / "heterolora.json").read_text())["paths"]
    assert {path["r"] for name, path in paths.items() if name.endswith("query")} == {2}
    assert {path["r"] for name, path in paths.items() if not name.endswith("query")} == {3}
    assert json.loads((output / "metrics.json").read_text())["steps"] == 3
    assert not (output / "history.jsonl").read_text()


def test_paper_settings_and_a_decoder_that_classifies(folder, tmp_path):
    output = tmp_path / "run"
    arguments = pairs(folder, output, "--paper", "dynamic", "--max-steps", "4", "--num-batches", "2")
    arguments[1] = f"{folder}/llama"
    assert main(["train", *arguments, "--debug"]) == 0
    record = json.loads((output / "adapter" / "heterolora.json").read_text())
    assert record["base"]["class"] == LlamaForSequenceClassification.__name__
    assert record["config"]["score"] == "probe" and record["config"]["warmup"] == 0 and len(record["config"]["shortcuts"]) == 4


@pytest.mark.parametrize("change, message", [
    ({"--data": "nothing.csv"}, "--data: there is no file nothing.csv"), ({"--text-columns": "a,c"}, "--data has no column 'c'"),
    ({"--label-column": "c"}, "--data has no column 'c'"), ({"--text-columns": "a,b,label"}, "--text-columns"),
    ({"--budget": "1.5"}, "budget must be"), ({"--proxy": "luck"}, "proxy must be one of"),
    ({"--target-modules": "luck"}, "target_modules"), ({"--validation-split": "2"}, "--validation-split"),
    ({"--rank-pattern": "luck=3"}, "rank_pattern"), ({"--min-rank": "2"}, "min_rank"),
    ({"--model": "./nowhere"}, "--model: there is no folder ./nowhere"),
    ({"--accumulation": "0"}, "--accumulation must be at least 1"),
    ({"--batch-size": "0"}, "--batch-size must be at least 1"), ({"--lr": "nan"}, "--lr must be finite"),
    ({"--lr": "-1"}, "--lr must be > 0"), ({"--epochs": "0"}, "--epochs must be > 0"),
    ({"--max-steps": "0"}, "--max-steps must be"),
    ({"--scheduler": "luck"}, "--scheduler must be one of"), ({"--max-length": "0"}, "--max-length must be at least 1"),
    ({"--limit": "-3"}, "--limit must be at least 1"), ({"--weight-decay": "-1"}, "--weight-decay must be at least 0"),
    ({"--save-every": "-1"}, "--save-every must be at least 0"), ({"--max-grad-norm": "nan"}, "--max-grad-norm must be finite"),
    ({"--validation": "luck"}, "--validation must be a file where --data is one"),
    ({"--init-from": "nowhere"}, "init_from: directory: there is no folder"),
    ({"--init-ranks": "nowhere"}, "--init-ranks: nowhere/adapter_config.json is missing"),
    ({"--config": "nowhere.toml"}, "--config: there is no file nowhere.toml"),
], ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "")
def test_errors_are_one_line_and_name_the_flag(folder, tmp_path, capsys, change, message):
    arguments = pairs(folder, tmp_path / "run")
    for flag, value in change.items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        else:
            arguments += [flag, value]
    assert message in fails(capsys, "train", *arguments)


def test_an_empty_cell_is_named(folder, tmp_path, capsys):
    (tmp_path / "gap.csv").write_text("a,b,label\nthe cat,the dog,yes\n,the dog,no\n")
    arguments = pairs(folder, tmp_path / "run")
    arguments[3] = str(tmp_path / "gap.csv")
    del arguments[8:10]  # --validation-split
    assert "column 'a' must hold texts" in fails(capsys, "train", *arguments)


def with_data(folder, output, file, text) -> list[str]:
    """Arguments for a run on a file of this text (or of these bytes)."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = pairs(folder, output, "--max-steps", "1")
    arguments[3] = str(file)
    del arguments[8:10]  # --validation-split
    return arguments


@pytest.mark.parametrize("name, content, said", [
    ("header.csv", "a,b,label\n", "--data: .* holds no example"), ("nothing.csv", "", "--data: .*nothing.csv cannot be read: "),
    ("quote.csv", 'a,b,label\n"the cat,the dog,1\n', "--data: .*quote.csv cannot be read: "),
    ("text.json", "no json", "--data: .*text.json cannot be read: "),
    ("b.parquet", b"\0" * 99, "--data: .*b.parquet cannot be read: "),
    ("numbers.csv", "a,b,label\nthe cat,1.5,x\nthe dog,2.5,y\n", "--text-columns: column 'b' must hold texts, and has 1.5"),
    ("one.csv", "a,b,label\nthe cat,the dog,1\nthe mat,the tree,1\n", "--label-column 'label' must hold two classes or more"),
    ("gap.csv", "a,b,label\nthe cat,the dog,1\nthe mat,the tree,\n", "--label-column 'label' must hold whole numbers or words"),
], ids=lambda value: value if isinstance(value, str) and value.partition(".")[2].isalpha() else "")
def test_data_that_cannot_be_used_is_named(folder, tmp_path, capsys, name, content, said):
    line = fails(capsys, "train", *with_data(folder, tmp_path / "run", tmp_path / name, content))
    assert re.search(said, line) and line.count("--data") + line.count("column") >= 1


def test_words_that_look_like_missing_values_are_words(folder, tmp_path):
    text = "a,b,label\n" + "NA,the cat,None\nthe dog,null,NA\n" * 4
    assert main(["train", *with_data(folder, tmp_path / "run", tmp_path / "words.csv", text), "--debug"]) == 0
    record = json.loads((tmp_path / "run" / "adapter" / "heterolora.json").read_text())
    assert record["base"]["labels"] == ["NA", "None"]


@pytest.mark.parametrize("line, said", [
    ('lr = "fast"', "--lr must be a number, got 'fast'"), ("batch_size = 1.5", "--batch-size must be a whole number, got 1.5"),
    ("epochs = true", "--epochs must be a number, got True"), ("label_column = 3", "--label-column must be a string, got 3"),
    ("text_columns = [1, 2]", "--text-columns must be a name or a list of names"), ('task = "luck"', "--task must be one of"),
    ('checkpointing = "yes"', "--checkpointing must be true or false"), ('dtype = "int8"', "--dtype must be one of"),
    ('r = "many"', "r must be an int"), ("target_modules = 3", "target_modules must be"),
    ("rank_pattern = 3", "rank_pattern must be"),
], ids=lambda value: value.partition(" ")[0])
def test_a_toml_value_of_a_wrong_kind_is_named_as_its_flag(folder, tmp_path, capsys, line, said):
    lines = {name: f'{name} = "{value}"' for name, value in {
        "model": folder / "bert", "data": folder / "pairs.csv", "label_column": "label", "text_columns": "a"}.items()}
    lines[line.partition(" ")[0]] = line
    (tmp_path / "run.toml").write_text("\n".join(lines.values()))
    assert said in fails(capsys, "train", "--config", str(tmp_path / "run.toml"), "--output", str(tmp_path / "run"))


def test_a_run_that_diverges_says_so(folder, tmp_path, capsys):
    assert "the run diverged" in fails(capsys, "train", *pairs(folder, tmp_path / "run", "--lr", "1e38", "--max-steps", "4"))


def test_a_toml_file_with_an_unknown_key_is_refused(folder, tmp_path, capsys):
    (tmp_path / "run.toml").write_text("luck = 3\n")
    assert "there is no setting 'luck'" in fails(capsys, "train", "--config", str(tmp_path / "run.toml"), "--output", "x")
    (tmp_path / "run.toml").write_text("luck = \n")
    assert "run.toml is no valid TOML" in fails(capsys, "train", "--config", str(tmp_path / "run.toml"), "--output", "x")


def test_a_folder_that_holds_something_is_left_alone(folder, run, capsys):
    before = (run / "metrics.json").read_bytes()
    assert "--overwrite" in fails(capsys, "train", *pairs(folder, run))
    assert (run / "metrics.json").read_bytes() == before


def test_resume_refuses_what_contradicts_the_run(run, tmp_path, capsys):
    assert "--lr is 0.5" in fails(capsys, "train", "--resume", "--output", str(run), "--lr", "0.5")
    assert "no run.toml" in fails(capsys, "train", "--resume", "--output", str(tmp_path))


CUT = {
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half a state": lambda folder: os.truncate(folder / "trainer_state.json", 500),
    "half the weights": lambda folder: os.truncate(folder / "model.safetensors", 500),
    "half an optimizer": lambda folder: os.truncate(folder / "optimizer.pt", 500),
    "half the generators": lambda folder: os.truncate(folder / "rng_state.pth", 500),
}


@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(run, tmp_path, capsys, cut):
    output = tmp_path / "killed"
    shutil.copytree(run, output)
    whole, half = (output / "checkpoints" / f"checkpoint-{step}" for step in (9, 18))
    cut(half)
    assert main(["train", "--resume", "--output", str(output), "--debug"]) == 0
    assert f"{half} was not written to its end" in capsys.readouterr().err
    assert whole.is_dir()
    for name in ("history.jsonl", "adapter/adapter.safetensors"):
        assert (output / name).read_bytes() == (run / name).read_bytes(), name


def test_a_run_without_a_whole_checkpoint_is_said(run, tmp_path, capsys):
    output = tmp_path / "killed"
    shutil.copytree(run, output)
    for checkpoint in (output / "checkpoints").iterdir():
        (checkpoint / "trainer_state.json").unlink()
    assert "--resume" in (line := fails(capsys, "train", "--resume", "--output", str(output))) and "--overwrite" in line


def test_overwriting_leaves_nothing_of_the_old_run_to_resume_from(folder, run, tmp_path, monkeypatch):
    output, train, steps = tmp_path / "again", transformers.Trainer.training_step, []
    shutil.copytree(run, output)
    (output / "notes.txt").write_text("mine")

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", interrupted)
    assert main(["train", *pairs(folder, output, "--epochs", "1", "--overwrite", "--debug")]) == 130
    assert [place.name for place in (output / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert (output / "notes.txt").read_text() == "mine"


def test_usage_errors_exit_with_2(capsys):
    for flag, value in (("--r", "many"), ("--rank-pattern", "query"), ("--rank-pattern", "query=x"), ("--dtype", "int8")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", flag, value, "--output", "x"])
        assert stopped.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert flag in line and "_" not in line


@pytest.mark.parametrize("command", ["train", "search", "plot", "info", "export", "demo"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "example:" in out and f"heterolora {command}" in out


# ---- options ----


def test_every_field_of_the_config_has_a_flag():
    assert set(CONFIG_FLAGS) == set(hlk.HeteroLoraConfig().to_dict()) - {"sites"}


@pytest.mark.parametrize("text, expected", [
    ("all-linear", "all-linear"), ("all", "all"), ("q_proj", ["q_proj"]), ("q_proj,v_proj", ["q_proj", "v_proj"]),
    (r".*\.q_proj", r".*\.q_proj"), ("attention.query", ["attention.query"]),
], ids=str)
def test_names_are_lists_but_for_all_and_regular_expressions(text, expected):
    assert parse_names(text) == expected


def test_paper_is_under_the_flags():
    config = config_from({"paper": "llama", "r": 4, "lr": 0.1})
    assert (config.r, config.budget, config.warmup) == (4, 0.33, 8)


# ---- export, search, plot ----


def test_export_to_peft_computes_the_same(folder, run, tmp_path, capsys):
    assert "drop" in fails(capsys, "export", str(run), "--format", "peft", "--output", str(tmp_path / "peft"))
    assert main(["export", str(run), "--format", "peft", "--drop-shortcuts", "--output", str(tmp_path / "peft"), "--debug"]) == 0
    assert "the outputs change by" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=2), tmp_path / "peft").eval()
    model = hlk.load_adapter(BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=2), run / "adapter").eval()
    search = hlk.RankSearch(model)
    search.load_state_dict(hlk.load_search_state(run / "adapter"))
    search.apply({name: 0 for name in search.paths if name.rpartition(".")[2] in model._heterolora_state.config.shortcuts})
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_export_merged_is_a_model_of_transformers(run, tmp_path):
    assert main(["export", str(run), "--format", "merged", "--drop-shortcuts", "--output", str(tmp_path / "model")]) == 0
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.label2id == {"no": 0, "yes": 1}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("the cat")["input_ids"] == [2, 6, 7, 3]


def test_export_of_a_decoder_that_classifies_pads_as_it_was_trained(folder, tmp_path):
    arguments = pairs(folder, tmp_path / "run", "--max-steps", "2")
    arguments[1] = f"{folder}/llama"
    assert main(["train", *arguments, "--debug"]) == 0
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "--output", str(tmp_path / "model"), "--debug"]) == 0
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "model")
    assert LlamaConfig.from_pretrained(folder / "llama").pad_token_id is None and model.config.pad_token_id == 0
    assert model(input_ids=torch.tensor([[6, 7, 0], [6, 7, 8]])).logits.shape == (2, 2)


def test_export_to_the_native_format_keeps_the_search(run, tmp_path):
    assert main(["export", str(run), "--format", "native", "--output", str(tmp_path / "copy"), "--debug"]) == 0
    for name in ("adapter.safetensors", "heterolora.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (run / "adapter" / name).read_bytes(), name


@pytest.mark.parametrize("arguments, said", [
    (["export", "nowhere", "--format", "peft", "--output", "x"], "ADAPTER: nowhere/heterolora.json is missing"),
    (["export", "RUN", "--format", "peft", "--output", "FILE"], "--output: .* is a file"),
    (["export", "RUN", "--format", "peft", "--output", "x", "--model", "./nowhere"], "--model: ./nowhere cannot be read"),
    (["plot", "RUN", "--out", "FILE"], "--out: .* is a file"), (["plot", "FILE"], "RUN_DIR: there is no folder"),
    (["info", "--model", "no/such-model"], "--model: no/such-model cannot be read"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_errors_of_the_other_commands_name_the_argument(run, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    assert re.search(said, fails(capsys, *({"RUN": str(run), "FILE": "file"}.get(part, part) for part in arguments)))


@pytest.mark.parametrize("flag, value", [("--search", "dynamic"), ("--score", "in_step"), ("--train-steps", "-1"), ("--lr", "0")])
def test_search_refuses_what_it_would_not_do(folder, tmp_path, capsys, flag, value):
    assert f"{flag} must be" in fails(capsys, "search", *pairs(folder, tmp_path / "ranks", flag, value))


def test_search_writes_a_pattern_that_peft_reads_and_train_takes(folder, tmp_path, capsys):
    arguments = pairs(folder, tmp_path / "ranks", "--proxy", "snip", "--train-steps", "4", "--ranks", "graded", "--budget", "0.3")
    assert main(["search", *arguments, "--debug"]) == 0
    ranks = json.loads((tmp_path / "ranks" / "ranks.json").read_text())
    config = LoraConfig.from_pretrained(tmp_path / "ranks")
    on = {name: rank for name, rank in ranks.items() if rank}
    assert {name: config.rank_pattern.get(name, config.r) for name in config.target_modules} == on
    assert len(set(on.values())) > 1
    scores = json.loads((tmp_path / "ranks" / "scores.json").read_text())
    assert scores.keys() == ranks.keys() and (tmp_path / "ranks" / "ranks.png").exists()
    output = tmp_path / "run"
    assert main(["train", *pairs(folder, output, "--init-ranks", str(tmp_path / "ranks"), "--max-steps", "2", "--debug")]) == 0
    paths = json.loads((output / "adapter" / "heterolora.json").read_text())["paths"]
    assert {name: path["rank"] for name, path in paths.items()} == on
    assert {path["scaling"] for path in paths.values()} == {2.0}


def test_search_by_alpha_test_shows_its_evaluations(folder, tmp_path, capsys):
    arguments = pairs(folder, tmp_path / "ranks", "--proxy", "alpha_test", "--train-steps", "2", "--num-batches", "2",
                      "--budget", "2")
    assert main(["search", *arguments, "--debug"]) == 0
    scores = json.loads((tmp_path / "ranks" / "scores.json").read_text())
    assert set(scores.values()) <= {float(a) for a in range(11)}
    shown = capsys.readouterr().err
    assert "evaluations (at most)" in shown and "batches to score with" in shown


def test_plot_draws_into_another_folder(run, tmp_path, capsys):
    assert main(["plot", str(run), "--out", str(tmp_path), "--format", "svg"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"ranks.svg", "frequency.svg", "churn.svg"}
    assert "there is no folder" in fails(capsys, "plot", str(tmp_path / "nothing"))
