"""alpha_test: how far a path's delta can be scaled down before the metric suffers (arXiv 2406.14956).

    S = 10 * smallest a in {0, 0.1 ... 1} whose metric stays within the tolerance of the metric at a = 1

a scales one path (or one row) at a time, through its gate, with everything else on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from heterolora_kernels import distributed
from heterolora_kernels.proxies import register_proxy
from heterolora_kernels.scoring import LossFunction, Measures, ScoringPass, untouched

_STEPS = 10
_IGNORED_LABEL = -100  # transformers' and torch's label of what counts for nothing


@register_proxy("alpha_test", degree=0, zero_at_zero_B=True, own_pass=True)
def _alpha_test(request: ScoringPass) -> dict[str, Tensor]:
    """10 times the smallest share of the path's delta that keeps the metric; at most 4 evaluations a path."""
    model, state, measures = request.model, request.state, request.measures
    source = request.loader if measures.eval_batches is None else measures.eval_batches
    device = state.device
    with ExitStack() as stack:
        stack.enter_context(untouched(model, state, source, training=False))
        stack.enter_context(torch.no_grad())
        batches = distributed.on_every_process(
            lambda: request.batches() if measures.eval_batches is None else _listed(measures.eval_batches), device)
        metric, greater = distributed.on_every_process(lambda: _metric_of(measures, batches), device)

        # A sharded model's forward is a collective itself: a process that fails in it cannot tell the others.
        alone = distributed.wrapper_of(model) is None
        count = int(distributed.broadcast_(torch.tensor(len(batches), device=device)))
        if not alone and distributed.any_process(len(batches) != count, device):
            raise ValueError("eval_batches must be as many on every process of a sharded model")

        def evaluate() -> float:
            value = (distributed.on_every_process(lambda: _number(metric(model, batches)), device) if alone
                     else _number(metric(model, batches)))
            value = float(distributed.sum_(torch.tensor(value, dtype=torch.float64, device=device))) / distributed.world_size()
            if not math.isfinite(value):
                raise FloatingPointError(f"metric is {value}; no rank was changed")
            return value

        whole = evaluate()
        allowed = abs(whole) * measures.tolerance

        def smallest(gate: Tensor) -> int:
            low, high = 0, _STEPS
            try:
                while low < high:
                    middle = (low + high) // 2
                    gate.fill_(middle / _STEPS)
                    value = evaluate()
                    if value >= whole - allowed if greater else value <= whole + allowed:
                        high = middle
                    else:
                        low = middle + 1
            finally:
                gate.fill_(1.0)
            return high

        scores = {}
        for name, gate in _gates(state).items():
            units = gate.split(1) if request.per_rank else [gate]
            found = torch.tensor([smallest(unit) for unit in units], dtype=torch.float64, device="cpu")
            scores[name] = found if request.per_rank else found[0]
    return {name: scores[name] for name in state.paths}


def _listed(batches: Iterable) -> list:
    found = list(batches)
    if not found:
        raise ValueError("eval_batches is empty: there is no batch to measure with")
    return found


def _gates(state) -> dict[str, Tensor]:
    """``{path: its slice [r] of the gate that its module reads}``."""
    gates = {}
    for module in state.linears:
        paths = module._heterolora.paths
        parts = module._heterolora.derived.gate.split([path.r for path in paths])
        gates.update({path.name: part for path, part in zip(paths, parts)})
    return gates


def _number(value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (int, float)):
        raise TypeError(f"metric must return a number, got {type(value).__name__}")
    return float(value)


def _metric_of(measures: Measures, batches: list) -> tuple[Callable[[nn.Module, Iterable], float], bool]:
    """``(metric, whether greater is better)``."""
    if callable(measures.metric):
        return measures.metric, measures.greater_is_better is not False
    name = measures.metric
    if name is None:
        labels = batches[0].get("labels") if isinstance(batches[0], Mapping) else None
        one_class = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
        name = "accuracy" if one_class else "perplexity"
    if name == "accuracy":
        return accuracy, True
    return lambda model, batches: perplexity(model, batches, measures.loss_fn), False


def accuracy(model: nn.Module, batches: Iterable[Mapping]) -> float:
    """Share of examples whose largest logit is their label's; labels: integers [B], -100 is left out.

    Raises:
        ValueError: labels of another shape; pass a metric of your own.
    """
    device = next(model.parameters()).device
    right = total = 0
    for batch in batches:
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        labels = inputs.pop("labels", None)
        if labels is None or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError("metric 'accuracy' needs one integer label for each example; use 'perplexity' or a function")
        counted = labels != _IGNORED_LABEL
        right += int(((model(**inputs).logits.argmax(-1) == labels) & counted).sum())
        total += int(counted.sum())
    return right / max(total, 1)


def perplexity(model: nn.Module, batches: Iterable, loss_fn: LossFunction) -> float:
    """exp of the mean loss, each batch weighted by its number of labels."""
    total = weight = 0.0
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        count = int((labels != _IGNORED_LABEL).sum()) if isinstance(labels, Tensor) else 1
        total += count * float(loss_fn(model, batch))
        weight += count
    return math.exp(min(total / max(weight, 1), 700.0))  # exp overflows a float64 above 709
