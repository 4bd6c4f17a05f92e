"""Extra passes with every path on, from which scores are made. They leave no trace.

A probe runs a few batches and reads ledger rows from their gradients. These are taken on twins of the model's parameters that
share their storage, put in their places for the time of the probe. So the user's half accumulated ``.grad``, his hooks on
parameters and DDP's reducer never see it. Under FSDP2, which puts parameters of its own in their places, the gradients and hooks
of the sharded parameters are set aside instead. Trainable tensors that a ``loss_fn`` uses and that are not the model's do get
gradients: it should not use any.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from heterolora_kernels import backends, distributed
from heterolora_kernels.layers import Path
from heterolora_kernels.ops.ledger import row_statistics
from heterolora_kernels.state import HeteroLoraState, inside_wrappers, state_of
from heterolora_kernels.undo import put_back, undone_on_failure

LossFunction = Callable[[nn.Module, object], Tensor]
Metric = Callable[[nn.Module, Iterable], float]


_REMEDY = ("pass loss_fn, or use score='in_step', the only way where a trainer makes the model's inputs itself (as for DPO and "
           "GRPO)")


def inputs_of(model: nn.Module, batch) -> dict:
    """A batch as keyword arguments, its tensors on the model's device.

    Raises:
        TypeError: it is no dictionary.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"loss_fn: the default, model(**batch).loss, needs batches that are dictionaries, got "
                        f"{type(batch).__name__}; {_REMEDY}")
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def loss_in(outputs) -> Tensor | None:
    """A model's loss: an attribute, or an entry of a dictionary."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def default_loss(model: nn.Module, batch) -> Tensor:
    """``model(**batch).loss``, the batch's tensors moved to the model's device."""
    loss = loss_in(model(**inputs_of(model, batch)))
    if loss is None:
        raise ValueError(f"loss_fn: model(**batch).loss is None (the batch has {sorted(batch)}); {_REMEDY}")
    return loss


@dataclass(frozen=True)
class Measures:
    """What a user says about loss and metric.

    Args:
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``.
        metric: ``metric(model, batches) -> float``, ``"accuracy"`` or ``"perplexity"``; None: accuracy where each example has one
            integer label, else perplexity.
        greater_is_better: of a metric that is a function (None: True); the named ones know.
        tolerance: relative loss of the metric that ``alpha_test`` allows.
        eval_batches: batches for the metric; None: the head of the training set.

    Raises:
        ValueError, TypeError: name the argument.
    """

    loss_fn: LossFunction = default_loss
    metric: Metric | str | None = None
    greater_is_better: bool | None = None
    tolerance: float = 0.01
    eval_batches: Iterable | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be a function (model, batch) -> loss, got {type(self.loss_fn).__name__}")
        if self.metric is not None and not callable(self.metric) and self.metric not in ("accuracy", "perplexity"):
            raise ValueError("metric must be a function (model, batches) -> float, 'accuracy' or 'perplexity', "
                             f"got {self.metric!r}")
        if not callable(self.metric) and self.greater_is_better is not None:
            raise ValueError("greater_is_better belongs to a metric that is a function: the named ones know theirs")
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance!r}")
        if self.eval_batches is not None:
            check_rereadable("eval_batches", self.eval_batches)


def check_rereadable(name: str, batches: object) -> None:
    """Refuse what cannot be read again and again."""
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(f"{name} must be an iterable that can be read again and again, got {type(batches).__name__}")


@dataclass(frozen=True)
class ScoringPass:
    """What a proxy that makes passes of its own is given.

    Attributes:
        model: the patched model, unwrapped.
        state: its paths, switches and config.
        loader: training batches in a fixed order.
        num_batches: how many of them count; None: all.
        measures: the user's loss and metric.
        per_rank: whether a score per row is wanted.
        name: the user's argument that ``loader`` is, for errors.
    """

    model: nn.Module
    state: HeteroLoraState
    loader: Iterable
    num_batches: int | None
    measures: Measures
    per_rank: bool = False
    name: str = "dataloader"

    def batches(self) -> list:
        """The batches that count.

        Raises:
            ValueError: there is none.
        """
        found = list(islice(iter(self.loader), self.num_batches))
        if not found:
            raise ValueError(f"{self.name} is empty: there is no batch to score with")
        return found


def _checked_loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn must return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError("loss_fn returned a loss without a gradient: was it detached, or computed without the model?")
    return loss


def probe_loader(dataloader: Iterable) -> Iterable:
    """A twin of a DataLoader without workers that reads the head of the training set in a fixed order.

    A twin, because ``iter`` on a loader with persistent workers restarts the iterator that the user's loop is in. Samplers
    that shuffle are replaced; others, and what is no DataLoader, are read as they are.
    """
    # accelerate's loader counts epochs, and whoever reads its last batch ends an accumulation of gradients.
    dataloader = getattr(dataloader, "base_dataloader", dataloader)
    if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
        return dataloader
    # A generator of its own: an iterator's first act is to draw a seed.
    common = dict(collate_fn=dataloader.collate_fn, generator=torch.Generator())
    batches = dataloader.batch_sampler
    if batches is None:
        return DataLoader(dataloader.dataset, batch_size=None, sampler=dataloader.sampler, **common)
    return DataLoader(dataloader.dataset, batch_sampler=_in_order(batches, dataloader.dataset), **common)


def _in_order(batches: Iterable, dataset: Dataset) -> Iterable:
    """A batch sampler in the place of one that shuffles."""
    if type(batches).__name__ == "BatchSamplerShard":
        # accelerate's, around another: the batches of one process.
        twin = copy.copy(batches)
        twin.batch_sampler = _in_order(batches.batch_sampler, dataset)
        return twin
    if type(batches) is not BatchSampler:
        return batches
    sampler = batches.sampler
    # accelerate's own shuffles too, and counts its epochs: who reads it to its end changes the order of the training.
    if type(sampler) is RandomSampler or type(sampler).__name__ == "SeedableRandomSampler":
        sampler = SequentialSampler(dataset)
    elif type(sampler) is DistributedSampler and sampler.shuffle:
        sampler = DistributedSampler(dataset, sampler.num_replicas, sampler.rank, shuffle=False, drop_last=sampler.drop_last)
    return BatchSampler(sampler, batches.batch_size, batches.drop_last)


def _generators(loader: Iterable) -> list[torch.Generator]:
    holders = [loader, getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def _kept_rng(model: nn.Module, loader: Iterable) -> Iterator[None]:
    """Give back the state of every generator that a pass or ``iter(loader)`` draws from."""
    devices: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type not in ("cpu", "meta"):
            devices.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    numpy = sys.modules.get("numpy")
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None

    def undo() -> None:
        random.setstate(python_state)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        stack.enter_context(put_back(undo))
        yield


@contextmanager
def _kept_modes(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside, every module's own mode and every running average of a norm as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    averages = [(module, name, buffer) for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)
                for name, buffer in module._buffers.items() if buffer is not None]

    def undo() -> None:
        for module, before in modes:
            module.training = before
        for module, name, buffer in averages:
            module._buffers[name] = buffer

    with put_back(undo):
        # Copies are written instead: a graph that waits for its backward may hold the buffers themselves.
        for module, name, buffer in averages:
            module._buffers[name] = buffer.clone()
        model.train(training)
        yield


@contextmanager
def twins(model: nn.Module) -> Iterator[None]:
    """Fresh leaves in the places of all trainable parameters: same storage, no ``.grad``, no hooks."""
    twins: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                places.append((module, name, parameter))

    def undo() -> None:
        for module, name, parameter in places:
            module._parameters[name] = parameter

    with put_back(undo):
        for module, name, parameter in places:
            if id(parameter) not in twins:
                twins[id(parameter)] = nn.Parameter(parameter.detach())
            module._parameters[name] = twins[id(parameter)]
        yield


@contextmanager
def _grads_set_aside(model: nn.Module) -> Iterator[None]:
    """No ``.grad`` and no hooks on a sharded model's parameters inside; both as before after it."""
    distributed.reshard(model)
    kept = [(p, p.grad, p._post_accumulate_grad_hooks) for p in model.parameters() if p.requires_grad]

    def undo() -> None:
        distributed.reshard(model)
        for parameter, grad, hooks in kept:
            parameter.grad, parameter._post_accumulate_grad_hooks = grad, hooks

    with put_back(undo):
        for parameter, _, _ in kept:
            parameter.grad = parameter._post_accumulate_grad_hooks = None
        yield


