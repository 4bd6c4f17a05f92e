"""Kernels of the forward: the low-rank activations of all paths, then the base matmul whose accumulator they enter.

Sizes: M tokens, K in_features (K_s of a source), N_i out_features of linear i, H columns of ``hidden``. Accumulation is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heterolora_kernels.backends.triton.device import (
    CHUNK_FIELDS,
    OUTPUT_FIELDS,
    _cast,
    _column_records,
    _grouped_order,
    _keep_bits,
    _low_rank,
    _operand,
    _pick,
    _row_pointers,
    _tile_of_group,
    _unpacked,
)


@triton.jit(do_not_specialize=["threshold"])
def _lora_hidden_kernel(
    hidden_ptr, mask_ptr, sources, lora_A, active_ptr, rng_ptr, columns_ptr, chunks_ptr,
    M, widths, strides_um, stride_hm8, stride_bm, threshold, keep_scale,
    EVERY_ROW: tl.constexpr, HAS_DROPOUT: tl.constexpr, STORES_MASK: tl.constexpr, CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """hidden[:, columns of p] = drop(u_p) A_p^T for every path p that reads one source.

    ========== ==================== ==================================================
    hidden     [M, H]               every column is written: 0 where not computed
    mask       [M, stride_bm] bytes bit c % 8 of a source's byte c // 8: 1 = kept
    sources[s] [M, widths[s]]       x is source 0; row stride strides_um[s]
    lora_A[p]  [r_p, widths[s]]
    ========== ==================== ==================================================

    A program owns BLOCK_M rows and one chunk of at most BLOCK_R columns of one source: the source is read once where its
    columns fit one chunk.
    """
    chunk_ptr = chunks_ptr + tl.program_id(1) * CHUNK_FIELDS
    source = tl.load(chunk_ptr)
    mask_first = tl.load(chunk_ptr + 3)
    u_ptr = _pick(sources, source)
    width = _pick(widths, source)
    stride_um = _pick(strides_um, source)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = offs_m < M
    column, path, row, rank, is_inside, is_computed, _ = _column_records(
        columns_ptr, active_ptr, chunk_ptr, EVERY_ROW, CONTIGUOUS, BLOCK_R)
    a_rows = _row_pointers(lora_A, path, row, width, ALIGNED)  # (BLOCK_R)
    end = tl.where(tl.max(is_computed.to(tl.int32), 0) > 0, width, 0)
    if STORES_MASK:
        mask_width = tl.where(tl.load(chunk_ptr + 4) == 1, width, 0)
        end = tl.maximum(end, mask_width)
    if HAS_DROPOUT:
        seed = tl.load(rng_ptr)
    u_rows = u_ptr + offs_m.to(tl.int64) * stride_um
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first_k in range(0, end, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        k_mask = offs_k < width
        u_tile = tl.load(u_rows[:, None] + offs_k[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        a_tile = tl.load(a_rows[None, :] + offs_k[:, None], mask=is_computed[None, :] & k_mask[:, None], other=0.0)
        if HAS_DROPOUT:
            bits = _keep_bits(seed, offs_m, first_k // 8, width, source, threshold, BLOCK_M, BLOCK_K // 8)
            if STORES_MASK:
                offs_b = first_k // 8 + tl.arange(0, BLOCK_K // 8)
                bytes_ptrs = mask_ptr + offs_m.to(tl.int64)[:, None] * stride_bm + (mask_first + offs_b)[None, :]
                is_stored = m_mask[:, None] & (offs_b * 8 < mask_width)[None, :]
                tl.store(bytes_ptrs, bits.to(tl.uint8), mask=is_stored)
            u_tile = tl.where(_unpacked(bits, BLOCK_M, BLOCK_K), u_tile, 0.0)
        a_tile = _cast(a_tile, u_tile.dtype, UPCAST)
        acc = tl.dot(_operand(u_tile, UPCAST), _operand(a_tile, UPCAST), acc, input_precision=PRECISION)
    if HAS_DROPOUT:
        acc = acc * keep_scale
    # A column that is not computed is 0 and not 0 times whatever x holds.
    acc = tl.where(is_computed[None, :], acc, 0.0)
    hidden_ptrs = hidden_ptr + offs_m.to(tl.int64)[:, None] * (8 * stride_hm8) + column[None, :]
    tl.store(hidden_ptrs, _cast(acc, hidden_ptr.dtype.element_ty, UPCAST), mask=m_mask[:, None] & is_inside[None, :])


@triton.jit
def _lora_linear_forward_kernel(
    outs, hidden_ptr, x_ptr, weights, biases, bases, lora_A, lora_B, scaling_ptr, gate_ptr, active_ptr, paths_ptr,
    columns_ptr, outputs_ptr,
    M, K, out_features, stride_xm, stride_wn, stride_wk, stride_hm8, strides_base,
    HAS_WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, BIAS_BITS: tl.constexpr, HAS_PATHS: tl.constexpr,
    ONE_PASS: tl.constexpr, STORES_HIDDEN: tl.constexpr, EVERY_ROW: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, RANK_STEP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """outs[i] = sum over paths of hidden_p (scaling_p gate_p B_p)^T  +  x W_i^T + bias_i  (or + base_i), stored once.

    ========== ============== ===========================================================
    outs[i]    [M, N_i]       contiguous
    hidden     [M, H]         read; with ONE_PASS computed here (all paths read x, no dropout)
    x          [M, K]
    weights[i] [N_i, K]       one pair of strides for the group
    biases[i]  [N_i]          read where bit i of BIAS_BITS is set
    bases[i]   [M, N_i]       outputs that something else computed (HAS_BASE)
    lora_B[p]  [N_i, r_p]
    ========== ============== ===========================================================

    A program owns one [BLOCK_M, BLOCK_N] tile of one output, or with PERSISTENT every num_programs-th of them. The low-rank part
    comes first, so the accumulator of the K loop begins with it; with ONE_PASS hidden takes shape beside the K loop and enters
    after it. With TMA, x and weights contiguous in K are read through tensor descriptors (sm_90 and later).
    """
    if PERSISTENT:
        tiles = 0
        for i in tl.static_range(len(out_features)):
            tiles += tl.cdiv(M, BLOCK_M) * tl.cdiv(out_features[i], BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _forward_tile(tile, outs, hidden_ptr, x_ptr, weights, biases, bases, lora_A, lora_B, scaling_ptr, gate_ptr,
                          active_ptr, paths_ptr, columns_ptr, outputs_ptr, M, K, out_features, stride_xm, stride_wn,
                          stride_wk, stride_hm8, strides_base, HAS_WEIGHT, HAS_BASE, BIAS_BITS, HAS_PATHS, ONE_PASS,
                          STORES_HIDDEN, EVERY_ROW, EVEN_K, ALIGNED, TMA, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
                          BLOCK_R, GROUP_M, RANK_STEP)
    else:
        _forward_tile(tl.program_id(0), outs, hidden_ptr, x_ptr, weights, biases, bases, lora_A, lora_B, scaling_ptr,
                      gate_ptr, active_ptr, paths_ptr, columns_ptr, outputs_ptr, M, K, out_features, stride_xm, stride_wn,
                      stride_wk, stride_hm8, strides_base, HAS_WEIGHT, HAS_BASE, BIAS_BITS, HAS_PATHS, ONE_PASS,
                      STORES_HIDDEN, EVERY_ROW, EVEN_K, ALIGNED, TMA, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
                      BLOCK_R, GROUP_M, RANK_STEP)


@triton.jit
def _forward_tile(
    tile,
    outs, hidden_ptr, x_ptr, weights, biases, bases, lora_A, lora_B, scaling_ptr, gate_ptr, active_ptr, paths_ptr,
    columns_ptr, outputs_ptr,
    M, K, out_features, stride_xm, stride_wn, stride_wk, stride_hm8, strides_base,
    HAS_WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, BIAS_BITS: tl.constexpr, HAS_PATHS: tl.constexpr,
    ONE_PASS: tl.constexpr, STORES_HIDDEN: tl.constexpr, EVERY_ROW: tl.constexpr, EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, RANK_STEP: tl.constexpr,
):
    """One tile of _lora_linear_forward_kernel."""
    num_m = tl.cdiv(M, BLOCK_M)
    module, tile = _tile_of_group(tile, out_features, num_m, BLOCK_N)
    N = _pick(out_features, module)
    tile_m, tile_n = _grouped_order(tile, num_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = offs_m < M
    n_mask = offs_n < N
    output_ptr = outputs_ptr + module * OUTPUT_FIELDS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_PATHS and not ONE_PASS:
        acc = _low_rank(acc, hidden_ptr, stride_hm8, offs_m, m_mask, lora_B, 0, offs_n, n_mask, tl.load(output_ptr),
                        tl.load(output_ptr + 1), paths_ptr, scaling_ptr, gate_ptr, active_ptr, True, EVERY_ROW, PRECISION,
                        UPCAST, RANK_STEP)
    if ONE_PASS:
        # An output's record ends as a chunk's begins.
        column, path, row, rank, is_inside, is_computed, records = _column_records(
            columns_ptr, active_ptr, output_ptr + 1, EVERY_ROW, False, BLOCK_R)
        a_ptrs = _row_pointers(lora_A, path, row, K, ALIGNED)[None, :] + tl.arange(0, BLOCK_K)[:, None]
        h_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if HAS_WEIGHT:
        w_ptr = _pick(weights, module)
        offs_k = tl.arange(0, BLOCK_K)
        if TMA:
            x_rows = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
            w_rows = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        else:
            x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
            w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
        for first_k in range(0, K, BLOCK_K):
            if TMA:
                # What lies outside the descriptors' shapes reads as 0.
                x_tile = x_rows.load([tile_m * BLOCK_M, first_k])
                w_tile = tl.trans(w_rows.load([tile_n * BLOCK_N, first_k]))
            elif EVEN_K:
                x_tile = tl.load(x_ptrs, mask=m_mask[:, None], other=0.0)
                w_tile = tl.load(w_ptrs, mask=n_mask[None, :], other=0.0)
            else:
                k_mask = offs_k < K - first_k
                x_tile = tl.load(x_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
                w_tile = tl.load(w_ptrs, mask=n_mask[None, :] & k_mask[:, None], other=0.0)
            acc = tl.dot(_operand(x_tile, UPCAST), _operand(w_tile, UPCAST), acc, input_precision=PRECISION)
            if ONE_PASS:
                a_mask = is_computed[None, :] & (offs_k < K - first_k)[:, None]
                a_tile = _cast(tl.load(a_ptrs, mask=a_mask, other=0.0), x_tile.dtype, UPCAST)
                h_acc = tl.dot(_operand(x_tile, UPCAST), _operand(a_tile, UPCAST), h_acc, input_precision=PRECISION)
                a_ptrs += BLOCK_K
            if not TMA:
                x_ptrs += BLOCK_K
                w_ptrs += BLOCK_K * stride_wk
    if ONE_PASS:
        gate_ptrs = gate_ptr + tl.load(records + 4, mask=is_computed, other=0)
        gate = tl.load(gate_ptrs, mask=is_computed, other=0.0)
        scale = tl.load(scaling_ptr + path, mask=is_computed, other=0.0)
        is_open = gate != 0.0
        hidden = _cast(tl.where(is_computed[None, :], h_acc, 0.0), x_ptr.dtype.element_ty, UPCAST)
        if STORES_HIDDEN:
            hidden_ptrs = hidden_ptr + offs_m.to(tl.int64)[:, None] * (8 * stride_hm8) + column[None, :]
            # Every tile of a row block computes the same bits; the first stores them.
            tl.store(hidden_ptrs, hidden, mask=(offs_m < tl.where(tile_n == 0, M, 0))[:, None] & is_inside[None, :])
        b_ptrs = _b_pointers(lora_B, path, row, rank, offs_n)
        right = tl.load(b_ptrs, mask=is_open[:, None] & n_mask[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
        right = _cast(right.to(tl.float32) * (gate * scale)[:, None], hidden.dtype, UPCAST)
        hidden = tl.where(is_open[None, :], hidden, 0.0)
        acc = tl.dot(_operand(hidden, UPCAST), _operand(right, UPCAST), acc, input_precision=PRECISION)
    if BIAS_BITS != 0:
        bias_end = tl.where(((BIAS_BITS >> module) & 1) != 0, N, 0)
        acc += tl.load(_pick(biases, module) + offs_n, mask=offs_n < bias_end, other=0.0).to(tl.float32)[None, :]
    is_stored = m_mask[:, None] & n_mask[None, :]
    if HAS_BASE:
        base_ptrs = _pick(bases, module) + offs_m.to(tl.int64)[:, None] * _pick(strides_base, module) + offs_n[None, :]
        acc += tl.load(base_ptrs, mask=is_stored, other=0.0).to(tl.float32)
    out_ptr = _pick(outs, module)
    tl.store(out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], _cast(acc, out_ptr.dtype.element_ty, UPCAST),
             mask=is_stored)


@triton.jit
def _b_pointers(lora_B, path, row, rank, offs_n):
    """Pointers to column ``row`` of lora_B[path], one column a packed rank: [len(path), len(offs_n)]."""
    offset = offs_n.to(tl.int64)[None, :] * rank[:, None] + row[:, None]
    pointers = lora_B[0] + offset
    for i in tl.static_range(1, len(lora_B)):
        pointers = tl.where((path == i)[:, None], lora_B[i] + offset, pointers)
    return pointers
