"""Adapters of older transformers are read under today's names; what cannot be read is refused by name."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from helpers_errors import assert_models_agree
from helpers_saving import assert_untouched
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import heterolora_kernels as hlk

peft = pytest.importorskip("peft", reason="peft is not installed")

_SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_TEXT = dict(_SMALL, vocab_size=64, pad_token_id=0)
_VISION = dict(_SMALL, image_size=16, patch_size=8)

ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def llava(cls=transformers.LlavaForConditionalGeneration) -> nn.Module:
    torch.manual_seed(0)
    return cls(transformers.LlavaConfig(text_config=transformers.LlamaConfig(**_TEXT),
                                        vision_config=transformers.CLIPVisionConfig(**_VISION), image_token_index=63)).eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


#: ``{case: (today's part of the names, what it was)}``.
OLD = {"llava": (".model.model.language_model.layers", ".model.language_model.model.layers"),
       "today": (".model.model.language_model.layers", ".model.model.language_model.layers")}


@pytest.mark.parametrize("through", ["load_adapter", "init_from", "patched"])
@pytest.mark.parametrize("now, before", OLD.values(), ids=OLD)
def test_old_names_are_mapped_as_peft_maps_them(now, before, through, tmp_path):
    options = dict(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(llava(), peft.LoraConfig(**options, init_lora_weights=False)).eval()
        made.save_pretrained(str(tmp_path))
        file = tmp_path / "adapter_model.safetensors"
        save_file({name.replace(now, before): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
        assert_models_agree(peft.PeftModel.from_pretrained(llava(), str(tmp_path)).eval(), made, outputs)
    if through == "init_from":
        model = hlk.apply_heterolora(llava(), hlk.HeteroLoraConfig(init_from=tmp_path, search="off"))
    elif through == "load_adapter":
        model = hlk.load_adapter(llava(), tmp_path)
    else:
        model = hlk.load_adapter(hlk.apply_heterolora(llava(), hlk.HeteroLoraConfig(lora_alpha=8, search="off", **options)),
                                 tmp_path)
    assert_models_agree(model, made, outputs)


def test_names_that_nobody_moved_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(llava(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("language_model.layers", "elsewhere.layers"): value for name, value in load_file(file).items()}, file)
    model = llava()
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path), "modules that the model does not have: .*elsewhere")


# ---- what cannot be read ----


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT)).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, num_local_experts=4, num_key_value_heads=4)).eval()


SAVED = {
    "dora": (llama, dict(target_modules=["q_proj"], use_dora=True), "field 'use_dora' is True.*DoRA's magnitudes"),
    "lora_bias": (llama, dict(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False),
                  "field 'lora_bias' is True.*bias behind"),
    "bias": (llama, dict(target_modules=["q_proj"], bias="all"), "field 'bias' is 'all'"),
    "tokens": (llama, dict(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "field 'trainable_token_indices'.*rows "
                                                                                       "of the embedding"),
    "pissa": (llama, dict(target_modules=["q_proj"], init_lora_weights="pissa"), "field 'init_lora_weights' is 'pissa'.*other "
                                                                                 "base"),
    "olora": (llama, dict(target_modules=["q_proj"], init_lora_weights="olora"), "field 'init_lora_weights' is 'olora'"),
    "experts": (mixtral, dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
                "field 'target_parameters' is .*stacked parameter"),
    "embedding": (llama, dict(target_modules=["q_proj", "embed_tokens"]), "lora_embedding_[AB]' .*an adapted embedding"),
    "replication": (llama, dict(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]), "field 'layer_replication'"),
    "loha": (llama, None, "field 'peft_type' is 'LOHA'"),
}


@pytest.mark.parametrize("through", ["load_adapter", "init_from"])
@pytest.mark.parametrize("build, options, named", SAVED.values(), ids=SAVED)
def test_what_cannot_be_read_is_refused_by_its_field(build, options, named, through, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoHaConfig(target_modules=["q_proj"]) if options is None else peft.LoraConfig(r=2, **options)
        peft.get_peft_model(build(), config).save_pretrained(str(tmp_path))
    model = build()
    call = {"load_adapter": lambda: hlk.load_adapter(model, tmp_path),
            "init_from": lambda: hlk.apply_heterolora(model, hlk.HeteroLoraConfig(init_from=tmp_path))}[through]
    assert_untouched(model, call, f"adapter_(config|model).*{named}")


def test_stacked_experts_without_their_field_are_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
                            ).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": None}))
    model = mixtral()
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path), "4 times the rank 2.*stacked experts|modules that the "
                                                                       "model does not")


def test_experts_of_their_own_into_a_model_that_stacks_them(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.mlp.experts.3.w1"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 32), f"{name}.lora_B.weight": torch.zeros(48, 2)},
              tmp_path / "adapter_model.safetensors")
    model = mixtral()
    assert_untouched(model, lambda: hlk.load_adapter(model, tmp_path), "experts that this model stacks into one parameter")


def test_tying_by_name_is_followed(tmp_path):
    def tied():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, tie_word_embeddings=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(tied(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
                                                           ensure_weight_tying=True)).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        made.save_pretrained(str(tmp_path))
        assert_models_agree(hlk.load_adapter(tied(), tmp_path), made, outputs)
