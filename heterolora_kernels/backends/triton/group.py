"""The four passes of a group in terms of launches: allocation, splits, and which kernel gets what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heterolora_kernels.backends.triton import backward, configs, finalize, forward
from heterolora_kernels.backends.triton.launch import architecture, launch, processors
from heterolora_kernels.backends.triton.plan import Plan, Structure, plan_of
from heterolora_kernels.ops import rng as dropout
from heterolora_kernels.ops.ledger import COLUMNS, NUM_COLUMNS
from heterolora_kernels.ops.schema import Flags, Needs, empty_gradients, empty_outputs


@dataclass
class Group:
    """Tensors of one call in the form that kernels take: rows with unit stride, adapters contiguous and of one dtype."""

    x: Tensor
    sources: tuple[Tensor, ...]
    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    scaling: Tensor
    gate: Tensor
    active: Tensor
    out_features: tuple[int, ...]
    dropout_p: float
    flags: int
    plan: Plan
    arch: int | str
    #: Whether rows of x, weights, sources, outputs and lora_A all begin at 16 bytes.
    is_aligned: bool

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(source.shape[1] for source in self.sources)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(_row_stride(source) for source in self.sources)

    @property
    def every_row(self) -> bool:
        return bool(self.flags & Flags.STATISTICS)

    @property
    def keep_scale(self) -> float:
        return dropout.dropout_scale(self.dropout_p) if self.dropout_p > 0 else 1.0

    def config(self, role: str, n: int, k: int, rank: int) -> dict:
        """The table's configuration of a role for this group."""
        return configs.choose(role, self.arch, self.x.element_size(), self.is_aligned, _precision(self.x.dtype) == "tf32",
                              self.dropout_p > 0, self.rows, n, k, rank)

    def constants(self, *names: str) -> dict:
        """Those constexpr arguments that many kernels share and that the group settles."""
        is_interpreted = self.arch == "interpreter"
        all_of_them = {"EVERY_ROW": self.every_row, "HAS_DROPOUT": self.dropout_p > 0, "PRECISION": _precision(self.x.dtype),
                       "ALIGNED": self.is_aligned, "UPCAST": is_interpreted and self.x.dtype != torch.float32}
        return {name: all_of_them[name] for name in names}


_MATMUL = ("EVERY_ROW", "PRECISION", "UPCAST")


def make_group(x, sources, lora_A, lora_B, scaling, gate, active, path_output, path_source, out_features, dropout_p,
               flags) -> Group:
    """Bring the arguments of an op into the form that kernels take, copying only what has unusable strides."""
    every_source = (_rows(x), *[_rows(source) for source in sources])
    dtypes = {a.dtype for a in lora_A}
    # Kernels select one of several pointers, which needs one type.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    structure = Structure(tuple(a.shape[0] for a in lora_A), tuple(path_output), tuple(path_source),
                          tuple(source.shape[1] for source in every_source), tuple(out_features))
    # 8 elements are 16 bytes in 16-bit types; in float32 4 would do, but such sizes are not worth a build of their own.
    sizes = (*structure.widths, *structure.out_features, *(_row_stride(source) for source in every_source))
    is_aligned = all(size % 8 == 0 for size in sizes) and all(t.data_ptr() % 16 == 0 for t in (*every_source, *lora_A))
    return Group(
        x=every_source[0], sources=every_source, lora_A=tuple(a.to(dtype).contiguous() for a in lora_A),
        lora_B=tuple(b.to(dtype).contiguous() for b in lora_B), scaling=scaling.contiguous(), gate=gate.contiguous(),
        active=active.contiguous(), out_features=tuple(out_features), dropout_p=dropout_p, flags=flags,
        plan=plan_of(structure, x.device), arch=architecture(x.device), is_aligned=is_aligned)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if neighbours in a row are not neighbours in memory."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _row_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def _uniform(weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int, int]:
    """Weights that share one pair of strides, one of them 1, and the pair; others are copied."""
    strides = {weight.stride() for weight in weights}
    if len(strides) == 1 and 1 in next(iter(strides)):
        return tuple(weights), *strides.pop()
    return tuple(weight.contiguous() for weight in weights), weights[0].shape[1], 1


