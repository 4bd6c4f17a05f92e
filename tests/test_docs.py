"""What README and docs show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_search import adapter, llama_batch, make_net, net_batch, path_names, plain_llama
from peft.tuners.lora import LoraLayer

import heterolora_kernels as hlk
from heterolora_kernels import allocation, proxies
from heterolora_kernels.peft_layers import FusedLora

ROOT = Path(__file__).resolve().parent.parent


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_readme_trainer_example_chooses_ranks_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block, _) = _blocks("README.md")
    train_dataset = [{name: value[0] for name, value in llama_batch(seed, 1).items()} for seed in range(80)]
    namespace = {"model": plain_llama(), "train_dataset": train_dataset}
    exec(block, namespace)
    search = namespace["callback"].search
    assert [entry["step"] for entry in search.history] == list(range(0, 31, 2))
    assert not search.history[-1]["warmup"]
    names = safetensors.torch.load_file("adapter/adapter_model.safetensors")
    on = {name for name, rank in search.ranks.items() if rank}
    assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names} == on


def test_readme_loop_example_trains_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (_, block) = _blocks("README.md")
    namespace = {"model": plain_llama(), "loader": [llama_batch(0)] * 320}
    exec(block, namespace)
    history = namespace["search"].history
    assert [entry["step"] for entry in history] == list(range(0, 301, 50))
    assert not history[-1]["warmup"]
    loaded = hlk.load_adapter(plain_llama(), "adapter").eval()
    model = namespace["model"].eval()
    assert torch.equal(loaded(**llama_batch(1)).logits, model(**llama_batch(1)).logits)


@pytest.fixture
def registries(monkeypatch):
    """Proxies and allocators as they were after the test."""
    monkeypatch.setattr(proxies, "_proxies", dict(proxies._proxies))
    monkeypatch.setattr(allocation, "_allocators", dict(allocation._allocators))


def test_extending_page_examples_work_in_a_search(registries):
    for block in _blocks("docs/extending.md"):
        exec(block, {})
    assert proxies.get_proxy("b_only").formula({"grad_B_sq": torch.tensor(9.0)}) == 3.0
    search = hlk.RankSearch(make_net(proxy="weight_norm", ranks="graded"), dataloader=[net_batch(0)])
    whole, rows = search.score(), search.score(per_rank=True)
    for name, score in whole.items():
        a, b = (getattr(adapter(search._model, name), part).detach() for part in ("lora_A", "lora_B"))
        expected = [4.0 * float(a[j].norm() * b[:, j].norm()) for j in range(4)]
        assert rows[name] == pytest.approx(expected, rel=1e-5)
        assert score == pytest.approx(torch.tensor(expected).norm().item(), rel=1e-5)
    ranks = hlk.allocate({"a.q": 1.0, "b.q": 2.0, "a.v": 0.0}, dict.fromkeys(("a.q", "b.q", "a.v"), 1), 1, ranks="one_per_type",
                         kinds=dict.fromkeys(("a.q", "b.q", "a.v"), "lora"), max_ranks=dict.fromkeys(("a.q", "b.q", "a.v"), 8),
                         generator=torch.Generator())
    assert ranks == {"a.q": 0, "b.q": 8, "a.v": 8}


def test_paper_page_examples_choose_a_quarter_and_train_from_fresh_weights():
    first, second = _blocks("docs/paper.md")
    namespace = {}
    exec(first, namespace)
    assert namespace["config"].shortcuts and namespace["config"].target_modules == ("query", "value")
    model = plain_llama()
    namespace = {"model": model, "loader": [llama_batch(0), llama_batch(1)]}
    exec(second, namespace)
    assert sum(rank > 0 for rank in namespace["search"].ranks.values()) == 14 // 4
    assert not any(bool(adapter(model, name).lora_B.any()) for name in path_names(model))


def test_peft_page_example_runs_on_the_op():
    namespace = {"model": plain_llama()}
    exec(_blocks("docs/peft.md")[0], namespace)
    layers = [m for m in namespace["model"].modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 14 and all(isinstance(layer, FusedLora) for layer in layers)
    namespace["model"](**llama_batch(0)).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in layers)


def test_quantised_page_example_adapts_a_model_of_four_bits(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.chdir(tmp_path)
    plain_llama().save_pretrained("my-model")
    namespace = {}
    exec(_blocks("docs/peft.md")[1], namespace)
    model = namespace["model"]
    assert len(path_names(model)) == 21
    model(**llama_batch(0)).loss.backward()
    assert all(adapter(model, name).lora_B.grad.any() for name in path_names(model))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
