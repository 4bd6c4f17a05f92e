"""What leaving the shortcuts out does to the outputs, measured and said in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from heterolora_kernels.scoring import untouched
from heterolora_kernels.state import HeteroLoraState

_UNMEASURED = "what this does to the outputs was not measured; give batches= to know"


def effect_of_shortcuts(model: nn.Module, state: HeteroLoraState, batches: Iterable[Mapping] | None) -> str:
    """In words; the model is left as it was."""
    if batches is not None:
        return _measured(model, state, batches)
    guessed = _random_batches(model)
    try:
        return f"{_measured(model, state, guessed)}, measured on random token ids" if guessed else _UNMEASURED
    except Exception:
        # That the model takes token ids was a guess.
        return _UNMEASURED


def _random_batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """A few sequences for a text model of transformers; none for any other."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size < 1 or getattr(model, "main_input_name", None) != "input_ids":
        return []
    length = min(32, getattr(config, "max_position_embeddings", None) or 32)
    generator = torch.Generator().manual_seed(0)
    # One sequence a batch: a classifier without a padding token takes no more.
    return [{"input_ids": torch.randint(size, (1, length), generator=generator, device="cpu")} for _ in range(4)]


@torch.no_grad()
def _measured(model: nn.Module, state: HeteroLoraState, batches: Iterable[Mapping]) -> str:
    device = next(model.parameters()).device
    difference, norm, losses = 0.0, 0.0, []
    with untouched(model, state, batches, training=False):
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must hold dictionaries for model(**batch), got {type(batch).__name__}")
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            results = []
            for with_shortcuts in (True, False):
                _open_gates(state, with_shortcuts)
                results.append(model(**inputs))
            before, after = (_outputs(result).double() for result in results)
            difference, norm = difference + float((after - before).square().sum()), norm + float(before.square().sum())
            losses.append([getattr(result, "loss", None) for result in results])
    if not losses:
        raise ValueError("batches is empty: there is nothing to measure with")
    changed = f"the outputs change by {100 * math.sqrt(difference / norm) if norm else math.inf:.1f} % (relative L2)"
    if any(loss is None for pair in losses for loss in pair):
        return changed
    before, after = (sum(float(pair[i]) for pair in losses) / len(losses) for i in (0, 1))
    return f"{changed}, loss {before:.4f} -> {after:.4f}"


def _open_gates(state: HeteroLoraState, with_shortcuts: bool) -> None:
    for module in state.linears:
        paths = module._heterolora
        rows = [on and (with_shortcuts or path.site is None) for path in paths.paths for on in path.active_rows()]
        paths.derived.gate.copy_(torch.tensor(rows, device="cpu"))


def _outputs(result) -> Tensor:
    """The logits, or the first floating tensor that is no loss."""
    if isinstance(result, Tensor):
        return result
    named = result if isinstance(result, Mapping) else getattr(result, "__dict__", None) or dict(enumerate(result))
    found = {name: value for name, value in named.items()
             if isinstance(value, Tensor) and value.is_floating_point() and name != "loss"}
    if not found:
        raise ValueError(f"batches: the model's outputs ({type(result).__name__}) hold no tensor to compare")
    return found.get("logits", next(iter(found.values())))
