"""Compile every Triton kernel and configuration ahead of time, without a GPU, and report registers, spills and shared memory.

example:
  heterolora compile --arch sm_80,sm_90,sm_100 --json builds.json
  heterolora compile --arch sm_90 --scenario main --json - | jq '.builds[] | select(.spills > 0)'
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from heterolora_kernels import _env

#: What the process that compiles one architecture runs: a fresh one, since Triton decides at its import whether it interprets.
_WORKER = "import sys; from heterolora_kernels.cli import compile; compile.worker(int(sys.argv[1]), sys.argv[2:])"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--arch", type=_architectures, default="sm_80,sm_90,sm_100", metavar="SM[,SM...]",
                        help="architectures to compile for (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is the standard output, then nothing else")
    parser.add_argument("--scenario", action="append", metavar="NAME",
                        help="only the calls whose name begins so (main, rows, rank, group, shortcuts, ...); may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="architectures that are compiled at once (default: 1)")


def _architectures(text: str) -> list[int]:
    names = text.split(",")
    for name in names:
        if not (name.startswith("sm_") and name[3:].isdigit()):
            raise argparse.ArgumentTypeError(f"must be names like sm_90 with commas between them, got {name!r}")
    return [int(name[3:]) for name in names]


def run(args: argparse.Namespace) -> int:
    """The command; 1 if a build spills or needs more shared memory than the chip has."""
    if reason := _env.triton_not_installed():
        raise RuntimeError(reason)
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        reports = list(pool.map(lambda arch: _compile(arch, args.scenario or []), args.arch))
    builds = [build for report in reports for build in report["builds"]]
    report = {"triton": reports[0]["triton"], "ptxas": reports[0]["ptxas"], "builds": builds}
    if args.json is not None:
        text = json.dumps(report, indent=1) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
    faults = [fault for build in builds for fault in faults_of(build)]
    for line in [*_summary(builds), *faults]:
        print(line, file=sys.stderr if args.json == "-" else sys.stdout)
    return 1 if faults else 0


def _compile(arch: int, scenarios: list[str]) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _WORKER, str(arch), *scenarios], stdout=subprocess.PIPE, text=True,
                          env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"compiling for sm_{arch} failed; what the compiler said stands above")
    return json.loads(done.stdout)


def worker(arch: int, names: list[str]) -> None:
    """Compile for one architecture; the report goes to the standard output, progress to standard error."""
    import triton

    from heterolora_kernels.backends.triton.builds import SCENARIOS, compiled, ptxas_version

    chosen = [scenario for scenario in SCENARIOS if not names or scenario.name.startswith(tuple(names))]
    if not chosen:
        raise ValueError(f"scenario must begin with one of {sorted({s.name.split()[0] for s in SCENARIOS})}, got {names}")
    builds = []
    for build in compiled(arch, chosen):
        builds.append(build)
        print(f"sm_{arch} {len(builds):4d} {build['kernel']} {build['dtype']} for {build['scenario']!r}, {build['rows']} rows: "
              f"{build['registers']} registers, {build['shared_bytes']} bytes shared", file=sys.stderr, flush=True)
    json.dump({"triton": triton.__version__, "ptxas": ptxas_version(arch), "builds": builds}, sys.stdout)


def faults_of(build: dict) -> list[str]:
    """What is wrong with a build, in words; empty where nothing is."""
    name = f"{build['arch']} {build['kernel']} {build['dtype']} {build['config']}"
    faults = []
    if build["spills"]:
        faults.append(f"{name}: {build['spills']} accesses to local memory ({build['stack_bytes']} bytes of stack)")
    if build["shared_bytes"] > build["shared_limit"]:
        faults.append(f"{name}: {build['shared_bytes']} bytes of shared memory, the chip has {build['shared_limit']}")
    if build["requires_wgmma"] and not build["uses_wgmma"]:
        faults.append(f"{name}: no wgmma, though its tile allows it")
    return faults


def _summary(builds: list[dict]) -> list[str]:
    lines = []
    for arch in dict.fromkeys(build["arch"] for build in builds):
        mine = [build for build in builds if build["arch"] == arch]
        lines.append(f"{arch}: {len(mine)} builds")
        for role in dict.fromkeys(build["role"] for build in mine):
            part = [build for build in mine if build["role"] == role]
            spills = sum(build["spills"] > 0 for build in part)
            wgmma = sum(build["uses_wgmma"] for build in part)
            lines.append(f"  {role:14s} {len(part):3d} builds, registers {min(b['registers'] for b in part)}-"
                         f"{max(b['registers'] for b in part)}, shared up to "
                         f"{max(b['shared_bytes'] for b in part) / 1024:.0f} KiB, {spills} with spills, {wgmma} with wgmma")
    return lines
