"""Models with heads, saved and read through PEFT."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from families import HEADS, HIDDEN, INNER, LAYERS, VOCAB, make_inputs, make_model
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed")

_COMMON = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
               num_attention_heads=HEADS, max_position_embeddings=64, pad_token_id=0)
_NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
#: Models with heads, and the task that is written for PEFT.
HEADED = {
    "bert_sequence": ("SEQ_CLS", "BertForSequenceClassification", "BertConfig", {**_COMMON, **_NO_DROPOUT, "num_labels": 3}),
    "roberta_sequence": ("SEQ_CLS", "RobertaForSequenceClassification", "RobertaConfig", {**_COMMON, **_NO_DROPOUT}),
    "llama_sequence": ("SEQ_CLS", "LlamaForSequenceClassification", "LlamaConfig", {**_COMMON, "num_labels": 3}),
    "gpt2_token": ("TOKEN_CLS", "GPT2ForTokenClassification", "GPT2Config",
                   dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=64,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, classifier_dropout=0.0)),
    "bert_question": ("QUESTION_ANS", "BertForQuestionAnswering", "BertConfig", {**_COMMON, **_NO_DROPOUT}),
    "bert_bare": ("FEATURE_EXTRACTION", "BertModel", "BertConfig", {**_COMMON, **_NO_DROPOUT}),
}
PLAIN = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": None, "opt_norm_first": "CAUSAL_LM", "gemma2": "CAUSAL_LM"}


def build(name: str, seed: int = 0) -> nn.Module:
    """The base: the same whenever it is built."""
    if name in PLAIN:
        return make_model(name, seed=seed)
    _, model, config, options = HEADED[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.config.use_cache = False
    return model.eval()


def inputs() -> dict:
    return {name: value for name, value in make_inputs().items() if name != "labels"}


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    """Whatever floating tensors the model gives, flat."""
    result = model(**inputs())
    return torch.cat([value.flatten() for value in result.values() if isinstance(value, torch.Tensor)])


def load_with_peft(name: str, folder) -> nn.Module:
    with warnings.catch_warnings():
        # Keys that are missing or not expected, layers of another layout.
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(build(name), str(folder)).eval()


def lora_layers(model: nn.Module) -> dict[str, tuple[int, float]]:
    """``{module: (rank, scaling)}`` of a PEFT model."""
    return {name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
            for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def written(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())
