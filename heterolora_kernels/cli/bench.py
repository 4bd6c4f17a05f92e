"""Measure the kernels on this machine against the frozen linear and PEFT, each checked against float64 before it is timed.

The measurements live in the folder bench/ of a checkout, which an installed wheel does not have. Exit code 1 where a check fails.

example:
  heterolora bench --quick
  heterolora bench --filter "shapes and bfloat16" --threads 2
  heterolora bench --json bench/results/cpu.json
  heterolora bench --markdown bench/results/cpu.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heterolora_kernels.backends import available_backends, resolve
from heterolora_kernels.files import write_file

_ROOT = Path(__file__).resolve().parents[2]
_NEEDED = ("pytest", "pytest_benchmark", "peft", "transformers", "tqdm")
#: What holds PyTorch to the instructions that the kernels are held to: oneDNN's and ATen's names.
_TORCH_ISAS = {"portable": ("SSE41", "default"), "avx2": ("AVX2", "avx2"), "avx512": ("AVX512_CORE", "avx512"),
               "avx512_bf16": ("AVX512_CORE_BF16", "avx512")}

#: Cores that the system itself may use; a hundredth more is the resolution of its clock in the shortest cases.
_ALONE = 0.15

#: What pytest returns where nothing was selected.
_NOTHING = 5

#: What a measurement adds to its case; ``ms`` and ``mib`` hold medians by contender.
_MEASURED = ("rounds", "calls", "others", "ms", "mib", "held")

#: Shapes on which means are taken: M 768 to 1536, K and N 576 to 2048.
TARGET = ("SmolLM-135M_gate_up", "SmolLM-135M_down", "BERT-base_attention", "OPT-350m_attention", "TinyLlama-1.1B_attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and rounds: about two minutes instead of fifteen")
    add("--filter", metavar="EXPR", help="cases to run, as pytest's -k ('shapes and bfloat16'); blocks: " + ", ".join(_TITLES))
    add("--backend", metavar="NAME", help="backend to measure (default: the one that would be chosen)")
    add("--isa", metavar="NAME", help="hold the cpu backend and PyTorch to one instruction set (few shapes)")
    add("--threads", type=int, metavar="N", help="threads of PyTorch and of the kernels (default: PyTorch's choice)")
    add("--tolerance", type=float, default=1.0, metavar="X", help="multiply what the check allows; file and tables say so")
    add("--json", type=Path, metavar="FILE", help="write the results: one file per machine")
    add("--add", action="store_true", help="keep the results of other cases that FILE has from the same machine and commit")
    add("--markdown", type=Path, metavar="FILE", help="measure nothing: print the tables of a results file as markdown")


def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.markdown is not None:
        print("\n".join(markdown(read_results(args.markdown))))
        return 0
    _check_arguments(args)
    before = read_results(args.json) if args.add and args.json.exists() else None
    reports, failures, ran = [], [], False
    for isa in _processes(args):
        code, report, failed = _measure(args, isa)
        ran |= code != _NOTHING
        reports += [report] if report is not None else []
        failures += failed
    if not ran:
        raise ValueError(f"--filter {args.filter!r} matches no case")
    if reports:
        found = reduce_reports(reports)
        shown = found if before is None else add_results(before, found)
        print("\n".join(text(found)))
        if args.json is not None:
            write_results(args.json, shown)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


# ---- running ----

def _check_arguments(args: argparse.Namespace) -> None:
    if not (_ROOT / "bench" / "conftest.py").exists():
        raise FileNotFoundError(f"there is no folder bench/ in {_ROOT}: the measurements are not part of an installed package; "
                                "run in a checkout, installed by pip install -e '.[bench]'")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"bench needs the extra 'bench' (pip install -e '.[bench]'); missing: {', '.join(missing)}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance must be above 0, got {args.tolerance}")
    if args.add and args.json is None:
        raise ValueError("--add needs --json FILE")
    if args.backend is not None:
        resolve(torch.device("cpu"), args.backend)
    if args.isa is not None:
        if args.isa not in _available_isas():
            raise ValueError(f"--isa must be one of {_available_isas()} here, got {args.isa!r}")
        if args.backend not in (None, "cpu"):
            raise ValueError(f"--isa is about the cpu backend, got --backend {args.backend}")


def _available_isas() -> list[str]:
    if "cpu" not in available_backends():
        return []
    resolve(torch.device("cpu"), "cpu")
    ops = torch.ops.heterolora_kernels
    return [name for name in ops.cpu_isas() if not ops.cpu_isa_missing(name)]


def _processes(args: argparse.Namespace) -> list[str | None]:
    """Instruction sets to run, each in a process of its own; None is the processor's best."""
    if args.isa is not None:
        return [args.isa]
    if args.quick or args.backend not in (None, "cpu") or args.filter is not None and "isas" not in args.filter:
        return [None]
    isas = _available_isas()
    best = torch.ops.heterolora_kernels.cpu_isa() if isas else None
    # What computes one instruction set by another is there for tests.
    return [None, *(isa for isa in reversed(isas) if isa != best and not isa.endswith("_emulated"))]


