"""Kernels of the backward: q and grad_B in one launch, grad_x of a group, grad_A from one read of each source.

Sizes: M tokens, N_i out_features of linear i, K_s width of source s, H columns of ``hidden`` and of q, S splits of a sum.
Sums over splits are stored in float32 and added in the order of the splits: no atomics, so the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heterolora_kernels.backends.triton.device import (
    CHUNK_FIELDS,
    HIDDEN_FIELDS,
    RANGE_FIELDS,
    TARGET_FIELDS,
    _cast,
    _column_records,
    _grouped_order,
    _low_rank,
    _operand,
    _pick,
    _tile_of_group,
    _unpacked,
)
from heterolora_kernels.backends.triton.forward import _b_pointers


@triton.jit(do_not_specialize=["num_slabs", "num_ranges", "q_programs"])
def _lora_q_grad_B_kernel(
    q_parts_ptr, grad_B_parts_ptr, grad_outs, hidden_ptr, lora_B, active_ptr, columns_ptr, slabs_ptr, ranges_ptr,
    M, out_features, strides_gm, stride_hm8, stride_qs, stride_bs, split_rows, split_columns, num_slabs, num_ranges, q_programs,
    ONE_READ: tl.constexpr, NEEDS_GRAD_B: tl.constexpr, EVERY_ROW: tl.constexpr, CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_STEP: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """q_p = grad_out B_p over one range of columns, and hidden_p^T grad_out over one range of rows.

    ============= ======================= ==============================================
    q_parts       [S_n, M, H]             float32, part j of a column: range j of its output's columns; computed columns alone
    grad_B_parts  [S_m, sum r N]          float32, path p's [r_p, N_i] at its offset: transposed, unscaled
    grad_outs[i]  [M, N_i]
    hidden        [M, H]
    lora_B[p]     [N_i, r_p]
    ============= ======================= ==============================================

    ONE_READ: a program owns a slab of BLOCK_OWN columns of one output, one chunk of at most BLOCK_R packed columns and split_rows
    rows. It walks over the rows in steps of BLOCK_STEP, adds to grad_B in registers and leaves q of the slab. Otherwise the first
    q_programs programs own BLOCK_OWN rows of q and walk over split_columns columns, the others own slabs of grad_B as before:
    grad_out is read twice, and fewer programs share a sum. Walks start at different places, so that both kinds of program reach
    a tile of grad_out at the same time and the second reader finds it in L2.
    """
    pid = tl.program_id(0)
    if ONE_READ:
        _columns_of_grad_B(
            pid, q_parts_ptr, grad_B_parts_ptr, grad_outs, hidden_ptr, lora_B, active_ptr, columns_ptr, slabs_ptr, M,
            out_features, strides_gm, stride_hm8, stride_qs, stride_bs, split_rows, split_columns, num_slabs, ONE_READ,
            NEEDS_GRAD_B, EVERY_ROW, CONTIGUOUS, PRECISION, UPCAST, BLOCK_OWN, BLOCK_STEP, BLOCK_R)
    else:
        if pid < q_programs:
            _rows_of_q(
                pid, q_parts_ptr, grad_outs, lora_B, active_ptr, columns_ptr, ranges_ptr, M, out_features, strides_gm,
                stride_hm8, stride_qs, split_rows, split_columns, num_ranges, EVERY_ROW, CONTIGUOUS, PRECISION, UPCAST,
                BLOCK_OWN, BLOCK_STEP, BLOCK_R)
        else:
            if NEEDS_GRAD_B:
                _columns_of_grad_B(
                    pid - q_programs, q_parts_ptr, grad_B_parts_ptr, grad_outs, hidden_ptr, lora_B, active_ptr, columns_ptr,
                    slabs_ptr, M, out_features, strides_gm, stride_hm8, stride_qs, stride_bs, split_rows, split_columns,
                    num_slabs, ONE_READ, NEEDS_GRAD_B, EVERY_ROW, CONTIGUOUS, PRECISION, UPCAST, BLOCK_OWN, BLOCK_STEP, BLOCK_R)


@triton.jit
def _columns_of_grad_B(
    pid,
    q_parts_ptr, grad_B_parts_ptr, grad_outs, hidden_ptr, lora_B, active_ptr, columns_ptr, slabs_ptr,
    M, out_features, strides_gm, stride_hm8, stride_qs, stride_bs, split_rows, split_columns, num_slabs,
    ONE_READ: tl.constexpr, NEEDS_GRAD_B: tl.constexpr, EVERY_ROW: tl.constexpr, CONTIGUOUS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_STEP: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """grad_B of one slab of columns over one range of rows; with ONE_READ also those rows' part of q."""
    slab_ptr = slabs_ptr + (pid % num_slabs) * RANGE_FIELDS
    split = pid // num_slabs
    module = tl.load(slab_ptr)
    first_n = tl.multiple_of(tl.load(slab_ptr + 3), 16)
    N = _pick(out_features, module)
    column, path, row, rank, is_inside, is_computed, records = _column_records(
        columns_ptr, active_ptr, slab_ptr, EVERY_ROW, CONTIGUOUS, BLOCK_R)
    offs_n = first_n + tl.arange(0, BLOCK_OWN)
    n_mask = offs_n < N
    g_ptr = _pick(grad_outs, module)
    stride_gm = _pick(strides_gm, module)
    first = split * split_rows
    end = tl.minimum(first + split_rows, M)
    end = tl.where(tl.max(is_computed.to(tl.int32), 0) > 0, end, first)
    steps = tl.cdiv(end - first, BLOCK_STEP)
    if ONE_READ:
        b_tile = tl.load(_b_pointers(lora_B, path, row, rank, offs_n), mask=is_computed[:, None] & n_mask[None, :], other=0.0)
        b_tile = tl.trans(_cast(b_tile, g_ptr.dtype.element_ty, UPCAST))  # (BLOCK_OWN, BLOCK_R)
        q_ptrs = q_parts_ptr + tl.load(slab_ptr + 4).to(tl.int64) * stride_qs + column[None, :]
    else:
        start = (first_n % split_columns) // BLOCK_OWN * steps // tl.cdiv(tl.minimum(split_columns, N), BLOCK_OWN)
    acc = tl.zeros((BLOCK_OWN, BLOCK_R), tl.float32)
    for step in range(0, steps):
        index = step
        if not ONE_READ:
            index = (start - step + steps) % steps
        offs_m = first + index * BLOCK_STEP + tl.arange(0, BLOCK_STEP)
        m_mask = offs_m < end
        rows = offs_m.to(tl.int64)[:, None]
        g_tile = tl.load(g_ptr + rows * stride_gm + offs_n[None, :], mask=m_mask[:, None] & n_mask[None, :], other=0.0)
        hidden_mask = m_mask[:, None] & is_computed[None, :]
        if NEEDS_GRAD_B:
            hidden = tl.load(hidden_ptr + rows * (8 * stride_hm8) + column[None, :], mask=hidden_mask, other=0.0)
            acc = tl.dot(tl.trans(_operand(g_tile, UPCAST)), _operand(hidden, UPCAST), acc, input_precision=PRECISION)
        if ONE_READ:
            q = tl.dot(_operand(g_tile, UPCAST), _operand(b_tile, UPCAST), input_precision=PRECISION)  # (BLOCK_STEP, BLOCK_R)
            tl.store(q_ptrs + rows * (8 * stride_hm8), q, mask=hidden_mask)
    if NEEDS_GRAD_B:
        part_first = tl.load(records + 5, mask=is_inside, other=0).to(tl.int64)
        part_ptrs = grad_B_parts_ptr + split.to(tl.int64) * stride_bs + (part_first + row.to(tl.int64) * N)[None, :]
        tl.store(part_ptrs + offs_n[:, None], acc, mask=n_mask[:, None] & is_computed[None, :])


