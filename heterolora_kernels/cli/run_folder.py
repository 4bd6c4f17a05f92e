"""A run's folder: settings, history, metrics, pictures and a model card, each file replaced at once.

    adapter/                       the adapter in the native format, with the search's state
    checkpoints/                   the Trainer's, adapters only
    run.toml                       every setting
    history.jsonl                  a line per reallocation
    reallocation_history.toml, reallocation_frequency.toml   the same in the published layout
    metrics.json                   results, time, memory, parameters, versions; during the run what was measured before it
    ranks.png, frequency.png, churn.png
    README.md                      the model card
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from heterolora_kernels._version import __version__
from heterolora_kernels.cli.options import read_toml
from heterolora_kernels.cli.plot import draw_run
from heterolora_kernels.files import field_of, read_json, read_tensors, write_file
from heterolora_kernels.history import published_frequency, published_history, write_jsonl, write_toml
from heterolora_kernels.patching import count_parameters
from heterolora_kernels.peft_format import class_names
from heterolora_kernels.plotting import rank_map
from heterolora_kernels.save_and_load import save_adapter
from heterolora_kernels.saved_files import NATIVE_NAME
from heterolora_kernels.search import RankSearch
from heterolora_kernels.state import state_of

#: What the Trainer calls its own state.
TRAINER_STATE_NAME = "trainer_state.json"


def open_folder(folder: Path, overwrite: bool) -> None:
    """Make a run's folder.

    Raises:
        ValueError: it holds something.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"--output: {folder} is not empty; go on with it by --resume, or replace its files by --overwrite")
    folder.mkdir(parents=True, exist_ok=True)


#: What an earlier run leaves that a new one may write late or never: its checkpoints would be resumed from.
_OF_A_RUN = ("adapter", "checkpoints", "history.jsonl", "reallocation_history.toml", "reallocation_frequency.toml",
             "metrics.json", "ranks.png", "frequency.png", "churn.png")


def clear(folder: Path) -> None:
    """Remove what an earlier run left; files of others stay."""
    for name in _OF_A_RUN:
        place = folder / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The Trainer's last checkpoint that was written to its end; what a kill cut off is left out, and said."""
    found = [(int(match[1]), place) for place in (folder.iterdir() if folder.is_dir() else ())
             if (match := re.fullmatch(r"checkpoint-(\d+)", place.name)) and place.is_dir()]
    for _, place in sorted(found, reverse=True):
        odd = _cut_off(place)
        if odd is None:
            return place
        print(f"{place} was not written to its end ({odd}) and is left out", file=sys.stderr)
    return None


def _cut_off(checkpoint: Path) -> str | None:
    """The first file that is missing or damaged. The Trainer writes its own state last."""
    try:
        for name in (TRAINER_STATE_NAME, NATIVE_NAME):
            read_json(checkpoint / name)
        weights = field_of(read_json(checkpoint / NATIVE_NAME), "weights", dict, NATIVE_NAME)
        read_tensors(checkpoint / str(weights.get("file")), weights.get("sha256"))
    except (OSError, ValueError) as error:
        return str(error)
    # What torch.save writes are zip files, whose table of contents stands at their end.
    files = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return next((f"{file} is missing or damaged" for file in files if not zipfile.is_zipfile(file)), None)


def read_before(folder: Path) -> dict[str, float]:
    """What was measured before a run that is resumed; nothing where its file says nothing."""
    try:
        found = read_json(folder / "metrics.json")
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in found.items() if name.startswith("before_")}


def write_settings(folder: Path, settings: Mapping) -> None:
    """``run.toml``: what was given and what was left at its default."""
    write_toml(folder / "run.toml", {name: str(value) if isinstance(value, Path) else value
                                     for name, value in settings.items()})


def read_settings(folder: Path) -> dict:
    """The settings of a run that is to go on.

    Raises:
        FileNotFoundError: there is no such run.
    """
    file = folder / "run.toml"
    if not file.exists():
        raise FileNotFoundError(f"--resume: {folder} has no run.toml: it is no run's folder")
    return read_toml(file)


def write_json_file(file: Path, content: object) -> None:
    """A JSON file for people and programs."""
    write_file(file, (json.dumps(content, indent=2) + "\n").encode())


