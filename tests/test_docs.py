"""What README and docs show runs."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers_op import CASES, assert_same, dense, gradients, make_inputs, random_grads
from helpers_search import (
    adapter,
    fill_B,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    path_names,
    plain_llama,
    trainable,
)
from peft.tuners.lora import LoraLayer

import heterolora_kernels as hlk
from heterolora_kernels import allocation, backends, proxies
from heterolora_kernels.ops.schema import Flags, Needs
from heterolora_kernels.peft_layers import FusedLora

ROOT = Path(__file__).resolve().parent.parent


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_readme_quick_start_gives_peft_the_same_logits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block, shown = re.search(r"## Quick start.*?```python\n(.*?)```\n```\n(.*?)```", (ROOT / "README.md").read_text(),
                             flags=re.DOTALL).groups()
    assert block == _blocks("README.md")[0]
    namespace = {}
    exec(block, namespace)
    said, expected = capsys.readouterr().out.splitlines(), shown.splitlines()
    # Which paths are on may differ by the processor's rounding, and their parameters with them.
    pattern = re.escape(expected[0]).replace("7,168", r"[\d,]+")
    assert re.fullmatch(pattern, said[0]) and said[1].startswith("on: ") and said[2:] == expected[2:]
    model, loaded, batch = (namespace[name] for name in ("model", "loaded", "batches"))
    with torch.no_grad(), loaded.disable_adapter():
        base = loaded(**batch[0]).logits
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch[0]).logits, model(**batch[0]).logits, rtol=0, atol=1e-5)
        assert (loaded(**batch[0]).logits - base).abs().max() > 1e-2
    assert sum(rank > 0 for rank in namespace["search"].ranks.values()) == 28 // 4


def test_readme_trainer_example_chooses_ranks_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (_, block, _) = _blocks("README.md")
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
    (_, _, block) = _blocks("README.md")
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


@pytest.fixture(scope="module")
def dense_backend(tmp_path_factory):
    """The module of docs/backends.md, imported from a file of its own, and its second block."""
    folder = tmp_path_factory.mktemp("backend")
    module, use = _blocks("docs/backends.md")
    (folder / "dense_backend.py").write_text(module)
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("dense_backend")
        yield use
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("dense_backend", None)
        backends._backends.pop("dense", None)
        backends._resolved.clear()


def test_backends_page_example_is_used_when_asked_for(dense_backend, capsys):
    exec(dense_backend, {})
    assert capsys.readouterr().out == "tensor(True)\n"
    assert backends.resolve(torch.device("cpu")) != "dense" and "dense" in hlk.available_backends()


def _op(name):
    return getattr(torch.ops.heterolora_kernels, name)


def _parts(result):
    return [tensor for part in result for tensor in (part if isinstance(part, list) else [part])]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backends_page_example_keeps_the_contract(dense_backend, case):
    inputs = make_inputs(case).requires_grad_()
    truth = inputs.doubles().requires_grad_()
    outs, expected = inputs.run(backend="dense"), dense(truth)
    grads = random_grads(expected)
    assert_same(outs, expected)
    assert_same(gradients(outs, inputs, grads), gradients(expected, truth, grads))
    # What is saved, the statistics and every need alone are the reference's; NaN in closed rows is neither read nor passed on.
    first = 0
    for a, b in zip(inputs.lora_A, inputs.lora_B):
        closed = inputs.gate[first:first + len(a)] == 0
        a.data[closed], b.data[:, closed], first = torch.nan, torch.nan, first + len(a)
    for flags in (Flags.SAVE, Flags.SAVE | Flags.STATISTICS):
        args = inputs.args(int(flags))
        saved, usual = _op("lora_linear_dense")(*args), _op("lora_linear_reference")(*args)
        torch.testing.assert_close(_parts(saved), _parts(usual), equal_nan=True)
        for needs in (*Needs, Needs.X | Needs.LORA_B, sum(Needs)):
            if needs & Needs.STATISTICS and not flags & Flags.STATISTICS:
                continue
            got, want = (_parts(_op(f"lora_linear_backward_{name}")(grads, *args, *usual[1:], int(needs)))
                         for name in ("dense", "reference"))
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_page_example_serves_a_model_with_shortcuts(dense_backend, dtype):
    results = []
    for name in ("reference", "dense"):
        model = fill_B(make_llama(dtype=dtype, shortcuts="all", lora_dropout=0.2, search="off"))
        torch.manual_seed(3)
        with hlk.use_backend(name):
            loss = model(**llama_batch(0)).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in trainable(model))])
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 0.01)
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)


def test_backends_page_example_agrees_with_its_fakes(dense_backend):
    inputs = make_inputs(CASES["three_linears_four_paths"])
    args = inputs.args(int(Flags.SAVE | Flags.STATISTICS))
    torch.library.opcheck(_op("lora_linear_dense").default, args)
    outs, hidden, mask = _op("lora_linear_dense")(*args)
    torch.library.opcheck(_op("lora_linear_backward_dense").default, (random_grads(outs), *args, hidden, mask, int(sum(Needs))))


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


def test_every_page_with_python_has_a_test_that_runs_it():
    tests = "".join(test.read_text() for test in (ROOT / "tests").glob("test_*.py"))
    pages = {page.name for page in (ROOT / "docs").glob("*.md") if _blocks(f"docs/{page.name}")}
    assert pages >= {"backends.md", "guides.md"} and {name for name in pages if f'{name}"' not in tests} == set()


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
