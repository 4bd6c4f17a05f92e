"""The dropout generator: Philox's known answers, the mask rule, packing, and the key's draw."""

import pytest
import torch
from helpers_op import RNG, keep_matrix, packed_bytes, philox

from heterolora_kernels.ops import rng

# Random123 1.14, tests/kat_vectors, philox4x32 10.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
           (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
}


def _words(counter, key):
    words = rng.philox_4x32_10(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    return tuple(int(word) for word in words)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert _words(counter, key) == expected


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_of_the_tests_known_answers(counter, key, expected):
    assert philox(counter, key) == expected


def test_philox_broadcasts_its_counters():
    words = rng.philox_4x32_10((torch.arange(3)[None, :], torch.arange(2)[:, None], torch.tensor(5), torch.tensor(0)),
                               (torch.tensor([0x89ABCDEF]), torch.tensor([0x01234567])))
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    assert words.shape == (2, 3, 4)
    for row in range(2):
        for block in range(3):
            assert tuple(words[row, block].tolist()) == philox((block, row, 5, 0), (0x89ABCDEF, 0x01234567))


@pytest.mark.parametrize("key", [0, RNG, 2**63 - 1, -1, -0x1234_5678_9ABC_DEF1],
                         ids=["zero", "typical", "largest", "minus_one", "negative"])
def test_keep_equals_the_rule_for_any_key(key):
    keep = rng.dropout_keep(torch.tensor([key]), 3, 19, 2, 0.5)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, keep_matrix(key, 3, 19, 2, 0.5))


@pytest.mark.parametrize("rows, columns, source_id", [(0, 5, 0), (4, 0, 0), (1, 1, 0), (5, 8, 1), (2, 23, 3)],
                         ids=["no_rows", "no_columns", "one", "eight_columns", "odd_columns"])
@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 1 / 3, 0.9, 1.0], ids=str)
def test_keep_equals_the_rule_for_any_size(rows, columns, source_id, dropout_p):
    keep = rng.dropout_keep(torch.tensor([RNG]), rows, columns, source_id, dropout_p)
    assert torch.equal(keep, keep_matrix(RNG, rows, columns, source_id, dropout_p))


def test_keep_known_bytes():
    keep = rng.dropout_keep(torch.tensor([0x0123456789ABCDEF]), 3, 20, 1, 0.5)
    assert rng.pack_mask(keep).tolist() == [[87, 127, 3], [144, 26, 3], [241, 171, 6]]


def test_keep_known_draws():
    # Key 0, row 0, source 0: the words of the first known answer, low halves first.
    draws = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
    for column, draw in enumerate(draws):
        kept, lost = draw / 65536, (draw + 1) / 65536
        assert rng.dropout_keep(torch.tensor([0]), 1, 8, 0, kept)[0, column]
        assert not rng.dropout_keep(torch.tensor([0]), 1, 8, 0, lost)[0, column]


def test_keep_of_a_row_does_not_depend_on_the_other_sizes():
    small = rng.dropout_keep(torch.tensor([RNG]), 2, 9, 0, 0.4)
    large = rng.dropout_keep(torch.tensor([RNG]), 7, 40, 0, 0.4)
    assert torch.equal(large[:2, :9], small)


def test_keep_differs_between_sources_rows_and_keys():
    base = rng.dropout_keep(torch.tensor([RNG]), 2, 64, 0, 0.5)
    assert not torch.equal(base, rng.dropout_keep(torch.tensor([RNG]), 2, 64, 1, 0.5))
    assert not torch.equal(base, rng.dropout_keep(torch.tensor([RNG + 1]), 2, 64, 0, 0.5))
    assert not torch.equal(base, rng.dropout_keep(torch.tensor([RNG + 2**32]), 2, 64, 0, 0.5))
    assert not torch.equal(base[0], base[1])


@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.8], ids=str)
def test_keep_frequency(dropout_p):
    keep = rng.dropout_keep(torch.tensor([RNG]), 400, 500, 0, dropout_p)
    # 200,000 draws: five standard deviations are at most 0.0056.
    assert abs(keep.double().mean().item() - (1 - dropout_p)) < 0.0056


def test_keep_of_p_one_drops_everything():
    assert not rng.dropout_keep(torch.tensor([RNG]), 3, 50, 0, 1.0).any()
    assert rng.dropout_scale(1.0) == 0.0


@pytest.mark.parametrize("dropout_p, threshold, scale", [(0.0, 0, 1.0), (0.5, 32768, 2.0), (0.1, 6554, 65536 / 58982),
                                                         (1 - 1e-9, 65536, 0.0)],
                         ids=["none", "half", "tenth", "nearly_one"])
def test_threshold_and_scale(dropout_p, threshold, scale):
    assert rng.dropout_threshold(dropout_p) == threshold
    assert rng.dropout_scale(dropout_p) == scale


@pytest.mark.parametrize("rows, columns", [(0, 7), (3, 0), (1, 1), (4, 8), (3, 21)],
                         ids=["no_rows", "no_columns", "one", "one_byte", "odd"])
def test_pack_mask_layout_and_round_trip(rows, columns):
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) < 0.5
    packed = rng.pack_mask(keep)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 8))
    assert torch.equal(packed, packed_bytes(keep))
    assert torch.equal(rng.unpack_mask(packed, columns), keep)


def test_unpack_mask_of_a_slice():
    keep = torch.rand(3, 29, generator=torch.Generator().manual_seed(4)) < 0.5
    assert torch.equal(rng.unpack_mask(rng.pack_mask(keep)[:, 1:3], 13), keep[:, 8:21])


def test_draw_rng_replays_with_the_seed():
    torch.manual_seed(5)
    first, second = rng.draw_rng(torch.device("cpu")), rng.draw_rng(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(rng.draw_rng(torch.device("cpu")), first)
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert not torch.equal(first, second)


def test_draw_rng_uses_both_halves_of_the_key():
    torch.manual_seed(6)
    keys = torch.cat([rng.draw_rng(torch.device("cpu")) for _ in range(16)])
    assert (keys >= 0).all()
    assert len(set((keys >> 32).tolist())) == 16 and len(set((keys & 0xFFFFFFFF).tolist())) == 16


def test_masks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    rng.dropout_keep(torch.tensor([RNG]), 3, 9, 0, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
