"""The tensors of a case, and the truth about them.

Nothing is zero and lora_B is not: at B = 0 most errors hide, and kernels run faster on zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case
from heterolora_kernels.ops.autograd import call_lora_linear
from heterolora_kernels.ops.ledger import NUM_COLUMNS

#: Of the published settings: alpha 16 at rank 8; the same scaling at every rank.
SCALING = 2.0


@dataclass
class Problem:
    """x [M, K], one weight [N_i, K] and one path (lora_A [r, K], lora_B [N_i, r]) per output, and grad_outs [M, N_i]."""

    case: Case
    x: Tensor
    weights: list[Tensor]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    grad_outs: list[Tensor]
    rng: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype, adapters included."""
        return self._mapped(lambda t: t.to(dtype), self.rng)

    def copy(self) -> Problem:
        """The same values in memory of their own."""
        return self._mapped(torch.clone, self.rng)

    def _mapped(self, change, rng: Tensor | None) -> Problem:
        many = [[change(t) for t in tensors] for tensors in (self.weights, self.lora_A, self.lora_B, self.grad_outs)]
        return Problem(self.case, change(self.x), *many, rng)


@dataclass
class Results:
    """What one pass gave: outputs, gradients by name, and statistics [R, columns] if they were collected."""

    outs: list[Tensor]
    grads: dict[str, Tensor]
    statistics: Tensor | None = None


def make_problem(case: Case, device: str = "cpu") -> Problem:
    """Random tensors of a case, drawn on the device, scaled so that outputs and hidden are of order 1."""
    generator = torch.Generator(device).manual_seed(1)
    dtype, adapters = getattr(torch, case.dtype), getattr(torch, case.adapter_dtype)

    def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(to)

    return Problem(
        case, draw(case.m, case.k), [draw(n, case.k, scale=case.k ** -0.5) for n in case.outs],
        [draw(case.rank, case.k, scale=case.k ** -0.5, to=adapters) for _ in case.outs],
        [draw(n, case.rank, scale=0.1, to=adapters) for n in case.outs], [draw(case.m, n) for n in case.outs],
        torch.tensor([20240616], device=device) if case.dropout_p else None)


def run_reference(problem: Problem) -> Results:
    """Outputs, gradients and statistics by the reference backend, in the problem's dtype."""
    import heterolora_kernels.backends.reference  # noqa: F401 - defines the ops

    x = problem.x.detach().requires_grad_()
    lora_A, lora_B = ([t.detach().requires_grad_() for t in tensors] for tensors in (problem.lora_A, problem.lora_B))
    paths = range(len(problem.weights))
    probe = torch.zeros(len(paths) * problem.case.rank, NUM_COLUMNS, device=x.device, requires_grad=True)
    outs = call_lora_linear(
        "reference", x, problem.weights, [], [w.new_empty(0) for w in problem.weights], [], lora_A, lora_B,
        *path_vectors(problem.case, x.device), problem.rng, list(paths), [-1] * len(paths), problem.case.dropout_p, probe)
    torch.autograd.backward(outs, problem.grad_outs)
    return Results([out.detach() for out in outs], named_gradients(x, lora_A, lora_B), probe.grad)


def path_vectors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """scaling, gate and active of one fully active path per output."""
    paths = len(case.outs)
    return (torch.full((paths,), SCALING, device=device), torch.ones(paths * case.rank, device=device),
            torch.full((paths,), case.rank, dtype=torch.int32, device=device))


def named_gradients(x: Tensor, lora_A: list[Tensor], lora_B: list[Tensor]) -> dict[str, Tensor]:
    """``{name: gradient}`` of the leaves that have one."""
    leaves = {"x": x, **{f"lora_A[{p}]": t for p, t in enumerate(lora_A)}, **{f"lora_B[{p}]": t for p, t in enumerate(lora_B)}}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
