"""One command for a machine with a GPU: build, test on CUDA, measure; one JSON and one table of ratios.

Nothing is installed and no network is used: the package is taken from this checkout. It needs torch, triton, pytest, transformers
and peft (without peft its columns stay empty).

example:
  bench/run_gpu.sh --out results
  bench/run_gpu.sh --quick --parts bench

exit codes: 0 all is well; 1 a test failed or something computes something else; 2 wrong usage; 3 no device to run on;
4 all that ran is well, but something did not fit into its time (the table says what). Missed limits are told, and change nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from bench.gpu import NO_DEVICE
from bench.gpu_report import judged, markdown, write_whole

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "tests", "bench")
#: Seconds for everything, and shares of it that a part may take at most; what a part leaves over goes to those after it.
TOTAL, QUICK_TOTAL = 520, 240
SHARES = {"build": 0.2, "tests": 0.55, "bench": 1.0}
#: Seconds that a benchmark's last case and the report may still take.
RESERVE = 45
#: What the benchmark writes while it runs.
SCRATCH = "gpu-part.json"
#: Exit code where something was cut off.
CUT = 4
_TEST_FILES = ("tests/test_triton_cuda.py", "tests/triton_interpreted.py")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(prog="bench/run_gpu.sh", formatter_class=argparse.RawDescriptionHelpFormatter,
                                   description=__doc__)
    made.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"), metavar="FOLDER",
                      help="where gpu-CARD.json, gpu-CARD.md and the logs go (default: $OUT, else bench/results)")
    made.add_argument("--quick", action="store_true", help="four minutes: a few cases, no build, part of the tests")
    made.add_argument("--parts", type=_parts, default=None, metavar="PART[,PART...]",
                      help=f"only these of {', '.join(PARTS)} (default: all; with --quick tests,bench)")
    made.add_argument("--seconds", type=float, default=None,
                      help=f"for everything (default: {TOTAL}, with --quick {QUICK_TOTAL})")
    return made


def _parts(text: str) -> tuple[str, ...]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(PARTS)}, got {name!r}")
    # In the order in which they build on each other.
    return tuple(name for name in PARTS if name in names)


def main(arguments: list[str] | None = None) -> int:
    """See the module's docstring for the exit codes."""
    args = parser().parse_args(arguments)
    parts = args.parts or (PARTS[1:] if args.quick else PARTS)
    ends = perf_counter() + (args.seconds or (QUICK_TOTAL if args.quick else TOTAL))
    if reason := _why_not():
        print(f"bench/run_gpu.sh: {reason}", file=sys.stderr)
        return NO_DEVICE
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = args.out / SCRATCH
    # Of a run that was killed.
    scratch.unlink(missing_ok=True)
    outcomes: dict[str, dict] = {}
    measured: dict = {}
    for part in parts:
        began = perf_counter()
        left = (ends - began) * SHARES[part] if part != parts[-1] else ends - began
        outcomes[part] = {"build": _build, "tests": _tests, "bench": _bench}[part](args, left)
        outcomes[part]["seconds"] = round(perf_counter() - began, 1)
        print(f"{part}: {outcomes[part]['outcome']} ({outcomes[part]['seconds']:g} s)", flush=True)
    if scratch.exists():
        measured = json.loads(scratch.read_text())
        scratch.unlink()
    return _finish(args.out, {"parts": outcomes, **measured})


def _why_not() -> str | None:
    from bench.gpu import why_not

    return why_not()


def _finish(out: Path, found: dict) -> int:
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", found.get("machine", {}).get("card", "unmeasured").lower()).strip("-")
    text = markdown(found)
    write_whole(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    write_whole(out / f"{name}.md", text)
    print(text)
    for limit, value, word in judged(found):
        if word == "missed":
            print(f"missed: {limit.ratio}, {limit.mode}: {value:.3f}, limit {limit.bound:g}")
    states = [part["state"] for part in found["parts"].values()]
    return 1 if "failed" in states else CUT if "cut" in states or found.get("left_out") else 0


# ---- parts: each returns {"state": "well", "failed" or "cut", "outcome": text} ----

def _build(args: argparse.Namespace, seconds: float) -> dict:
    """The CPU kernels, beside the package, if a compiler is there: nothing that runs on the GPU needs them."""
    code, tail = _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, args.out / "gpu-build.log",
                      HETEROLORA_BUILD=os.environ.get("HETEROLORA_BUILD", "auto"))
    if code is None:
        return {"state": "cut", "outcome": f"the CPU kernels were not built in {seconds:.0f} s; nothing here needs them"}
    if code != 0:
        return {"state": "failed", "outcome": f"failed with exit code {code}: {tail}"}
    importlib.invalidate_caches()
    built = importlib.util.find_spec("heterolora_kernels._C") is not None
    return {"state": "well", "outcome": "built" if built else "without compiled CPU kernels"}


def _tests(args: argparse.Namespace, seconds: float) -> dict:
    """The device's tests first, then the numbers of every small case."""
    ends = perf_counter() + seconds
    states, texts = [], []
    # Compiling kernels is most of it, and that a core does alone.
    workers = ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))] if importlib.util.find_spec("xdist") else []
    for index, file in enumerate(_TEST_FILES):
        # test_triton_cuda.py runs the second file too, in a process of its own: here it is run so that its time can be bounded.
        chosen = ["-k", "not numbers_on_the_device"] if index == 0 else []
        log = args.out / f"gpu-tests-{index + 1}.log"
        code, tail = _run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *workers, *chosen, file],
                          ends - perf_counter(), log, HETEROLORA_TEST_DEVICE="cuda", TRITON_INTERPRET="")
        states.append("cut" if code is None else "well" if code == 0 else "failed")
        texts.append(f"{file}: {'stopped when the time was up, at ' if code is None else ''}{tail}")
        if args.quick:
            break
    state = "failed" if "failed" in states else "cut" if "cut" in states else "well"
    return {"state": state, "outcome": "; ".join(texts)}


def _bench(args: argparse.Namespace, seconds: float) -> dict:
    scratch = args.out / SCRATCH
    limits = ["--seconds", f"{max(1.0, seconds - RESERVE):.0f}", *(["--quick"] if args.quick else [])]
    code, tail = _run([sys.executable, "-m", "bench.gpu", "--json", str(scratch), *limits], seconds, args.out / "gpu-bench.log")
    cases = len(json.loads(scratch.read_text())["results"]) if scratch.exists() else 0
    if code is None:
        return {"state": "cut", "outcome": f"stopped when the time was up, after {cases} cases"}
    if code != 0:
        return {"state": "failed", "outcome": f"exit code {code} after {cases} cases: {tail}"}
    return {"state": "well", "outcome": f"{cases} cases"}


def _run(command: list[str], seconds: float, log: Path, **environment: str) -> tuple[int | None, str]:
    """Exit code (None: stopped when the time was up) and last line of a process whose output goes to ``log``."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **environment}
    with log.open("w") as file:
        # A session of its own: compilers that it started are stopped with it.
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return code, lines[-1].strip("= ")[:300] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
