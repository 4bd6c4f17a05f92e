"""What README and docs show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from heterolora_kernels import proxies

ROOT = Path(__file__).resolve().parent.parent


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_readme_example_trains_and_merges(capsys):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2))
    ids = torch.randint(0, 20, (2, 5))
    namespace = {"model": model, "loader": [{"input_ids": ids, "labels": ids}] * 320}
    (block,) = _blocks("README.md")
    exec(block, namespace)
    history = namespace["search"].history
    assert [entry["step"] for entry in history] == list(range(0, 301, 50))
    assert not history[-1]["warmup"]
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_proxies_page_example_registers():
    (block,) = _blocks("docs/proxies.md")
    try:
        exec(block, {})
        formula = proxies.get_proxy("b_only").formula
        assert formula({"grad_B_sq": torch.tensor(9.0)}) == 3.0
    finally:
        proxies._proxies.pop("b_only", None)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/proxies.md", "docs/results.md", "docs/decisions.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
