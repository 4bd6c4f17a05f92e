"""What is trained beside adapters and heads is kept, or said to be lost before it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from families import make_inputs, make_model, patch
from helpers_errors import assert_models_agree
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.state import state_of


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in make_inputs().items() if name != "labels"}).logits


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(**make_inputs()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def unfrozen(names, **options) -> nn.Module:
    model = patch(make_model("bert" if "bias" in names else "llama"), **{"shortcuts": (), **options})
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("names", ["norm", "bias", "embed_tokens"])
def test_unfrozen_parameters_come_back(names, tmp_path):
    model = unfrozen(names)
    family = "bert" if names == "bias" else "llama"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model)
    assert not torch.equal(outputs(model), outputs(patch(make_model(family), shortcuts=())))
    # Frozen again for an evaluation, say.
    model.requires_grad_(False)
    hlk.save_adapter(model, tmp_path)
    loaded = hlk.load_adapter(make_model(family), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained and all(names in name for name in trained)
    # And what was loaded is not lost by the next save.
    hlk.save_adapter(loaded.requires_grad_(False), tmp_path / "again")
    assert torch.equal(outputs(hlk.load_adapter(make_model(family), tmp_path / "again")), outputs(model))


def test_copies_remember(tmp_path):
    model = unfrozen("norm")
    step(model)
    twin = copy.deepcopy(model.requires_grad_(False))
    hlk.save_adapter(twin, tmp_path)
    assert torch.equal(outputs(hlk.load_adapter(make_model("llama"), tmp_path)), outputs(model))


def test_peft_saves_whole_modules(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = unfrozen("norm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)
        hlk.save_adapter(model, tmp_path, "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path)).eval()
    assert_models_agree(loaded, model, outputs)
    assert_models_agree(hlk.load_adapter(make_model("llama"), tmp_path), model, outputs)


def test_what_peft_cannot_hold_is_said_at_the_first_step_and_refused(tmp_path):
    model = unfrozen("bias")
    with pytest.warns(UserWarning, match="trained beside the adapters, which format='peft' cannot hold .*query.bias"):
        step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)
    with pytest.raises(ValueError, match="format 'peft' cannot hold 'bert.encoder.layer.0.*bias'"):
        hlk.save_adapter(model, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()
    hlk.save_adapter(model, tmp_path / "peft", "peft", drop_heads=True)


def test_vllm_takes_no_norms(tmp_path):
    model = unfrozen("norm")
    step(model)
    with pytest.raises(ValueError, match="format 'vllm' cannot hold what was trained beside adapters"):
        hlk.save_adapter(model, tmp_path, "vllm")


def test_nothing_is_written_where_nothing_else_is_trained(tmp_path):
    model = patch(make_model("llama"))
    step(model)
    assert state_of(model).beside.tensors(model, state_of(model).is_own) == {}


def test_a_file_without_what_this_model_trained_is_said(tmp_path):
    hlk.save_adapter(patch(make_model("llama"), shortcuts=()), tmp_path)
    model = unfrozen("norm")
    step(model)
    with pytest.warns(UserWarning, match="does not hold what this model trained beside its adapters .*stays as it is"):
        hlk.load_adapter(model, tmp_path)


@pytest.mark.parametrize("change, named", [
    (lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.ones(5))), "'model.norm.weight' has shape"),
    (lambda m: delattr(m.model, "norm"), "has no tensor 'model.norm.weight'")], ids=["shape", "gone"])
def test_a_model_without_them_is_refused(change, named, tmp_path):
    model = unfrozen("model.norm")
    step(model)
    hlk.save_adapter(model, tmp_path)
    base = make_model("llama")
    change(base)
    with pytest.raises(ValueError, match=f"field 'others': .*{named}|{named}"):
        hlk.load_adapter(base, tmp_path)
    assert not hasattr(type(base.model.layers[0].self_attn.q_proj), "_heterolora_key")


class Convolutional(nn.Module):
    """A batch norm moves while it trains, whether its weight is frozen or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).mean(-1))


@pytest.mark.parametrize("format", ["native", "peft", "merged"])
def test_running_statistics_come_back(format, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = hlk.apply_heterolora(Convolutional(), hlk.HeteroLoraConfig(r=2, search="off", init_B="kaiming_uniform"))
    x = torch.randn(8, 4, 9)
    for _ in range(3):
        model(x)
    model.eval()
    hlk.save_adapter(model, tmp_path, format)
    base = Convolutional().eval()
    if format == "native":
        loaded = hlk.load_adapter(base, tmp_path)
    elif format == "peft":
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    else:
        from safetensors.torch import load_file
        base.load_state_dict(load_file(tmp_path / "model.safetensors"))
        loaded = base
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
