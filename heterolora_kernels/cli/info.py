"""Show what runs here (backends, and why not, versions, devices), and what a model would get.

example:
  heterolora info
  heterolora info --model ./encoder --shortcuts all --budget 0.25
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from heterolora_kernels import distributed
from heterolora_kernels.allocation import allocate, available_allocators
from heterolora_kernels.backends import available_backends, unavailable_backends
from heterolora_kernels.cli import options, run_folder
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.names import split_path
from heterolora_kernels.patching import apply_heterolora, state_of
from heterolora_kernels.proxies import available_proxies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--model", help="folder or hub name of a transformers model; no weights are loaded")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_config_arguments(parser)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict:
    """Versions, devices and backends."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"versions": run_folder.versions(), "platform": platform.platform(), "processor": _processor(),
            "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(), "gpus": gpus,
            "processes": distributed.world_size(), "backends": available_backends(), "unavailable": unavailable_backends(),
            "proxies": available_proxies(), "allocators": available_allocators()}


def describe_model(source: str, config: HeteroLoraConfig) -> dict:
    """What ``apply_heterolora`` would add to a model, built from its configuration alone."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"--model needs the extra 'train' (pip install 'heterolora-kernels[train]'): {error}") from error
    found = transformers.AutoConfig.from_pretrained(source)
    names = found.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(found) if cls is None else cls._from_config(found)
    base = sum(p.numel() for p in model.parameters())
    apply_heterolora(model, config)
    paths = state_of(model).paths
    ranks = allocate(dict.fromkeys(paths, 1.0), {name: path.num_parameters for name, path in paths.items()}, config.budget,
                     kinds={name: path.kind for name, path in paths.items()},
                     max_ranks={name: path.r for name, path in paths.items()}, mode=config.mode, ranks=config.ranks,
                     budget_unit=config.budget_unit, rank_step=config.rank_step, min_rank=config.min_rank,
                     generator=torch.Generator().manual_seed(config.seed))
    rows = {name: sum(rank) if isinstance(rank, list) else int(rank) for name, rank in ranks.items()}
    kinds: dict[tuple, dict] = {}
    for name, path in paths.items():
        key = (split_path(name)[2], path.lora_B.shape[0], path.lora_A.shape[1], path.r)
        entry = kinds.setdefault(key, {"module": key[0], "out_features": key[1], "in_features": key[2], "r": key[3],
                                       "paths": 0, "parameters": 0})
        entry["paths"] += 1
        entry["parameters"] += path.num_parameters
    return {"class": type(model).__name__, "base_parameters": base, "modules": list(kinds.values()), "paths": len(paths),
            "adapter_parameters": sum(path.num_parameters for path in paths.values()),
            "budget": {"paths": sum(map(bool, rows.values())), "rows": sum(rows.values()),
                       "parameters": sum(path.num_parameters // path.r * rows[name] for name, path in paths.items())}}


def run(args: argparse.Namespace) -> int:
    """The command."""
    found = machine()
    settings = options.settings_of(args, {})
    if args.model is not None:
        found["model"] = describe_model(args.model, options.config_from(settings))
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


def _lines(found: Mapping) -> list[str]:
    lines = ["  ".join(f"{name} {version}" for name, version in found["versions"].items()),
             f"{found['platform']}, {found['processor']}, {found['threads']} threads ({found['capability']})",
             f"GPUs: {', '.join(found['gpus']) or 'none'}",
             f"backends: {', '.join(found['backends'])}"]
    lines += [f"  not {name}: {reason}" for name, reason in found["unavailable"].items()]
    lines += [f"proxies: {', '.join(found['proxies'])}", f"ranks: {', '.join(found['allocators'])}"]
    if "model" not in found:
        return lines
    model = found["model"]
    width = max(len(entry["module"]) for entry in model["modules"])
    lines += ["", f"{model['class']}: {model['base_parameters']:,} parameters; adapters would be:",
              f"{'module'.ljust(width)}  paths  out x in          r  parameters"]
    for entry in model["modules"]:
        shape = f"{entry['out_features']} x {entry['in_features']}"
        lines.append(f"{entry['module'].ljust(width)}  {entry['paths']:5d}  {shape:<15s} {entry['r']:3d}  "
                     f"{entry['parameters']:>10,}")
    share = 100 * model["adapter_parameters"] / model["base_parameters"]
    budget = model["budget"]
    lines += [f"{model['paths']} paths, {model['adapter_parameters']:,} parameters at full rank ({share:.2f} % of the base)",
              f"the budget buys about {budget['paths']} paths, {budget['rows']} rows, {budget['parameters']:,} parameters "
              "(which ones, the scores decide)"]
    return lines