def peak_memory() -> dict[str, float]:
    """Largest memory so far in MiB, of the process and of the GPU."""
    found = {}
    try:
        import resource
    except ImportError:
        # Windows
        pass
    else:
        # Linux counts in KiB, macOS in bytes.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        found["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if torch.cuda.is_available():
        found["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def versions() -> dict[str, str]:
    """Of the package and of what it stands on; packages that are not installed are left out."""
    found = {"heterolora_kernels": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def budget_reached(model: nn.Module) -> dict:
    """What is on, in paths, rows and parameters, beside what there is."""
    paths = state_of(model).paths.values()
    rows = {path.name: sum(path.active_rows()) for path in paths}
    return {"paths_on": sum(map(bool, rows.values())), "paths": len(rows), "rows_on": sum(rows.values()),
            "rows": sum(path.r for path in paths),
            "adapter_parameters_on": sum(path.num_parameters // path.r * rows[path.name] for path in paths),
            "adapter_parameters": sum(path.num_parameters for path in paths), **count_parameters(model)}


def write_run(folder: Path, model: nn.Module, search: RankSearch, steps_per_epoch: int | None) -> list[str]:
    """Everything that a run has after training, finished or not, but metrics and card; what could not be written, in words."""
    # The search knows what was on; a dynamic run that has not begun has nothing to say.
    save_adapter(model, folder / "adapter", search=search)
    write_jsonl(folder / "history.jsonl", search.history)
    write_toml(folder / "reallocation_history.toml", published_history(search.history, steps_per_epoch))
    write_toml(folder / "reallocation_frequency.toml", published_frequency(search.history))
    try:
        draw_run(folder, folder)
    except ImportError as error:
        return [str(error)]
    return []


def write_card(folder: Path, model: nn.Module, search: RankSearch, settings: Mapping, metrics: Mapping) -> None:
    """``README.md``: what the adapter is, what it was trained on and with, its ranks, and how to load it."""
    config, reached = search.config, budget_reached(model)
    shown = {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name not in reached}
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in shown.items())
    ranks = rank_map(search.ranks, {name for name, path in state_of(model).paths.items() if bool(path.lora_B.any())})
    loader = "AutoModelForCausalLM" if settings["task"] == "causal-lm" else "AutoModelForSequenceClassification"
    classes = class_names(model)
    labels = f", num_labels={len(classes)}" if classes else ""
    pictures = "\n".join(f"![{name}]({name}.png)" for name in ("ranks", "frequency", "churn")
                         if (folder / f"{name}.png").exists())
    warm = sum(entry["warmup"] for entry in search.history)
    classes_row = f"\n| classes | {', '.join(f'{index}: {name}' for index, name in enumerate(classes))} |" if classes else ""
    write_file(folder / "README.md", f"""# Adapter for {settings["model"]}
LoRA adapters with chosen ranks (heterolora_kernels {__version__}; HeteroLoRA, arXiv 2406.14956), in `adapter/`.

| | |
|---|---|
| base model | {settings["model"]} ({settings["dtype"]}) |
| task and data | {settings["task"]}, {settings["data"]} |{classes_row}
| search | {config.search}, proxy {config.proxy}, normalize {config.normalize}, ranks {config.ranks} |
| budget | {config.budget} {config.budget_unit}, mode {config.mode} |
| reached | {reached["paths_on"]} of {reached["paths"]} paths, {reached["rows_on"]} of {reached["rows"]} rows, \
{reached["adapter_parameters_on"]:,} of {reached["adapter_parameters"]:,} adapter parameters |
| reallocations | {len(search.history)}, {warm} of them warm-up |
| r, alpha | {config.r}, {config.lora_alpha:g} (shortcuts {config.shortcut_r or config.r}, {config.shortcut_alpha:g}) |
| seed | {config.seed} |

## Results
| | |
|---|---|
{rows}

## Ranks
A number is a rank, `o` a path that is off and has learnt, `.` one that is off and has not.
```
{ranks}
```
{pictures}

## Loading
```python
from transformers import {loader}
import heterolora_kernels as hlk

model = {loader}.from_pretrained({settings["model"]!r}{labels})
hlk.load_adapter(model, "adapter")
```
`heterolora export {folder.name} --format peft --output DIR` writes it for PEFT. Every setting is in `run.toml`.
""".encode())
