"""synflow: the snip sum of the network whose every parameter is its absolute value, fed with ones (arXiv 2006.05467).

    R = sum of outputs (or the loss) at |theta|, inputs of ones;   S = sum |A| |dR/d|A|| + sum |B| |dR/d|B||

It sees no data beyond the length of the first batch. In float32 R underflows in deep networks, so the pass runs on a
float64 copy of the parameters, which stand in the originals' places meanwhile; where that copy does not fit, on a float32 copy
of 16-bit parameters, and where that does not fit either on the parameters themselves, whose signs are kept as bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from heterolora_kernels import _env, distributed
from heterolora_kernels.backends import computing_with
from heterolora_kernels.bases import is_quantised, is_quantised_linear
from heterolora_kernels.proxies import get_proxy, register_proxy, scores_of
from heterolora_kernels.scoring import ScoringPass, gradient_rows, twins, untouched
from heterolora_kernels.state import HeteroLoraState
from heterolora_kernels.undo import put_back

#: What a copy of the parameters may take of the memory that is free: activations and gradients need some as well.
_SHARE_OF_FREE = 0.8


@register_proxy("synflow", zero_at_zero_B=True, own_pass=True)
def _synflow(request: ScoringPass) -> dict[str, Tensor]:
    """Sum of abs(parameter * gradient) at absolute parameters; 0 while lora_B is 0."""
    model, state = request.model, request.state
    if distributed.wrapper_of(model) is not None:
        raise ValueError("synflow puts absolute copies in the places of all parameters, which a sharded model does not allow: "
                         "score before fully_shard and hand the ranks to search.apply")
    with ExitStack() as stack:
        stack.enter_context(untouched(model, state, request.loader, training=False))
        stack.enter_context(torch.enable_grad())
        # The only backend that every dtype is promised on; one batch of one row needs no other.
        stack.enter_context(computing_with("reference"))
        rows = distributed.on_every_process(lambda: _rows(request), state.device)
    # The length of the first batch is each process's own.
    flat = distributed.broadcast_(torch.cat([rows[name] for name in state.paths]))
    parts = flat.split([path.r for path in state.paths.values()])
    snip = get_proxy("snip")
    return {name: scores_of(snip, part, request.per_rank) for name, part in zip(state.paths, parts)}


def _rows(request: ScoringPass) -> dict[str, Tensor]:
    model, state = request.model, request.state
    batch = ScoringPass(**{**request.__dict__, "num_batches": 1}).batches()[0]
    target = state.config.synflow_target
    with _absolute(model, state) as dtype, _no_autocast(state.device):
        inputs = _ones(model, batch, dtype, state.device, keep_labels=target == "loss")
        if target == "loss":
            result = request.measures.loss_fn(model, inputs)
        else:
            result = _output(model(**inputs)).sum()
        if not bool(torch.isfinite(result.detach())):
            raise FloatingPointError(f"synflow: the {target} of the absolute network ({dtype}) is not finite; no rank was "
                                     "changed")
        result.backward()
        return {path.name: gradient_rows(path, *(torch.zeros_like(p) if p.grad is None else p.grad
                                                 for p in (path.lora_A, path.lora_B))).to(torch.float64)
                for path in state.paths.values()}


def _no_autocast(device: torch.device):
    return torch.autocast(device.type, enabled=False)


def _ones(model: nn.Module, batch: object, dtype: torch.dtype, device: torch.device, keep_labels: bool) -> dict:
    """One example of ones, as long as the batch's, without padding."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"synflow needs batches that are dictionaries, got {type(batch).__name__}")
    labels = {name: value[:1].to(device) for name, value in batch.items() if name == "labels" and keep_labels}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is not None and "input_ids" in batch:
        ones = torch.ones(1, batch["input_ids"].shape[1], embedding.weight.shape[1], dtype=dtype, device=device)
        decoder = {"decoder_inputs_embeds": ones} if getattr(model.config, "is_encoder_decoder", False) else {}
        return {"inputs_embeds": ones, **decoder, **labels}
    tensors = {name: value[:1].to(device) for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    if not any(value.is_floating_point() for value in tensors.values()):
        raise ValueError(f"synflow: the model has no input embeddings to replace, and of {sorted(batch)} nothing holds floating "
                         "numbers that could be set to one")
    return {**{name: torch.ones_like(value, dtype=dtype) if value.is_floating_point() else value
               for name, value in tensors.items()}, **labels}


def _output(result: object) -> Tensor:
    """The tensor whose elements are summed: the logits, else the first one that has a dimension."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, (tuple, list)):
        values = list(result)
    else:
        values = [getattr(result, "logits", None), *(result if isinstance(result, Mapping) else vars(result)).values()]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise TypeError(f"synflow: the model returned {type(result).__name__} without a tensor to sum")


@contextmanager
def _absolute(model: nn.Module, state: HeteroLoraState) -> Iterator[torch.dtype]:
    """The model with every parameter replaced by its absolute value; yields the dtype in which it runs.

    Raises:
        ValueError: a parameter is quantised, so that its absolute value is not that of its elements.
        MemoryError: a float16 model, whose sums would overflow, and no room for a copy.
    """
    for name, parameter in model.named_parameters():
        if is_quantised(parameter) or not parameter.is_floating_point():
            raise ValueError(f"synflow needs the absolute values of all parameters, and {name!r} is quantised "
                             f"({type(parameter).__name__} of {parameter.dtype})")
    for name, module in model.named_modules():
        if is_quantised_linear(module):
            raise ValueError(f"synflow needs the absolute values of all parameters, and {name!r} has quantised weights "
                             f"({type(module).__name__})")
    dtype = next((dtype for dtype in (torch.float64, torch.float32) if _fits(model, dtype)), None)
    if dtype is not None:
        with _attention_of_any_dtype(model), _copies(model, state, dtype):
            yield dtype
        return
    own = {p.dtype for p in model.parameters()}
    if torch.float16 in own:
        raise MemoryError("synflow overflows in float16, and a float32 copy of the model's parameters does not fit into memory")
    with _signs_dropped(model), twins(model):
        # The adapters may be wider than the base, in whose dtype activations run.
        yield min(own, key=lambda dtype: dtype.itemsize)


def _tensors(model: nn.Module) -> list[Tensor]:
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    return list(found.values())


def _fits(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a copy in ``dtype`` is worth having (no parameter is wider, or has it already) and fits beside the model."""
    widest = max(p.dtype.itemsize for p in model.parameters())
    narrowest = min(p.dtype.itemsize for p in model.parameters())
    if dtype != torch.float64 and (widest > dtype.itemsize or narrowest == dtype.itemsize):
        return False
    needed: dict[torch.device, int] = {}
    for tensor in _tensors(model):
        needed[tensor.device] = needed.get(tensor.device, 0) + tensor.numel() * dtype.itemsize
    if dtype == torch.float64 and any(device.type == "mps" for device in needed):
        return False
    free = {device: _env.available_memory(device) for device in needed}
    return all(free[device] is None or size <= _SHARE_OF_FREE * free[device] for device, size in needed.items())


@contextmanager
def _copies(model: nn.Module, state: HeteroLoraState, dtype: torch.dtype) -> Iterator[None]:
    """Absolute copies in the places of all parameters, and buffers in their dtype; only the adapters' ask for gradients."""
    adapters = {id(p) for path in state.paths.values() for p in (path.lora_A, path.lora_B)}
    made: dict[int, Tensor] = {}
    places: list[tuple[dict, str, Tensor]] = []

    def copy(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor.detach().to(dtype, copy=True))
        return made[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            places += [(table, name, value) for name, value in table.items() if value is not None and value.is_floating_point()]

    def undo() -> None:
        for table, name, value in places:
            table[name] = value

    with put_back(undo):
        for table, name, value in places:
            if isinstance(value, nn.Parameter):
                table[name] = copy(value, lambda t, value=value: nn.Parameter(t.abs_(), requires_grad=id(value) in adapters))
            else:
                table[name] = copy(value, lambda t: t)
        yield


@contextmanager
def _attention_of_any_dtype(model: nn.Module) -> Iterator[None]:
    """Flash attention takes 16-bit numbers only: torch's own in its place."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if not isinstance(chosen, str) or "flash" not in chosen:
        yield
        return
    with put_back(lambda: setattr(config, "_attn_implementation", chosen)):
        config._attn_implementation = "sdpa"
        yield


@contextmanager
def _signs_dropped(model: nn.Module) -> Iterator[None]:
    """Absolute values in place, one bit kept for each sign.

    Written through ``.data``: every bit comes back, so a graph that waits for its backward stays valid.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def undo() -> None:
        for data, signs in kept:
            # From the absolute value, whether or not it had been written when something failed.
            data.abs_()
            data.copy_(torch.where(_unpack_signs(signs, data), -data, data))

    with put_back(undo):
        for parameter in {id(p): p for p in model.parameters()}.values():
            kept.append((parameter.data, _pack_signs(parameter.data)))
            parameter.data.abs_()
        yield


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def _pack_signs(data: Tensor) -> Tensor:
    """uint8 [ceil(numel / 8)], bit i % 8 of byte i // 8 for element i."""
    signs = torch.signbit(data).reshape(-1)
    signs = torch.cat([signs, signs.new_zeros(-signs.numel() % 8)]).view(-1, 8)
    return (signs * torch.tensor(_BITS, dtype=torch.uint8, device=data.device)).sum(1, dtype=torch.uint8)


def _unpack_signs(packed: Tensor, data: Tensor) -> Tensor:
    bits = packed.unsqueeze(1).bitwise_and(torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)) != 0
    return bits.reshape(-1)[:data.numel()].view(data.shape)
