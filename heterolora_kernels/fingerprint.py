"""A few values of every weight of a base, by which another base is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from heterolora_kernels import distributed, files
from heterolora_kernels.bases import is_quantised
from heterolora_kernels.files import field_of
from heterolora_kernels.layers import PatchedQuantised
from heterolora_kernels.state import HeteroLoraState

#: Values of each weight that are kept, evenly strided.
_SAMPLES = 8


def base_weights(model: nn.Module, state: HeteroLoraState) -> dict[str, Tensor]:
    """The parameters that neither an adapter, a head nor training beside them changes, by their first names.

    Quantised ones hold other numbers than the base that they were made from, and so does all of their module.
    """
    trained = {*state.heads.parameters(model), *map(id, state.beside.parameters(model, state.is_own).values())}
    quantised = {id(p) for m in model.modules() if isinstance(m, PatchedQuantised) for p in m.parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters()
            if not state.is_own(name) and id(parameter) not in trained and id(parameter) not in quantised
            and parameter.is_floating_point() and not parameter.is_meta and not is_quantised(parameter) and parameter.numel()}


def sample(weight: Tensor) -> dict:
    """What is kept of a weight."""
    flat = distributed.full(weight).reshape(-1)
    values = flat[::max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.float64)
    return {"dtype": str(weight.dtype).removeprefix("torch."), "values": files.encode(values.tolist())}


def read_sample(entry: object, where: str) -> tuple[torch.dtype, Tensor]:
    dtype = getattr(torch, field_of(entry, "dtype", str, where), None)
    values = files.decode(field_of(entry, "values", list, where), f"{where}: field 'values'")
    if not isinstance(dtype, torch.dtype) or not all(isinstance(value, float) for value in values):
        raise ValueError(f"{where}: fields 'dtype' and 'values' must be a torch dtype and floats")
    return dtype, torch.tensor(values, dtype=torch.float64, device="cpu")


def check_base(model: nn.Module, state: HeteroLoraState, kept: Mapping[str, tuple[torch.dtype, Tensor]], others: Mapping,
               file: Path) -> None:
    """Hold the base to be the one that an adapter was saved with.

    Args:
        kept: ``{weight: sample}``; files of earlier versions name the modules.
        others: what the adapter brings along beside, which may differ.

    Raises:
        ValueError: names the file and a weight of other values.
    """
    weights = base_weights(model, state)
    # In one order on every process: a sharded weight is gathered.
    for name, weight in weights.items():
        entry = kept.get(name, kept.get(name.removesuffix(".weight")))
        if entry is None or name in others:
            continue
        dtype, values = entry
        _, found = read_sample(sample(weight), name)
        kinds = () if weight.dtype == dtype else (torch.finfo(weight.dtype), torch.finfo(dtype))
        # The same number in another dtype is at most one rounding away, of a normal number or of the smallest ones.
        rtol = max((kind.eps for kind in kinds), default=0.0)
        atol = max((kind.tiny * kind.eps for kind in kinds), default=0.0)
        if found.shape != values.shape or not torch.allclose(found, values, rtol=rtol, atol=atol, equal_nan=True):
            raise ValueError(f"{file}: the adapter was trained on another base: the weight of "
                             f"{name.removesuffix('.weight')!r} has other values in this model (check_base=False loads it all "
                             "the same)")
