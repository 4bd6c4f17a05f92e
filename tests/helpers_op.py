"""Reference code and cases for the tests of the op, written from the contract and not from the package.

Truth is float64 autograd over the dense expression of :func:`dense`; masks come from a Philox in plain Python integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

import heterolora_kernels.backends.reference  # noqa: F401 - defines the ops
from heterolora_kernels.ops.autograd import call_lora_delta, call_lora_linear

RNG = 0x3C6EF372_9E3779B9
MASK_32 = 0xFFFFFFFF
REFERENCE = "reference"


def philox(counter, key):
    """Philox4x32-10 on Python integers: four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK_32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK_32
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return c0, c1, c2, c3


def keep_matrix(rng, rows, columns, source_id, dropout_p):
    """The mask rule element by element: bool [rows, columns]."""
    key = (rng & MASK_32, (rng >> 32) & MASK_32)
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    for m in range(rows):
        for c in range(columns):
            word = philox((c // 8, m, source_id, 0), key)[c % 8 // 2]
            draw = word >> 16 if c % 2 else word & 0xFFFF
            keep[m, c] = draw >= round(65536 * dropout_p)
    return keep


def keep_scale(dropout_p):
    dropped = round(65536 * dropout_p)
    return 0.0 if dropped == 65536 else 65536 / (65536 - dropped)


def packed_bytes(keep):
    """uint8 [M, ceil(K / 8)], bit c % 8 from the low end."""
    rows, columns = keep.shape
    packed = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    for m in range(rows):
        for c in range(columns):
            packed[m, c // 8] |= int(keep[m, c]) << (c % 8)
    return packed


@dataclass(frozen=True)
class Case:
    """Sizes of one call; paths are (rank, output, source), gates one of ones, mixed, closed_first, closed."""

    m: int = 5
    k: int = 11
    outs: tuple = (7,)
    biases: tuple = (True,)
    source_sizes: tuple = ()
    paths: tuple = ((3, 0, -1),)
    dropout_p: float = 0.0
    gates: str = "ones"
    seed: int = 0


CASES = {
    "one_path": Case(),
    "one_path_dropout": Case(m=6, k=13, biases=(False,), dropout_p=0.4, gates="mixed", seed=1),
    "rank_13_gates": Case(k=9, paths=((13, 0, -1),), gates="mixed", seed=2),
    "two_linears": Case(k=10, outs=(6, 9), biases=(True, False), paths=((5, 0, -1), (1, 1, -1)), gates="mixed", seed=3),
    "two_paths_one_output": Case(m=3, outs=(5,), source_sizes=(6,), paths=((2, 0, -1), (9, 0, 0)), dropout_p=0.25, seed=4),
    "sources_only": Case(m=4, k=7, outs=(5,), source_sizes=(3, 12), paths=((2, 0, 1), (5, 0, 0)), dropout_p=0.3,
                         gates="closed_first", seed=5),
    "three_linears_four_paths": Case(m=4, k=9, outs=(7, 5, 6), biases=(True, False, True), source_sizes=(13, 5),
                                     paths=((13, 0, -1), (0, 1, -1), (8, 2, 0), (3, 0, 1)), dropout_p=0.3, gates="mixed",
                                     seed=6),
    "source_read_twice": Case(m=3, k=6, outs=(4, 5), biases=(True, True), source_sizes=(10,),
                              paths=((3, 0, 0), (2, 1, 0), (1, 1, -1)), dropout_p=0.5, seed=7),
    "all_closed": Case(m=4, k=7, outs=(5,), source_sizes=(6,), paths=((4, 0, -1), (3, 0, 0)), gates="closed", seed=8),
}


@dataclass
class Inputs:
    """Arguments of the op, by the names of its schema."""

    x: torch.Tensor
    weights: list
    biases: list
    sources: list
    lora_A: list
    lora_B: list
    scaling: torch.Tensor
    gate: torch.Tensor
    active: torch.Tensor
    rng: torch.Tensor | None
    path_output: list
    path_source: list
    dropout_p: float
    packs: list = field(default_factory=list)

    @property
    def ranks(self):
        return [a.shape[0] for a in self.lora_A]

    def leaves(self):
        """Every tensor that can ask for a gradient, by name."""
        named = {"x": self.x}
        for name in ("weights", "biases", "sources", "lora_A", "lora_B"):
            named |= {f"{name}[{i}]": t for i, t in enumerate(getattr(self, name)) if name != "biases" or t.numel()}
        return named

    def to(self, device):
        """On another device; the rng stays in int64."""
        moved = self.mapped(lambda name, t: t.to(device))
        return replace(moved, scaling=self.scaling.to(device), gate=self.gate.to(device), active=self.active.to(device),
                       rng=None if self.rng is None else self.rng.to(device))

    def requires_grad_(self, names=None):
        for name, tensor in self.leaves().items():
            tensor.requires_grad_(names is None or name in names)
        return self

    def mapped(self, change):
        """A copy with ``change(name, tensor)`` in the place of every leaf."""
        pick = lambda name, tensors: [change(f"{name}[{i}]", t) for i, t in enumerate(tensors)]  # noqa: E731
        return replace(self, x=change("x", self.x), **{name: pick(name, getattr(self, name)) for name in (
            "weights", "biases", "sources", "lora_A", "lora_B")})

    def doubles(self):
        return self.mapped(lambda name, t: t.detach().double().clone())

    def args(self, flags=0):
        """Positional arguments of ``lora_linear``."""
        return (self.x, self.weights, self.packs, self.biases, *self.path_args(flags))

    def path_args(self, flags=0):
        return (self.sources, self.lora_A, self.lora_B, self.scaling, self.gate, self.active, self.rng, self.path_output,
                self.path_source, self.dropout_p, flags)

    def run(self, probe=None, backend=REFERENCE):
        return call_lora_linear(backend, self.x, self.weights, self.packs, self.biases, *self.path_args()[:-1], probe)

    def run_delta(self, base_outs, probe=None, backend=REFERENCE):
        return call_lora_delta(backend, self.x, base_outs, *self.path_args()[:-1], probe)

    def source_of(self, p):
        return self.x if self.path_source[p] == -1 else self.sources[self.path_source[p]]


def make_inputs(case, dtype=torch.float64, adapter_dtype=None):
    """Random inputs of a case; the values do not depend on the dtype but for rounding."""
    generator = torch.Generator().manual_seed(1000 + case.seed)

    def draw(*shape, scale=1.0, to=dtype):
        return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).to(to)

    adapters = adapter_dtype or dtype
    x = draw(case.m, case.k)
    sources = [draw(case.m, size) for size in case.source_sizes]
    weights = [draw(n, case.k, scale=case.k ** -0.5) for n in case.outs]
    biases = [draw(n) if wanted else draw(0) for n, wanted in zip(case.outs, case.biases)]
    widths = [case.k if source == -1 else case.source_sizes[source] for _, _, source in case.paths]
    lora_A = [draw(r, width, scale=width ** -0.5, to=adapters) for (r, _, _), width in zip(case.paths, widths)]
    lora_B = [draw(case.outs[output], r, scale=0.5, to=adapters) for r, output, _ in case.paths]
    gates = [torch.ones(r) for r, _, _ in case.paths]
    if case.gates == "mixed":
        gates = [(torch.rand(len(gate), generator=generator) < 0.6).float() for gate in gates]
    closed = {"closed_first": 1, "closed": len(gates)}.get(case.gates, 0)
    gates = [torch.zeros_like(gate) if p < closed else gate for p, gate in enumerate(gates)]
    return Inputs(
        x=x, weights=weights, biases=biases, sources=sources, lora_A=lora_A, lora_B=lora_B,
        scaling=torch.tensor([0.7 + 0.6 * p for p in range(len(gates))], dtype=torch.float32),
        gate=torch.cat([*gates, torch.zeros(0)]),
        active=torch.tensor([max([j + 1 for j, g in enumerate(gate.tolist()) if g] or [0]) for gate in gates],
                            dtype=torch.int32),
        rng=torch.tensor([RNG]) if case.dropout_p else None,
        path_output=[output for _, output, _ in case.paths], path_source=[source for _, _, source in case.paths],
        dropout_p=case.dropout_p)


def dropped(inputs, p):
    """drop(u_p) in the dtype of the source."""
    source = inputs.source_of(p)
    if not inputs.dropout_p:
        return source
    keep = keep_matrix(int(inputs.rng), *source.shape, inputs.path_source[p] + 1, inputs.dropout_p).to(source.device)
    return torch.where(keep, source * keep_scale(inputs.dropout_p), torch.zeros_like(source))


def path_slices(ranks):
    ends = [sum(ranks[:p + 1]) for p in range(len(ranks))]
    return [slice(end - r, end) for end, r in zip(ends, ranks)]


def delta(inputs, p, gate=None):
    """What path p adds, in the dtype of its source; gate overrides, and the computed rows too."""
    if gate is None:
        gate = inputs.gate[path_slices(inputs.ranks)[p]].clone()
        gate[int(inputs.active[p]):] = 0
    dtype = inputs.x.dtype
    hidden = dropped(inputs, p) @ inputs.lora_A[p].to(dtype).t()
    return inputs.scaling[p].to(dtype) * ((hidden * gate.to(dtype)) @ inputs.lora_B[p].to(dtype).t())


def dense(inputs, base_outs=None):
    """The outputs, in the inputs' dtype: the yardstick in 16 bits and, of float64 copies, the truth."""
    if base_outs is None:
        base_outs = [torch.nn.functional.linear(inputs.x, w, b if b.numel() else None)
                     for w, b in zip(inputs.weights, inputs.biases)]
    outs = list(base_outs)
    for p, output in enumerate(inputs.path_output):
        outs[output] = outs[output] + delta(inputs, p)
    return outs


def random_grads(outs, seed=77):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out) for out in outs]


def gradients(outs, inputs, grad_outs, retain_graph=False):
    """Gradient of every leaf that asks for one, by name; zeros where the graph does not reach it."""
    asked = {name: t for name, t in inputs.leaves().items() if t.requires_grad}
    used = [(out, grad) for out, grad in zip(outs, grad_outs) if out.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], list(asked.values()), [g for _, g in used], allow_unused=True,
                                retain_graph=retain_graph)
    return {name: torch.zeros_like(asked[name]) if grad is None else grad for name, grad in zip(asked, grads)}


def assert_same(actual, expected, rtol=1e-10, atol=1e-11):
    """Two dicts or lists of tensors, close in every entry."""
    pairs = [(name, actual[name], expected[name]) for name in expected] if isinstance(expected, dict) else [
        (i, a, e) for i, (a, e) in enumerate(zip(actual, expected))]
    assert len(actual) == len(expected)
    for name, a, e in pairs:
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