def _precision(dtype: torch.dtype) -> str:
    """tf32 for float32 where torch's setting allows it to matmuls."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _splits(config: dict, wanted: int, programs: int, length: int, step: int) -> tuple[int, int]:
    """In how many parts each of ``programs`` sums is taken so that at most ``wanted`` programs run, and the terms of a part.

    From shapes and the table alone, never from the device's state: the split shows in a sum's last bits. A program more than the
    chip holds at once would run alone in the end.
    """
    splits = max(1, min(wanted // max(1, programs), _cdiv(length, config["SPLIT_STEPS"] * step)))
    size = max(1, _cdiv(_cdiv(length, splits), step)) * step
    return max(1, _cdiv(length, size)), size


def run_forward(group: Group, weights: Sequence[Tensor], biases: Sequence[Tensor], bases: Sequence[Tensor], rng: Tensor | None,
                path_source: Sequence[int], sources: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """outs, hidden and mask of ``lora_linear`` (weights) or ``lora_delta`` (bases)."""
    plan, x = group.plan, group.x
    outs, hidden, mask = empty_outputs(x, group.out_features, sources, group.lora_A, path_source, group.dropout_p, group.flags)
    saves = bool(group.flags & Flags.SAVE)
    hidden = hidden if saves else x.new_empty((group.rows, plan.H))
    config = group.config("forward", sum(group.out_features), x.shape[1] if weights else 0, plan.widest_output)
    is_one_pass = (config["variant"] == "one_pass" and bool(weights) and group.dropout_p == 0 and plan.H > 0
                   and set(path_source) == {-1} and plan.widest_output <= config["BLOCK_R"])
    if len(group.lora_A) > 0 and not is_one_pass:
        _run_hidden(group, hidden, mask, rng, saves)
    if weights and config["variant"] == "cublas":
        outs = bases = [F.linear(x, weight, bias if bias.numel() > 0 else None) for weight, bias in zip(weights, biases)]
        weights, biases = [], []
        if plan.H == 0:
            return outs, hidden if saves else hidden.new_empty((0,)), mask
    _run_linear(group, config, outs, hidden, weights, biases, [_rows(base) for base in bases], is_one_pass, saves)
    return outs, hidden if saves else hidden.new_empty((0,)), mask


def _run_hidden(group: Group, hidden: Tensor, mask: Tensor, rng: Tensor | None, saves: bool) -> None:
    stores_mask = saves and group.dropout_p > 0
    config = group.config("hidden", group.plan.H, max(group.widths), group.plan.widest_source)
    chunks, num_chunks = group.plan.chunks("source", config["BLOCK_R"], stores_mask)
    launch(forward._lora_hidden_kernel, "hidden", (_cdiv(group.rows, config["BLOCK_M"]), num_chunks), group.x.device, config,
           hidden, mask, group.sources, group.lora_A, group.active, group.active if rng is None else rng,
           group.plan.source_columns, chunks, group.rows, group.widths, group.strides, group.plan.H // 8,
           mask.shape[1] if stores_mask else 0, dropout.dropout_threshold(group.dropout_p), group.keep_scale,
           STORES_MASK=stores_mask, CONTIGUOUS=group.plan.is_contiguous["source"],
           **group.constants(*_MATMUL, "HAS_DROPOUT", "ALIGNED"))


def _run_linear(group: Group, config: dict, outs: Sequence[Tensor], hidden: Tensor, weights: Sequence[Tensor],
                biases: Sequence[Tensor], bases: Sequence[Tensor], is_one_pass: bool, saves: bool) -> None:
    plan, x = group.plan, group.x
    weights, stride_wn, stride_wk = _uniform(weights) if weights else ((x,), 1, 1)
    has_weight, nothing = not bases, (x,)
    num_m = _cdiv(group.rows, config["BLOCK_M"])
    tiles = num_m * sum(_cdiv(n, config["BLOCK_N"]) for n in group.out_features)
    # A descriptor whose base or rows do not lie at 16 bytes is a fault on the device.
    has_descriptors = (has_weight and group.is_aligned and stride_wk == 1 and stride_wn % 8 == 0
                       and all(weight.data_ptr() % 16 == 0 for weight in weights))
    uses_tma = bool(config.get("tma")) and has_descriptors and not is_one_pass
    is_persistent = bool(config.get("persistent")) and has_weight and not is_one_pass
    programs = min(tiles, processors(x.device)) if is_persistent else tiles
    launch(forward._lora_linear_forward_kernel, "forward" if has_weight else "delta", (programs,), x.device, config,
           tuple(outs), hidden, x, weights, tuple(biases) or nothing, tuple(bases) or nothing, group.lora_A or nothing,
           group.lora_B or nothing, group.scaling, group.gate, group.active, plan.output_paths, plan.output_columns,
           plan.outputs, group.rows, x.shape[1], group.out_features, _row_stride(x), stride_wn, stride_wk, plan.H // 8,
           tuple(_row_stride(base) for base in bases) or (0,), HAS_WEIGHT=has_weight, HAS_BASE=not has_weight,
           BIAS_BITS=sum(1 << i for i, bias in enumerate(biases) if bias.numel() > 0), HAS_PATHS=plan.H > 0, ONE_PASS=is_one_pass,
           STORES_HIDDEN=is_one_pass and saves, EVEN_K=x.shape[1] % config["BLOCK_K"] == 0, TMA=uses_tma,
           PERSISTENT=is_persistent, **group.constants(*_MATMUL, "ALIGNED"))


def run_backward(group: Group, grad_outs: Sequence[Tensor], weights: Sequence[Tensor], hidden: Tensor, mask: Tensor,
                 needs: int, original_A: Sequence[Tensor], original_B: Sequence[Tensor], sources: Sequence[Tensor]
                 ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Everything that a backward returns, of ``lora_linear`` (weights) or ``lora_delta`` (no weights)."""
    plan = group.plan
    grads = empty_gradients(group.x, sources, group.lora_A, group.lora_B, needs)
    grad_outs = tuple(_rows(grad) for grad in grad_outs)
    # Views of what the forward saved, where an output was left out.
    hidden, mask = hidden.contiguous(), mask.contiguous()
    q = sums = parts_A = parts_B = group.scaling
    row_blocks = 0
    if plan.H > 0:
        q_parts, parts_B, split_columns = _run_q_grad_B(group, grad_outs, hidden, needs)
        q, sums, row_blocks = _run_q_sum(group, q_parts, split_columns, hidden, needs)
    if needs & (Needs.X | Needs.SOURCES):
        _run_grad_x(group, grads[0], grads[1], q, grad_outs, weights, mask, needs)
    if plan.H > 0 and needs & (Needs.LORA_A | Needs.LORA_B | Needs.STATISTICS):
        if needs & (Needs.LORA_A | Needs.STATISTICS):
            parts_A = _run_grad_A(group, q, mask)
        _run_finalize(group, grads, parts_A, parts_B, sums, row_blocks, needs)
    grad_x, grad_sources, grad_A, grad_B, stats = grads
    return (grad_x, grad_sources, [grad.to(a.dtype) for grad, a in zip(grad_A, original_A)],
            [grad.to(b.dtype) for grad, b in zip(grad_B, original_B)], stats)


