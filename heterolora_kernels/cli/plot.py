"""Draw what a run did: a heat map of its ranks, how often each path was on, and what each reallocation changed.

example:
  heterolora plot runs/mrpc --out pictures --format pdf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from heterolora_kernels.files import field_of, read_json
from heterolora_kernels.history import read_jsonl
from heterolora_kernels.plotting import plot_churn, plot_frequency, plot_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (history.jsonl, adapter/) or an adapter's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the pictures (default: into RUN)")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="default: %(default)s")


def _ranks(run: Path) -> tuple[dict[str, int], dict[str, int]]:
    """``(ranks, full ranks)`` as the run's adapter has them; empty without one."""
    for folder in (run / "adapter", run):
        file = folder / "heterolora.json"
        if file.exists():
            paths = field_of(read_json(file), "paths", dict, file)
            return tuple({name: field_of(path, key, int, f"{file}: path {name!r}") for name, path in paths.items()}
                         for key in ("rank", "r"))
    return {}, {}


def draw_run(run: Path, out: Path, format: str = "png") -> list[Path]:
    """Draw everything that a run's folder has something about; the files written.

    Raises:
        FileNotFoundError: it has neither a history nor an adapter.
    """
    ranks, full = _ranks(run)
    record = run / "history.jsonl"
    history = read_jsonl(record) if record.exists() else []
    if not ranks and history:
        ranks = history[-1]["ranks"]
        full = {name: max(entry["ranks"].get(name, 0) for entry in history) for name in ranks}
    if not ranks:
        raise FileNotFoundError(f"{run} has no history.jsonl with a reallocation and no adapter: there is nothing to draw")
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.{format}" for name in ("ranks", "frequency", "churn")}
    plot_ranks(ranks, full, files["ranks"])
    if not history:
        return [files["ranks"]]
    plot_frequency(history, files["frequency"])
    plot_churn(history, files["churn"])
    return list(files.values())


def run(args: argparse.Namespace) -> int:
    """The command."""
    if not args.run.is_dir():
        raise FileNotFoundError(f"RUN: there is no folder {args.run}")
    for file in draw_run(args.run, args.out or args.run, args.format):
        print(file)
    return 0
