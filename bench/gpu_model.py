"""Bytes and FLOPs of every kernel that the Triton backend launches, and the time an H100 would need: modelled, not measured.

The launches are those of the backend itself, taken on tensors without storage (backends/triton/builds.py), so a change of a
tile, a split or a kernel shows here without a GPU. Three amounts of traffic are kept apart:

    issued      the unmasked elements of every load and store that the programs execute, re-reads by several programs
                counted; tests/triton_model_interpreted.py counts the same in Triton's interpreter
    compulsory  each tensor that a kernel touches once per kernel: what HBM moves where L2 absorbs the re-reads
    swept       compulsory, and a source again for every further chunk of packed columns: a read of the whole tensor later,
                which L2 (50 MB) absorbs only as far as those programs happen to run side by side

A kernel takes the longest of compulsory / 3.0 TB/s, FLOPs of its tl.dot tiles (padding included) / 800 TFLOP/s, and the
integer work of Philox; kernels follow each other, launches are free. Not modelled: the quality of the matmul itself, latency,
what L2 and shared memory deliver, the overlap of kernels. Every path is taken to be fully active with an open gate.

    python -m bench.gpu_model --help
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterolora_kernels import _env

if _env.triton_not_installed():
    raise ImportError(f"bench.gpu_model takes its launches from the Triton backend: {_env.triton_not_installed()}")

from bench.kernel_costs import Cost, cost_of, structure_of  # noqa: E402 - needs triton
from heterolora_kernels.backends.triton.builds import Scenario, launches  # noqa: E402

SHAPES = {"4096 -> 4096": (4096, (4096,)), "4096 -> 14336": (4096, (14336,)), "14336 -> 4096": (14336, (4096,)),
          "q/k/v 4096 -> 4096 + 1024 + 1024": (4096, (4096, 1024, 1024))}
RANKS = (8, 16, 64)
DROPOUTS = (0.0, 0.1)
FORWARD_ROLES = ("hidden", "forward", "delta")


def matmul_of_torch(scenario: Scenario, role: str, m: int, n: int, k: int) -> Cost:
    """A base matmul [m, k] x [k, n] that torch computes: each tensor once."""
    size = scenario.dtype.itemsize
    cost = Cost("torch matmul", role)
    cost.load("x", m * k, m * k, size)
    cost.load("weights", n * k, n * k, size)
    cost.store("outs", m * n, m * n, size)
    cost.dot(1, m, n, k)
    return cost


def costs_of(scenario: Scenario, arch: int | str = 90) -> list[Cost]:
    """Every launch of a forward and a backward of the scenario, in order; matmuls that the table leaves to cuBLAS included."""
    found = []
    for launch in launches(scenario, arch):
        if not scenario.is_delta and launch.role == "delta":
            found += [matmul_of_torch(scenario, "forward", scenario.rows, n, scenario.width) for n in scenario.out_features]
        if not scenario.is_delta and launch.role == "grad_low_rank":
            found += [matmul_of_torch(scenario, "grad_x", scenario.rows, scenario.width, n) for n in scenario.out_features]
        found.append(cost_of(launch, structure_of(scenario)))
    return found


def is_forward(cost: Cost) -> bool:
    return cost.role in FORWARD_ROLES


def two_pass_bound(scenario: Scenario) -> tuple[int, int]:
    """Bytes that a two-pass forward, and its backward, move if every tensor of a pass is read or written once.

    With s bytes per element of x, a per element of an adapter, M rows, R the sum of ranks (not padded), N the sum of
    out_features, K_s the width of a source (x among them) that a path reads, K the width of x, P = sum of K_s r and N_i r:

        forward   s sum_s M K_s + a sum_s r K_s + s M R + [p > 0] sum_s M ceil(K_s / 8)               hidden
                  + s (M K + N K + M N) + s M R + a sum r N_i                                         fused linear
        backward  s M N + 2 s M R + a sum r N_i                                                       q and grad_B
                  + s (M N + N K + M K) + s sum_foreign M K_s + s M R + a sum r K_s + [p > 0] mask    grad_x
                  + s sum_s M K_s + s M R + [p > 0] mask + a P                                        grad_A, and both gradients

    Partial sums, statistics, tables and the padding of hidden to multiples of 8 columns are not in it: they are overhead.
    """
    s, a, M, K = scenario.dtype.itemsize, scenario.adapter_dtype.itemsize, scenario.rows, scenario.width
    N, widths = sum(scenario.out_features), (*scenario.source_widths, K)
    read = {source for _, _, source in scenario.paths}
    read_width = sum(widths[source] for source in read)
    size_A = sum(rank * widths[source] for rank, _, source in scenario.paths)
    size_B = sum(rank * scenario.out_features[output] for rank, output, _ in scenario.paths)
    R = sum(rank for rank, _, _ in scenario.paths)
    mask = sum(M * ((widths[source] + 7) // 8) for source in read) if scenario.dropout_p > 0 else 0
    base = s * (M * K + N * K + M * N)
    forward = s * M * read_width + a * size_A + s * M * R + mask + base + s * M * R + a * size_B
    backward = (s * M * N + 2 * s * M * R + a * size_B + base + s * M * sum(scenario.source_widths) + s * M * R + a * size_A
                + mask + s * M * read_width + s * M * R + mask + a * (size_A + size_B))
    return forward, backward


@dataclass
class Row:
    """One scenario of the table: what it launches, moves and takes, beside the base matmul and the bound."""

    shape: str
    scenario: Scenario
    costs: list[Cost]

    def launches(self) -> tuple[int, int]:
        """Of a forward, of a backward."""
        forward = sum(map(is_forward, self.costs))
        return forward, len(self.costs) - forward

    def over_bound(self, amount: str = "compulsory") -> float:
        """Bytes of forward and backward over the two-pass bound; "swept" and "without_partials" count more or less."""
        moved = sum(cost.compulsory for cost in self.costs)
        moved += sum(cost.again for cost in self.costs) if amount == "swept" else 0
        moved -= sum(cost.partials for cost in self.costs) if amount == "without_partials" else 0
        return moved / sum(two_pass_bound(self.scenario))

    def over_base(self, forward_only: bool) -> float:
        """Modelled time over that of the base matmul (and of its grad_x)."""
        s = self.scenario
        base = sum(matmul_of_torch(s, "forward", s.rows, n, s.width).seconds for n in s.out_features)
        # Both matmuls of a step have the same sizes.
        base *= 1 if forward_only else 2
        return sum(cost.seconds for cost in self.costs if is_forward(cost) or not forward_only) / base

    def as_json(self) -> dict[str, Any]:
        s, (forward, backward) = self.scenario, two_pass_bound(self.scenario)
        return {
            "modelled": True, "shape": self.shape, "rows": s.rows, "width": s.width, "out_features": list(s.out_features),
            "rank": s.paths[0][0], "dropout_p": s.dropout_p, "statistics": s.statistics, "launches": list(self.launches()),
            "bound_bytes": {"forward": forward, "backward": backward},
            "over_bound": {name: self.over_bound(name) for name in ("compulsory", "swept", "without_partials")},
            "over_base": {"forward": self.over_base(True), "step": self.over_base(False)},
            "kernels": [{"kernel": cost.kernel, "role": cost.role, "issued_bytes": cost.issued,
                         "compulsory_bytes": cost.compulsory, "swept_bytes": cost.compulsory + cost.again,
                         "partial_bytes": cost.partials, "flops": cost.flops, "philox_calls": cost.philox,
                         "microseconds": 1e6 * cost.seconds, "limited_by": max(cost.limits, key=cost.limits.get)}
                        for cost in self.costs]}


def rows_of_table(arch: int = 90, tokens: int = 8192) -> Iterator[Row]:
    """The shapes, ranks, dropouts and statistics of the table."""
    for shape, (width, outs) in SHAPES.items():
        for rank in RANKS:
            for dropout_p in DROPOUTS:
                for statistics in (False, True):
                    paths = tuple((rank, output, -1) for output in range(len(outs)))
                    scenario = Scenario(shape, tokens, width, outs, paths=paths, dropout_p=dropout_p, statistics=statistics)
                    yield Row(shape, scenario, costs_of(scenario, arch))


def table(rows: list[Row]) -> str:
    """Markdown; statistics off and on of one case stand in one line."""
    heads = ["shape", "r", "dropout", "launches fwd + bwd (statistics)", "modelled fwd / base", "modelled fwd+bwd / base",
             "the same, statistics", "modelled bytes / bound", "the same, statistics", "swept / bound"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for off, on in zip(rows[::2], rows[1::2]):
        s, counts = off.scenario, off.launches()
        lines.append(
            f"| {off.shape} | {s.paths[0][0]} | {s.dropout_p:g} | {counts[0]} + {counts[1]} ({on.launches()[1]}) "
            f"| {off.over_base(True):.3f} | {off.over_base(False):.3f} | {on.over_base(False):.3f} "
            f"| {off.over_bound():.3f} | {on.over_bound():.3f} | {off.over_bound('swept'):.3f} |")
    return "\n".join(lines)


def kernel_table(row: Row) -> str:
    """Markdown: the launches of one case."""
    s = row.scenario
    statistics = "on" if s.statistics else "off"
    lines = [f"Modelled: {row.shape}, r {s.paths[0][0]}, dropout {s.dropout_p:g}, statistics {statistics}", "",
             "| role | modelled: issued MB | compulsory MB | partial sums MB | GFLOP | modelled us | limited by |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {c.role} | {c.issued / 1e6:,.1f} | {c.compulsory / 1e6:,.1f} | {c.partials / 1e6:,.1f} | {c.flops / 1e9:,.1f} "
              f"| {1e6 * c.seconds:,.1f} | {max(c.limits, key=c.limits.get)} |" for c in row.costs]
    return "\n".join(lines)


def page_of(rows: list[Row]) -> str:
    """What stands between the markers of docs/gpu_model.md."""
    main = next(row for row in rows if row.scenario.paths[0][0] == 16 and row.scenario.dropout_p and row.scenario.statistics)
    return f"{table(rows)}\n\n{kernel_table(main)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_model", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="example: python -m bench.gpu_model --kernels --json model.json")
    parser.add_argument("--arch", type=int, default=90, metavar="CC",
                        help="take the tiles of this compute capability (80, 90, 100); the roofline stays the H100's")
    parser.add_argument("--rows", type=int, default=8192, metavar="M", help="tokens (default 8192)")
    parser.add_argument("--kernels", action="store_true", help="also a table of the launches of every case")
    parser.add_argument("--json", metavar="FILE", help="write every case with its launches; - for standard output")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables between the markers of this page")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error(f"argument --rows: must be at least 1, got {options.rows}")
    rows = list(rows_of_table(options.arch, options.rows))
    if options.markdown:
        page = Path(options.markdown)
        page.write_text(replaced(page.read_text(), page_of(rows)))
    if options.json:
        text = json.dumps({"modelled": True, "arch": options.arch, "cases": [row.as_json() for row in rows]}, indent=1)
        if options.json == "-":
            print(text)
            return 0
        Path(options.json).write_text(text + "\n")
    print(table(rows))
    for row in rows if options.kernels else ():
        print("\n" + kernel_table(row))
    return 0


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between its markers."""
    pattern = r"(<!-- begin: python -m bench\.gpu_model[^\n]*-->\n).*(<!-- end -->)"
    found, count = re.subn(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError("the page must have one pair of markers '<!-- begin: python -m bench.gpu_model ... -->', '<!-- end -->'")
    return found


if __name__ == "__main__":
    sys.exit(main())
