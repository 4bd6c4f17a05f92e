"""Writes rows of the Triton backend's table of tiles for the GPU that it runs on. Nothing calls it but a person.

For each role a few tiles are tried on calls of a size, by the time of the whole pass in a CUDA graph. A candidate must compile
without spills and within the chip's shared memory, and must compute what float64 computes.

example:
  python -m bench.tune_gpu --roles forward,grad_x --tokens 8192 --width 4096 --out rows.json
  python -m bench.tune_gpu --merge rows.json --table heterolora_kernels/backends/triton/configs.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.cases import Case
from bench.gpu_report import write_whole

#: Exit code where there is no device to tune for.
NO_DEVICE = 3
TABLE = Path(__file__).resolve().parent.parent / "heterolora_kernels" / "backends" / "triton" / "configs.json"
#: Inclusive ranges of M that the table tells apart.
ROWS = ((None, 32), (33, 512), (513, 2048), (2049, None))
#: Highest ranks per accumulator that the table tells apart.
RANKS = (16, 32, 64)
#: ``{role: {entry: values}}``: what is tried in the place of the entries of the rule that holds today, the last varying
#: fastest; what the time does not allow is the end.
CANDIDATES: dict[str, dict[str, tuple]] = {
    "forward": {"BLOCK_K": (64, 32), "BLOCK_M": (128, 64), "BLOCK_N": (256, 128), "num_warps": (8, 4), "num_stages": (3, 4),
                "variant": ("cublas", "two_pass", "one_pass"), "persistent": (False, True), "tma": (False, True)},
    "grad_x": {"BLOCK_K": (64, 32), "BLOCK_M": (128, 64), "BLOCK_N": (256, 128), "num_warps": (8, 4), "num_stages": (3, 4),
               "variant": ("cublas", "two_pass")},
    "hidden": {"BLOCK_M": (16, 32, 64, 128), "BLOCK_K": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "q_grad_B": {"one_read": (True, False), "BLOCK_OWN": (128, 256, 512), "BLOCK_STEP": (32, 64, 128), "num_warps": (4, 8),
                 "num_stages": (2, 3), "PROGRAMS": (132, 264)},
    "grad_A": {"BLOCK_M": (32, 64, 128), "BLOCK_K": (64, 128, 256), "num_warps": (4, 8), "num_stages": (3, 4)},
}
#: Roles whose time is that of a forward; those of the others is the backward's.
_OF_FORWARD = ("forward", "hidden")
#: A candidate must be faster than the best so far by this much: less is noise.
_GAIN = 0.99


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--roles", type=_roles, default=tuple(CANDIDATES), metavar="ROLE[,ROLE...]",
                        help=f"what is tuned: {', '.join(CANDIDATES)} (default: all)")
    parser.add_argument("--tokens", type=int, default=8192, help="M of the calls (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="K and N of the calls (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, choices=RANKS, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no candidate after this long (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the rows that were found, as JSON")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="no tuning: put the rows of this file into --table")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="(default: the package's own)")


def _roles(text: str) -> tuple[str, ...]:
    for name in text.split(","):
        if name not in CANDIDATES:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(CANDIDATES)}, got {name!r}")
    return tuple(text.split(","))


def main(arguments: list[str] | None = None) -> int:
    """0: rows were written; 2: wrong usage; 3: there is no device."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_gpu", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(arguments)
    if (args.out is None) == (args.merge is None):
        parser.error("one of --out (tune) and --merge (put rows into the table) is needed")
    if args.merge is not None:
        table = merged(json.loads(args.table.read_text()), json.loads(args.merge.read_text()))
        write_whole(args.table, as_text(table))
        return 0
    from bench.gpu import why_not

    if reason := why_not():
        print(f"bench.tune_gpu: {reason}", file=sys.stderr)
        return NO_DEVICE
    return tune(args)


# ---- the table ----

