"""Try every architecture of transformers that can be built small: a table of what is reached, left out by name, or refused.

    python tests/architectures.py --jobs 2          writes docs/architectures.md; results are kept in build/architectures
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = ROOT / "build" / "architectures", ROOT / "docs" / "architectures.md"
SECONDS, MEMORY = 90, 6 * 2**30


def _one(model_type: str, file: str) -> None:
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    import transformers
    from check_architecture import check

    transformers.logging.set_verbosity_error()
    Path(file).write_text(json.dumps(check(model_type), indent=1))


def _all(names: list[str], jobs: int) -> None:
    """A process for every type, forked from this one, which has imported everything."""
    context, running, todo = multiprocessing.get_context("fork"), {}, list(names)
    while todo or running:
        while todo and len(running) < jobs:
            name = todo.pop(0)
            process = context.Process(target=_one, args=(name, str(RESULTS / f"{name}.json")))
            process.start()
            running[name] = (process, time.monotonic())
        for name, (process, begun) in list(running.items()):
            late = time.monotonic() - begun > SECONDS
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[name]
            file = RESULTS / f"{name}.json"
            if not file.exists():
                reason = f"took longer than {SECONDS} s" if late else f"its process ended with {process.exitcode}"
                file.write_text(json.dumps({"type": name, "class": None, "outcome": "not built", "paths": 0, "unreached": [],
                                            "left": "", "peft": "", "reason": reason}, indent=1))
        time.sleep(0.02)


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[:most] + " ..."


def _row(record: dict) -> str:
    from heterolora_kernels.leftovers import listed_by_pattern

    unreached = listed_by_pattern(record["unreached"]) if record["unreached"] else ""
    told = "; ".join(filter(None, (f"not reached: {unreached}" if unreached else "", record["left"].partition(": ")[2],
                                   record["reason"])))
    reached = record["paths"] - len(record["unreached"])
    peft = record["peft"].partition(":")[0]
    return (f"| {record['type']} | {record['class'] or ''} | {record['outcome']} | {reached if record['paths'] else ''} | "
            f"{_short(told)} | {peft} |")


def write_table(records: list[dict]) -> None:
    """Write ``docs/architectures.md``."""
    import peft
    import torch
    import transformers

    outcomes, exports = Counter(record["outcome"] for record in records), Counter(
        record["peft"].partition(":")[0] for record in records if record["outcome"] == "reached")
    tried = [record for record in records if record["outcome"] != "not built"]
    lines = [
        "# Architectures", "",
        "What the default makes of every architecture of transformers that can be built small from its config: patched, "
        "stepped once,",
        "saved, loaded into a fresh copy and into PEFT, removed.", "",
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}. Made by `make "
        f"architectures`.", "",
        f"{len(records)} types; {len(tried)} could be built and run here: {outcomes['reached']} work, {outcomes['refused']} are "
        f"refused by name, {outcomes['fault']} have a fault.",
        f"{sum(bool(r['unreached']) for r in tried)} have paths that no gradient reaches, which are named; "
        f"{sum(bool(r['left']) for r in tried)} have modules that are left out by name.",
        f"In PEFT {exports['same']} compute the same, {exports['refused']} exports are refused with the reason, "
        f"{exports['not in PEFT']} cannot be run by PEFT at all.", "",
        "*Reached*: paths that had a gradient after the first step. *Not built*: our recipes for small configs and inputs do "
        "not fit it; that says nothing about the package.", "",
        "| type | class | outcome | reached | what is said | PEFT |", "|---|---|---|---|---|---|",
        *(_row(record) for record in tried), "", "## Not built here", "", "| type | class | why |", "|---|---|---|",
        *(f"| {record['type']} | {record['class'] or ''} | {_short(record['reason'], 110)} |" for record in records
          if record["outcome"] == "not built"), ""]
    TABLE.write_text("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--types", nargs="*", help="only these, without a table")
    parser.add_argument("--stale", action="store_true", help="take results that are there")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    import peft  # noqa: F401 - before the processes fork
    from check_architecture import types

    names = args.types or types()
    _all([name for name in names if not (args.stale and (RESULTS / f"{name}.json").exists())
          and ((RESULTS / f"{name}.json").unlink(missing_ok=True) or True)], args.jobs)
    records = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    for record in records:
        if record["outcome"] == "fault" or args.types:
            print(f"{record['type']}: {record['outcome']}: {record['paths']} paths, {len(record['unreached'])} not reached; "
                  f"PEFT: {record['peft']}; {record['reason']} {record['left'][:200]}")
    print(dict(Counter(record["outcome"] for record in records)))
    if not args.types:
        write_table(records)
    return int(any(record["outcome"] == "fault" for record in records))


if __name__ == "__main__":
    sys.exit(main())
