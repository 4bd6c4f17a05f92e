"""Dropout masks as a pure function of (rng, row, column, source), equal on every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One counter yields eight 16-bit
draws, that is eight neighbouring columns. Nothing here reads the global generators except :func:`draw_rng`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK_32 = 0xFFFFFFFF
_ROUNDS = 10


def draw_rng(device: torch.device) -> Tensor:
    """Draw the key of one dropout mask: int64 [1] on ``device``, replayed by activation checkpointing."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> int:
    """Number of the 65536 draws that are dropped."""
    return int(round(65536 * dropout_p))


def dropout_scale(dropout_p: float) -> float:
    """Factor of the kept values; 0 where everything is dropped."""
    threshold = dropout_threshold(dropout_p)
    return 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for every counter, as int64 tensors with values in [0, 2^32).

    Args:
        counter: four int64 tensors that broadcast against each other, values in [0, 2^32).
        key: two int64 tensors, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64: after the mask, both halves are those of the unsigned product.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK_32) ^ c1 ^ k0,
            product_1 & _MASK_32,
            ((product_0 >> 32) & _MASK_32) ^ c3 ^ k1,
            product_0 & _MASK_32,
        )
        k0 = (k0 + _WEYL_0) & _MASK_32
        k1 = (k1 + _WEYL_1) & _MASK_32
    return c0, c1, c2, c3


def dropout_keep(rng: Tensor, rows: int, columns: int, source_id: int, dropout_p: float) -> Tensor:
    """Which elements of a source are kept: bool [rows, columns].

    Args:
        rng: int64 [1].
        source_id: 0 for x, j + 1 for ``sources[j]``.
    """
    device = rng.device
    key = (rng & _MASK_32, (rng >> 32) & _MASK_32)
    blocks = torch.arange((columns + 7) // 8, dtype=torch.int64, device=device)[None, :]
    row_ids = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    zero = torch.zeros((1, 1), dtype=torch.int64, device=device)
    words = philox_4x32_10((blocks + zero, row_ids + zero, zero + source_id, zero), key)
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # (M, K/8, 4)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (M, K/8, 4, 2): the low half first
    return draws.reshape(rows, 8 * blocks.shape[1])[:, :columns] >= dropout_threshold(dropout_p)


def pack_mask(keep: Tensor) -> Tensor:
    """bool [M, K] to uint8 [M, ceil(K / 8)], bit ``c % 8`` from the low end."""
    rows, columns = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -columns % 8)).reshape(rows, (columns + 7) // 8, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (padded.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_mask`: bool [M, columns]."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).bool().reshape(mask.shape[0], mask.shape[1] * 8)[:, :columns]
