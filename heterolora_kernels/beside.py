"""What training changes beside adapters and heads: parameters that somebody unfroze, running statistics of batch norms.

A patched model trains whatever requires grad. What is no adapter and no head is kept all the same: in the native format and in
checkpoints, in PEFT's where ``modules_to_save`` can express it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from heterolora_kernels.distributed import full
from heterolora_kernels.layers import Path

IsOwn = Callable[[str], bool]
_LISTED = 4


class Beside:
    """The tensors of one patched model that are neither adapters nor heads and yet not what they were.

    ``is_own`` says of the name of a parameter or buffer whether it is an adapter's or a head's.
    """

    def __init__(self, model: nn.Module):
        self._statistics = {name: buffer.detach().clone() for name, buffer in _running_statistics(model)}
        #: Names of parameters that an optimizer has held, or that were loaded.
        self.trained: set[str] = set()
        self._seen: weakref.WeakSet = weakref.WeakSet()
        self._is_told = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_seen": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _seen=weakref.WeakSet())

    def parameters(self, model: nn.Module, is_own: IsOwn) -> dict[str, nn.Parameter]:
        """Trained now or before, by their first names."""
        return {name: parameter for name, parameter in model.named_parameters()
                if (parameter.requires_grad or name in self.trained) and not is_own(name)}

    def tensors(self, model: nn.Module, is_own: IsOwn) -> dict[str, Tensor]:
        """Those parameters, and the running statistics that are not what they were when the model was patched."""
        moved = {name: buffer for name, buffer in _running_statistics(model)
                 if not is_own(name) and not _is_same(buffer, self._statistics.get(name))}
        return {**self.parameters(model, is_own), **moved}

    def notice(self, model: nn.Module, optimizer: torch.optim.Optimizer, is_own: IsOwn, paths: Iterable[Path]) -> None:
        """Remember what an optimizer trains; say once what of it the PEFT format will not be able to hold.

        Args:
            paths: all paths.
        """
        if optimizer in self._seen:
            return
        self._seen.add(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.trained |= {name for name, parameter in self.parameters(model, is_own).items() if id(parameter) in held}
        _, lost = peft_modules(model, self.trained, [path.name for path in paths if path.site is None])
        if lost and not self._is_told:
            self._is_told = True
            warnings.warn(f"trained beside the adapters, which format='peft' cannot hold ({_in_short(lost)}): PEFT saves "
                          f"whole modules "
                          "without adapters; the native format, checkpoints and format='merged' hold them", stacklevel=5)


def _in_short(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _is_same(buffer: Tensor, before: Tensor | None) -> bool:
    if before is None or buffer.shape != before.shape or buffer.is_meta or before.is_meta:
        return buffer.is_meta
    return torch.equal(full(buffer).to(before), before)


def _running_statistics(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        # FSDP and the like keep the class; SyncBatchNorm is one too.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for leaf, buffer in module._buffers.items():
                if buffer is not None and leaf not in module._non_persistent_buffers_set:
                    yield f"{name}.{leaf}" if name else leaf, buffer


def peft_modules(model: nn.Module, names: Iterable[str], paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Modules whose tensors ``modules_to_save`` can hold, and the names of tensors that it cannot.

    PEFT copies a module whole, with all below it; one that has an adapter, or has one below it, it will not take. An entry also
    takes every module whose name ends in it.

    Args:
        names: of parameters and buffers.
        paths: names of the LoRA paths.
    """
    adapted, everything = list(paths), [name for name, _ in model.named_modules(remove_duplicate=False)]
    possible, lost = {}, []
    for name in sorted(names):
        owner = name.rpartition(".")[0]
        taken = [module for module in everything if module.endswith(owner)] if owner else []
        holds_path = any(path == module or path.startswith(f"{module}.") for module in taken for path in adapted)
        is_list = owner and isinstance(model.get_submodule(owner), (nn.ParameterList, nn.ParameterDict))
        if not owner or holds_path or is_list:
            lost.append(name)
        else:
            possible[owner] = None
    return list(possible), lost


def check_fits(record: Mapping[str, list], model: nn.Module, is_own: IsOwn, where: object) -> dict[str, Tensor]:
    """The model's tensors of the names in ``record`` (``{name: shape}``).

    Raises:
        ValueError: names what the model does not have, or has in another shape.
    """
    own = dict(model.state_dict(keep_vars=True))
    for name, shape in record.items():
        if not isinstance(own.get(name), Tensor) or is_own(name):
            raise ValueError(f"{where}: field 'others': the model has no tensor {name!r} beside its adapters and heads")
        if list(own[name].shape) != shape:
            raise ValueError(f"{where}: field 'others': {name!r} has shape {shape}, and the model takes {list(own[name].shape)}")
    return {name: own[name] for name in record}
