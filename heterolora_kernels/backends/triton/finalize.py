"""Kernels that end a backward: gradients of the adapters from their parts, and the ledger's statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from heterolora_kernels.backends.triton.device import BLOCK_FIELDS, WORK_FIELDS, _cast, _pick


@triton.jit(do_not_specialize=["splits_A", "splits_B"])
def _lora_finalize_kernel(
    grad_A, grad_B, sums_ptr, grad_A_parts_ptr, grad_B_parts_ptr, lora_A, lora_B, scaling_ptr, gate_ptr, active_ptr,
    works_ptr, stride_as, stride_bs, splits_A, splits_B,
    NEEDS_GRAD_A: tl.constexpr, NEEDS_GRAD_B: tl.constexpr, NEEDS_STATISTICS: tl.constexpr, EVERY_ROW: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """shadow = scaling_p * sum of the parts in their order;  grad = gate * shadow, 0 where the gate is 0.

    ========================= ============================================================================
    grad_A[p] / grad_B[p]     [r_p, K_s] / [N_i, r_p], in the adapters' dtype
    sums                      [works, 3, BLOCK_J] float32: over the tile's columns, per row, the sums of shadow^2,
                              abs(value * shadow) and (value * shadow)^2, value being A or B
    grad_A_parts[split]       path p's [r_p, K_s] at its offset
    grad_B_parts[split]       path p's [r_p, N_i] at its offset
    ========================= ============================================================================

    A program owns one record of ``works``: a [BLOCK_J, BLOCK_N] tile of one path's A, or of its B transposed.
    """
    work = tl.program_id(0)
    record = works_ptr + work * WORK_FIELDS
    path = tl.load(record)
    is_b = tl.load(record + 1) == 1
    rank = tl.load(record + 5)
    offs_j = tl.load(record + 2) + tl.arange(0, BLOCK_J)
    offs_n = tl.load(record + 3) + tl.arange(0, BLOCK_N)
    limit = rank
    if not EVERY_ROW:
        limit = tl.minimum(rank, tl.load(active_ptr + path))
    length = tl.load(record + 7)
    is_stored = (offs_j < rank)[:, None] & (offs_n < length)[None, :]
    is_computed = is_stored & (offs_j < limit)[:, None]
    part_ptrs = tl.where(is_b, grad_B_parts_ptr, grad_A_parts_ptr) + tl.load(record + 4).to(tl.int64)
    part_ptrs += offs_j.to(tl.int64)[:, None] * length + offs_n[None, :]
    stride_part = tl.where(is_b, stride_bs, stride_as).to(tl.int64)
    shadow = tl.zeros((BLOCK_J, BLOCK_N), tl.float32)
    for _ in range(0, tl.where(is_b, splits_B, splits_A)):
        shadow += tl.load(part_ptrs, mask=is_computed, other=0.0)
        part_ptrs += stride_part
    shadow = shadow * tl.load(scaling_ptr + path)
    gate = tl.load(gate_ptr + tl.load(record + 6) + offs_j, mask=offs_j < limit, other=0.0)
    value_offsets = (offs_j.to(tl.int64)[:, None] * tl.where(is_b, 1, length)
                     + offs_n.to(tl.int64)[None, :] * tl.where(is_b, rank, 1))
    if NEEDS_GRAD_A or NEEDS_GRAD_B:
        grad = tl.where((gate != 0.0)[:, None], shadow * gate[:, None], 0.0)
        if NEEDS_GRAD_A:
            grad_ptr = _pick(grad_A, path)
            mask = is_stored & (offs_j < tl.where(is_b, 0, rank))[:, None]
            tl.store(grad_ptr + value_offsets, _cast(grad, grad_ptr.dtype.element_ty, UPCAST), mask=mask)
        if NEEDS_GRAD_B:
            grad_ptr = _pick(grad_B, path)
            mask = is_stored & (offs_j < tl.where(is_b, rank, 0))[:, None]
            tl.store(grad_ptr + value_offsets, _cast(grad, grad_ptr.dtype.element_ty, UPCAST), mask=mask)
    if NEEDS_STATISTICS:
        value_ptr = tl.where(is_b, _pick(lora_B, path), _pick(lora_A, path))
        value = tl.load(value_ptr + value_offsets, mask=is_computed, other=0.0).to(tl.float32)
        product = value * shadow
        sums_ptrs = sums_ptr + work.to(tl.int64) * (3 * BLOCK_J) + tl.arange(0, BLOCK_J)
        tl.store(sums_ptrs, tl.sum(shadow * shadow, 1))
        tl.store(sums_ptrs + BLOCK_J, tl.sum(tl.abs(product), 1))
        tl.store(sums_ptrs + 2 * BLOCK_J, tl.sum(product * product, 1))


@triton.jit(do_not_specialize=["num_row_blocks"])
def _lora_statistics_kernel(
    stats_ptr, sums_ptr, column_sums_ptr, scaling_ptr, active_ptr, blocks_ptr, H, stride_sums, num_row_blocks,
    NUM_COLUMNS: tl.constexpr, HIDDEN_SQ: tl.constexpr, GRAD_A_SQ: tl.constexpr, GRAD_B_SQ: tl.constexpr,
    ABS_A_GRAD_A: tl.constexpr, ABS_B_GRAD_B: tl.constexpr, GATE_GRAD: tl.constexpr, TAYLOR_SQ: tl.constexpr,
    EVERY_ROW: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """stats[row] = the ledger's columns, from the sums of the other kernels added in a fixed order.

    =========== ============================ =============================================
    stats       [R, NUM_COLUMNS]             float32; the upper-case names are its columns
    sums        [works, 3, BLOCK_J]          of _lora_finalize_kernel
    column_sums [2, num_row_blocks, H]       of _lora_q_sum_kernel
    =========== ============================ =============================================

    A program owns one record of ``blocks``: up to BLOCK_J rows of one path.
    """
    record = blocks_ptr + tl.program_id(0) * BLOCK_FIELDS
    path = tl.load(record)
    rank = tl.load(record + 8)
    offs_j = tl.arange(0, BLOCK_J)
    row = tl.load(record + 1) + offs_j
    is_row = row < rank
    is_computed = is_row
    if not EVERY_ROW:
        is_computed = is_row & (row < tl.load(active_ptr + path))
    grad_A_sq = tl.zeros((BLOCK_J,), tl.float32)
    abs_A = tl.zeros((BLOCK_J,), tl.float32)
    taylor = tl.zeros((BLOCK_J,), tl.float32)
    work = tl.load(record + 2)
    sums_ptrs = sums_ptr + work.to(tl.int64) * (3 * BLOCK_J) + offs_j
    for _ in range(work, tl.load(record + 3)):
        grad_A_sq += tl.load(sums_ptrs)
        abs_A += tl.load(sums_ptrs + BLOCK_J)
        taylor += tl.load(sums_ptrs + 2 * BLOCK_J)
        sums_ptrs += 3 * BLOCK_J
    grad_B_sq = tl.zeros((BLOCK_J,), tl.float32)
    abs_B = tl.zeros((BLOCK_J,), tl.float32)
    taylor_B = tl.zeros((BLOCK_J,), tl.float32)
    work = tl.load(record + 4)
    sums_ptrs = sums_ptr + work.to(tl.int64) * (3 * BLOCK_J) + offs_j
    for _ in range(work, tl.load(record + 5)):
        grad_B_sq += tl.load(sums_ptrs)
        abs_B += tl.load(sums_ptrs + BLOCK_J)
        taylor_B += tl.load(sums_ptrs + 2 * BLOCK_J)
        sums_ptrs += 3 * BLOCK_J
    hidden_sq = tl.zeros((BLOCK_J,), tl.float32)
    gate_grad = tl.zeros((BLOCK_J,), tl.float32)
    column_ptrs = column_sums_ptr + tl.load(record + 7) + row
    products_ptrs = column_ptrs + stride_sums
    for _ in range(0, num_row_blocks):
        hidden_sq += tl.load(column_ptrs, mask=is_computed, other=0.0)
        gate_grad += tl.load(products_ptrs, mask=is_computed, other=0.0)
        column_ptrs += H
        products_ptrs += H
    gate_grad = gate_grad * tl.load(scaling_ptr + path)
    stats_ptrs = stats_ptr + (tl.load(record + 6) + row) * NUM_COLUMNS
    tl.store(stats_ptrs + HIDDEN_SQ, hidden_sq, mask=is_row)
    tl.store(stats_ptrs + GRAD_A_SQ, grad_A_sq, mask=is_row)
    tl.store(stats_ptrs + GRAD_B_SQ, grad_B_sq, mask=is_row)
    tl.store(stats_ptrs + ABS_A_GRAD_A, abs_A, mask=is_row)
    tl.store(stats_ptrs + ABS_B_GRAD_B, abs_B, mask=is_row)
    tl.store(stats_ptrs + GATE_GRAD, gate_grad, mask=is_row)
    tl.store(stats_ptrs + TAYLOR_SQ, taylor + taylor_B, mask=is_row)
