"""What each kernel of the Triton backend moves and computes in one launch, from its arguments; gpu_model.py adds it up.

A model repeats the loops and masks of its kernel in closed form, so a kernel that changes has to change here too;
tests/triton_model_interpreted.py notices. Every path is taken to be fully active with an open gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heterolora_kernels.backends.triton.builds import Launch, Scenario
from heterolora_kernels.backends.triton.plan import (
    CHUNK_FIELDS,
    COLUMN_FIELDS,
    HIDDEN_FIELDS,
    OUTPUT_FIELDS,
    PATH_FIELDS,
    RANGE_FIELDS,
    TARGET_FIELDS,
    WORK_FIELDS,
    Plan,
    Structure,
)

#: Roofline of an H100: dense bf16 with float32 accumulation as good matmuls reach it, and HBM3 as good copies do.
FLOPS_PER_SECOND = 800e12
BYTES_PER_SECOND = 3.0e12
#: Philox4x32-10 takes some 100 integer instructions a call; 132 multiprocessors of 64 integer lanes at 1.755 GHz.
PHILOX_INSTRUCTIONS = 100
INTEGERS_PER_SECOND = 132 * 64 * 1.755e9
#: Sums of one kernel that a later one adds: they are no tensor of the two-pass bound.
PARTIALS = ("q_parts", "grad_B_parts", "grad_A_parts")


class UnknownKernel(LookupError):
    """A kernel was launched whose cost nobody wrote down here."""


@dataclass
class Cost:
    """What one launch moves and computes."""

    kernel: str
    role: str
    issued_loads: int = 0
    issued_stores: int = 0
    flops: int = 0
    #: Calls of Philox, each for eight dropout decisions.
    philox: int = 0
    #: Bytes read and written, by the name of the tensor.
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    #: What further chunks read once more.
    again: int = 0

    def load(self, name: str, issued: int, once: int, itemsize: int) -> None:
        """Charge ``issued`` elements loaded by programs, of which ``once`` are different ones."""
        self.issued_loads += issued * itemsize
        self.reads[name] = self.reads.get(name, 0) + once * itemsize

    def store(self, name: str, issued: int, once: int, itemsize: int) -> None:
        self.issued_stores += issued * itemsize
        self.writes[name] = self.writes.get(name, 0) + once * itemsize

    def dot(self, count: int, m: int, n: int, k: int) -> None:
        self.flops += 2 * count * m * n * k

    @property
    def issued(self) -> int:
        return self.issued_loads + self.issued_stores

    @property
    def compulsory(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def partials(self) -> int:
        return sum(size for part in (self.reads, self.writes) for name, size in part.items() if name in PARTIALS)

    @property
    def seconds(self) -> float:
        return max(self.limits.values())

    @property
    def limits(self) -> dict[str, float]:
        """Seconds by what would take them."""
        return {"memory": self.compulsory / BYTES_PER_SECOND, "matmul": self.flops / FLOPS_PER_SECOND,
                "philox": self.philox * PHILOX_INSTRUCTIONS / INTEGERS_PER_SECOND}


def structure_of(scenario: Scenario) -> Structure:
    """The scenario in the words of plan.py, whose tables a launch on storage-less tensors does not hold."""
    ranks, outputs, sources = zip(*scenario.paths) if scenario.paths else ((), (), ())
    return Structure(ranks, outputs, sources, (scenario.width, *scenario.source_widths), scenario.out_features)


def cost_of(launch: Launch, structure: Structure) -> Cost:
    """The cost of one launch.

    Raises:
        UnknownKernel: no model of the kernel is written.
    """
    name = launch.kernel.__name__
    if name not in MODELS:
        raise UnknownKernel(f"bench/kernel_costs.py has no model of the kernel {name} (role {launch.role}); add one to MODELS")
    call = _Call(launch, Plan(structure, torch.device("cpu")), structure)
    cost = Cost(name, launch.role)
    MODELS[name](call, cost)
    return cost


class _Call:
    """Arguments of a launch by their names, constants included, and the group's tables with their contents."""

    def __init__(self, launch: Launch, plan: Plan, structure: Structure):
        self.arguments = dict(zip(launch.kernel.arg_names, launch.arguments)) | launch.constants
        self.grid, self.plan, self.structure = launch.grid, plan, structure

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(f"the launch has no argument {name}") from None

    def size(self, name: str) -> int:
        """Bytes per element of an argument, of the first where it is a tuple."""
        value = self.arguments[name]
        return (value if isinstance(value, Tensor) else value[0]).element_size()

    def chunks(self, by: str, every: bool = False) -> list[_Chunk]:
        table, count = self.plan.chunks(by, self.BLOCK_R, every)
        columns = _records(getattr(self.plan, f"{by}_columns"), COLUMN_FIELDS)
        return [_Chunk(owner, end - first, sum(row < rank for _, _, row, rank, *_ in columns[first:end]), bool(is_first))
                for owner, first, end, _, is_first, *_ in _records(table, CHUNK_FIELDS)[:count]]

    def ranges(self, width: int) -> list[_Range]:
        table, count = self.plan.ranges(self.BLOCK_R, width)
        columns = _records(self.plan.output_columns, COLUMN_FIELDS)
        return [_Range(owner, end - start, sum(row < rank for _, _, row, rank, *_ in columns[start:end]), first)
                for owner, start, end, first, *_ in _records(table, RANGE_FIELDS)[:count]]

    def paths(self, by: str) -> list[list[int]]:
        """Ranks of the paths of every output or source, in the tables' order."""
        table, fields = ((self.plan.outputs, OUTPUT_FIELDS) if by == "output" else (self.plan.targets, TARGET_FIELDS))
        paths = _records(getattr(self.plan, f"{by}_paths"), PATH_FIELDS)
        return [[rank for _, rank, *_ in paths[first:end]] for first, end, *_ in _records(table, fields)]


