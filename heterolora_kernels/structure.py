"""Where patched modules lie in their model, and what is said when somebody has moved or replaced them since."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

#: Names under which wrappers of parts of a model (activation checkpointing, torch.compile, FSDP1) hold what they wrap.
_WRAPPED = frozenset(("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"))
_LISTED = 4


class Structure:
    """The places of the patched modules, as they were when the model was patched.

    It holds the modules but not the model, which holds it: whoever drops the model gets its memory back at once.

    Args:
        model: the patched model.
        modules: those of its modules that patching changed.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]):
        wanted = {id(module) for module in modules}
        everything = dict(model.named_modules())
        self._places = {name: module for name, module in everything.items() if name and id(module) in wanted}
        # (parent, or None for the model; name in it; module) of every patched module and of all that it lies in.
        self._links: dict[str, tuple[nn.Module | None, str, nn.Module]] = {}
        for name in self._places:
            while name and name not in self._links:
                parent, _, leaf = name.rpartition(".")
                self._links[name] = (everything[parent] if parent else None, leaf, everything[name])
                name = parent

    def check(self, model: nn.Module) -> None:
        """Refuse a model in which a patched module has another place than when it was patched, or none.

        Costs a look-up for every patched module. Wrappers around parts of the model are no change.

        Raises:
            ValueError: names the modules.
        """
        for parent, leaf, module in self._links.values():
            if (model if parent is None else parent)._modules.get(leaf) is not module:
                break
        else:
            return
        changes = self._changes(model)
        if not changes:
            return
        listed = "; ".join(changes[:_LISTED]) + (f"; and {len(changes) - _LISTED} more" if len(changes) > _LISTED else "")
        if peft_layers(model):
            raise ValueError(f"model was given adapters of PEFT after apply_heterolora: {listed}. {PEFT_REMEDY}")
        raise ValueError(
            f"model was changed after apply_heterolora: {listed}. Change it (resize_token_embeddings, other modules, fewer "
            "layers) before it is patched: call remove_heterolora(model), then apply_heterolora(model, config) anew")

    def _changes(self, model: nn.Module) -> list[str]:
        now = dict(model.named_modules())
        found = {id(module): ".".join(part for part in name.split(".") if part not in _WRAPPED) for name, module in now.items()}
        changes = []
        for name, module in self._places.items():
            place = found.get(id(module))
            if place == name:
                continue
            if place is not None:
                changes.append(f"{name!r} lies at {place!r} now")
            else:
                other = now.get(name)
                changes.append(f"{name!r} is gone" if other is None else f"{name!r} is another {type(other).__name__} now")
        return changes


PEFT_REMEDY = ("Only PEFT's would be trained, beside patched linears that are frozen. Train one of the two: leave peft_config "
               "(of a TRL trainer) or get_peft_model away, or patch nothing and call accelerate_peft on PEFT's model")


def peft_layers(model: nn.Module) -> list[str]:
    """Names of the modules that hold adapters of PEFT."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return [] if peft is None else [name for name, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer)]


def refuse_peft_beside(model: nn.Module) -> None:
    """Refuse to train a model that PEFT has given adapters too.

    Raises:
        ValueError: names one, and the remedy.
    """
    layers = peft_layers(model)
    if layers:
        raise ValueError(f"model has adapters of PEFT ({layers[0]!r}, {len(layers)} in all) beside those of apply_heterolora. "
                         f"{PEFT_REMEDY}")