@contextmanager
def _everything_on(state: HeteroLoraState) -> Iterator[None]:
    """Every gate 1 and the adapters enabled; masks are not touched."""
    enabled = state.switches.enabled
    with put_back(lambda: setattr(state.switches, "enabled", enabled)), ExitStack() as stack:
        state.switches.enabled = True
        for module in state.linears:
            stack.enter_context(module._heterolora.everything_on())
        yield


@contextmanager
def untouched(model: nn.Module, state: HeteroLoraState, loader: Iterable, training: bool) -> Iterator[None]:
    """Every path on at gate 1 inside; random generators, modes, masks and the ledger's readers as before after it.

    Args:
        loader: entered before anything is drawn, so that ``iter(loader)`` is covered.
        training: train or eval mode inside.
    """
    with _kept_rng(model, loader), _kept_modes(model, training), _everything_on(state), state.switches.ledger.isolated():
        yield


def gradient_rows(path: Path, grad_A: Tensor, grad_B: Tensor) -> Tensor:
    """The ledger's rows [r, columns] of one path from its gradients."""
    dtype = torch.float64 if grad_A.dtype == torch.float64 else torch.float32
    return row_statistics(*(tensor.detach().to(dtype) for tensor in (path.lora_A, path.lora_B, grad_A, grad_B)))


