"""The commands plot and info."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch
from helpers_search import build, make_llama, net_batch, train_step
from transformers import BertConfig, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, T5Config

import heterolora_kernels as hlk
from heterolora_kernels.backends import Backend, register_backend
from heterolora_kernels.cli import main
from heterolora_kernels.cli.info import describe, skeleton
from heterolora_kernels.history import write_jsonl
from heterolora_kernels.state import state_of

TINY_LLAMA = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, architectures=["LlamaForCausalLM"])
PICTURES = ["churn.png", "frequency.png", "ranks.png"]


def fails(capsys, *arguments: str) -> str:
    """The one line that a command ends with."""
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.fixture
def searched():
    """A model and its search after some reallocations."""
    model, optimizer, search = build(interval=2)
    for step in range(6):
        train_step(model, optimizer, net_batch(step), search)
    return model, search


@pytest.fixture
def run_dir(tmp_path, searched):
    """A run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    hlk.save_adapter(searched[0], folder / "adapter")
    write_jsonl(folder / "history.jsonl", searched[1].history)
    return folder


@pytest.fixture
def model_dir(tmp_path):
    """``write(config)``: a folder with a model's configuration and no weights."""
    def write(config) -> str:
        folder = tmp_path / type(config).__name__
        config.save_pretrained(folder)
        return str(folder)
    return write


# ---- plot ----