def _measure(args: argparse.Namespace, isa: str | None) -> tuple[int, dict | None, list[str]]:
    """One process of pytest: its exit code, pytest-benchmark's report, and one line for every failure."""
    # Wide enough for the reason of a failure in pytest's one-line summary.
    environment = {**os.environ, "COLUMNS": "1000"}
    if args.threads is not None:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(args.threads)
    if isa is not None:
        environment["HETEROLORA_CPU_ISA"] = isa
        if isa in _TORCH_ISAS:
            environment["ONEDNN_MAX_CPU_ISA"], environment["ATEN_CPU_CAPABILITY"] = _TORCH_ISAS[isa]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", "-s", "-rfE", "--tb=short", "-p", "no:cacheprovider",
                   "-W", "ignore", "--lora-bar", f"--lora-tolerance={args.tolerance}", f"--benchmark-json={report}",
                   "--benchmark-disable-gc"]
        command += ["--quick"] if args.quick else []
        command += [f"--lora-backend={args.backend}"] if args.backend is not None else []
        command += [f"--lora-threads={args.threads}"] if args.threads is not None else []
        command += ["-k", args.filter] if args.filter is not None else []
        done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1, _NOTHING):
            said = done.stdout.splitlines()
            said = [line for line in said if line.startswith(("ERROR", "E "))] or said[-1:]
            raise RuntimeError(f"the measurements stopped with exit code {done.returncode}: {' '.join(said[:3])}")
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        whole = report.exists() and report.stat().st_size > 0
        return done.returncode, json.loads(report.read_text()) if whole else None, lines


# ---- results ----

def reduce_reports(reports: Iterable[Mapping]) -> dict:
    """pytest-benchmark's reports as ``{"machine": ..., "tolerance": ..., "results": [...]}``, quartiles instead of samples."""
    machine, tolerance, results = None, None, []
    for report in reports:
        for entry in report["benchmarks"]:
            extra = entry["extra_info"]
            if "ms" not in extra:
                continue  # the check failed
            machine, tolerance = machine or extra["machine"], extra["tolerance"]
            case = {name: value for name, value in extra["case"].items() if name != "contenders"}
            results.append({**case, "isa": extra["machine"]["isa"], "torch_isa": extra["machine"]["torch_isa"],
                            **{name: extra[name] for name in _MEASURED if name in extra}})
    return {"machine": machine, "tolerance": tolerance, "results": results}


def _key(result: Mapping) -> str:
    """What tells one measurement from another."""
    return json.dumps({name: value for name, value in result.items() if name not in _MEASURED}, sort_keys=True)


def add_results(old: Mapping, new: Mapping) -> dict:
    """``old`` with what was measured anew.

    Raises:
        ValueError: they are not from the same machine, versions, threads and commit.
    """
    # Instruction sets are the results' own.
    differing = [name for name, value in new["machine"].items()
                 if name not in ("isa", "torch_isa") and value != old["machine"].get(name)]
    if differing or old["tolerance"] != new["tolerance"]:
        raise ValueError(f"--add: not the same as in the file: {', '.join(differing or ['tolerance'])}")
    fresh = {_key(result) for result in new["results"]}
    return {**old, "results": [*(result for result in old["results"] if _key(result) not in fresh), *new["results"]]}