def _run_q_grad_B(group: Group, grad_outs: Sequence[Tensor], hidden: Tensor, needs: int) -> tuple[Tensor, Tensor, int]:
    """Parts of q and of grad_B, and how many columns of an output a part of q covers."""
    plan, widest = group.plan, max(group.out_features)
    config = group.config("q_grad_B", widest, group.rows, plan.widest_output)
    own, step, programs = config["BLOCK_OWN"], config["BLOCK_STEP"], config["PROGRAMS"]
    needs_grad_B = bool(needs & (Needs.LORA_B | Needs.STATISTICS))
    slabs, num_slabs = plan.ranges(config["BLOCK_R"], own)
    split_columns, q_programs = own, 0
    if not config["one_read"]:
        programs //= 2
        row_blocks = _cdiv(group.rows, own)
        num_chunks = plan.chunks("output", config["BLOCK_R"])[1]
        split_columns = _splits(config, programs, row_blocks * num_chunks, widest, step)[1]
        q_programs = row_blocks * plan.ranges(config["BLOCK_R"], split_columns)[1]
    ranges, num_ranges = plan.ranges(config["BLOCK_R"], split_columns)
    splits, split_rows = _splits(config, programs, num_slabs, group.rows, step)
    slab_programs = num_slabs * splits if config["one_read"] or needs_grad_B else 0
    q_parts = group.scaling.new_empty((_cdiv(widest, split_columns), group.rows, plan.H))
    parts_B = group.scaling.new_empty((splits, plan.size_B) if needs_grad_B else (1, 1))
    launch(backward._lora_q_grad_B_kernel, "q_grad_B", (q_programs + slab_programs,), group.x.device, config,
           q_parts, parts_B, grad_outs, hidden, group.lora_B, group.active, plan.output_columns, slabs, ranges, group.rows,
           group.out_features, tuple(_row_stride(grad) for grad in grad_outs), plan.H // 8, group.rows * plan.H, plan.size_B,
           split_rows, split_columns, num_slabs, num_ranges, q_programs, ONE_READ=config["one_read"], NEEDS_GRAD_B=needs_grad_B,
           CONTIGUOUS=plan.is_contiguous["output"], **group.constants(*_MATMUL))
    return q_parts, parts_B, split_columns