@dataclass(frozen=True)
class _Chunk:
    """A piece of packed columns: its source or output, columns with and without padding, whether it is that one's first."""

    owner: int
    inside: int
    computed: int
    is_first: bool


@dataclass(frozen=True)
class _Range:
    """A chunk of an output's packed columns and its columns from ``first`` on."""

    owner: int
    inside: int
    computed: int
    first: int


def _records(table: Tensor, fields: int) -> list[list[int]]:
    return table.view(-1, fields).tolist()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tables(cost: Cost, issued: int) -> None:
    """Small integers and floats that all programs read: four bytes each, in L2 after the first, so 0 of compulsory."""
    cost.load("tables", issued, 0, 4)


def _column_records(call: _Call, cost: Cost, programs: int, inside: int, contiguous: bool) -> None:
    """Loads of device._column_records."""
    _tables(cost, programs * (2 + 3 * inside + (1 if contiguous else inside) + (0 if call.EVERY_ROW else inside)))


def _low_rank(call: _Call, cost: Cost, left: str, right: str, ranks: list[int], num_m: int, num_n: int, width: int) -> None:
    """Loads and FLOPs of device._low_rank over all tiles of one output or target."""
    tiles, rows = num_m * num_n, call.M
    for rank in ranks:
        _tables(cost, tiles * ((5 if call.EVERY_ROW else 6) + rank))
        cost.load(left, rows * rank * num_n, rows * rank, call.size(f"{left}_ptr"))
        cost.load(right, width * rank * num_m, width * rank, call.size(right))
        cost.dot(tiles * _cdiv(rank, call.RANK_STEP), call.BLOCK_M, call.BLOCK_N, call.RANK_STEP)


