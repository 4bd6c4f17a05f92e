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
    # "run" is the command itself.
    parser.add_argument("folder", type=Path, metavar="RUN_DIR", help="a run's folder (history.jsonl, adapter/), or an adapter's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the pictures (default: into RUN_DIR)")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="default: %(default)s")


def _adapter_ranks(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """``(ranks, full ranks)`` of the adapter in a run's folder, or of the folder's own; empty without one."""
    file = next((file for file in (folder / "adapter" / "heterolora.json", folder / "heterolora.json") if file.exists()), None)
    if file is None:
        return {}, {}
    paths = field_of(read_json(file), "paths", dict, file)
    full = {name: field_of(path, "r", int, f"{file}: path {name!r}") for name, path in paths.items()}
    return {name: field_of(path, "active", str, f"{file}: path {name!r}").count("1") for name, path in paths.items()}, full


def draw_run(folder: Path, out: Path, format: str = "png") -> list[Path]:
    """Draw what a run's folder has something about: all three pictures, or without a history the adapter's ranks.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError, ValueError: there is nothing to draw, or a file is damaged.
    """
    record = folder / "history.jsonl"
    history = read_jsonl(record) if record.exists() else []
    ranks, full = _adapter_ranks(folder)
    if not history and not ranks:
        found = f"{record} is empty" if record.exists() else f"there is no {record}"
        raise FileNotFoundError(f"nothing to draw: {found} (search='off' chooses no ranks), and no adapter/heterolora.json")
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.{format}" for name in ("ranks", "frequency", "churn")}
    plot_ranks(history[-1]["ranks"] if history else ranks, full or None, files["ranks"])
    if not history:
        return [files["ranks"]]
    plot_frequency(history, files["frequency"])
    plot_churn(history, files["churn"])
    return list(files.values())


def run(args: argparse.Namespace) -> int:
    """The command."""
    if not args.folder.is_dir():
        raise FileNotFoundError(f"RUN_DIR: there is no folder {args.folder}")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a file")
    for file in draw_run(args.folder, args.out or args.folder, args.format):
        print(file)
    return 0