def _run_q_sum(group: Group, q_parts: Tensor, split_columns: int, hidden: Tensor, needs: int) -> tuple[Tensor, Tensor, int]:
    plan = group.plan
    config = group.config("q_sum", plan.H, group.rows, plan.H)
    row_blocks = _cdiv(group.rows, config["BLOCK_M"])
    needs_statistics = bool(needs & Needs.STATISTICS)
    q = group.x.new_empty((group.rows, plan.H))
    sums = q_parts.new_empty((2, row_blocks, plan.H) if needs_statistics else (1,))
    launch(backward._lora_q_sum_kernel, "q_sum", (row_blocks, _cdiv(plan.H, config["BLOCK_H"])), group.x.device, config,
           q, sums, q_parts, hidden, group.active, plan.hidden, group.rows, plan.H, group.rows * plan.H, split_columns,
           NEEDS_STATISTICS=needs_statistics, **group.constants("EVERY_ROW", "UPCAST"))
    return q, sums, row_blocks


def _run_grad_x(group: Group, grad_x: Tensor, grad_sources: Sequence[Tensor], q: Tensor, grad_outs: Sequence[Tensor],
                weights: Sequence[Tensor], mask: Tensor, needs: int) -> None:
    plan, x = group.plan, group.x
    first = 0 if needs & Needs.X else 1
    targets = ([grad_x] if first == 0 else []) + (list(grad_sources) if needs & Needs.SOURCES else [])
    widths = group.widths[first:first + len(targets)]
    if not targets:
        return
    config = group.config("grad_x", sum(widths), sum(group.out_features), plan.widest_source)
    bases: tuple[Tensor, ...] = ()
    if weights and first == 0 and config.get("variant") == "cublas":
        # The sum over linears stays in float32 until the low-rank part has joined it only where one linear is all there is.
        base = grad_outs[0] @ weights[0]
        for grad, weight in zip(grad_outs[1:], weights[1:]):
            base.addmm_(grad, weight)
        bases, weights = (base,), ()
    has_weight = bool(weights) and first == 0
    weights, stride_wn, stride_wk = _uniform(weights) if has_weight else ((x,), 1, 1)
    tiles = _cdiv(group.rows, config["BLOCK_M"]) * sum(_cdiv(width, config["BLOCK_N"]) for width in widths)
    launch(backward._lora_grad_x_kernel, "grad_x" if has_weight else "grad_low_rank", (tiles,), x.device, config,
           tuple(targets), q, grad_outs, weights, bases or (x,), group.lora_A or (x,), mask, group.scaling, group.gate,
           group.active, plan.source_paths, plan.targets, group.rows, widths, group.out_features,
           tuple(_row_stride(grad) for grad in grad_outs), stride_wn, stride_wk, plan.H // 8,
           mask.shape[1] if group.dropout_p > 0 else 0, group.keep_scale, FIRST_TARGET=first, HAS_WEIGHT=has_weight,
           HAS_BASE=bool(bases), EVEN_N=all(n % config["BLOCK_K"] == 0 for n in group.out_features),
           **group.constants(*_MATMUL, "HAS_DROPOUT"))


