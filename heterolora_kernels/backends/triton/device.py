"""Device functions that several kernels share: picks among arguments, dropout bits, the low-rank part of a matmul.

Nothing here is launched. The records that the functions read are described in plan.py. A mask is never combined with a scalar
condition by ``&``, from which the interpreter makes integers that it then refuses as a mask: the condition goes into a bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heterolora_kernels.backends.triton import plan

#: Integers per record of the tables that plan.py writes.
PATH_FIELDS = tl.constexpr(plan.PATH_FIELDS)
COLUMN_FIELDS = tl.constexpr(plan.COLUMN_FIELDS)
CHUNK_FIELDS = tl.constexpr(plan.CHUNK_FIELDS)
OUTPUT_FIELDS = tl.constexpr(plan.OUTPUT_FIELDS)
RANGE_FIELDS = tl.constexpr(plan.RANGE_FIELDS)
HIDDEN_FIELDS = tl.constexpr(plan.HIDDEN_FIELDS)
TARGET_FIELDS = tl.constexpr(plan.TARGET_FIELDS)
WORK_FIELDS = tl.constexpr(plan.WORK_FIELDS)
BLOCK_FIELDS = tl.constexpr(plan.BLOCK_FIELDS)


@triton.jit
def _pick(values, index):
    """``values[index]`` of a tuple whose index is known on the device only; keeps the divisibility that all share."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def _operand(tile, UPCAST: tl.constexpr):
    """An operand of tl.dot; the interpreter multiplies 16-bit types wrongly and gets float32."""
    if UPCAST:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def _cast(tile, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """The tile in another dtype, rounded to nearest even; the interpreter cuts bfloat16 off, so there it is rounded before."""
    if UPCAST and dtype == tl.bfloat16:
        value = tile.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        # The sum would carry a NaN into the sign.
        return tl.where(value == value, rounded, value).to(dtype)
    else:
        return tile.to(dtype)


@triton.jit
def _tile_of_group(tile, sizes, num_m, BLOCK_N: tl.constexpr):
    """Which entry of ``sizes`` a tile belongs to, and its number within that entry."""
    entry = 0
    first = 0
    end = 0
    for i in tl.static_range(0, len(sizes) - 1):
        end += num_m * tl.cdiv(sizes[i], BLOCK_N)
        is_later = tile >= end
        entry = tl.where(is_later, i + 1, entry)
        first = tl.where(is_later, end, first)
    return entry, tile - first


@triton.jit
def _grouped_order(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile; GROUP_M neighbouring rows share their column's operand in the L2 cache."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    inside = tile % per_group
    return first_m + inside % size_m, inside // size_m


@triton.jit
def _column_records(columns_ptr, active_ptr, chunk_ptr, EVERY_ROW: tl.constexpr, CONTIGUOUS: tl.constexpr,
                    BLOCK_R: tl.constexpr):
    """The packed columns of a chunk: hidden column, path, row in the path, rank, inside the chunk, computed; and the records.

    CONTIGUOUS: they are neighbours in hidden, which the compiler is told so that it moves 16 bytes at once.
    """
    first = tl.load(chunk_ptr + 1)
    offs = first + tl.arange(0, BLOCK_R)
    is_inside = offs < tl.load(chunk_ptr + 2)
    records = columns_ptr + offs * COLUMN_FIELDS
    path = tl.load(records + 1, mask=is_inside, other=0)
    row = tl.load(records + 2, mask=is_inside, other=0)
    rank = tl.load(records + 3, mask=is_inside, other=0)
    if CONTIGUOUS:
        column = tl.multiple_of(tl.load(columns_ptr + first * COLUMN_FIELDS), 8) + tl.arange(0, BLOCK_R)
    else:
        column = tl.load(records, mask=is_inside, other=0)
    limit = rank
    if not EVERY_ROW:
        limit = tl.minimum(rank, tl.load(active_ptr + path, mask=is_inside, other=0))
    return column, path, row, rank, is_inside, is_inside & (row < limit), records


@triton.jit
def _row_pointers(matrices, path, row, stride, ALIGNED: tl.constexpr):
    """Pointers to row ``row`` of ``matrices[path]``, element by element; ALIGNED: every row begins at 16 bytes."""
    offset = row.to(tl.int64) * stride
    pointers = matrices[0] + offset
    for i in tl.static_range(1, len(matrices)):
        pointers = tl.where(path == i, matrices[i] + offset, pointers)
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _keep_bits(seed, offs_m, first_block, width, source, threshold, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr):
    """Dropout decisions of eight columns each: int32 [BLOCK_M, BLOCKS], bit c % 8; 0 from column ``width`` on.

    Philox4x32-10 with the counter (column // 8, row, source, 0): the rule of ops/rng.py, so tiles do not show in it.
    """
    blocks = first_block + tl.arange(0, BLOCKS)
    zeros = tl.zeros((BLOCK_M, BLOCKS), tl.int32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, zeros + blocks[None, :], zeros + offs_m[:, None], zeros + source, zeros, 10)
    bits = _two_bits(word_0, threshold, 0) | _two_bits(word_1, threshold, 2)
    bits |= _two_bits(word_2, threshold, 4) | _two_bits(word_3, threshold, 6)
    inside = tl.minimum(tl.maximum(width - 8 * blocks, 0), 8)
    return bits & ((1 << inside) - 1)[None, :]


@triton.jit
def _two_bits(word, threshold, SHIFT: tl.constexpr):
    """The decisions of both halves of a word, the low half first."""
    low = (word & 0xFFFF).to(tl.int32) >= threshold
    high = (word >> 16).to(tl.int32) >= threshold
    return (low.to(tl.int32) << SHIFT) | (high.to(tl.int32) << (SHIFT + 1))


@triton.jit
def _unpacked(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_M, BLOCK_K // 8] to bool [BLOCK_M, BLOCK_K]."""
    spread = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(spread, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def _low_rank(acc, left_ptr, stride_lm8, offs_m, m_mask, rights, width, offs_n, n_mask, first_path, end_path, paths_ptr,
              scaling_ptr, gate_ptr, active_ptr, RIGHT_IS_B: tl.constexpr, EVERY_ROW: tl.constexpr,
              PRECISION: tl.constexpr, UPCAST: tl.constexpr, RANK_STEP: tl.constexpr):
    """acc + sum over paths of left_p @ (scaling_p * gate_p * right_p), in steps of RANK_STEP ranks.

    left_p [M, r_p] are columns of ``left_ptr``, whose rows are 8 * ``stride_lm8`` long; right_p [r_p, N] is lora_B[p] transposed,
    or lora_A[p] whose rows are ``width`` long. Closed ranks are masked at the loads: their numbers may be NaN and 0 * NaN is NaN.
    """
    for index in range(first_path, end_path):
        record = paths_ptr + index * PATH_FIELDS
        path = tl.load(record)
        rank = tl.load(record + 1)
        column = tl.multiple_of(tl.load(record + 2), 8)
        first_row = tl.load(record + 3)
        scale = tl.load(scaling_ptr + path)
        limit = rank
        if not EVERY_ROW:
            limit = tl.minimum(rank, tl.load(active_ptr + path))
        right_ptr = _pick(rights, path)
        for step in range(0, limit, RANK_STEP):
            offs_j = step + tl.arange(0, RANK_STEP)
            gate = tl.load(gate_ptr + first_row + offs_j, mask=offs_j < limit, other=0.0)
            is_open = gate != 0.0
            left = tl.load(left_ptr + offs_m.to(tl.int64)[:, None] * (8 * stride_lm8) + (column + offs_j)[None, :],
                           mask=m_mask[:, None] & is_open[None, :], other=0.0)  # (BLOCK_M, RANK_STEP)
            if RIGHT_IS_B:
                right_ptrs = right_ptr + offs_n.to(tl.int64)[None, :] * rank + offs_j[:, None]
            else:
                right_ptrs = right_ptr + offs_j.to(tl.int64)[:, None] * width + offs_n[None, :]
            right = tl.load(right_ptrs, mask=is_open[:, None] & n_mask[None, :], other=0.0)  # (RANK_STEP, BLOCK_N)
            right = _cast(right.to(tl.float32) * (gate * scale)[:, None], left.dtype, UPCAST)
            acc = tl.dot(_operand(left, UPCAST), _operand(right, UPCAST), acc, input_precision=PRECISION)
    return acc
