"""Heads that transformers made anew, and heads that share a parameter with other modules."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from families import HEADS, HIDDEN, INNER, LAYERS, VOCAB, make_inputs
from helpers_errors import assert_models_agree
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.checkpoint import new_modules
from heterolora_kernels.state import state_of

_BERT = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
             max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def config_of(**options) -> hlk.HeteroLoraConfig:
    return hlk.HeteroLoraConfig(**{"r": 2, "search": "off", "init_B": "kaiming_uniform", **options})


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


# ---- the checkpoint's header ----


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**_BERT)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


class OddHead(transformers.BertPreTrainedModel):
    """A model of somebody's own, whose head has a name that nobody knows."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.verdict = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.Tanh(), nn.Linear(8, 3))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return self.verdict(self.bert(input_ids).pooler_output)


@pytest.mark.parametrize("cls, expected", [
    (transformers.BertForSequenceClassification, ["classifier"]), (transformers.BertForQuestionAnswering, ["qa_outputs"]),
    (transformers.BertForMultipleChoice, ["classifier"]), (OddHead, ["verdict"]), (transformers.BertModel, []),
    (transformers.BertForNextSentencePrediction, ["cls"])], ids=lambda value: getattr(value, "__name__", None))
def test_modules_that_the_checkpoint_does_not_hold_are_heads(cls, expected, bert):
    model = cls.from_pretrained(bert)
    assert new_modules(model) == expected
    hlk.apply_heterolora(model, config_of())
    assert {name.split(".")[0] for name in trained_names(model)} == set(expected)


def test_tied_weights_are_not_new(bert):
    model = transformers.BertForMaskedLM.from_pretrained(bert)
    assert new_modules(model) == ["cls.predictions.transform"]


def test_heads_under_odd_names_come_back_into_a_base_from_nowhere(bert, tmp_path):
    model = hlk.apply_heterolora(OddHead.from_pretrained(bert).eval(), config_of())
    with torch.no_grad():
        model.verdict[2].weight.add_(1.0)
    hlk.save_adapter(model, tmp_path / "adapter")
    base = OddHead(transformers.BertConfig(**_BERT)).eval()
    base.bert.load_state_dict(transformers.BertModel.from_pretrained(bert).state_dict())
    ids = make_inputs()["input_ids"]
    assert torch.equal(hlk.load_adapter(base, tmp_path / "adapter")(ids), model(ids))
    assert json.loads((tmp_path / "adapter" / "heterolora.json").read_text())["config"]["modules_to_save"][-1] == "verdict"


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**_BERT))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert new_modules(OddHead.from_pretrained(tmp_path)) == ["verdict"]


def test_checkpoints_that_cannot_be_read_are_none(bert):
    model = OddHead.from_pretrained(bert)
    (bert / "model.safetensors").write_bytes(b"\xff" * 40)
    assert new_modules(model) is None


def test_what_may_be_new_is_said_where_no_checkpoint_is_found(bert):
    model = OddHead.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"not known whether \['verdict'\] were made anew.*modules_to_save"):
        hlk.apply_heterolora(model, config_of())


def test_a_model_from_a_config_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hlk.apply_heterolora(OddHead(transformers.BertConfig(**_BERT)), config_of())


# ---- shared parameters ----


def llama(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        tie_word_embeddings=tied, pad_token_id=0)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=HEADS,
                                                                n_positions=64,
                                                                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_ff=INNER, num_layers=2, num_heads=HEADS, d_kv=8, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1)).eval()


TIED = {"llama_embedding": (llama, ["embed_tokens"], "model.embed_tokens.weight"), "llama_head": (llama, ["lm_head"],
                                                                                                  "lm_head.weight"),
        "gpt2_wte": (gpt2, ["wte"], "transformer.wte.weight"), "gpt2_head": (gpt2, ["lm_head"], "lm_head.weight"),
        "t5_shared": (t5, ["shared"], "shared.weight")}
every_tie = pytest.mark.parametrize("build, heads, name", TIED.values(), ids=TIED)


