"""One architecture of transformers, tiny and random: patched, stepped, saved, loaded, removed. What comes of it, in one
record."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import heterolora_kernels as hlk
from heterolora_kernels.state import state_of

MOST_PARAMETERS = 70_000_000
#: Which class stands for a type: the first mapping that has it.
_MAPPINGS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION",
             "MASKED_LM",
             "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "")

#: (pattern of a field's name, value): the first that matches counts.
_SIZES: list[tuple[str, int]] = [
    (r".*(num_key_value_heads|kv_heads|n_head_kv|num_kv_heads)$", 2), (r".*(head_dim|d_kv|kv_channels|attention_head_dim)$", 8),
    (r".*(num_heads|attention_heads|n_heads?|num_attention_heads)$", 4),
    (r".*(experts_per_tok|experts_per_token|moe_top_?k|moe_topk|top_?k_experts|num_selected_experts)$", 2),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4), (r"n_shared_experts|num_shared_experts", 1),
    (r"n_group|topk_group", 1),
    (r"(moe_|shared_expert_)?intermediate_size|.*ffn_dim|d_ff|d_inner|ffn_hidden_size|n_inner|hidden_dim|.*_intermediate_size",
     48),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|.*hidden_size|projection_dim|.*embed_dim", 32),
    (r"q_lora_rank|kv_lora_rank|qk_nope_head_dim|v_head_dim", 8), (r"qk_rope_head_dim", 8),
    (r"num_hidden_layers|n_layers?|.*encoder_layers|.*decoder_layers|num_layers|.*num_hidden_layers|depth", 2),
    (r"vocab_size|.*_vocab_size", 100), (r"image_size|.*image_size", 32), (r"patch_size", 8), (r"num_mel_bins", 8),
    (r"max_source_positions", 20), (r"max_position_embeddings|n_positions|max_target_positions", 64), (r"state_size|d_state", 4),
    (r"num_queries|num_query_tokens|num_latents", 4), (r"rms_norm_dim", 32),
]
_TOKENS = re.compile(r".*(pad|bos|eos|cls|sep|mask|unk|start)_token_id$")


def class_of(model_type: str) -> type | None:
    """The class that stands for a model type; None if no mapping has it."""
    config = CONFIG_MAPPING[model_type]
    for name in _MAPPINGS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING" if name else "MODEL_MAPPING", None)
        if mapping is not None and config in mapping:
            found = mapping[config]
            return found[0] if isinstance(found, tuple) else found
    return None


def types() -> list[str]:
    """All model types for which transformers has a model."""
    found = []
    for model_type in sorted(CONFIG_MAPPING.keys()):
        with contextlib.suppress(Exception):
            if class_of(model_type) is not None:
                found.append(model_type)
    return found


def _small(config: transformers.PretrainedConfig, skipped: tuple[str, ...] = ()) -> dict:
    """Fields that make a config small, those of its parts too."""
    fields = {}
    for name, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name) and pattern not in skipped), None)
            if size is not None and value > size:
                fields[name] = size
            elif _TOKENS.fullmatch(name) and value >= 100:
                fields[name] = 1 if "pad" not in name else 0
            elif re.fullmatch(r".*(image|video|audio)_token_(id|index)", name):
                fields[name] = 99
        elif isinstance(value, float) and re.fullmatch(r"mask_(time|feature)_prob", name):
            fields[name] = 0.0
    for name in getattr(type(config), "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            fields[name] = {**_small(part, skipped), "model_type": part.model_type}
    return fields


def _configs(model_type: str) -> Iterator[transformers.PretrainedConfig]:
    cls = CONFIG_MAPPING[model_type]
    layers, heads, sizes = _SIZES[10][0], tuple(pattern for pattern, _ in _SIZES[:3]), tuple(pattern for pattern,
                                                                                             _ in _SIZES[7:9])
    for skipped in ((), heads, (*heads, *sizes), (layers,), (*heads, *sizes, layers)):
        with contextlib.suppress(Exception):
            config = cls(**_small(cls(), skipped))
            yield config
        with contextlib.suppress(Exception):
            config = cls()
            for name, value in _small(config, skipped).items():
                target = getattr(config, name)
                if isinstance(value, dict):
                    for field, size in value.items():
                        setattr(target, field, size)
                else:
                    setattr(config, name, value)
            yield config


def _text(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _batches(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs that may fit, by the names that the forward takes."""
    config, taken = model.config, inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def size_of(name, default):
        for each in (config, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
            value = getattr(each, name, None)
            if isinstance(value, int):
                return value
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                return value[0]
        return default

    vocab = getattr(_text(config), "vocab_size", None) or 50
    ids = torch.randint(3, max(4, min(vocab, 90)), (2, 8), generator=generator)
    text = {"input_ids": ids} if "input_ids" in taken else {}
    if "decoder_input_ids" in taken and getattr(config, "is_encoder_decoder", False):
        text["decoder_input_ids"] = ids
    side, channels = size_of("image_size", 32), size_of("num_channels", 3)
    bins = size_of("num_mel_bins", 8)
    images = [{"pixel_values": randn(2, channels, edge, edge)} for edge in dict.fromkeys((side, 32, 64, 224))]
    videos = [{"pixel_values": randn(1, size_of("num_frames", 8), channels, side, side)},
              {"pixel_values_videos": randn(1, size_of("frames_per_clip", 8), channels, side, side)}]
    sounds = [{"input_values": randn(2, 2000)}, {"input_values": randn(2, size_of("max_length", 128), bins)},
              {"input_features": randn(2, bins, 2 * size_of("max_source_positions", 20))}, {"input_features": randn(2, 40, bins)},
              {"input_values": randn(2, 1, 2000)}, {"audio_values": randn(2, 2000)}]
    main = getattr(model, "main_input_name", "input_ids")
    others = [batch for batch in (*images, *videos, *sounds) if next(iter(batch)) in taken]
    orders = [text] if text and main == "input_ids" else []
    orders += [{**text, **other} for other in others] if text else []
    orders += [other for other in others]
    if "decoder_input_ids" in text:
        orders += [{**other, "decoder_input_ids": ids} for other in others]
    if text and main != "input_ids":
        orders.append(text)
    if "inputs" in taken:
        orders.append({"inputs": ids})
    yield from orders


def _floats(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):
        return [t for each in value.values() for t in _floats(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _floats(each)]
    return []


def _run(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _floats(model(**batch))


@torch.no_grad()
def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    return [t.clone() for t in _run(model, batch)]


def _differ(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, in parts of the largest number."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other):
        both = torch.isfinite(a) & torch.isfinite(b)
        if bool((torch.isfinite(a) != torch.isfinite(b)).any()):
            return float("inf")
        size = float(b[both].abs().max()) if bool(both.any()) else 0.0
        worst = max(worst, float((a[both] - b[both]).abs().max()) / max(size, 1e-6) if bool(both.any()) else 0.0)
    return worst


class NotBuilt(Exception):
    """The type cannot be tried here; why."""


def build(model_type: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """A function that builds the same tiny model every time, in eval mode, and inputs for it.

    Raises:
        NotBuilt: no recipe fits.
    """
    cls, reason = class_of(model_type), "no config could be made small"
    for config in _configs(model_type):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        except Exception as error:  # noqa: BLE001 - whatever a foreign model raises is the answer
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            continue
        if size > MOST_PARAMETERS:
            reason = f"{size / 1e6:.0f} million parameters however small the fields that are known"
            continue

        def make(config=config) -> nn.Module:
            torch.manual_seed(0)
            model = cls(copy.deepcopy(config)).eval()
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = False
            return model

        try:
            model = make()
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            continue
        reason = "no inputs are known for it"
        for batch in _batches(model):
            try:
                first = _outputs(model, batch)
            except Exception as error:  # noqa: BLE001
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
                continue
            if first and _differ(_outputs(model, batch), first) == 0 and all(bool(torch.isfinite(t).any()) for t in first):
                return make, batch
            reason = "its outputs are not the same twice"
    raise NotBuilt(reason)


def check(model_type: str) -> dict:
    """Try one type.

    Returns:
        ``class``; ``outcome``: ``"reached"``, ``"refused"``, ``"not built"`` or ``"fault"``; ``paths``, ``unreached``, ``left``,
        ``peft``, ``reason``.
    """
    record: dict = {"type": model_type, "class": None, "outcome": "fault", "paths": 0, "unreached": [], "left": "", "peft": "",
                    "reason": ""}
    try:
        record["class"] = class_of(model_type).__name__
        make, batch = build(model_type)
    except NotBuilt as error:
        return {**record, "outcome": "not built", "reason": str(error)}
    except Exception as error:  # noqa: BLE001
        return {**record, "outcome": "not built", "reason": f"{type(error).__name__}: {str(error)[:100]}"}
    stage = "patching"
    try:
        return _check(record, make, batch, lambda now: record.update(stage=now))
    except Exception as error:  # noqa: BLE001
        stage = record.pop("stage", stage)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {**record, "outcome": "fault", "reason": f"{stage}: {type(error).__name__}: {str(error)[:200]} "
                                                        f"({where.filename.rpartition('/')[2]}:{where.lineno})"}


class _Fault(Exception):
    pass


def _expect(value: float, limit: float, what: str) -> None:
    if not value <= limit:
        raise _Fault(f"{what} differ by {value:.2g} of their size")


def _check(record: dict, make: Callable[[], nn.Module], batch: dict[str, Tensor], at: Callable[[str], None]) -> dict:
    model = make()
    before = _outputs(model, batch)
    at("patching")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2, search="off"))
        except ValueError as error:
            record.pop("stage", None)
            return {**record, "outcome": "refused", "reason": str(error)}
    record["left"] = " ".join(str(w.message) for w in told if "without adapters" in str(w.message))
    paths = state_of(model).paths
    record["paths"] = len(paths)
    _expect(_differ(_outputs(model, batch), before), 1e-4, "outputs after patching")
    at("training")
    try:
        # Some cannot be trained on inputs as small as these, patched or not.
        _outputs(make().train(), batch)
        model.train()
    except Exception:  # noqa: BLE001
        model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = sum(t.float().square().mean() for t in _run(model, batch) if t.requires_grad)
    if not isinstance(loss, Tensor):
        raise _Fault("no output depends on an adapter or a head")
    loss.backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    unreached = state_of(model).reach.unreached
    silent = [name for name, path in paths.items() if path.lora_B.grad is None and name not in unreached]
    if silent or unreached and not any("took no part" in str(w.message) for w in told):
        raise _Fault(f"dead paths are not named: {silent or sorted(unreached)}")
    record["unreached"] = sorted(unreached)
    model.eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for path in paths.values():
            if path.name not in unreached:
                path.lora_B.add_(0.02 * torch.randn(path.lora_B.shape, generator=generator))
    after = _outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at("saving")
        hlk.save_adapter(model, f"{folder}/native")
        loaded = hlk.load_adapter(make(), f"{folder}/native")
        _expect(_differ(_outputs(loaded, batch), after), 1e-5, "outputs of the loaded adapter")
        at("exporting")
        record["peft"] = _through_peft(model, make, batch, after, f"{folder}/peft")
    at("removing")
    hlk.remove_heterolora(model)
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    _outputs(fresh, batch)
    # By name: a parametrization makes a class for every instance. After a forward, in which some exchange modules.
    if [type(m).__name__ for m in model.modules()] != [type(m).__name__ for m in fresh.modules()] or any(
            hasattr(type(m), "_heterolora_key") for m in model.modules()):
        raise _Fault("classes are not those of before")
    # Heads and batch norms keep what they learnt.
    _expect(_differ(_outputs(model, batch), _outputs(fresh, batch)), 0.0, "outputs after removing")
    record.pop("stage", None)
    return {**record, "outcome": "reached"}


def _through_peft(model: nn.Module, make: Callable[[], nn.Module], batch: dict, after: list[Tensor], folder: str) -> str:
    try:
        import peft
    except ImportError:
        return "not installed"
    try:
        hlk.save_adapter(model, folder, "peft")
    except ValueError as error:
        return f"refused: {error}"
    try:
        loaded = peft.PeftModel.from_pretrained(make(), folder).eval()
        found = _outputs(loaded, batch)
    except Exception as error:  # noqa: BLE001 - of PEFT and the model, which are not ours
        try:
            plain = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=list(
                {name for name, path in state_of(model).paths.items()}))).eval()
            _outputs(plain, batch)
        except Exception:  # noqa: BLE001
            return f"not in PEFT: {type(error).__name__}"
        raise
    if _differ(found, after) > 1e-3 and not _reads_its_own(peft, make, batch, list(state_of(model).paths), folder):
        return "not in PEFT: it does not read what it writes of this model"
    if _differ(found, after) > 1e-3:
        # Some decide by a threshold: a rounding may turn everything after it.
        wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        found, after = (_outputs(copy.deepcopy(each).double(), wide) for each in (loaded, model))
    if _differ(found, after) > 1e-3 and (idle := _idle_layers(peft, loaded, batch)):
        # The model holds it in a list of its own, where PEFT did not put its layer.
        return f"not in PEFT: its layer at {idle[0]!r} is never called"
    _expect(_differ(found, after), 1e-3, "outputs in PEFT")
    return "same"


def _idle_layers(peft, loaded: nn.Module, batch: dict) -> list[str]:
    """LoRA layers that PEFT has put into a model and the model does not call."""
    called: set[str] = set()
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    handles = [module.register_forward_hook(lambda *args, name=name: called.add(name)) for name, module in layers.items()]
    _outputs(loaded, batch)
    for handle in handles:
        handle.remove()
    return [name.removeprefix("base_model.model.") for name in layers if name not in called]


def _reads_its_own(peft, make: Callable[[], nn.Module], batch: dict, paths: list[str], folder: str) -> bool:
    made = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=paths, init_lora_weights=False)).eval()
    made.save_pretrained(f"{folder}-own")
    return _differ(_outputs(peft.PeftModel.from_pretrained(make(), f"{folder}-own").eval(), batch), _outputs(made, batch)) < 1e-3