def _rows_of_shards(path: Path) -> Tensor:
    """This process's share of a sharded path's rows [r, columns]: those of all processes add up to the path's."""
    dtype = torch.float64 if path.lora_A.dtype == torch.float64 else torch.float32

    def spread(tensor: Tensor | None, like: Tensor, dim: int) -> Tensor:
        """The part that lies here, with zeros for the path's rows that do not."""
        local, where = distributed.local_part(like if tensor is None else tensor)
        shape = list(local.shape)
        shape[dim] = path.r
        whole = local.new_zeros(shape, dtype=dtype)
        if tensor is not None and distributed.is_first_copy(tensor):
            whole.narrow(dim, where[dim].start, local.shape[dim]).copy_(local)
        return whole

    pairs = [(path.lora_A, 0), (path.lora_B, 1)]
    return row_statistics(*(spread(p, p, dim) for p, dim in pairs), *(spread(p.grad, p, dim) for p, dim in pairs))


def gradient_rows_of(paths: Sequence[Path], grads: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """``{path: rows [r, columns]}`` from ``(grad_A, grad_B)`` of each path; in one pass where the backend has one."""
    kinds = {(grad.device, grad.dtype) for pair in grads for grad in pair}
    if len(kinds) == 1:
        device, dtype = kinds.pop()
        fused = backends.extra(backends.resolve(device, None, dtype), "row_statistics")
        if fused is not None:
            rows = fused([path.lora_A.detach() for path in paths], [path.lora_B.detach() for path in paths],
                         *([pair[half] for pair in grads] for half in (0, 1)))
            return dict(zip([path.name for path in paths], rows.split([path.r for path in paths])))
    return {path.name: gradient_rows(path, *pair) for path, pair in zip(paths, grads)}


def probe_rows(model: nn.Module, loader: Iterable, num_batches: int | None, loss_fn: LossFunction, streaming: bool,
               name: str = "dataloader") -> tuple[dict[str, Tensor], int]:
    """Run a probe and read every path's ledger rows.

    Args:
        model: patched; a DDP wrapper is looked through, and an FSDP2 model run as it is.
        loader: batches for ``loss_fn``; the first ``num_batches`` are used, all of them if it is None.
        streaming: sums over batches of the ledger's columns, instead of the columns of the summed gradient.
        name: the user's argument that ``loader`` is, for errors.

    Returns:
        ``({path: [r, columns]}, batches used)``. Over several processes gradients are averaged before anything is squared;
        streaming sums are added.

    Raises:
        ValueError: no batch came; under FSDP2 also: not as many on every process.
        RuntimeError: FSDP2 accumulates gradients without reducing them.
        FloatingPointError: a loss was not finite (on any process).
    """
    inner, state = inside_wrappers(model), state_of(model)
    paths = list(state.paths.values())
    device, ledger = state.device, state.switches.ledger
    is_sharded = distributed.wrapper_of(model) is not None
    if is_sharded and not distributed.reduces_gradients(model):
        raise RuntimeError("model accumulates gradients without reducing them (set_requires_gradient_sync(False)), and a probe "
                           "under FSDP2 would be added to them: score between optimizer steps")
    with ExitStack() as stack:
        stack.enter_context(undone_on_failure(ledger.undo_point()))
        stack.enter_context(untouched(inner, state, loader, training=True))
        stack.enter_context(_grads_set_aside(model) if is_sharded else twins(inner))
        stack.enter_context(torch.enable_grad())
        if streaming:
            collector = ledger.open()
            stack.callback(ledger.close, collector)

        batches = islice(iter(loader), num_batches)
        used = (_run_together(model, batches, loss_fn, device, name) if is_sharded
                else _run_alone(inner, batches, loss_fn, device, name))
        if streaming:
            ledger.flush()
            rows = ledger.rows_by_path(distributed.sum_(collector.raw))
        elif is_sharded:
            distributed.average_([p.grad for path in paths for p in (path.lora_A, path.lora_B)
                                  if p.grad is not None and not distributed.is_dtensor(p)])
            flat = distributed.sum_(torch.cat([_rows_of_shards(path) for path in paths]))
            rows = dict(zip([path.name for path in paths], flat.split([path.r for path in paths])))
        else:
            grads = [[torch.zeros_like(p) if p.grad is None else p.grad for p in (path.lora_A, path.lora_B)] for path in paths]
            distributed.average_([grad for pair in grads for grad in pair])
            rows = gradient_rows_of(paths, grads)
    return rows, used


_NOT_FINITE = "the loss of a scoring batch is not finite; no rank was changed"


def _run_alone(model: nn.Module, batches: Iterator, loss_fn: LossFunction, device: torch.device, name: str) -> int:
    """Forward and backward of all batches, each process for itself until the end; returns how many they were."""
    def run() -> tuple[int, bool]:
        used, finite = 0, True
        for batch in batches:
            loss = _checked_loss(loss_fn(model, batch))
            finite = finite and bool(torch.isfinite(loss.detach()))
            if finite:
                loss.backward()
            used += 1
        return used, finite

    used, finite = distributed.on_every_process(run, device)
    if distributed.any_process(used == 0, device):
        raise ValueError(f"{name} is empty: there is no batch to score with")
    if distributed.any_process(not finite, device):
        raise FloatingPointError(_NOT_FINITE)
    return used


def _run_together(model: nn.Module, batches: Iterator, loss_fn: LossFunction, device: torch.device, name: str) -> int:
    """The same where every forward and backward is a collective: the processes agree on each before they begin it.

    An exception inside a forward is not waited for: the process that raises ends, and the others with it.
    """
    used, end = 0, object()
    while True:
        batch = distributed.on_every_process(lambda: next(batches, end), device)
        if distributed.any_process(batch is end, device):
            break
        loss = _checked_loss(loss_fn(model, batch))
        if distributed.any_process(not bool(torch.isfinite(loss.detach())), device):
            raise FloatingPointError(_NOT_FINITE)
        loss.backward()
        used += 1
    if distributed.any_process(batch is not end, device):
        raise ValueError(f"{name} must hold as many batches on every process of a sharded model; one has {used}, another more")
    if used == 0:
        raise ValueError(f"{name} is empty: there is no batch to score with")
    return used