def write_results(path: Path, found: Mapping) -> None:
    """JSON with one measurement a line, so that a change can be read."""
    lines = ",\n".join("  " + json.dumps(result) for result in found["results"])
    head = json.dumps({name: value for name, value in found.items() if name != "results"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, f'{head[:-2]},\n "results": [\n{lines}\n ]\n}}\n'.encode())


def read_results(path: Path) -> dict:
    """A file of :func:`write_results`.

    Raises:
        ValueError, FileNotFoundError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text())
        return {"machine": dict(found["machine"]), "tolerance": found["tolerance"], "results": list(found["results"])}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of heterolora bench: {error!r}") from error


# ---- tables ----

_TITLES = {"shapes": "Shapes of models", "tokens": "Number of tokens", "ranks": "Ranks",
           "options": "Dropout and float32 adapters", "groups": "Linears that read one x", "layers": "A patched nn.Linear",
           "overhead": "Overhead (K = N = 64, M = 1)", "backends": "Other backends",
           "isas": "Other instruction sets, PyTorch held to the same", "steps": "Training steps",
           "search": "Training steps with a search"}

_READING = ("Ratios of medians. infer (no grad), forward, backward and fwd+bwd: the op's time by the frozen linear's (in the "
            "table of overheads by that of F.linear plus two matmuls); below 1 is faster. X/op: X's time by the op's; memory: "
            "what X keeps for the backward, x included, by what the op keeps. Steps with a search: time and peak memory by those "
            "of search='off' with the same active set; reallocations in steps of it.")

#: Per block: heading and ratio (numerator, denominator, phase). "op" is the subject.
_COLUMNS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "shapes": (("infer", "op", "frozen", "infer"), ("forward", "op", "frozen", "forward"),
               ("backward", "op", "frozen", "backward"), ("fwd+bwd", "op", "frozen", "both"), ("PEFT/op", "peft", "op", "both"),
               ("mm+addmm/op", "mm_addmm", "op", "both"), ("statistics", "op", "no_statistics", "both")),
    "tokens": (("infer", "op", "frozen", "infer"), ("fwd+bwd", "op", "frozen", "both"), ("PEFT/op infer", "peft", "op", "infer"),
               ("PEFT/op", "peft", "op", "both")),
    "ranks": (("fwd+bwd", "op", "frozen", "both"), ("PEFT/op", "peft", "op", "both"), ("op/no path", "op", "no_path", "both")),
    "options": (("fwd+bwd", "op", "frozen", "both"), ("PEFT/op", "peft", "op", "both"), ("PEFT/op memory", "peft", "op", "held")),
    "groups": (("infer", "op", "frozen", "infer"), ("fwd+bwd", "op", "frozen", "both"),
               ("separate/op infer", "separate", "op", "infer"), ("separate/op", "separate", "op", "both"),
               ("PEFT/op", "peft", "op", "both"), ("PEFT/op memory", "peft", "op", "held")),
    "layers": (("infer", "layer", "frozen", "infer"), ("fwd+bwd", "layer", "frozen", "both"),
               ("layer/op", "layer", "op", "both"), ("PEFT/layer infer", "peft", "layer", "infer"),
               ("PEFT/layer", "peft", "layer", "both"), ("PEFT/layer memory", "peft", "layer", "held")),
    "overhead": (("infer", "op", "two_matmuls", "infer"), ("forward", "op", "two_matmuls", "forward"),
                 ("fwd+bwd", "op", "two_matmuls", "both"), ("layer infer", "layer", "two_matmuls", "infer"),
                 ("layer fwd+bwd", "layer", "two_matmuls", "both"), ("PEFT infer", "peft", "two_matmuls", "infer"),
                 ("PEFT fwd+bwd", "peft", "two_matmuls", "both")),
    "backends": (("fwd+bwd", "op", "frozen", "both"), ("PEFT/op", "peft", "op", "both")),
    "isas": (("fwd+bwd", "op", "frozen", "both"), ("PEFT/op", "peft", "op", "both")),
    "steps": (("step/frozen", "op", "frozen", "step"), ("PEFT/op", "peft", "op", "step"),
              ("reference/op", "reference", "op", "step")),
    "search": (("in_step", "in_step", "off", "step"), ("outside window", "in_step", "off", "plain"),
               ("in window", "in_step", "off", "window"), ("reallocation", "in_step", "off", "reallocation"),
               ("probe", "probe", "off", "step"), ("reallocation by probe", "probe", "off", "reallocation"),
               ("memory", "in_step", "off", "mib"), ("memory with probe", "probe", "off", "mib")),
}


@dataclass(frozen=True)
class Limit:
    """A promise: a ratio of some cases, joined to one number by ``join``, is at most or at least ``bound``."""

    title: str
    block: str
    ratio: tuple[str, str, str]
    join: str
    sense: str
    bound: float
    where: Mapping[str, object]

    def about(self, rows: Iterable[Mapping]) -> list[Mapping]:
        """The rows in which the ratio was measured."""
        def meant(row: Mapping) -> bool:
            wanted = ((name, value if isinstance(value, tuple) else (value,)) for name, value in self.where.items())
            return row["block"] == self.block and all(row.get(name) in values for name, values in wanted)

        return [row for row in rows if meant(row) and ratio_of(row, *self.ratio) is not None]

    def reached(self, rows: Iterable[Mapping]) -> float | None:
        """The number, None where nothing of it was measured."""
        values = [ratio_of(row, *self.ratio) for row in self.about(rows)]
        if not values:
            return None
        return geometric_mean(values) if self.join == "mean" else max(values) if self.sense == "<=" else min(values)

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.sense == "<=" else value >= self.bound


def limits(machine: Mapping) -> list[Limit]:
    """What is promised for a processor."""
    isa, amd = machine.get("isa") or "", "AMD" in f"{machine['processor']} {machine['model']}".upper()
    found = []
    # Where no instruction multiplies bfloat16, the frozen linear is no yardstick.
    if isa.startswith("amx") or isa == "avx512_bf16":
        most, least = (1.15, 1.5) if isa.startswith("amx") else (1.0, 1.25)
        found += [_mean("bfloat16", "fwd+bwd / frozen linear", ("op", "frozen", "both"), "<=", most),
                  _mean("bfloat16", "fwd+bwd, PEFT / op", ("peft", "op", "both"), ">=", least)]
    found += [_mean("float32", "fwd+bwd / frozen linear", ("op", "frozen", "both"), "<=", 0.85 if amd else 1.10),
              Limit("float32 fwd+bwd, PEFT / op, worst shape", "shapes", ("peft", "op", "both"), "worst", ">=", 1.0,
                    {"dtype": "float32"})]
    for dtype in ("bfloat16", "float32"):
        where = {"dtype": dtype}
        found += [_mean(dtype, "fwd+bwd, statistics on / off", ("op", "no_statistics", "both"), "<=", 1.03),
                  # Repeats agree to 3 %: up to there nothing is measurable.
                  Limit(f"{dtype} fwd+bwd, rank 0 / no path", "ranks", ("op", "no_path", "both"), "worst", "<=", 1.03, where)]
        found += [Limit(f"{dtype} {_NAMES[phase]}, M = {m} / frozen linear", "tokens", ("op", "frozen", phase), "worst", "<=",
                        1.0, {**where, "m": m}) for m in (1, 16) for phase in ("infer", "both")]
        found += [Limit(f"{dtype} {_NAMES[phase]}, K = N = 64, M = 1 / linear + 2 matmuls", "overhead",
                        ("op", "two_matmuls", phase), "worst", "<=", bound, where)
                  for phase, bound in (("infer", 1.5), ("forward", 2.5), ("both", 2.5))]
    found += [Limit(f"{name}'s step in bfloat16, PEFT / op", "steps", ("peft", "op", "step"), "worst", ">=", 1.15,
                    {"dtype": "bfloat16", "name": name}) for name in ("encoder", "decoder")]
    return [*found, Limit("demo's step, reference backend / op", "steps", ("reference", "op", "step"), "worst", ">=", 1.0,
                          {"name": "demo"}),
            *(Limit(f"{dtype} step of a search in_step / off", "search", ("in_step", "off", "step"), "worst", "<=", 1.05,
                    {"dtype": dtype}) for dtype in ("bfloat16", "float32"))]


_NAMES = {"infer": "infer", "forward": "forward", "both": "fwd+bwd"}


def _mean(dtype: str, what: str, ratio: tuple[str, str, str], sense: str, bound: float) -> Limit:
    return Limit(f"{dtype} {what}, mean", "shapes", ratio, "mean", sense, bound, {"dtype": dtype, "name": TARGET})


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))


def rows_of(found: Mapping) -> list[dict]:
    """One row per case: what differs only by mode is joined."""
    rows: dict[str, dict] = {}
    for result in found["results"]:
        row = rows.setdefault(_key({**result, "mode": ""}), {**result, "ms": {}})
        row["ms"].update(result["ms"])
        # One number each, where a time has its quartiles.
        row["ms"].update({"mib": {name: [mib] * 3 for name, mib in result["mib"].items()}} if "mib" in result else {})
        row.setdefault("held", {}).update(result.get("held", {}))
        row["others"] = max(row.get("others") or 0.0, result.get("others") or 0.0)
    return list(rows.values())


def ratio_of(row: Mapping, over: str, under: str, phase: str) -> float | None:
    """Ratio of two medians, or of bytes in the phase ``held``; None where one was not measured."""
    if phase == "held":
        held = row.get("held", {})
        return held[over] / held[under] if over in held and under in held else None
    times = row["ms"].get(phase, {})
    return times[over][1] / times[under][1] if over in times and under in times else None


def _labels(row: Mapping) -> list[str]:
    """Shape, sizes, type, and what the block varies."""
    sizes = f"{row['m']} x {row['k']} x {'+'.join(map(str, row['outs']))}" if "k" in row else ""
    varied = {"ranks": f"r {row['rank']}", "isas": str(row["isa"]), "backends": row["backend"]}.get(row["block"], "")
    if row.get("adapters"):
        varied = f"adapters {row['adapters']}"
    if row.get("dropout_p"):
        varied = ", ".join(filter(None, [varied, f"dropout {row['dropout_p']}"]))
    return [row["name"].replace("_", " ") + " *" * (row["others"] >= _ALONE), sizes, row["dtype"], varied]


def _table(rows: Sequence[Mapping], block: str) -> list[list[str]]:
    columns = _COLUMNS[block]
    phase = "step" if block in ("steps", "search") else "both"
    name = {"steps": "op", "search": "off", "overhead": "two_matmuls"}.get(block, "frozen")
    table = [["shape", "M x K x N", "dtype", "", f"{name.replace('_', ' ')} ms", *(heading for heading, *_ in columns)]]

    def cells(values: Iterable[float | None]) -> list[str]:
        return ["" if value is None else f"{value:.2f}" for value in values]

    for row in rows:
        time = row["ms"].get(phase, row["ms"].get("infer", {})).get(name)
        table.append([*_labels(row), "" if time is None else f"{time[1]:.0f}" if time[1] >= 100 else f"{time[1]:.3g}",
                      *cells(ratio_of(row, *ratio) for _, *ratio in columns)])
    if block in ("shapes", "isas", "groups", "backends"):
        for dtype, *key in dict.fromkeys((row["dtype"], row["isa"], row["backend"]) for row in rows):
            meant = [row for row in rows if [row["dtype"], row["isa"], row["backend"]] == [dtype, *key]
                     and (block != "shapes" or row["name"] in TARGET) and row["m"] > 1]
            values = [[value for row in meant if (value := ratio_of(row, *ratio)) is not None] for _, *ratio in columns]
            of = f"mean of {len(meant)}"
            table.append([of, "", dtype, str(key[0]) if block == "isas" else "", "",
                          *cells(geometric_mean(found) if found else None for found in values)])
    kept = [i for i in range(len(table[0])) if i < 1 or any(line[i] for line in table[1:])]
    return [[line[i] for i in kept] for line in table]


def _about(found: Mapping) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    widened = "" if found["tolerance"] == 1 else f"; the check allowed {found['tolerance']:g} times the rule's error"
    return (f"{machine['processor']} ({machine['model']}), {machine['threads']} threads, kernels {machine['isa']}, {versions}, "
            f"commit {machine['commit']}{widened}{_disturbed(found)}")


def _disturbed(found: Mapping) -> str:
    """A warning where other processes took part of the machine: ratios then say little."""
    shares = [result["others"] for result in found["results"] if result.get("others") is not None]
    if not shares or max(shares) < _ALONE:
        return ""
    count = sum(share >= _ALONE for share in shares)
    return f"; NOT ALONE: beside {count} of {len(shares)} cases (*) other processes kept up to {max(shares):.1f} cores busy"


def _promises(found: Mapping) -> list[list[str]]:
    rows, table = rows_of(found), [["promised", "limit", "measured", ""]]
    for limit in limits(found["machine"]):
        value = limit.reached(rows)
        if value is not None:
            alone = all(row["others"] < _ALONE for row in limit.about(rows))
            verdict = "not alone" if not alone else "" if limit.holds(value) else "missed"
            table.append([limit.title, f"{limit.sense} {limit.bound:.2f}", f"{value:.2f}", verdict])
    return table


def _blocks(found: Mapping) -> Iterable[tuple[str, list[list[str]]]]:
    rows = rows_of(found)
    for block, title in _TITLES.items():
        chosen = [row for row in rows if row["block"] == block]
        if chosen:
            yield title, _table(chosen, block)
    promises = _promises(found)
    if len(promises) > 1:
        yield "Limits", promises


def text(found: Mapping) -> list[str]:
    """The tables for a terminal: ratios of medians."""
    lines = [_about(found), _READING]
    for title, table in _blocks(found):
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["", title]
        lines += ["  ".join(cell.ljust(width) if cell[:1].isalpha() or not i else cell.rjust(width)
                            for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in table]
    return lines


def markdown(found: Mapping) -> list[str]:
    """The same for README.md and docs."""
    lines = [_about(found), "", _READING]
    for title, table in _blocks(found):
        lines += ["", f"**{title}**", "", "| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
        lines += ["| " + " | ".join(line) + " |" for line in table[1:]]
    return lines