def _run_grad_A(group: Group, q: Tensor, mask: Tensor) -> Tensor:
    plan, widest = group.plan, max(group.widths)
    config = group.config("grad_A", widest, group.rows, plan.widest_source)
    chunks, num_chunks = plan.chunks("source", config["BLOCK_R"])
    column_blocks = _cdiv(widest, config["BLOCK_K"])
    splits, split_rows = _splits(config, config["PROGRAMS"], column_blocks * num_chunks, group.rows, config["BLOCK_M"])
    parts = group.scaling.new_empty((splits, plan.size_A))
    launch(backward._lora_grad_A_kernel, "grad_A", (column_blocks, num_chunks, splits), group.x.device, config,
           parts, group.sources, q, mask, group.active, plan.source_columns, chunks, group.rows, group.widths, group.strides,
           plan.H // 8, mask.shape[1] if group.dropout_p > 0 else 0, plan.size_A, split_rows, group.keep_scale,
           CONTIGUOUS=plan.is_contiguous["source"], **group.constants(*_MATMUL, "HAS_DROPOUT"))
    return parts


def _run_finalize(group: Group, grads: tuple, parts_A: Tensor, parts_B: Tensor, column_sums: Tensor, row_blocks: int,
                  needs: int) -> None:
    plan = group.plan
    _, _, grad_A, grad_B, stats = grads
    needs_statistics = bool(needs & Needs.STATISTICS)
    needs_A, needs_B = bool(needs & Needs.LORA_A), bool(needs & Needs.LORA_B)
    config = group.config("finalize", max(group.widths), max(group.out_features), plan.H)
    works, num_works, blocks, num_blocks = plan.works(config["BLOCK_J"], config["BLOCK_N"], needs_A or needs_statistics,
                                                      needs_B or needs_statistics)
    sums = group.scaling.new_empty((num_works, 3, config["BLOCK_J"]) if needs_statistics else (1,))
    launch(finalize._lora_finalize_kernel, "finalize", (num_works,), group.x.device, config,
           tuple(grad_A), tuple(grad_B), sums, parts_A, parts_B, group.lora_A, group.lora_B, group.scaling, group.gate,
           group.active, works, plan.size_A, plan.size_B, parts_A.shape[0], parts_B.shape[0], NEEDS_GRAD_A=needs_A,
           NEEDS_GRAD_B=needs_B, NEEDS_STATISTICS=needs_statistics, **group.constants("EVERY_ROW", "UPCAST"))
    if needs_statistics:
        columns = {f"{name.upper()}": COLUMNS.index(name) for name in COLUMNS}
        launch(finalize._lora_statistics_kernel, "statistics", (num_blocks,), group.x.device, config,
               stats, sums, column_sums, group.scaling, group.active, blocks, plan.H, row_blocks * plan.H, row_blocks,
               NUM_COLUMNS=NUM_COLUMNS, EVERY_ROW=group.every_row, **columns)