def test_plot_writes_three_pictures_into_the_run(run_dir, capsys):
    assert main(["plot", str(run_dir)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(run_dir / name) for name in ("ranks.png", "frequency.png", "churn.png")]
    assert all((run_dir / name).stat().st_size > 1000 for name in PICTURES)


def test_plot_writes_where_and_as_it_is_told(run_dir, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert main(["plot", str(run_dir), "--out", str(out), "--format", "pdf"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["churn.pdf", "frequency.pdf", "ranks.pdf"]
    assert not list(run_dir.glob("*.png"))


@pytest.fixture
def drawn(monkeypatch):
    """What plot_ranks is called with."""
    calls = []
    monkeypatch.setattr("heterolora_kernels.cli.plot.plot_ranks", lambda ranks, full, file: calls.append((ranks, full)))
    return calls


def test_plot_takes_ranks_from_the_history_and_full_ranks_from_the_adapter(run_dir, searched, drawn):
    main(["plot", str(run_dir)])
    model, search = searched
    assert drawn == [(search.history[-1]["ranks"], {name: path.r for name, path in state_of(model).paths.items()})]


def test_plot_needs_no_adapter(run_dir, drawn, searched):
    (run_dir / "adapter" / "heterolora.json").unlink()
    assert main(["plot", str(run_dir)]) == 0
    assert drawn == [(searched[1].ranks, None)]


@pytest.mark.parametrize("place", ["run", "adapter"])
@pytest.mark.parametrize("history", ["missing", "empty"])
def test_plot_without_reallocations_draws_the_adapters_ranks(run_dir, searched, drawn, capsys, place, history):
    (run_dir / "history.jsonl").write_text("") if history == "empty" else (run_dir / "history.jsonl").unlink()
    folder = run_dir if place == "run" else run_dir / "adapter"
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "ranks.png")]
    assert drawn[0][0] == searched[1].ranks


@pytest.mark.parametrize("history", ["missing", "empty"])
def test_plot_with_nothing_to_draw_says_why(tmp_path, capsys, history):
    if history == "empty":
        (tmp_path / "history.jsonl").write_text("")
    error = fails(capsys, "plot", str(tmp_path))
    assert "nothing to draw" in error and "search='off'" in error and str(tmp_path / "history.jsonl") in error
    assert not list(tmp_path.glob("*.png"))


def test_plot_of_a_folder_that_is_not_there(tmp_path, capsys):
    assert f"RUN_DIR: there is no folder {tmp_path / 'nothing'}" in fails(capsys, "plot", str(tmp_path / "nothing"))


def test_plot_of_a_damaged_history_names_file_and_line(run_dir, capsys):
    (run_dir / "history.jsonl").write_text("{}\n")
    assert "history.jsonl, line 1: field 'step' is missing" in fails(capsys, "plot", str(run_dir))


def test_plot_of_a_damaged_adapter_names_file_and_field(run_dir, capsys):
    (run_dir / "adapter" / "heterolora.json").write_text('{"paths": {"m.0.q": {"r": "8"}}}')
    error = fails(capsys, "plot", str(run_dir))
    assert "heterolora.json" in error and "'r' must be int" in error


def test_plot_without_matplotlib_names_the_extra(run_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ".[plot]" in fails(capsys, "plot", str(run_dir))


# ---- info ----

def test_info_shows_versions_backends_proxies_and_allocators(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["heterolora-kernels"] == hlk.__version__ and lines["torch"].startswith(torch.__version__.split("+")[0])
    assert lines["python"] == platform.python_version()
    assert lines["backends"].split(", ") == hlk.available_backends()
    assert lines["proxies"].split(", ") == hlk.available_proxies() and "graded" in lines["allocators"]
    assert "cpu" in lines and "model" not in lines


def test_info_says_what_is_not_installed_and_why_a_backend_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("heterolora_kernels.backends._backends", dict(sys.modules["heterolora_kernels.backends"]._backends))
    register_backend(Backend("abacus", "nowhere", (), lambda: "no beads on this machine"))
    monkeypatch.setattr("heterolora_kernels.cli.info._PACKAGES", ("torch", "surely-not-installed"))
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == "surely-not-installed not installed".split() for line in lines)
    assert any(line.split(None, 2) == ["not", "abacus", "no beads on this machine"] for line in lines)


def test_info_and_readme_say_what_has_not_been_measured(capsys):
    remark = "not yet measured on hardware"
    assert main(["info"]) == 0
    # Whether the backend can run here or not.
    assert any(line.split(None, 2) == ["about", "triton", remark] for line in capsys.readouterr().out.splitlines())
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["remarks"] == {"triton": remark}
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text()
    row, = (line for line in readme.splitlines() if line.startswith("| `triton` |"))
    assert remark in row


def test_info_json_is_one_object(capsys, model_dir):
    assert main(["info", "--json", "--model", model_dir(TINY_LLAMA), "--shortcuts", "all", "--r", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["heterolora-kernels"] == hlk.__version__
    assert found["backends"]["available"] == hlk.available_backends() and "constant" in found["proxies"]
    assert found["devices"][0]["device"] == "cpu"
    assert found["model"]["class"] == "LlamaForCausalLM" and found["model"]["lora_paths"] == 14


def test_info_model_by_hand(capsys, model_dir):
    arguments = ["info", "--json", "--model", model_dir(TINY_LLAMA), "--target-modules", "q_proj,down_proj", "--r", "4",
                 "--lora-alpha", "8", "--shortcuts", "residual_1,shortcut_ffn", "--mode", "separated", "--budget", "0.5"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    base = sum(p.numel() for p in LlamaForCausalLM(TINY_LLAMA).parameters())
    assert found["groups"] == [
        {"module": "self_attn.q_proj", "kind": "lora", "count": 2, "in_features": 16, "out_features": 16, "r": 4, "alpha": 8,
         "parameters": 2 * 4 * 32},
        {"module": "mlp.down_proj", "kind": "lora", "count": 2, "in_features": 24, "out_features": 16, "r": 4, "alpha": 8,
         "parameters": 2 * 4 * 40},
        {"module": "residual_1", "kind": "shortcut", "count": 2, "in_features": 16, "out_features": 16, "r": 4, "alpha": 4,
         "parameters": 2 * 4 * 32},
        {"module": "shortcut_ffn", "kind": "shortcut", "count": 1, "in_features": 16, "out_features": 16, "r": 4, "alpha": 4,
         "parameters": 4 * 32},
    ]
    total = 2 * 128 + 2 * 160 + 3 * 128
    assert (found["lora_paths"], found["shortcuts"], found["rows"], found["adapter_parameters"]) == (4, 3, 28, total)
    assert (found["base_parameters"], found["head_parameters"]) == (base, 0)
    assert found["share_of_base"] == pytest.approx(total / base)
    # Two of four LoRA paths, at 128 or 160 parameters, and two of three shortcuts, at 128.
    assert found["budget"] == {"budget": 0.5, "unit": "modules", "mode": "separated", "ranks": "binary", "paths": [4, 4],
                               "rows": [16, 16], "parameters": [512, 576]}
    assert found["shortcut_sites"] == {
        "classes": {"LlamaDecoderLayer": {
            "layers": 2, "h": "input_layernorm", "f": "post_attention_layernorm", "attention": "self_attn.o_proj",
            "feed_forward": "mlp.down_proj", "attention_norm": None, "feed_forward_norm": None}},
        "refused": None, "used": ["residual_1", "shortcut_ffn"]}


@pytest.mark.parametrize("config", [
    {}, {"shortcuts": "all", "rank_pattern": {"q_proj": 2, "up_proj": 0}}, {"ranks": "graded", "budget_unit": "parameters"},
    {"target_modules": ["q_proj"], "shortcuts": "residual_2", "mode": "lora_only", "budget": 1}],
    ids=["plain", "pattern", "graded", "lora-only"])
def test_describe_is_what_apply_makes(config):
    config = hlk.HeteroLoraConfig(**config)
    plain = LlamaForCausalLM(TINY_LLAMA)
    found = describe(plain, config)
    assert not hasattr(plain, "_heterolora_state")
    paths = state_of(hlk.apply_heterolora(plain, config)).paths.values()
    assert found["lora_paths"] == sum(path.kind == "lora" for path in paths)
    assert found["shortcuts"] == sum(path.kind == "shortcut" for path in paths)
    assert found["adapter_parameters"] == sum(path.num_parameters for path in paths)
    assert found["rows"] == sum(path.r for path in paths)


@pytest.mark.parametrize("config", [
    {}, {"shortcuts": "all", "mode": "separated"}, {"ranks": "graded", "budget": 0.4}, {"budget_unit": "parameters"},
    {"ranks": "graded", "budget_unit": "parameters", "rank_step": 2}, {"budget": 5}],
    ids=["binary", "separated", "graded", "parameters", "graded-parameters", "number"])
def test_every_allocation_lies_within_the_bounds(config):
    config = {"r": 4, "shortcut_r": 4, "shortcuts": (), **config}
    model = make_llama(**config)
    search = hlk.RankSearch(model)
    bounds = describe(LlamaForCausalLM(model.config), hlk.HeteroLoraConfig(**config))["budget"]
    per_rank = config.get("ranks") == "graded"
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = {name: torch.rand(4, generator=generator).tolist() if per_rank else torch.rand(1, generator=generator).item()
                  for name in search.paths}
        rows = {name: rank if isinstance(rank, int) else sum(rank) for name, rank in search.allocate(scores).items()}
        size = {name: path.num_parameters // path.r for name, path in state_of(model).paths.items()}
        assert bounds["rows"][0] <= sum(rows.values()) <= bounds["rows"][1]
        if config.get("budget_unit") != "parameters":
            assert bounds["parameters"][0] <= sum(size[name] * row for name, row in rows.items()) <= bounds["parameters"][1]


def test_info_prints_a_table_of_what_the_model_gets(capsys, model_dir):
    assert main(["info", "--model", model_dir(TINY_LLAMA), "--shortcuts", "all", "--budget", "3"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("self_attn.k_proj"))
    assert row.split() == ["self_attn.k_proj", "LoRA", "2", "16", "x", "8", "8", "16", "384"]
    assert "14 LoRA paths and 7 shortcuts, 168 rows" in out and "% of the base" in out
    assert "3 modules (binary, combined) switches on 3 of 21 paths, 24 rows" in out
    assert "known for the 2 layers of class LlamaDecoderLayer" in out


def test_info_search_off_needs_no_budget(capsys, model_dir):
    assert main(["info", "--model", model_dir(TINY_LLAMA), "--search", "off"]) == 0
    assert "search is off, every path has its full rank" in capsys.readouterr().out


def test_info_shows_the_heads(capsys, model_dir):
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                        num_labels=3, architectures=["BertForSequenceClassification"])
    assert main(["info", "--model", model_dir(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["class"] == "BertForSequenceClassification" and found["head_parameters"] == 3 * 16 + 3
    assert any(group["module"] == "bert.pooler.dense" and group["count"] == 1 for group in found["groups"])


@pytest.mark.parametrize("config,reason", [
    (T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=2, d_kv=8, num_heads=2,
              architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
    (GPTNeoXConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
     "['GPTNeoXLayer']")], ids=["encoder-decoder", "unknown-class"])
@pytest.mark.parametrize("shortcuts", [[], ["--shortcuts", "all"]], ids=["not-asked", "asked"])
def test_info_tells_why_shortcuts_are_refused(capsys, model_dir, config, reason, shortcuts):
    assert main(["info", "--model", model_dir(config), *shortcuts]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("shortcuts"))
    assert "refused: " in line and reason in line and " and 0 shortcuts" in out


def test_skeleton_holds_no_weights(model_dir):
    huge = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
                       num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    model = skeleton(model_dir(huge))
    assert isinstance(model, LlamaForCausalLM) and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("architectures", [None, ["SomethingOfTheirOwn"]], ids=["none", "unknown"])
def test_skeleton_without_a_known_architecture_is_the_base_model(model_dir, architectures):
    config = LlamaConfig(**{**TINY_LLAMA.to_dict(), "architectures": architectures})
    assert type(skeleton(model_dir(config))).__name__ == "LlamaModel"


@pytest.mark.parametrize("arguments,message", [
    (["--target-modules", "nonsense"], "target_modules ('nonsense',) matches no linear"),
    (["--budget", "0.01"], "raise budget"), (["--proxy", "nonsense"], "proxy must be one of"),
    (["--r", "0"], "r must be an int >= 1"), (["--modules-to-save", "nonsense"], "modules_to_save"),
    (["--rank-pattern", "q_proj=0", "--target-modules", "q_proj"], "nothing is left to adapt")],
    ids=["targets", "budget", "proxy", "r", "heads", "nothing"])
def test_info_errors_name_the_field(capsys, model_dir, arguments, message):
    assert message in fails(capsys, "info", "--model", model_dir(TINY_LLAMA), *arguments)


def test_info_of_a_folder_that_is_not_there(tmp_path, capsys):
    assert f"--model: there is no folder {tmp_path / 'nothing'}" in fails(capsys, "info", "--model", str(tmp_path / "nothing"))


def test_info_model_without_transformers_names_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert ".[train]" in fails(capsys, "info", "--model", str(tmp_path))


def test_info_starts_from_a_peft_adapter(tmp_path, capsys, model_dir):
    plain = LlamaForCausalLM(TINY_LLAMA)
    hlk.apply_heterolora(plain, hlk.HeteroLoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"1.self_attn.q_proj": 2}))
    hlk.save_adapter(plain, tmp_path / "peft", format="peft")
    assert main(["info", "--json", "--model", model_dir(TINY_LLAMA), "--init-from", str(tmp_path / "peft"), "--budget", "1"]) == 0
    groups = json.loads(capsys.readouterr().out)["model"]["groups"]
    assert [(group["module"], group["r"]) for group in groups] == [("self_attn.q_proj", 4), ("self_attn.q_proj", 2)]


@pytest.mark.parametrize("command", ["plot", "info"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "example:" in out and f"heterolora {command}" in out


def test_plot_without_a_folder_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot"])
    assert stopped.value.code == 2 and "RUN_DIR" in capsys.readouterr().err