@triton.jit
def _rows_of_q(
    pid,
    q_parts_ptr, grad_outs, lora_B, active_ptr, columns_ptr, ranges_ptr,
    M, out_features, strides_gm, stride_hm8, stride_qs, split_rows, split_columns, num_ranges,
    EVERY_ROW: tl.constexpr, CONTIGUOUS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_OWN: tl.constexpr,
    BLOCK_STEP: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """q of BLOCK_OWN rows over one range of columns."""
    range_ptr = ranges_ptr + (pid % num_ranges) * RANGE_FIELDS
    first_m = pid // num_ranges * BLOCK_OWN
    module = tl.load(range_ptr)
    first = tl.multiple_of(tl.load(range_ptr + 3), 16)
    N = _pick(out_features, module)
    column, path, row, rank, is_inside, is_computed, _ = _column_records(
        columns_ptr, active_ptr, range_ptr, EVERY_ROW, CONTIGUOUS, BLOCK_R)
    offs_m = first_m + tl.arange(0, BLOCK_OWN)
    m_mask = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    g_rows = _pick(grad_outs, module) + rows * _pick(strides_gm, module)
    end = tl.minimum(first + split_columns, N)
    end = tl.where(tl.max(is_computed.to(tl.int32), 0) > 0, end, first)
    steps = tl.cdiv(end - first, BLOCK_STEP)
    start = (first_m % split_rows) // BLOCK_OWN * steps // tl.cdiv(split_rows, BLOCK_OWN)
    acc = tl.zeros((BLOCK_OWN, BLOCK_R), tl.float32)
    for step in range(0, steps):
        offs_n = first + (start + step) % steps * BLOCK_STEP + tl.arange(0, BLOCK_STEP)
        n_mask = offs_n < end
        g_tile = tl.load(g_rows + offs_n[None, :], mask=m_mask[:, None] & n_mask[None, :], other=0.0)
        b_tile = tl.load(_b_pointers(lora_B, path, row, rank, offs_n), mask=is_computed[:, None] & n_mask[None, :], other=0.0)
        b_tile = tl.trans(_cast(b_tile, g_tile.dtype, UPCAST))  # (BLOCK_STEP, BLOCK_R)
        acc = tl.dot(_operand(g_tile, UPCAST), _operand(b_tile, UPCAST), acc, input_precision=PRECISION)
    q_ptrs = q_parts_ptr + tl.load(range_ptr + 4).to(tl.int64) * stride_qs + rows * (8 * stride_hm8) + column[None, :]
    tl.store(q_ptrs, acc, mask=m_mask[:, None] & is_computed[None, :])


@triton.jit
def _lora_q_sum_kernel(
    q_ptr, sums_ptr, q_parts_ptr, hidden_ptr, active_ptr, records_ptr, M, H, stride_qs, split_columns,
    NEEDS_STATISTICS: tl.constexpr, EVERY_ROW: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """q = sum of its parts, in the dtype of x; per block of rows also sum_m hidden^2 and sum_m q hidden.

    ======== ========================= ====================================================================
    q        [M, H]                    0 in columns that are not computed
    sums     [2, M / BLOCK_M, H]       float32, with NEEDS_STATISTICS
    q_parts  [S_n, M, H]               float32, of each column one per split_columns columns of its output
    hidden   [M, H]
    ======== ========================= ====================================================================

    A program owns a [BLOCK_M, BLOCK_H] tile.
    """
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_mask = offs_m < M
    h_mask = offs_h < H
    records = records_ptr + offs_h * HIDDEN_FIELDS
    limit = tl.load(records + 3, mask=h_mask, other=0)
    if not EVERY_ROW:
        limit = tl.minimum(limit, tl.load(active_ptr + tl.load(records + 1, mask=h_mask, other=0), mask=h_mask, other=0))
    is_computed = tl.load(records + 2, mask=h_mask, other=0) < limit
    parts = tl.cdiv(tl.where(is_computed, tl.load(records, mask=h_mask, other=0), 0), split_columns)
    offsets = offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    q = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    part_ptrs = q_parts_ptr + offsets
    for part in range(0, tl.max(parts, 0)):
        q += tl.load(part_ptrs, mask=m_mask[:, None] & (part < parts)[None, :], other=0.0)
        part_ptrs += stride_qs
    mask = m_mask[:, None] & h_mask[None, :]
    tl.store(q_ptr + offsets, _cast(q, q_ptr.dtype.element_ty, UPCAST), mask=mask)
    if NEEDS_STATISTICS:
        hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sums_ptrs = sums_ptr + pid_m.to(tl.int64) * H + offs_h
        tl.store(sums_ptrs, tl.sum(hidden * hidden, 0), mask=h_mask)
        tl.store(sums_ptrs + tl.num_programs(0).to(tl.int64) * H, tl.sum(q * hidden, 0), mask=h_mask)


@triton.jit
def _lora_grad_x_kernel(
    grads, q_ptr, grad_outs, weights, bases, lora_A, mask_ptr, scaling_ptr, gate_ptr, active_ptr, paths_ptr, targets_ptr,
    M, widths, out_features, strides_gm, stride_wn, stride_wk, stride_hm8, stride_bm, keep_scale,
    FIRST_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EVERY_ROW: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, RANK_STEP: tl.constexpr,
):
    """grads[s] = drop'(sum over paths of q_p (scaling_p gate_p A_p))  +  for x: sum_i grad_out_i W_i, stored once.

    ============ ============== ======================================================================
    grads[t]     [M, widths[t]] target t is source FIRST_TARGET + t; source 0 is x
    q            [M, H]
    grad_outs[i] [M, N_i]
    weights[i]   [N_i, K]       one pair of strides for the group; HAS_WEIGHT: the targets begin with x
    bases[0]     [M, K]         the sum over linears where something else computed it (HAS_BASE)
    lora_A[p]    [r_p, K_s]
    mask         [M, stride_bm] bytes, a target's first byte in ``targets``
    ============ ============== ======================================================================

    A program owns one [BLOCK_M, BLOCK_N] tile of one target; BLOCK_K is a step along N_i. The low-rank part comes first and is
    masked alone; the linears follow into the same accumulator.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    target, tile = _tile_of_group(tl.program_id(0), widths, num_m, BLOCK_N)
    width = _pick(widths, target)
    tile_m, tile_n = _grouped_order(tile, num_m, tl.cdiv(width, BLOCK_N), GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = offs_m < M
    n_mask = offs_n < width
    target_ptr = targets_ptr + (FIRST_TARGET + target) * TARGET_FIELDS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _low_rank(acc, q_ptr, stride_hm8, offs_m, m_mask, lora_A, width, offs_n, n_mask, tl.load(target_ptr),
                    tl.load(target_ptr + 1), paths_ptr, scaling_ptr, gate_ptr, active_ptr, False, EVERY_ROW, PRECISION, UPCAST,
                    RANK_STEP)
    if HAS_DROPOUT:
        offs_b = tile_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        mask_first = tl.load(target_ptr + 2)
        mask_width = tl.where(mask_first >= 0, width, 0)
        bits = tl.load(mask_ptr + offs_m.to(tl.int64)[:, None] * stride_bm + (mask_first + offs_b)[None, :],
                       mask=m_mask[:, None] & (offs_b * 8 < mask_width)[None, :], other=0)
        acc = tl.where(_unpacked(bits.to(tl.int32), BLOCK_M, BLOCK_N), acc * keep_scale, 0.0)
    if HAS_WEIGHT:
        # Shortcut sources have no base matmul.
        terms = tl.where(target == 0, len(weights), 0)
        for module in range(0, terms):
            N = _pick(out_features, module)
            offs_k = tl.arange(0, BLOCK_K)
            g_ptrs = _pick(grad_outs, module) + offs_m.to(tl.int64)[:, None] * _pick(strides_gm, module) + offs_k[None, :]
            w_ptrs = (_pick(weights, module) + offs_k.to(tl.int64)[:, None] * stride_wn
                      + offs_n.to(tl.int64)[None, :] * stride_wk)
            for first_k in range(0, N, BLOCK_K):
                if EVEN_N:
                    g_tile = tl.load(g_ptrs, mask=m_mask[:, None], other=0.0)
                    w_tile = tl.load(w_ptrs, mask=n_mask[None, :], other=0.0)
                else:
                    k_mask = offs_k < N - first_k
                    g_tile = tl.load(g_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
                    w_tile = tl.load(w_ptrs, mask=n_mask[None, :] & k_mask[:, None], other=0.0)
                acc = tl.dot(_operand(g_tile, UPCAST), _operand(w_tile, UPCAST), acc, input_precision=PRECISION)
                g_ptrs += BLOCK_K
                w_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_wn
    is_stored = m_mask[:, None] & n_mask[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
    if HAS_BASE:
        base_mask = is_stored & (offs_m < tl.where(target == 0, M, 0))[:, None]
        acc += tl.load(bases[0] + offsets, mask=base_mask, other=0.0).to(tl.float32)
    grad_ptr = _pick(grads, target)
    tl.store(grad_ptr + offsets, _cast(acc, grad_ptr.dtype.element_ty, UPCAST), mask=is_stored)


@triton.jit
def _lora_grad_A_kernel(
    grad_A_parts_ptr, sources, q_ptr, mask_ptr, active_ptr, columns_ptr, chunks_ptr,
    M, widths, strides_um, stride_hm8, stride_bm, stride_as, split_rows, keep_scale,
    HAS_DROPOUT: tl.constexpr, EVERY_ROW: tl.constexpr, CONTIGUOUS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """q_p^T drop(u_p) of every path that reads one source, over one range of rows.

    ============ =================== ==================================================
    grad_A_parts [S, sum r K_s]      float32, path p's [r_p, K_s] at its offset, unscaled
    sources[s]   [M, widths[s]]      read once where its columns fit one chunk
    q            [M, H]
    mask         [M, stride_bm]      bytes
    ============ =================== ==================================================

    A program owns BLOCK_K columns of one source, one chunk of at most BLOCK_R packed columns, and split_rows rows.
    """
    split = tl.program_id(2)
    chunk_ptr = chunks_ptr + tl.program_id(1) * CHUNK_FIELDS
    source = tl.load(chunk_ptr)
    width = _pick(widths, source)
    stride_um = _pick(strides_um, source)
    first_k = tl.program_id(0) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    k_mask = offs_k < width
    column, path, row, rank, is_inside, is_computed, records = _column_records(
        columns_ptr, active_ptr, chunk_ptr, EVERY_ROW, CONTIGUOUS, BLOCK_R)
    part_first = tl.load(records + 6, mask=is_inside, other=0).to(tl.int64)
    first = split * split_rows
    end = tl.minimum(first + split_rows, M)
    # Sources differ in width, the grid is that of the widest.
    end = tl.where((tl.max(is_computed.to(tl.int32), 0) > 0) & (first_k < width), end, first)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    u_ptr = _pick(sources, source)
    for first_m in range(first, end, BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M)
        m_mask = offs_m < end
        u_tile = tl.load(u_ptr + offs_m.to(tl.int64)[:, None] * stride_um + offs_k[None, :],
                         mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        if HAS_DROPOUT:
            offs_b = first_k // 8 + tl.arange(0, BLOCK_K // 8)
            bits = tl.load(mask_ptr + offs_m.to(tl.int64)[:, None] * stride_bm + (tl.load(chunk_ptr + 3) + offs_b)[None, :],
                           mask=m_mask[:, None] & (offs_b * 8 < width)[None, :], other=0)
            u_tile = tl.where(_unpacked(bits.to(tl.int32), BLOCK_M, BLOCK_K), u_tile, 0.0)
        q_tile = tl.load(q_ptr + offs_m.to(tl.int64)[:, None] * (8 * stride_hm8) + column[None, :],
                         mask=m_mask[:, None] & is_computed[None, :], other=0.0)
        acc = tl.dot(tl.trans(_operand(u_tile, UPCAST)), _operand(q_tile, UPCAST), acc, input_precision=PRECISION)
    if HAS_DROPOUT:
        acc = acc * keep_scale
    part_ptrs = grad_A_parts_ptr + split.to(tl.int64) * stride_as + (part_first + row.to(tl.int64) * width)[None, :]
    tl.store(part_ptrs + offs_k[:, None], acc, mask=k_mask[:, None] & is_computed[None, :])
