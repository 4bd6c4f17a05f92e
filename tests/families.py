"""Tiny random models of every row of the site table, their inputs, and an eager twin of a patched model."""

from __future__ import annotations

import copy
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

import heterolora_kernels as hlk

HIDDEN, LAYERS, HEADS, VOCAB, INNER = 32, 3, 4, 61, 48
SHORTCUTS = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")

_DECODER = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
                bos_token_id=1, eos_token_id=2)
_ENCODER = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0)
_OPT = dict(vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GPT2 = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=64, resid_pdrop=0.0,
             embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class Family:
    """One row of the site table, written down once more: where h and f are taken and where shortcuts join.

    Attributes:
        layers: dotted name of the list of layers in the model.
        h, f: modules of a layer whose inputs are the two sources.
        attention, feed_forward: modules of a layer whose outputs the shortcuts join.
        qkv: linears of a layer that read the same x.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: str
    h: str
    f: str
    attention: str
    feed_forward: str
    qkv: tuple[str, ...]
    decoder: bool = True
    checkpointed: bool = False


def _causal(name: str, config: Callable[[], object]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(config())


def _gemma(number: str, **more):
    def config():
        return getattr(transformers, f"Gemma{number}Config")(**_DECODER, head_dim=8, **more)
    return config


def _gemma3_config():
    # Every layer kind of Gemma 3: attention over a window of 4 tokens, and full attention.
    return transformers.Gemma3TextConfig(**_DECODER, head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
                                         layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def _llama_row(name: str, model: str, config: Callable[[], object], checkpointed: bool = False) -> Family:
    return Family(name, _causal(model, config), "model.layers", "input_layernorm", "post_attention_layernorm", "self_attn.o_proj",
                  "mlp.down_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), checkpointed=checkpointed)


def _gemma2_row(name: str, model: str, config: Callable[[], object], checkpointed: bool = False) -> Family:
    return Family(name, _causal(model, config), "model.layers", "input_layernorm", "pre_feedforward_layernorm",
                  "post_attention_layernorm", "post_feedforward_layernorm",
                  ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), checkpointed=checkpointed)


def _opt_row(name: str, norm_first: bool) -> Family:
    h, f = ("self_attn_layer_norm", "final_layer_norm") if norm_first else ("self_attn.q_proj", "fc1")
    config = lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=norm_first)  # noqa: E731
    return Family(name, _causal("OPTForCausalLM", config), "model.decoder.layers", h, f, "self_attn.out_proj", "fc2",
                  ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), checkpointed=True)


def _bert_row(name: str, model: str, config: str, layers: str, checkpointed: bool = False) -> Family:
    return Family(name, _causal(model, lambda: getattr(transformers, config)(**_ENCODER)), layers,
                  "attention.self.query", "intermediate.dense", "attention.output.dense", "output.dense",
                  ("attention.self.query", "attention.self.key", "attention.self.value"), decoder=False,
                  checkpointed=checkpointed)


FAMILIES: dict[str, Family] = {family.name: family for family in (
    _llama_row("llama", "LlamaForCausalLM", lambda: transformers.LlamaConfig(**_DECODER), checkpointed=True),
    _llama_row("mistral", "MistralForCausalLM", lambda: transformers.MistralConfig(**_DECODER, sliding_window=4)),
    _llama_row("qwen2", "Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**_DECODER)),
    _llama_row("qwen3", "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**_DECODER, head_dim=8)),
    _llama_row("gemma", "GemmaForCausalLM", _gemma("")),
    _gemma2_row("gemma2", "Gemma2ForCausalLM", _gemma("2", sliding_window=4, query_pre_attn_scalar=8), checkpointed=True),
    _gemma2_row("gemma3", "Gemma3ForCausalLM", _gemma3_config),
    _opt_row("opt_norm_first", True),
    _opt_row("opt_norm_last", False),
    Family("gpt2", _causal("GPT2LMHeadModel", lambda: transformers.GPT2Config(**_GPT2)), "transformer.h", "ln_1", "ln_2",
           "attn.c_proj", "mlp.c_proj", (), checkpointed=True),
    _bert_row("bert", "BertForMaskedLM", "BertConfig", "bert.encoder.layer", checkpointed=True),
    _bert_row("roberta", "RobertaForMaskedLM", "RobertaConfig", "roberta.encoder.layer"),
)}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
decoders = [family for family in FAMILIES.values() if family.decoder]
every_decoder = pytest.mark.parametrize("family", decoders, ids=[family.name for family in decoders])
checkpointed = [family for family in FAMILIES.values() if family.checkpointed]
every_checkpointed = pytest.mark.parametrize("family", checkpointed, ids=[family.name for family in checkpointed])


def make_model(family: str | Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model in eval mode, in which every norm and bias matters (at their initial values they hide errors)."""
    family = FAMILIES[family] if isinstance(family, str) else family
    torch.manual_seed(seed)
    model = family.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif not any(part in name for part in ("embed", "wte", "wpe")):
                parameter.mul_(4.0)
    model.config.use_cache = False
    return model.to(dtype).eval()


def make_inputs(seed: int = 1, batch: int = 2, length: int = 7, padding: bool = True) -> dict[str, Tensor]:
    """Token ids with labels, the last two positions of the first row are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if padding:
        inputs["attention_mask"][0, -2:] = 0
        inputs["labels"][0, -2:] = -100
    return inputs


def layers_of(model: nn.Module, family: str | Family) -> nn.ModuleList:
    """The model's list of layers."""
    return model.get_submodule((FAMILIES[family] if isinstance(family, str) else family).layers)


@pytest.fixture(autouse=True)
def reference_backend():
    """Bits are promised on the reference backend, and so is float64; one thread, because other jobs share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with hlk.use_backend("reference"):
        yield
    torch.set_num_threads(threads)


def patch(model: nn.Module, shortcuts="all", open_B: bool = True, **options) -> nn.Module:
    """Patch with small odd ranks; random lora_B, so that every path has an effect."""
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(**{"r": 3, "lora_alpha": 6, "shortcut_r": 2, "shortcut_alpha": 4,
                                                       "shortcuts": shortcuts, "search": "off", **options}))
    if open_B:
        open_adapters(model)
    return model


def make_patched(family: str | Family, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """``patch`` of a fresh model."""
    return patch(make_model(family, dtype), **options)


def open_adapters(model: nn.Module, seed: int = 7, scale: float = 0.1) -> None:
    """Random lora_B everywhere, drawn by name, so that every path has an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def adapter_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """``{parameter: gradient}`` of every trainable parameter."""
    return {name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Cross entropy in the dtype of the logits (``.loss`` would be float32 in a float64 model)."""
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return nn.functional.cross_entropy(logits.flatten(0, -2), inputs["labels"].flatten())


def loss_and_gradients(model: nn.Module, *batches: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Every loss in order, and the summed gradients; all forwards run before the first backward."""
    model.zero_grad(set_to_none=True)
    losses = [loss_of(model, batch) for batch in batches]
    for loss in losses:
        loss.backward()
    return [loss.detach() for loss in losses], adapter_gradients(model)


def assert_gradients_close(found: dict, expected: dict, tolerance: float = 1e-9, may_be_zero: bool = False) -> None:
    """Every gradient within ``tolerance`` of the largest entry of the expected one; zero (or None) only where allowed."""
    assert found.keys() == expected.keys()
    for name in expected:
        one, other = (0.0 if g is None else g for g in (found[name], expected[name]))
        largest = max(torch.as_tensor(g).abs().max().item() for g in (one, other))
        assert largest > 0 or may_be_zero, f"{name}: the gradient is zero, the test would see nothing"
        error = torch.as_tensor(one - other).abs().max().item()
        assert error <= tolerance * largest, f"{name}: error {error:.3e} of {largest:.3e}"


class EagerTwin:
    """A copy of the unpatched model to whose modules hooks add the paths' terms, from clones of ``patched``'s adapters.

    Written apart from the package: sources are captured by pre-hooks, terms added by forward hooks, f of the layer before
    is found in a dictionary that is emptied before each call. It knows neither checkpointing nor dropout.
    """

    def __init__(self, base: nn.Module, patched: nn.Module, family: Family, lora_scaling: float = 2.0,
                 shortcut_scaling: float = 2.0):
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.adapters = {name: parameter.detach().clone().requires_grad_(True)
                         for name, parameter in patched.named_parameters() if name.endswith(("lora_A", "lora_B"))}
        self.sources: dict[tuple[int, str], Tensor] = {}
        self.model.register_forward_pre_hook(lambda module, args: self.sources.clear())
        for name, module in self.model.named_modules():
            if f"{name}.lora_A" in self.adapters:
                module.register_forward_hook(lambda m, args, out, name=name: out + self.delta(name, args[0], lora_scaling))
        for index, layer in enumerate(layers_of(self.model, family)):
            self.hook_layer(layer, index, family, shortcut_scaling)

    def delta(self, path: str, source: Tensor, scaling: float) -> Tensor:
        return scaling * ((source @ self.adapters[f"{path}.lora_A"].t()) @ self.adapters[f"{path}.lora_B"].t())

    def hook_layer(self, layer: nn.Module, index: int, family: Family, scaling: float) -> None:
        for key in ("h", "f"):
            layer.get_submodule(getattr(family, key)).register_forward_pre_hook(
                lambda m, args, key=key: self.sources.update({(index, key): args[0]}))
        for part, site, source in (("attention", "residual_1", (index, "h")), ("attention", "shortcut_ffn", (index - 1, "f")),
                                   ("feed_forward", "residual_2", (index, "f")), ("feed_forward", "shortcut_sa", (index, "h"))):
            path = f"{family.layers}.{index}.{site}"
            if f"{path}.lora_A" not in self.adapters:
                continue

            def add(module, args, out, path=path, source=source):
                if source not in self.sources:
                    return out
                return out + self.delta(path, self.sources[source], scaling).reshape(out.shape)

            layer.get_submodule(getattr(family, part)).register_forward_hook(add)

    def loss_and_gradients(self, *batches: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        for parameter in self.adapters.values():
            parameter.grad = None
        losses = [loss_of(self.model, batch) for batch in batches]
        for loss in losses:
            loss.backward()
        return [loss.detach() for loss in losses], {name: p.grad for name, p in self.adapters.items()}


def snapshot(model: nn.Module) -> dict:
    """Everything that patching may touch: types, attributes, hooks, children, tensors and their flags, by module."""
    state = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = dict(module.__dict__)
        registries = {key: OrderedDict(value) for key, value in attributes.items()
                      if isinstance(value, dict) and ("hooks" in key or key in ("_parameters", "_buffers", "_modules"))}
        state[name] = (type(module), {k: v for k, v in attributes.items() if k not in registries}, registries,
                       {key: p.requires_grad for key, p in module._parameters.items() if p is not None})
    return state


def assert_restored(model: nn.Module, before: dict) -> None:
    """The same modules hold the very same objects as at the time of ``before``."""
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (cls, attributes, registries, flags) in before.items():
        found_cls, found_attributes, found_registries, found_flags = after[name]
        assert found_cls is cls, name
        assert found_attributes.keys() == attributes.keys(), name
        for key, value in attributes.items():
            assert found_attributes[key] is value, (name, key)
        assert found_registries.keys() == registries.keys(), name
        for key, entries in registries.items():
            assert list(found_registries[key]) == list(entries), (name, key)
            assert all(found_registries[key][entry] is value for entry, value in entries.items()), (name, key)
        assert found_flags == flags, name
