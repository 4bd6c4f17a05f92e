"""The task in an exported adapter is one under which PEFT can run the model; else there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from helpers_errors import assert_models_agree
from helpers_peft import written
from torch import Tensor, nn

import heterolora_kernels as hlk

peft = pytest.importorskip("peft", reason="peft is not installed")

_SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_TEXT = dict(_SMALL, vocab_size=64, pad_token_id=0)
_VISION = dict(_SMALL, image_size=16, patch_size=8)
_WAV2VEC = dict(_SMALL, vocab_size=32, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2,
                num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, feat_proj_dropout=0.0, hidden_dropout=0.0,
                attention_dropout=0.0, activation_dropout=0.0, final_dropout=0.0, layerdrop=0.0, classifier_proj_size=16)

ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
audio = torch.randn(2, 600, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batch: dict
    task: str | None
    targets: list[str] | str = "all-linear"


def _of(model: str, config: Callable[[], object]) -> Callable[[], nn.Module]:
    def build():
        torch.manual_seed(0)
        return getattr(transformers, model)(config()).eval()
    return build


def _llava():
    return transformers.LlavaConfig(text_config=transformers.LlamaConfig(**_TEXT),
                                    vision_config=transformers.CLIPVisionConfig(**_VISION),
                                    image_token_index=63)


def _whisper():
    return transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)


def _t5():
    return transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, pad_token_id=0,
                                 decoder_start_token_id=0, dropout_rate=0.0)


class Own(nn.Module):
    """Somebody's model, which has a config of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.PretrainedConfig()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return {"logits": self.second(torch.tanh(self.first(x)))}


CASES = {
    "whisper": Case(_of("WhisperForConditionalGeneration", _whisper),
                    {"input_features": torch.randn(2, 8, 40), "labels": ids[:, :6]}, None, ["q_proj", "v_proj"]),
    "vit": Case(_of("ViTForImageClassification", lambda: transformers.ViTConfig(**_VISION)), {"pixel_values": pixels}, None),
    "wav2vec2_ctc": Case(_of("Wav2Vec2ForCTC", lambda: transformers.Wav2Vec2Config(**_WAV2VEC)), {"input_values": audio}, None),
    "wav2vec2_sequence": Case(_of("Wav2Vec2ForSequenceClassification", lambda: transformers.Wav2Vec2Config(**_WAV2VEC)),
                              {"input_values": audio}, None),
    "clip": Case(_of("CLIPModel", lambda: transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)),
                 {"input_ids": ids, "pixel_values": pixels}, None, ["q_proj", "v_proj"]),
    "llava": Case(_of("LlavaForConditionalGeneration", _llava), {"input_ids": ids}, None, r".*language_model.*q_proj"),
    "llama": Case(_of("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_TEXT)), {"input_ids": ids}, "CAUSAL_LM"),
    "mpt": Case(_of("MptForCausalLM", lambda: transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64)),
                {"input_ids": ids}, "CAUSAL_LM"),
    "t5": Case(_of("T5ForConditionalGeneration", _t5), {"input_ids": ids, "labels": ids}, "SEQ_2_SEQ_LM"),
    "bert": Case(_of("BertModel", lambda: transformers.BertConfig(**_TEXT)), {"input_ids": ids}, "FEATURE_EXTRACTION"),
    "distilbert_qa": Case(_of("DistilBertForQuestionAnswering", lambda: transformers.DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, qa_dropout=0.0)), {"input_ids": ids}, "QUESTION_ANS"),
    "own": Case(lambda: Own().eval(), {"x": torch.randn(3, 8)}, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peft_calls_what_was_exported(case, tmp_path):
    def outputs(model: nn.Module) -> Tensor:
        wide = next(model.parameters()).dtype == torch.float64
        batch = {name: value.double() if wide and value.is_floating_point() else value for name, value in case.batch.items()}
        with torch.no_grad():
            found = model(**batch)
        return torch.cat([value.flatten() for name, value in found.items() if isinstance(value, Tensor) and name != "loss"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hlk.apply_heterolora(case.build(), hlk.HeteroLoraConfig(
            r=3, search="off", init_B="kaiming_uniform", target_modules=case.targets))
        assert float((outputs(model) - outputs(case.build())).norm()) > 0
        hlk.save_adapter(model, tmp_path, "peft")
        assert written(tmp_path)["task_type"] == case.task
        loaded = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
        assert_models_agree(loaded, model, outputs)


def test_a_forward_in_the_instance_is_not_asked(tmp_path):
    model = hlk.apply_heterolora(CASES["llama"].build(), hlk.HeteroLoraConfig(search="off"))
    model.forward = lambda **batch: type(model).forward(model, **batch)
    hlk.save_adapter(model, tmp_path, "peft")
    assert written(tmp_path)["task_type"] == "CAUSAL_LM"


def test_names_that_peft_takes_for_experts_are_refused(tmp_path):
    conversions = pytest.importorskip("transformers.conversion_mapping", reason="this release stacks no experts")
    if "deepseek_v3" not in getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {}):
        pytest.skip("this release has no such list")
    config = transformers.DeepseekV3Config(**_TEXT, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
                                           n_group=1,
                                           topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
                                           qk_nope_head_dim=8,
                                           qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hlk.apply_heterolora(transformers.DeepseekV3ForCausalLM(config), hlk.HeteroLoraConfig(search="off"))
        with pytest.raises(ValueError, match="cannot hold 'model.layers.0.mlp.gate_proj'.*takes every target called 'gate_proj'"):
            hlk.save_adapter(model, tmp_path / "adapter", "peft")
        assert not (tmp_path / "adapter").exists()
        model = hlk.apply_heterolora(transformers.DeepseekV3ForCausalLM(config), hlk.HeteroLoraConfig(
            search="off", exclude_modules=["gate_proj", "up_proj", "down_proj"]))
        hlk.save_adapter(model, tmp_path / "adapter", "peft")
