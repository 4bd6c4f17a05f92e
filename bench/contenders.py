"""What runs in turn on the tensors of one case: the op and a patched linear, and what they are measured against.

A contender has ``name``, ``forward() -> outputs``, ``grad_outs`` and ``clear()``, which drops the gradients of the pass before.
All of a case share the storage of x and the weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import heterolora_kernels as hlk
from bench.problem import SCALING, Problem, Results, named_gradients, path_vectors
from heterolora_kernels.backends import resolve, use_backend
from heterolora_kernels.ops.autograd import call_lora_linear
from heterolora_kernels.ops.ledger import COLUMNS, NUM_COLUMNS
from heterolora_kernels.packing import PackBudget, Packs


def packs_of(backend: str, weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """Packed weights as patched layers keep them; nothing where the backend does not pack, or not for so few rows."""
    resolve(x.device, backend, x.dtype)
    return [pack for weight in weights for pack in Packs(PackBudget("copy")).of(backend, weight, x)]


class Contender:
    """Base: x as a leaf of its own, adapters as leaves of their own."""

    def __init__(self, problem: Problem, name: str):
        self.name = name
        self.problem = problem
        self.grad_outs = problem.grad_outs
        self.x = problem.x.detach().requires_grad_()
        self.lora_A, self.lora_B = ([t.detach().clone().requires_grad_() for t in tensors]
                                    for tensors in (problem.lora_A, problem.lora_B))

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.lora_A, *self.lora_B]

    def forward(self) -> list[Tensor]:
        raise NotImplementedError

    def own(self) -> list[Tensor]:
        """Tensors that are there whether or not a step runs: weights, packed ones too, and adapters."""
        return [*self.problem.weights, *self.lora_A, *self.lora_B]

    def clear(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None

    def close(self) -> None:
        """Undo what the contender changed outside itself."""

    def results(self, mode: str) -> Results:
        """One pass, to be compared with the truth."""
        if mode == "infer":
            with torch.no_grad():
                return Results(self.forward(), {})
        self.clear()
        outs = self.forward()
        torch.autograd.backward(outs, self.grad_outs)
        return Results([out.detach() for out in outs], named_gradients(self.x, self.lora_A, self.lora_B), self.statistics())

    def statistics(self) -> Tensor | None:
        """Of the last pass, where they were collected."""


class Op(Contender):
    """The op of a backend, weights packed."""

    def __init__(self, problem: Problem, name: str, backend: str, statistics: bool = True):
        super().__init__(problem, name)
        self.backend = backend
        self.packs = packs_of(backend, problem.weights, self.x)
        self.biases = [weight.new_empty(0) for weight in problem.weights]
        self.vectors = path_vectors(problem.case, self.x.device)
        rows = self.vectors[1].shape[0]
        self.probe = torch.zeros(rows, NUM_COLUMNS, device=self.x.device, requires_grad=True) if statistics else None
        self.path_output = list(range(len(problem.weights)))
        self.path_source = [-1] * len(problem.weights)

    def leaves(self) -> list[Tensor]:
        return super().leaves() + ([] if self.probe is None else [self.probe])

    def forward(self) -> list[Tensor]:
        problem = self.problem
        return call_lora_linear(
            self.backend, self.x, problem.weights, self.packs, self.biases, [], self.lora_A, self.lora_B, *self.vectors,
            problem.rng, self.path_output, self.path_source, problem.case.dropout_p, self.probe)

    def own(self) -> list[Tensor]:
        return [*super().own(), *self.packs]

    def statistics(self) -> Tensor | None:
        return None if self.probe is None else self.probe.grad


class NoPath(Op):
    """The op without any path."""

    def __init__(self, problem: Problem, name: str, backend: str):
        super().__init__(problem, name, backend, statistics=False)
        self.lora_A, self.lora_B, self.path_output, self.path_source = [], [], [], []
        self.vectors = tuple(vector[:0] for vector in self.vectors)


class Separate(Contender):
    """The members of a group as ops of their own."""

    def __init__(self, problem: Problem, name: str, backend: str):
        super().__init__(problem, name)
        self.ops = []
        for i, weight in enumerate(problem.weights):
            alone = Problem(replace(problem.case, outs=(problem.case.outs[i],)), problem.x, [weight], [problem.lora_A[i]],
                            [problem.lora_B[i]], [problem.grad_outs[i]], problem.rng)
            op = Op(alone, name, backend)
            op.x, op.lora_A, op.lora_B = self.x, [self.lora_A[i]], [self.lora_B[i]]
            self.ops.append(op)

    def leaves(self) -> list[Tensor]:
        return super().leaves() + [op.probe for op in self.ops]

    def forward(self) -> list[Tensor]:
        return [op.forward()[0] for op in self.ops]

    def statistics(self) -> Tensor | None:
        return torch.cat([op.probe.grad for op in self.ops])


class Layer(Contender):
    """A patched ``nn.Linear``, as users get it; statistics collected where there is a backward."""

    def __init__(self, problem: Problem, name: str, backend: str):
        super().__init__(problem, name)
        case = problem.case
        model = nn.ModuleDict({"linear": _linear(problem.weights[0])})
        config = hlk.HeteroLoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, lora_dropout=case.dropout_p, search="off",
                                      adapter_dtype=case.adapter_dtype)
        self.model = hlk.apply_heterolora(model, config)
        self.linear = model["linear"]
        self.lora_A, self.lora_B = [self.linear.lora_A], [self.linear.lora_B]
        with torch.no_grad():
            self.linear.lora_A.copy_(problem.lora_A[0])
            self.linear.lora_B.copy_(problem.lora_B[0])
        self.chosen = use_backend(backend)
        self.block = hlk.collect_statistics(self.model) if case.mode == "train" else None
        self.ledger = self.block.__enter__() if self.block is not None else None

    def forward(self) -> list[Tensor]:
        return [self.linear(self.x)]

    def own(self) -> list[Tensor]:
        return [*super().own(), *self.linear._heterolora.packs.tensors]

    def results(self, mode: str) -> Results:
        if self.ledger is not None:
            self.ledger.zero_()
        return super().results(mode)

    def statistics(self) -> Tensor | None:
        if self.ledger is None:
            return None
        (table,) = self.ledger.table().values()
        return torch.stack([table[column] for column in COLUMNS], 1)

    def close(self) -> None:
        if self.block is not None:
            self.block.__exit__(None, None, None)
        self.chosen.__exit__()


class Frozen(Contender):
    """``F.linear`` with frozen weights: the floor. It has no adapters."""

    def __init__(self, problem: Problem, name: str):
        super().__init__(problem, name)
        self.lora_A = self.lora_B = []

    def forward(self) -> list[Tensor]:
        return [F.linear(self.x, weight) for weight in self.problem.weights]


class Peft(Contender):
    """PEFT's layers, of a real PEFT model around ``nn.Linear``."""

    def __init__(self, problem: Problem, name: str):
        from peft import LoraConfig, get_peft_model

        super().__init__(problem, name)
        case = problem.case
        names = [f"linear{i}" for i in range(len(problem.weights))]
        base = nn.ModuleDict({key: _linear(weight) for key, weight in zip(names, problem.weights)})
        config = LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, lora_dropout=case.dropout_p, target_modules=names,
                            init_lora_weights=False)
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False)
        self.layers = [self.model.base_model.model[key] for key in names]
        self.lora_A, self.lora_B = [], []
        for layer, a, b in zip(self.layers, problem.lora_A, problem.lora_B):
            for part, value, kept in ((layer.lora_A, a, self.lora_A), (layer.lora_B, b, self.lora_B)):
                part["default"].weight.data = value.clone()
                kept.append(part["default"].weight)

    def forward(self) -> list[Tensor]:
        return [layer(self.x) for layer in self.layers]


