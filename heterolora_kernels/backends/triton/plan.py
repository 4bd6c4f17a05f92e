"""Tables that tell the kernels what a group looks like: integers on the device, made once per structure of a group.

They hold shapes and indices, never ranks in use, gates or pointers: an allocation changes nothing here, so nothing is uploaded
in a training step after the first. Records:

    paths     path, rank, first column of hidden, first row of gate; once ordered by output, once by source
    columns   column of hidden, path, row in the path, rank, row of gate, first element of grad_B's parts, of grad_A's parts
    outputs   first and end record in paths, first and end record in columns
    targets   first and end record in paths, first byte in mask (-1: no mask)
    chunks    source or output, first and end record in columns, first byte in mask, 1 for the chunk that writes the mask
    ranges    a chunk of an output's columns: output, first and end record in columns, first column of the output, number
    hidden    by column of hidden: columns of its output, path, row in the path, rank
    works     path, 1 for B, first row, first column, first element of the parts, rank, first row of gate, length of a row
    blocks    path, first row, first and end work of A, of B, first row of stats, first column of hidden, rank
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from heterolora_kernels.ops.schema import hidden_offsets, rank_offsets

PATH_FIELDS = 4
COLUMN_FIELDS = 8
OUTPUT_FIELDS = 4
TARGET_FIELDS = 4
CHUNK_FIELDS = 8
RANGE_FIELDS = 8
HIDDEN_FIELDS = 4
WORK_FIELDS = 8
BLOCK_FIELDS = 16


class Structure(NamedTuple):
    """What the tables depend on; ``widths`` begins with that of x, and a source is its place in it."""

    ranks: tuple[int, ...]
    path_output: tuple[int, ...]
    path_source: tuple[int, ...]
    widths: tuple[int, ...]
    out_features: tuple[int, ...]


class Plan:
    """The tables of one structure on one device, and the sizes that the host needs to launch."""

    def __init__(self, structure: Structure, device: torch.device):
        self._structure, self._device = structure, device
        ranks, outputs, sources = structure.ranks, structure.path_output, structure.path_source
        self._first_columns, self._first_rows = hidden_offsets(ranks), rank_offsets(ranks)
        self.H = self._first_columns[-1]
        self._first_A = _offsets([rank * structure.widths[source + 1] for rank, source in zip(ranks, sources)])
        self._first_B = _offsets([rank * structure.out_features[output] for rank, output in zip(ranks, outputs)])
        self.size_A, self.size_B = self._first_A[-1], self._first_B[-1]
        self._mask_first = self._mask_bytes()
        by_output = [[p for p, output in enumerate(outputs) if output == i] for i in range(len(structure.out_features))]
        by_source = [[p for p, source in enumerate(sources) if source + 1 == s] for s in range(len(structure.widths))]
        self.output_paths, self._output_ranges, self.output_columns, self._output_columns = self._ordered(by_output)
        self.source_paths, self._source_ranges, self.source_columns, self._source_columns = self._ordered(by_source)
        self.hidden = self._table([(structure.out_features[outputs[p]], p, j, rank) for p, rank in enumerate(ranks)
                                   for j in range(self._first_columns[p + 1] - self._first_columns[p])], HIDDEN_FIELDS)
        self.outputs = self._table([(*paths, *columns) for paths, columns in zip(self._output_ranges, self._output_columns)],
                                   OUTPUT_FIELDS)
        self.targets = self._table([(*paths, first) for paths, first in zip(self._source_ranges, self._mask_first)],
                                   TARGET_FIELDS)
        #: Whether the columns of each output, each source are neighbours in hidden.
        self.is_contiguous = {"output": self._are_neighbours(by_output), "source": self._are_neighbours(by_source)}
        #: Most packed columns that one output, one source has.
        self.widest_output = max((end - first for first, end in self._output_columns), default=0)
        self.widest_source = max((end - first for first, end in self._source_columns), default=0)

    def _are_neighbours(self, groups: list[list[int]]) -> bool:
        """Whether the columns of each group of paths follow each other without a gap."""
        return all(self._first_columns[p + 1] == self._first_columns[q] for group in groups for p, q in zip(group, group[1:]))

    def _mask_bytes(self) -> list[int]:
        """First byte of each source in ``mask``, -1 where no path reads it: the layout of ops.schema.mask_offsets."""
        firsts, first = [], 0
        for source, width in enumerate(self._structure.widths):
            is_read = source > 0 or -1 in self._structure.path_source
            firsts.append(first if is_read else -1)
            first += (width + 7) // 8 if is_read else 0
        return firsts

    def _ordered(self, groups: list[list[int]]) -> tuple[Tensor, list, Tensor, list]:
        """Records of paths and of columns, those of one group side by side, with the range that each group has."""
        paths, path_ranges, columns, column_ranges = [], [], [], []
        for group in groups:
            first_path, first_column = len(paths), len(columns)
            for p in group:
                rank, column, row = self._structure.ranks[p], self._first_columns[p], self._first_rows[p]
                paths.append((p, rank, column, row))
                columns += [(column + j, p, j, rank, row + j, self._first_B[p], self._first_A[p])
                            for j in range(self._first_columns[p + 1] - column)]
            path_ranges.append((first_path, len(paths)))
            column_ranges.append((first_column, len(columns)))
        return self._table(paths, PATH_FIELDS), path_ranges, self._table(columns, COLUMN_FIELDS), column_ranges

    def _table(self, records: list[tuple[int, ...]], fields: int) -> Tensor:
        flat = [value for record in records for value in (*record, *[0] * (fields - len(record)))]
        return torch.tensor(flat or [0] * fields, dtype=torch.int32, device=self._device)

    @functools.cached_property
    def _chunks(self) -> dict[tuple[str, int], tuple[Tensor, int]]:
        return {}

    def chunks(self, by: str, block: int, every: bool = False) -> tuple[Tensor, int]:
        """Packed columns cut in pieces of at most ``block``: the table and how many there are.

        Args:
            by: "source" or "output".
            every: also a piece without columns for each source that is read and has none: its mask has to be written.
        """
        key = (by, block, every)
        if key not in self._chunks:
            ranges = self._source_columns if by == "source" else self._output_columns
            records = []
            for index, (first, end) in enumerate(ranges):
                mask_first = self._mask_first[index] if by == "source" else -1
                starts = list(range(first, end, block)) or ([first] if every and mask_first >= 0 else [])
                records += [(index, start, min(start + block, end), max(mask_first, 0), int(start == first))
                            for start in starts]
            self._chunks[key] = self._table(records, CHUNK_FIELDS), len(records)
        return self._chunks[key]

    @functools.cached_property
    def _ranges(self) -> dict[tuple[int, int], tuple[Tensor, int]]:
        return {}

    def ranges(self, block: int, width: int) -> tuple[Tensor, int]:
        """Outputs cut in ranges of ``width`` columns, for each chunk of ``block`` packed ones: the table and its length."""
        key = (block, width)
        if key not in self._ranges:
            ranges = [(index, start, min(start + block, end), first_n, first_n // width)
                      for index, (first, end) in enumerate(self._output_columns) for start in range(first, end, block)
                      for first_n in range(0, self._structure.out_features[index], width)]
            self._ranges[key] = self._table(ranges, RANGE_FIELDS), len(ranges)
        return self._ranges[key]

    @functools.cached_property
    def _works(self) -> dict[tuple, tuple[Tensor, int, Tensor, int]]:
        return {}

    def works(self, block_j: int, block_n: int, wants_A: bool, wants_B: bool) -> tuple[Tensor, int, Tensor, int]:
        """Tiles of the adapters' gradients and the blocks of rows that they belong to: two tables and their lengths."""
        key = (block_j, block_n, wants_A, wants_B)
        if key not in self._works:
            works, blocks = [], []
            s = self._structure
            for p, rank in enumerate(s.ranks):
                sides = ((0, wants_A, s.widths[s.path_source[p] + 1], self._first_A[p]),
                         (1, wants_B, s.out_features[s.path_output[p]], self._first_B[p]))
                for row in range(0, rank, block_j):
                    ends = [len(works)]
                    for is_b, wanted, length, first in sides:
                        if wanted:
                            works += [(p, is_b, row, column, first, rank, self._first_rows[p], length)
                                      for column in range(0, length, block_n)]
                        ends.append(len(works))
                    blocks.append((p, row, ends[0], ends[1], ends[1], ends[2], self._first_rows[p], self._first_columns[p],
                                   rank))
            self._works[key] = self._table(works, WORK_FIELDS), len(works), self._table(blocks, BLOCK_FIELDS), len(blocks)
        return self._works[key]


def _offsets(sizes: list[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


@functools.lru_cache(maxsize=4096)
def plan_of(structure: Structure, device: torch.device) -> Plan:
    """The plan of a structure on a device, made at its first use."""
    return Plan(structure, device)
