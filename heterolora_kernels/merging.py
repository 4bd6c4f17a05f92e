"""Adapters become part of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heterolora_kernels import distributed
from heterolora_kernels.bases import is_conv1d, is_quantised_linear
from heterolora_kernels.layers import PatchedQuantised, Path
from heterolora_kernels.patching import refuse_sharded, remove_heterolora
from heterolora_kernels.reach import is_read_past
from heterolora_kernels.state import STATE_NAME, state_of, whole
from heterolora_kernels.undo import keeps_modes, undone_on_failure


@keeps_modes
def merge_heterolora(model: nn.Module, drop_shortcuts: bool = False) -> nn.Module:
    """Add every active LoRA path to its weight, ``W += s B A`` over the active rows, and remove the patch.

    Args:
        model: a patched model.
        drop_shortcuts: a shortcut reads another tensor than the linear whose output it joins, so it cannot become part of
            a weight. True leaves active shortcuts out, which changes the outputs.

    An interrupt before the first weight is written leaves the model as it was; one that comes later is raised when all are
    written and the patch is gone, since a second copy of all weights may not fit.

    Returns:
        The model inside any wrapper, no longer patched.

    Raises:
        ValueError: shortcuts are active, a base is quantised, a weight is shared with another module, or a merged weight would
            not be finite. The model is then as it was.
    """
    refuse_sharded(whole(model), "merge_heterolora")
    paths, inner = check_mergeable(model, drop_shortcuts), whole(model)
    before = [_write_mark(path.holder.weight) for path in paths]

    @torch.no_grad()
    def write() -> None:
        for path, mark in zip(paths, before):
            weight = path.holder.weight
            if torch.equal(_write_mark(weight), mark):
                weight.copy_(merged_weight(path))

    def finish() -> None:
        if any(not torch.equal(_write_mark(path.holder.weight), mark) for path, mark in zip(paths, before)):
            write()
            if STATE_NAME in inner.__dict__:
                remove_heterolora(inner)

    with undone_on_failure(finish):
        write()
        return remove_heterolora(inner)


def _write_mark(weight: Tensor) -> Tensor:
    """What changes when a weight is written: its version, or its values where it counts none."""
    return weight.detach().clone() if weight.is_inference() else torch.tensor(weight._version)


def check_mergeable(model: nn.Module, drop_shortcuts: bool = False) -> list[Path]:
    """The active LoRA paths, after the checks of :func:`merge_heterolora`.

    Raises:
        ValueError: as there.
    """
    model = whole(model)
    state = state_of(model)
    state.check_structure()
    active = [path.name for path in state.paths.values() if path.site is not None and any(path.active_rows())]
    if active and not drop_shortcuts:
        raise ValueError(f"{len(active)} active shortcuts cannot be merged into weights ({active[0]}, ...); save the adapter, "
                         "or pass drop_shortcuts=True to leave them out")
    # What nobody called had no effect, and merged into a weight that is read past its module it would have one.
    idle = {name for name in state.reach.unreached if is_read_past(model, name)}
    lora = [path for path in state.paths.values() if path.site is None and any(path.active_rows()) and path.name not in idle]
    alone = [path for path in lora if isinstance(path.holder, PatchedQuantised)]
    quantised = [path for path in alone if is_quantised_linear(path.holder)]
    if alone and not quantised:
        raise ValueError(f"the base of {alone[0].name!r} ({type(alone[0].holder).__name__}) computes its output itself, "
                         f"not as x W^T + b, so adapters cannot become part of its weight ({len(alone)} paths): save the adapter")
    if quantised:
        raise ValueError(f"the base of {quantised[0].name!r} is quantised ({type(quantised[0].holder).__name__}), and so would "
                         f"the merged weight have to be, which loses most of what was learnt ({len(quantised)} paths): save the "
                         "adapter, and load it into the base in full precision to merge it there")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    # Everything is checked before anything is written; computing twice is cheaper than a second copy of all weights.
    for path in lora:
        names = owners[id(path.holder.weight)]
        if len(names) > 1:
            raise ValueError(f"the weight of {path.name!r} is shared ({names}): merging would change all of them")
        if not bool(torch.isfinite(merged_weight(path)).all()):
            raise ValueError(f"the merged weight of {path.name!r} is not finite")
    return lora


@torch.no_grad()
def merged_weight(path: Path) -> Tensor:
    """``W + s B A`` over the active rows of a LoRA path, in W's dtype and layout."""
    weight, lora_A, lora_B = (distributed.full(tensor) for tensor in (path.holder.weight, path.lora_A, path.lora_B))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = path.scaling * (lora_B.to(dtype)[:, path.mask] @ lora_A.to(dtype)[path.mask])
    return (weight.to(dtype) + (delta.t() if is_conv1d(path.holder) else delta)).to(weight.dtype)
