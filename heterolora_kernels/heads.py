"""Heads: the modules of ``modules_to_save``, which are trained as they are and saved whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from heterolora_kernels.checkpoint import checkpoint_names, new_modules
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.matching import ends_in


class Heads:
    """The heads of one model.

    Args:
        entries: ends of names, as ``modules_to_save`` has them.

    Attributes:
        entries: those that select something.
        modules: names of all modules that they select.
    """

    def __init__(self, model: nn.Module, entries: Iterable[str]):
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        self.entries = tuple(entry for entry in dict.fromkeys(entries) if ends_in(names, (entry,)))
        self.modules = frozenset(ends_in(names, self.entries))

    def holds(self, module: str) -> bool:
        """Tell whether a module is a head or lies below one."""
        while module:
            if module in self.modules:
                return True
            module = module.rpartition(".")[0]
        return False

    def has(self, tensor: str) -> bool:
        """Tell whether a parameter or buffer is one of a head, by its name in the model."""
        return self.holds(tensor.rpartition(".")[0])

    def parameters(self, model: nn.Module) -> dict[int, nn.Parameter]:
        """The parameters of heads by identity: one that is shared counts by any of its names."""
        return {id(parameter): parameter for name, parameter in model.named_parameters(remove_duplicate=False) if self.has(name)}

    def other_ends(self, model: nn.Module) -> dict[str, str]:
        """``{name outside: name in a head}`` of parameters that a head shares with modules that are none (tied embeddings)."""
        inside = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False) if self.has(name)}
        return {name: inside[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)
                if id(parameter) in inside and not self.has(name)}


def find_heads(model: nn.Module, config: HeteroLoraConfig) -> Heads:
    """The heads that a config means.

    Without ``modules_to_save``: modules of the known names, and those of which the model's checkpoint holds nothing, which
    transformers has therefore drawn at random. Where the checkpoint cannot be found a warning names what may be such a module.

    Raises:
        ValueError: an entry selects nothing.
    """
    if config.modules_to_save is None:
        made_anew = new_modules(model)
        if made_anew is None:
            _warn_about_unknown(model, config.heads)
        return Heads(model, (*config.heads, *(name for name in made_anew or () if not ends_in((name,), config.heads))))
    heads = Heads(model, config.modules_to_save)
    missed = [entry for entry in config.modules_to_save if entry not in heads.entries]
    if missed:
        raise ValueError(f"modules_to_save: {missed} match no module of the model")
    return heads


def _warn_about_unknown(model: nn.Module, entries: Sequence[str]) -> None:
    """Name the modules outside the base of a model that was loaded from somewhere unknown; its language model head is the
    base's."""
    base = getattr(model, "base_model", model)
    source = getattr(model, "name_or_path", None)
    if base is model or not isinstance(base, nn.Module) or not source or checkpoint_names(model) is not None:
        return
    known = {id(module) for module in (base, _output_embeddings(model))}
    outside = [name for name, child in model.named_children() if id(child) not in known and not name.endswith(tuple(entries))
               and any(True for _ in child.parameters())]
    if outside:
        warnings.warn(f"no checkpoint was found under {source!r}, so it is not known whether {outside} were made anew: they stay "
                      "frozen (their linears get adapters); name them in modules_to_save if they have to be trained",
                      stacklevel=6)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
