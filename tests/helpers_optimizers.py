"""Optimizers that work element by element, from PyTorch and one that is written here."""

from __future__ import annotations

import pytest
import torch


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, arXiv 2302.06675."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average.lerp(p.grad, 1 - first).sign(), alpha=group["lr"])
                average.lerp_(p.grad, 1 - second)


def of_torch(name, **options):
    return lambda params: getattr(torch.optim, name)(params, **{"lr": 0.01, "weight_decay": 0.1, **options})


ELEMENTWISE = {
    "adamw": of_torch("AdamW", foreach=False), "adamw-foreach": of_torch("AdamW", foreach=True),
    "adamw-fused": of_torch("AdamW", fused=True), "adamw-amsgrad": of_torch("AdamW", amsgrad=True),
    "adam-l2": of_torch("Adam"), "nadam": of_torch("NAdam"),
    "sgd": of_torch("SGD", momentum=0.9), "sgd-nesterov-foreach": of_torch("SGD", momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": of_torch("SGD", momentum=0.9, fused=True),
    "rmsprop": of_torch("RMSprop", lr=0.001, momentum=0.9, centered=True),
    "rmsprop-foreach": of_torch("RMSprop", lr=0.001, momentum=0.9, foreach=True),
    "adagrad": of_torch("Adagrad"), "adagrad-foreach": of_torch("Adagrad", foreach=True),
    "adagrad-fused": of_torch("Adagrad", fused=True), "lion": Lion,
}
every_optimizer = pytest.mark.parametrize("make_optimizer", [pytest.param(make, id=name) for name, make in ELEMENTWISE.items()])