def outputs(model: nn.Module) -> torch.Tensor:
    ids = make_inputs()["input_ids"]
    more = {"labels": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def trained(build, heads) -> nn.Module:
    model = hlk.apply_heterolora(build(), config_of(modules_to_save=heads))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = make_inputs()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model


@every_tie
def test_a_tied_head_is_trained_under_all_its_names(build, heads, name):
    before, model = build().get_parameter(name).detach(), trained(build, heads)
    assert bool((model.get_parameter(name) != before).any())
    ends = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name)]
    assert len(ends) > 1 and state_of(model).heads.other_ends(model) == {n: name for n in ends if n != name}


@every_tie
@pytest.mark.parametrize("format", ["native", "merged"])
def test_a_tied_head_comes_back(build, heads, name, format, tmp_path):
    model = trained(build, heads)
    hlk.save_adapter(model, tmp_path, format)
    loaded = hlk.load_adapter(build(), tmp_path) if format == "native" else type(model).from_pretrained(tmp_path).eval()
    if format == "native":
        assert_models_agree(loaded, model, outputs)
    else:
        # Merged weights are rounded once more.
        expected = outputs(model)
        assert float((outputs(loaded) - expected).norm()) < 1e-5 * float(expected.norm())


@every_tie
def test_peft_loads_every_end_of_a_tied_head(build, heads, name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = trained(build, heads)
    with pytest.warns(UserWarning, match="tied to a head.*saved as often as it has names"):
        hlk.save_adapter(model, tmp_path, "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
        assert_models_agree(loaded, model, outputs)
    # And back: equal ends are one parameter again.
    assert_models_agree(hlk.load_adapter(build(), tmp_path), model, outputs)


@every_tie
def test_the_reference_model_does_not_share_a_tied_head(build, heads, name):
    model = hlk.apply_heterolora(build(), config_of(modules_to_save=heads))
    twin = hlk.reference_model(model)
    before = outputs(twin)
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    assert torch.equal(outputs(twin), before)
    assert all(not p.requires_grad for p in twin.parameters())


def test_another_tie_is_refused(tmp_path):
    hlk.save_adapter(trained(llama, ["embed_tokens"]), tmp_path / "tied")
    hlk.save_adapter(trained(lambda: llama(tied=False), ["embed_tokens"]), tmp_path / "free")
    with pytest.raises(ValueError, match="field 'tied': 'lm_head.weight' is one parameter.* and not in this model"):
        hlk.load_adapter(llama(tied=False), tmp_path / "tied")
    with pytest.raises(ValueError, match="field 'tied': 'lm_head.weight' is not one parameter"):
        hlk.load_adapter(llama(), tmp_path / "free", check_base=False)


@pytest.mark.parametrize("through", ["load", "load_patched", "init_from"])
def test_ends_that_differ_are_refused(through, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens",
                                                                                                              "lm_head"]))
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save.default.weight.add_(1.0)
        model.save_pretrained(str(tmp_path))
    patched = dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    calls = {"load": lambda: hlk.load_adapter(llama(), tmp_path),
             "load_patched": lambda: hlk.load_adapter(hlk.apply_heterolora(llama(), config_of(**patched)), tmp_path),
             "init_from": lambda: hlk.apply_heterolora(llama(), config_of(init_from=tmp_path))}
    with pytest.raises(ValueError, match="have other values, and in this model they are one "
                                         "parameter.*tie_word_embeddings=False"):
        calls[through]()
    assert torch.is_tensor(outputs(hlk.load_adapter(llama(tied=False), tmp_path)))


class Listed(nn.Module):
    """Two heads in a list."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 2)]),
                                                                     nn.Tanh()])

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return torch.cat([self.classifier[0](x), self.classifier[1][0](x)], dim=-1)


def test_heads_in_lists_are_saved_one_by_one(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = hlk.apply_heterolora(Listed(), config_of())
    assert trained_names(model) == {f"classifier.{name}.{leaf}" for name in ("0", "1.0") for leaf in ("weight", "bias")}
    with torch.no_grad():
        model.classifier[1][0].weight.add_(1.0)
    hlk.save_adapter(model, tmp_path, "peft")
    x = torch.randn(4, 6)
    loaded = peft.PeftModel.from_pretrained(Listed(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
