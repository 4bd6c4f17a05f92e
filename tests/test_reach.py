"""Paths that no forward reaches: named once, no budget, no turn in the warm-up, no part in a merge."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from families import make_inputs, make_model, patch
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.reach import is_read_past
from heterolora_kernels.state import state_of


class Past(nn.Module):
    """Reads one of its linears past the module, never calls another, and throws away what a third computes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.read, self.idle, self.lost = (nn.Linear(8, 8) for _ in range(4))
        self.also = nn.Linear(8, 8)
        self.calls_idle = False

    def forward(self, x):
        self.lost(x)
        x = self.also(torch.tanh(self.used(x)))
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.idle(x) if self.calls_idle else x


x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def past(**options) -> nn.Module:
    return hlk.apply_heterolora(Past(), hlk.HeteroLoraConfig(**{"r": 2, "search": "off", **options}))


def step(model: nn.Module, optimizer=None, inputs=None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    out = model(x) if inputs is None else model(**inputs)
    (out.square().sum() if inputs is None else out.loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def test_what_was_not_reached_is_named_once():
    model = past()
    with pytest.warns(UserWarning, match="3 paths took no part in the first step: read: the weight is read past the module, "
                                         "so LoRA "
                                         "has no effect there; idle, lost: no forward calls them.*exclude_modules") as seen:
        optimizer = step(model)
    assert len(seen) == 1
    assert state_of(model).reach.unreached == {"read", "idle", "lost"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        step(model)


def test_only_a_weight_that_is_read_is_said_to_be():
    model = past()
    assert [name for name in ("used", "read", "idle", "lost") if is_read_past(model, name)] == ["read"]


@pytest.mark.parametrize("ranks", ["binary", "graded"])
def test_no_budget_and_no_turn(ranks):
    model = past(search="dynamic", ranks=ranks, interval=1, budget=0.5, score="in_step")
    search = hlk.RankSearch(model)
    search.start()
    optimizer = quietly(step, model)
    search.step()
    dead = {"read", "idle", "lost"}
    for _ in range(6):
        assert all(rank == 0 for name, rank in search.ranks.items() if name in dead)
        # Half of the two that are left.
        assert sum(search.ranks.values()) == 2
        step(model, optimizer)
        search.step()
    assert sum(entry["warmup"] for entry in search.history) <= 4


def test_one_that_runs_later_joins():
    model = past(search="dynamic", interval=1, budget=3, score="in_step")
    search = hlk.RankSearch(model)
    optimizer = quietly(step, model)
    search.step()
    assert search.ranks["idle"] == 0
    model.calls_idle = True
    for _ in range(3):
        step(model, optimizer)
        search.step()
    assert state_of(model).reach.unreached == {"read", "lost"}
    assert search.ranks == {"used": 2, "also": 2, "idle": 2, "read": 0, "lost": 0}


@pytest.mark.parametrize("options", [dict(budget=5), dict(budget=9, ranks="graded"), dict(budget=150, budget_unit="parameters")],
                         ids=["modules", "rows", "parameters"])
def test_a_budget_larger_than_what_is_left_buys_all_of_it(options):
    model = past(search="dynamic", interval=1, **options)
    search = hlk.RankSearch(model)
    quietly(step, model)
    search.step()
    assert search.ranks == {"used": 2, "also": 2, "idle": 0, "read": 0, "lost": 0}


def test_a_resumed_search_knows():
    model = past(search="dynamic", interval=1, budget=0.5)
    search = hlk.RankSearch(model)
    search.start()
    optimizer = quietly(step, model)
    search.step()
    step(model, optimizer)
    search.step()
    twin = past(search="dynamic", interval=1, budget=0.5)
    twin.load_state_dict(model.state_dict())
    other = hlk.RankSearch(twin)
    state = copy.deepcopy(search.state_dict())
    other.load_state_dict(state)
    assert other.state_dict() is not state and state_of(twin).reach.unreached == {"read", "idle", "lost"}
    for each, m in ((search, model), (other, twin)):
        quietly(step, m)
        each.step()
    assert other.ranks == search.ranks
    # A state of an earlier version has no such entry.
    state.pop("unreached")
    other.load_state_dict(state)


@pytest.mark.parametrize("init_B", ["zeros", "kaiming_uniform"])
def test_merging_leaves_the_outputs(init_B, tmp_path):
    model = past(init_B=init_B)
    quietly(step, model)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        hlk.save_adapter(model, tmp_path, "merged")
        torch.testing.assert_close(hlk.merge_heterolora(model)(x), expected)
        from safetensors.torch import load_file
        loaded = Past()
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
        torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("options", [{}, {"shortcuts": "all"}, {"search": "dynamic", "interval": 1, "shortcuts": "all"}],
                         ids=["lora", "shortcuts", "search"])
def test_ordinary_models_are_not_told_of(options, accumulate):
    model = patch(make_model("llama"), **{"shortcuts": (), **options}).train()
    search = hlk.RankSearch(model) if "search" in options else None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for _ in range(accumulate):
                model(**make_inputs()).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            if search is not None:
                search.step()
    assert not state_of(model).reach.unreached


def test_checkpointed_and_compiled_models_are_not_told_of():
    model = patch(make_model("llama"), shortcuts=()).train()
    model.gradient_checkpointing_enable()
    compiled = torch.compile(patch(make_model("bert"), shortcuts=()).train(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, inputs=make_inputs())
        step(compiled, inputs=make_inputs())
    assert not state_of(model).reach.unreached and not state_of(compiled).reach.unreached


def test_frozen_adapters_are_not_told_of():
    model = patch(make_model("llama"), shortcuts=())
    model.model.layers[0].self_attn.q_proj.lora_A.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.lora_B.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, inputs=make_inputs())


# ---- models of transformers ----


_SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def mamba():
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=4,
                                                                   num_hidden_layers=2))
    ids = torch.randint(64, (2, 6))
    return model, {"input_ids": ids, "labels": ids}


def wavlm():
    model = transformers.WavLMForCTC(transformers.WavLMConfig(
        **_SMALL, vocab_size=32, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, layerdrop=0.0, mask_time_prob=0.0))
    return model, {"input_values": torch.randn(2, 600), "labels": torch.randint(1, 32, (2, 3))}


def llava():
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_SMALL, vocab_size=64),
        vision_config=transformers.CLIPVisionConfig(**_SMALL, image_size=16, patch_size=8), image_token_index=63,
        vision_feature_layer=-2))
    ids = torch.randint(60, (1, 10))
    ids[0, 1:5] = 63
    return model, {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


MODELS = {
    "mamba": (mamba, {"dt_proj"}, r"backbone.layers.\*.mixer.dt_proj \(2\): the weight is read past the module"),
    "wavlm": (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}, "q_proj.*the weight is read past the module"),
    "llava": (llava, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, r"vision_tower.encoder.layers.1.mlp.fc1.*no "
                                                                               r"forward calls them, or the loss"),
}


@pytest.mark.parametrize("build, dead, named", MODELS.values(), ids=MODELS)
def test_models_of_transformers(build, dead, named):
    torch.manual_seed(0)
    model, batch = build()
    quietly(hlk.apply_heterolora, model, hlk.HeteroLoraConfig(r=2, search="off"))
    with pytest.warns(UserWarning, match=named):
        step(model.train(), inputs=batch)
    unreached = state_of(model).reach.unreached
    assert {name.rpartition(".")[2] for name in unreached} == dead
    assert 0 < len(unreached) < len(state_of(model).paths)