class CompiledPeft(Peft):
    """PEFT's layers under torch.compile."""

    def __init__(self, problem: Problem, name: str):
        super().__init__(problem, name)
        torch._dynamo.reset()
        self.compiled = torch.compile(super().forward, dynamic=False)

    def forward(self) -> list[Tensor]:
        return self.compiled()


class _MmAddmm(torch.autograd.Function):
    """``y = x W^T; y += s (x A^T) B^T`` in place, and a backward of plain matmuls that accumulates into grad_x."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B):
        out, hidden = F.linear(x, weight), x @ lora_A.t()
        ctx.save_for_backward(x, weight, lora_A, lora_B, hidden)
        return out.addmm_(hidden, lora_B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, grad_out):
        x, weight, lora_A, lora_B, hidden = ctx.saved_tensors
        inner = (grad_out @ lora_B).mul_(SCALING)
        grad_x = (grad_out @ weight).addmm_(inner, lora_A)
        return grad_x, None, inner.t() @ x, (grad_out.t() @ hidden).mul_(SCALING)


class MmAddmm(Contender):
    """LoRA by hand, as Unsloth and Axolotl compose it of matmuls; adapters of x's dtype, no dropout."""

    def forward(self) -> list[Tensor]:
        return [_MmAddmm.apply(self.x, weight, a, b) for weight, a, b in zip(self.problem.weights, self.lora_A, self.lora_B)]


class TwoMatmuls(Contender):
    """``F.linear`` plus two small matmuls, not even added: the fewest calls that touch what the op touches."""

    def __init__(self, problem: Problem, name: str):
        super().__init__(problem, name)
        self.grad_outs = [problem.grad_outs[0]] * 2

    def forward(self) -> list[Tensor]:
        return [F.linear(self.x, self.problem.weights[0]), F.linear(F.linear(self.x, self.lora_A[0]), self.lora_B[0])]


def _linear(weight: Tensor) -> nn.Linear:
    """A linear that holds this very weight."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def make_contender(name: str, problem: Problem) -> Contender:
    """By the name under which a case lists it."""
    backend = problem.case.backend
    if name == "no_statistics":
        return Op(problem, name, backend, statistics=False)
    ours = {"op": Op, "op_again": Op, "layer": Layer, "no_path": NoPath, "separate": Separate}
    if name in ours:
        return ours[name](problem, name, backend)
    others = {"frozen": Frozen, "peft": Peft, "peft_compiled": CompiledPeft, "mm_addmm": MmAddmm, "two_matmuls": TwoMatmuls}
    return others[name](problem, name)


#: Compared by the rule of the tests; the others are baselines.
OURS = ("op", "op_again", "layer", "no_statistics", "separate", "no_path")
#: Those that compute something else than the case's paths: F.linear alone, and the sum that TwoMatmuls leaves out.
UNCHECKED = ("frozen", "two_matmuls")


def is_checked(name: str, problem: Problem) -> bool:
    """Whether a contender has the case's results; PEFT draws a dropout mask of its own, and so does a layer."""
    return name not in UNCHECKED and not (problem.case.dropout_p and name in ("peft", "peft_compiled", "layer"))