def _hidden(call: _Call, cost: Cost) -> None:
    num_m, seen = call.grid[0], set()
    for chunk in call.chunks("source", call.STORES_MASK):
        width = call.widths[chunk.owner]
        stores_mask = call.STORES_MASK and chunk.is_first
        is_run = chunk.computed > 0 or stores_mask
        steps = _cdiv(width, call.BLOCK_K) if is_run else 0
        _column_records(call, cost, num_m, chunk.inside, call.CONTIGUOUS)
        _tables(cost, num_m * (2 + call.STORES_MASK))
        if call.HAS_DROPOUT:
            cost.load("rng", num_m, 0, 8)
            cost.philox += num_m * steps * call.BLOCK_M * (call.BLOCK_K // 8)
            if stores_mask:
                cost.store("mask", call.M * _cdiv(width, 8), call.M * _cdiv(width, 8), 1)
        if is_run:
            _load_source(call, cost, "sources", chunk, call.M * width, seen)
        cost.load("lora_A", num_m * chunk.computed * width, chunk.computed * width, call.size("lora_A"))
        cost.dot(num_m * steps, call.BLOCK_M, call.BLOCK_R, call.BLOCK_K)
        cost.store("hidden", call.M * chunk.inside, call.M * chunk.inside, call.size("hidden_ptr"))


def _load_source(call: _Call, cost: Cost, name: str, chunk: _Chunk, elements: int, seen: set[int]) -> None:
    """A source or grad_out that every chunk of its columns reads whole."""
    cost.load(name, elements, 0 if chunk.owner in seen else elements, call.size(name))
    cost.again += elements * call.size(name) if chunk.owner in seen else 0
    seen.add(chunk.owner)


def _forward(call: _Call, cost: Cost) -> None:
    num_m, rows, K = _cdiv(call.M, call.BLOCK_M), call.M, call.K
    outputs = _records(call.plan.outputs, OUTPUT_FIELDS)
    columns = _records(call.plan.output_columns, COLUMN_FIELDS)
    ranks = call.paths("output")
    if call.HAS_WEIGHT:
        cost.load("x", 0, rows * K, call.size("x_ptr"))
    for i, N in enumerate(call.out_features):
        num_n = _cdiv(N, call.BLOCK_N)
        tiles, steps = num_m * num_n, _cdiv(K, call.BLOCK_K)
        if call.HAS_PATHS and not call.ONE_PASS:
            _tables(cost, 2 * tiles)
            _low_rank(call, cost, "hidden", "lora_B", ranks[i], num_m, num_n, N)
        if call.ONE_PASS:
            first, end = outputs[i][2:4]
            inside, computed = end - first, sum(row < rank for _, _, row, rank, *_ in columns[first:end])
            _column_records(call, cost, tiles, inside, False)
            _tables(cost, 3 * tiles * computed)
            cost.load("lora_A", tiles * computed * K, computed * K, call.size("lora_A"))
            cost.load("lora_B", num_m * computed * N, computed * N, call.size("lora_B"))
            cost.dot(tiles * steps, call.BLOCK_M, call.BLOCK_R, call.BLOCK_K)
            cost.dot(tiles, call.BLOCK_M, call.BLOCK_N, call.BLOCK_R)
            if call.STORES_HIDDEN:
                cost.store("hidden", rows * inside, rows * inside, call.size("hidden_ptr"))
        if call.HAS_WEIGHT:
            cost.load("x", rows * K * num_n, 0, call.size("x_ptr"))
            cost.load("weights", N * K * num_m, N * K, call.size("weights"))
            cost.dot(tiles * steps, call.BLOCK_M, call.BLOCK_N, call.BLOCK_K)
        if call.BIAS_BITS >> i & 1:
            cost.load("biases", N * num_m, N, call.size("biases"))
        if call.HAS_BASE:
            cost.load("bases", rows * N, rows * N, call.size("bases"))
        cost.store("outs", rows * N, rows * N, call.size("outs"))


def _q_grad_B(call: _Call, cost: Cost) -> None:
    own, step, rows, seen = call.BLOCK_OWN, call.BLOCK_STEP, call.M, set()
    size = call.size("grad_outs")
    splits = (call.grid[0] - call.q_programs) // call.num_slabs
    for slab in call.ranges(own) if splits > 0 else ():
        columns = min(own, call.out_features[slab.owner] - slab.first)
        _column_records(call, cost, splits, slab.inside, call.CONTIGUOUS)
        _tables(cost, splits * (2 + call.ONE_READ + call.NEEDS_GRAD_B * slab.inside))
        if slab.computed == 0:
            continue
        key = (slab.owner, slab.first)
        cost.load("grad_outs", rows * columns, 0 if key in seen else rows * columns, size)
        cost.again += rows * columns * size if key in seen else 0
        seen.add(key)
        cost.dot((call.ONE_READ + call.NEEDS_GRAD_B) * _cdiv(rows, step), own, step, call.BLOCK_R)
        if call.NEEDS_GRAD_B:
            cost.load("hidden", rows * slab.computed, rows * slab.computed if slab.first == 0 else 0, call.size("hidden_ptr"))
            cost.store("grad_B_parts", splits * columns * slab.computed, splits * columns * slab.computed, 4)
        if call.ONE_READ:
            cost.load("lora_B", splits * columns * slab.computed, columns * slab.computed, call.size("lora_B"))
            cost.store("q_parts", rows * slab.computed, rows * slab.computed, 4)
    if call.q_programs > 0:
        _rows_of_q(call, cost, {owner for owner, _ in seen})


def _rows_of_q(call: _Call, cost: Cost, seen: set[int]) -> None:
    """The programs that own rows of q; where others own columns of grad_B, they read grad_out once more."""
    rows, size = call.M, call.size("grad_outs")
    blocks = call.q_programs // call.num_ranges
    for part in call.ranges(call.split_columns):
        columns = min(call.split_columns, call.out_features[part.owner] - part.first)
        _column_records(call, cost, blocks, part.inside, call.CONTIGUOUS)
        _tables(cost, 3 * blocks)
        if part.computed == 0:
            continue
        is_again = part.owner in seen
        cost.load("grad_outs", rows * columns, 0 if is_again else rows * columns, size)
        cost.again += rows * columns * size if is_again else 0
        cost.dot(blocks * _cdiv(columns, call.BLOCK_STEP), call.BLOCK_OWN, call.BLOCK_R, call.BLOCK_STEP)
        cost.load("lora_B", blocks * columns * part.computed, columns * part.computed, call.size("lora_B"))
        cost.store("q_parts", rows * part.computed, rows * part.computed, 4)


def _q_sum(call: _Call, cost: Cost) -> None:
    elements = call.M * call.H
    parts = [_cdiv(N, call.split_columns) for N, _, row, rank in _records(call.plan.hidden, HIDDEN_FIELDS) if row < rank]
    _tables(cost, call.grid[0] * call.H * (3 if call.EVERY_ROW else 5))
    cost.load("q_parts", call.M * sum(parts), call.M * sum(parts), 4)
    cost.store("q", elements, elements, call.size("q_ptr"))
    if call.NEEDS_STATISTICS:
        cost.load("hidden", elements, elements, call.size("hidden_ptr"))
        cost.store("sums", 2 * call.grid[0] * call.H, 2 * call.grid[0] * call.H, 4)


def _grad_x(call: _Call, cost: Cost) -> None:
    num_m, rows = _cdiv(call.M, call.BLOCK_M), call.M
    ranks, targets = call.paths("source"), _records(call.plan.targets, TARGET_FIELDS)
    for target, width in enumerate(call.widths):
        source, num_n = call.FIRST_TARGET + target, _cdiv(width, call.BLOCK_N)
        tiles = num_m * num_n
        _tables(cost, tiles * (3 if call.HAS_DROPOUT else 2))
        _low_rank(call, cost, "q", "lora_A", ranks[source], num_m, num_n, width)
        if call.HAS_DROPOUT and targets[source][2] >= 0:
            cost.load("mask", rows * _cdiv(width, 8), rows * _cdiv(width, 8), 1)
        if call.HAS_WEIGHT and target == 0:
            for N in call.out_features:
                cost.load("grad_outs", rows * N * num_n, rows * N, call.size("grad_outs"))
                cost.load("weights", N * width * num_m, N * width, call.size("weights"))
                cost.dot(tiles * _cdiv(N, call.BLOCK_K), call.BLOCK_M, call.BLOCK_N, call.BLOCK_K)
        if call.HAS_BASE and target == 0:
            cost.load("bases", rows * width, rows * width, call.size("bases"))
        cost.store("grads", rows * width, rows * width, call.size("grads"))


def _grad_A(call: _Call, cost: Cost) -> None:
    column_blocks, _, splits = call.grid
    rows, seen = call.M, set()
    for chunk in call.chunks("source"):
        width = call.widths[chunk.owner]
        _column_records(call, cost, column_blocks * splits, chunk.inside, call.CONTIGUOUS)
        _tables(cost, column_blocks * splits * (1 + chunk.inside))
        if chunk.computed == 0:
            continue
        blocks, steps = _cdiv(width, call.BLOCK_K), _cdiv(rows, call.BLOCK_M)
        # Programs of one range of rows follow each other, so what a further chunk reads again is a range and not the source.
        cost.load("sources", rows * width, 0 if chunk.owner in seen else rows * width, call.size("sources"))
        if call.HAS_DROPOUT:
            elements = rows * _cdiv(width, 8)
            _tables(cost, blocks * steps)
            cost.load("mask", elements, 0 if chunk.owner in seen else elements, 1)
        seen.add(chunk.owner)
        cost.load("q", rows * chunk.computed * blocks, rows * chunk.computed, call.size("q_ptr"))
        cost.dot(blocks * steps, call.BLOCK_K, call.BLOCK_R, call.BLOCK_M)
        cost.store("grad_A_parts", splits * width * chunk.computed, splits * width * chunk.computed, 4)


def _finalize(call: _Call, cost: Cost) -> None:
    statistics = call.NEEDS_STATISTICS
    works, count, _, _ = call.plan.works(call.BLOCK_J, call.BLOCK_N, call.NEEDS_GRAD_A or statistics,
                                         call.NEEDS_GRAD_B or statistics)
    for _, is_b, row, column, _, rank, _, length, *_ in _records(works, WORK_FIELDS)[:count]:
        side = "B" if is_b else "A"
        height = min(call.BLOCK_J, rank - row)
        elements = height * min(call.BLOCK_N, length - column)
        _tables(cost, (9 if call.EVERY_ROW else 10) + height)
        splits = call.splits_B if is_b else call.splits_A
        cost.load(f"grad_{side}_parts", splits * elements, splits * elements, 4)
        if call.NEEDS_GRAD_B if is_b else call.NEEDS_GRAD_A:
            cost.store(f"grad_{side}", elements, elements, call.size(f"grad_{side}"))
        if statistics:
            cost.load(f"lora_{side}", elements, elements, call.size(f"lora_{side}"))
            cost.store("sums", 3 * call.BLOCK_J, 3 * call.BLOCK_J, 4)


def _statistics(call: _Call, cost: Cost) -> None:
    sums = call.sums_ptr.numel()
    cost.load("sums", sums, sums, 4)
    for rank in call.structure.ranks:
        blocks = _cdiv(rank, call.BLOCK_J)
        _tables(cost, blocks * (10 if call.EVERY_ROW else 11))
        cost.load("column_sums", 2 * call.num_row_blocks * rank, 2 * call.num_row_blocks * rank, 4)
        cost.store("stats", 7 * rank, 7 * rank, 4)


MODELS: dict[str, Callable[[_Call, Cost], None]] = {
    "_lora_hidden_kernel": _hidden,
    "_lora_linear_forward_kernel": _forward,
    "_lora_q_grad_B_kernel": _q_grad_B,
    "_lora_q_sum_kernel": _q_sum,
    "_lora_grad_x_kernel": _grad_x,
    "_lora_grad_A_kernel": _grad_A,
    "_lora_finalize_kernel": _finalize,
    "_lora_statistics_kernel": _statistics,
}