def conditions(role: str, arch: int, tokens: int, rank: int, itemsize: int, width: int) -> dict[str, Any]:
    """When a row holds: this architecture, aligned calls, the range of M and of ranks, widths from half to twice."""
    below = max((low for low in RANKS if low < rank), default=0)
    # The outputs of hidden are the packed ranks: there the width is the length of the sum.
    return {"arch": [arch], "itemsize": [itemsize], "aligned": [True],
            "rows": next([low, high] for low, high in ROWS if high is None or tokens <= high),
            "k" if role == "hidden" else "n": [width // 2, 2 * width], "rank": [below + 1, rank]}


def merged(table: dict[str, list], rows: dict[str, list]) -> dict[str, list]:
    """The table with rows in it: in the place of a rule with the same conditions, else before all rules but the interpreter's.

    Raises:
        ValueError: an unknown role, a row without conditions, or one that lacks an entry that the role's rules have.
    """
    result = {role: list(rules) for role, rules in table.items()}
    for role, new in rows.items():
        if role not in result:
            raise ValueError(f"rows: role must be one of {sorted(result)}, got {role!r}")
        needed = set(result[role][-1]["use"])
        for row in reversed(new):
            if not row["when"]:
                raise ValueError(f"rows: a row of {role} has no conditions; only the table's last rule may have none")
            if missing := needed - set(row["use"]):
                raise ValueError(f"rows: a row of {role} lacks {sorted(missing)}")
            same = [place for place, rule in enumerate(result[role]) if rule["when"] == row["when"]]
            first = next(place for place, rule in enumerate(result[role]) if rule["when"].get("arch") != ["interpreter"])
            if same:
                result[role][same[0]] = row
            else:
                result[role].insert(first, row)
    return result


def as_text(table: dict[str, list]) -> str:
    """The table in the form of the shipped file: a rule per line."""
    roles = [f' "{role}": [\n' + ",\n".join(f"  {json.dumps(rule)}" for rule in rules) + "\n ]" for role, rules in table.items()]
    return "{\n" + ",\n".join(roles) + "\n}\n"


def candidates(role: str, today: dict[str, Any], rank: int) -> Iterator[dict[str, Any]]:
    """Configurations to try, today's first; ranks are taken in one accumulator where the role has a tile for them."""
    yield today
    names, has_cublas = list(CANDIDATES[role]), False
    for values in itertools.product(*CANDIDATES[role].values()):
        found = {**today, **dict(zip(names, values))}
        if "BLOCK_R" in found:
            found["BLOCK_R"] = max(16, rank)
        # Descriptors are measured with persistent programs alone, cuBLAS once, and a wide tile needs eight warps.
        if found.get("tma") and not found.get("persistent") or found.get("persistent") and found["variant"] != "two_pass":
            continue
        if found.get("variant") == "cublas":
            if has_cublas:
                continue
            has_cublas = True
            # The tile of the epilogue after it, which has no long sum: a wide one would spill under dropout.
            found |= {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4}
        if role in ("forward", "grad_x") and found["BLOCK_M"] * found["BLOCK_N"] > 128 * 128 and found["num_warps"] < 8:
            continue
        if found != today:
            yield found


@contextmanager
def used(role: str, config: dict[str, Any]) -> Iterator[None]:
    """Calls in the block take this configuration for the role."""
    from heterolora_kernels.backends.triton import configs

    choose = configs.choose
    configs.choose = lambda asked, *shape: config if asked == role else choose(asked, *shape)
    try:
        yield
    finally:
        configs.choose = choose


# ---- on a device ----

def faults(case: Case, role: str, config: dict[str, Any], arch: int) -> list[str]:
    """What is wrong with the role's builds, with and without dropout and float32 adapters: spills, too much shared memory."""
    from heterolora_kernels.backends.triton import builds
    from heterolora_kernels.cli.compile import faults_of

    dtype = getattr(torch, case.dtype)
    plain = builds.Scenario("tuned", case.m, case.k, case.outs, paths=((case.rank, 0, -1),), dtype=dtype, adapter_dtype=dtype,
                            statistics=True)
    # A row holds for these calls too.
    scenarios = (plain, replace(plain, dropout_p=0.1, adapter_dtype=torch.float32))
    found: list[str] = []
    with used(role, config):
        launches = [(scenario, launch) for scenario in scenarios for launch in builds.launches(scenario, arch)]
    for scenario, launch in launches:
        # The epilogue after cuBLAS goes by a name of its own.
        if launch.role == role or (role, launch.role) in (("forward", "delta"), ("grad_x", "grad_low_rank")):
            report = builds.report_on(arch, scenario, launch, builds.build_of(launch))
            # A tile without wgmma may still be the fastest: the clock decides.
            found += faults_of({**report, "requires_wgmma": False})
    return found


def tune(args: argparse.Namespace) -> int:
    """Try the candidates and write the rows that were found."""
    from bench.gpu_timing import first_line
    from heterolora_kernels.backends.triton import configs

    major, minor = torch.cuda.get_device_capability()
    arch, itemsize, ends = 10 * major + minor, getattr(torch, args.dtype).itemsize, perf_counter() + args.seconds
    case = Case("tune", "square", args.tokens, args.width, (args.width,), args.dtype, "triton", ("op",), rank=args.rank)
    rows: dict[str, list] = {}
    for index, role in enumerate(args.roles):
        until = perf_counter() + (ends - perf_counter()) / (len(args.roles) - index)
        n = args.rank if role == "hidden" else args.width
        k = args.tokens if role in ("q_grad_B", "grad_A") else args.width
        today = configs.choose(role, arch, itemsize, True, False, False, args.tokens, n, k, args.rank)
        best, best_ms, first_ms, tried = today, float("inf"), None, 0
        for config in candidates(role, today, args.rank):
            if perf_counter() > until and first_ms is not None:
                print(f"{role}: no time was left for more than {tried} candidates", flush=True)
                break
            tried += 1
            try:
                reasons = faults(case, role, config, arch)
                ms = float("nan") if reasons else measured(case, role, config)
            except Exception as error:  # a tile that Triton cannot compile
                reasons, ms = [first_line(error)], float("nan")
            first_ms = ms if first_ms is None else first_ms
            print(f"{role} {tried}: {reasons[0] if reasons else f'{ms:.4f} ms'} {config}", flush=True)
            if ms < best_ms * _GAIN:
                best, best_ms = config, ms
        if best_ms < float("inf"):
            rows[role] = [{"when": conditions(role, arch, args.tokens, args.rank, itemsize, args.width), "use": best}]
            print(f"{role}: {first_ms:.4f} -> {best_ms:.4f} ms of the whole pass", flush=True)
        # What was found so far is kept if this is stopped.
        write_whole(args.out, json.dumps(rows, indent=1) + "\n")
    return 0


def measured(case: Case, role: str, config: dict[str, Any]) -> float:
    """Milliseconds of a forward or of both passes with a configuration; NaN where the numbers are wrong."""
    import statistics

    from bench.gpu import checked
    from bench.gpu_timing import graph_of, milliseconds, one_call
    from bench.problem import make_problem

    with used(role, config):
        contenders, _, wrong = checked(make_problem(replace(case, contenders=("op",)), "cuda"))
        if wrong:
            print(f"{role}: {wrong[0]}", flush=True)
            return float("nan")
        graph = graph_of([one_call(contenders["op"], "forward" if role in _OF_FORWARD else "both")] * 5)
        graph.replay()
        return statistics.median(milliseconds(graph.replay) / 5 for _ in range(15))


if __name__ == "__main__":
    sys.exit(main())
