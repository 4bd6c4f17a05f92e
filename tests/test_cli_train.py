"""The commands train, search, export and plot on tiny models and files of their own."""

from __future__ import annotations

import csv
import json
import os
import random
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
    assert json.loads((output / "metrics.json").read_text())["after_loss"] == json.loads(
        (run / "metrics.json").read_text())["after_loss"]


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
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
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


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--r", "many", "--output", "x"])
    assert stopped.value.code == 2


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
    assert BertForSequenceClassification.from_pretrained(tmp_path / "model").num_labels == 2


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
