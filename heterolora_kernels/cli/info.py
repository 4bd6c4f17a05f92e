"""Show what runs here: versions, devices, backends, proxies, allocators; and with --model what adapters a model would get,
built from its configuration alone, without its weights.

example:
  heterolora info
  heterolora info --model Qwen/Qwen2.5-0.5B --r 16 --shortcuts all --budget 0.25
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from heterolora_kernels._env import available_memory, cpu_isa, how_to_install
from heterolora_kernels._version import __version__
from heterolora_kernels.allocation import allocate, available_allocators, get_allocator
from heterolora_kernels.backends import available_backends, backend_remarks, extra, unavailable_backends
from heterolora_kernels.cli import data, options
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.heads import find_heads
from heterolora_kernels.names import split_path
from heterolora_kernels.packing import AUTO_SHARE
from heterolora_kernels.peft_format import read_peft
from heterolora_kernels.planning import (
    PlannedLayer,
    PlannedPath,
    check_shortcut_layers,
    find_targets,
    plan_layers,
    plan_lora,
    plan_shortcuts,
)
from heterolora_kernels.proxies import available_proxies, get_proxy
from heterolora_kernels.trials import ANY_NAME, CONV1D, PLAIN, forget, judge

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "matplotlib", "tomli-w")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--model", metavar="MODEL", help="local folder or hub name: show what this model would get")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with fields of the config; flags win over it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """The command."""
    found = machine()
    if args.model is not None:
        config = options.config_from(options.settings_of(args, {}))
        found["model"] = {"name": args.model, **describe(skeleton(args.model), config)}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    _print_machine(found)
    if args.model is not None:
        _print_model(found["model"])
    return 0


# ---- the machine ----

def machine() -> dict:
    """What is installed and what can run."""
    return {"versions": {"heterolora-kernels": __version__, "python": platform.python_version(),
                         **{name: _version_of(name) for name in _PACKAGES}},
            "platform": platform.platform(), "processor": _processor(), "devices": list(_devices()),
            "backends": {"available": available_backends(), "unavailable": unavailable_backends(),
                         "remarks": backend_remarks()},
            "cpu_kernels": _cpu_kernels(),
            "proxies": available_proxies(), "allocators": available_allocators()}


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    # platform.processor() is empty or just the architecture on most Linux systems.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return name or platform.processor() or platform.machine()


def _cpu_kernels() -> dict | None:
    """Which instruction set the CPU backend's kernels use and why not another; None without the backend."""
    if "cpu" not in available_backends():
        return None
    chosen, unavailable = extra("cpu", "instruction_sets")()
    return {"chosen": chosen, "asked_for": cpu_isa(), "unavailable": unavailable}


def _devices() -> Iterable[dict]:
    cpu = torch.device("cpu")
    yield {"device": "cpu", "name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
           f"{torch.backends.cpu.get_cpu_capability()}", "free_bytes": available_memory(cpu)}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        yield {"device": f"cuda:{index}", "name": f"{about.name}, capability {about.major}.{about.minor}",
               "free_bytes": available_memory(torch.device("cuda", index))}
    if torch.backends.mps.is_available():
        yield {"device": "mps", "name": "Apple GPU", "free_bytes": None}


# ---- a model ----

def skeleton(name: str) -> nn.Module:
    """The model that a configuration describes, on the meta device: no weights are read or allocated.

    Raises:
        FileNotFoundError, ImportError: there is no such folder, or no transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"--model needs the extra 'train' ({how_to_install('train')}): {error}") from error
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        # Not left to the hub, which would complain about the form of the name.
        raise FileNotFoundError(f"--model: there is no folder {name}")
    with data.naming("--model", name):
        config = transformers.AutoConfig.from_pretrained(name)
    known = (getattr(transformers, architecture, None) for architecture in config.architectures or ())
    built = next((architecture for architecture in known if architecture is not None), None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if built is None else built(config)


def describe(model: nn.Module, config: HeteroLoraConfig) -> dict:
    """What :func:`apply_heterolora` would make of a model, and what the budget buys of it; the model is not changed.

    Raises:
        ValueError: as :func:`apply_heterolora`; but shortcuts that are refused are left out, and the reason is told.
    """
    get_proxy(config.proxy)
    if config.init_from is not None:
        # Base weights that were saved along cannot be compared with those of a skeleton.
        config = dataclasses.replace(read_peft(config.init_from).named_as(model), others={}).adopted_by(model, config)
    forget()
    found_heads = find_heads(model, config)
    targets = find_targets(model, config, found_heads) if len(config.target_modules) else {}
    layers = plan_layers(model, config)
    refused = _why_no_shortcuts(model, config, layers)
    lora = plan_lora(targets, config)
    planned = plan_shortcuts(layers, config) if refused is None else []
    shortcuts, bases = [plan for _, plan, _ in planned], {base for _, _, base in planned}
    if not lora and not shortcuts:
        raise ValueError(f"nothing is left to adapt; shortcuts: {refused or config.shortcuts or 'none'}")
    base = sum(parameter.numel() for parameter in model.parameters())
    heads = sum(parameter.numel() for parameter in found_heads.parameters(model).values())
    paths = [*lora, *shortcuts]
    return {"class": type(model).__name__, "base_parameters": base, "head_parameters": heads, "groups": _groups(paths),
            "lora_paths": len(lora), "shortcuts": len(shortcuts), "rows": sum(plan.r for plan in paths),
            "adapter_parameters": sum(map(_size, paths)), "share_of_base": sum(map(_size, paths)) / base,
            "budget": None if config.search == "off" else _bought(paths, config),
            "packed_bytes": _packed_bytes(model, {plan.name for plan in lora} | bases, config),
            "shortcut_sites": {"classes": _sites(layers) if refused is None else {}, "refused": refused,
                               "used": list(config.shortcuts) if refused is None else []}}


def _size(plan: PlannedPath) -> int:
    return plan.r * (plan.in_features + plan.out_features)


def _packed_bytes(model: nn.Module, names: Iterable[str], config: HeteroLoraConfig) -> dict | None:
    """Memory of the packed copies of the adapted weights, for inference and for training; None where none are made."""
    if config.pack == "off" or "cpu" not in available_backends():
        return None
    modules = [model.get_submodule(name) for name in names]
    weights = [torch.empty_strided(module.weight.shape, module.weight.stride(), dtype=module.weight.dtype)
               for module in modules if judge(module).way in (PLAIN, ANY_NAME, CONV1D)]
    size = extra("cpu", "packed_bytes")
    return {"mode": config.pack, **{what: sum(size(weight, needs_grad) for weight in weights)
                                    for what, needs_grad in (("inference", False), ("training", True))}}


def _why_no_shortcuts(model: nn.Module, config: HeteroLoraConfig, layers: list[PlannedLayer]) -> str | None:
    """Why the model cannot have the config's shortcuts (all of them where it has none), or None."""
    wanted = config if config.shortcuts else dataclasses.replace(config, shortcuts="all")
    try:
        check_shortcut_layers(model, wanted, layers)
    except ValueError as error:
        return str(error).removeprefix("shortcuts: ")
    return None


def _sites(layers: list[PlannedLayer]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for layer in layers:
        entry = found.setdefault(type(layer.module).__name__, {"layers": 0, **dataclasses.asdict(layer.site)})
        entry["layers"] += 1
    return found


def _groups(paths: Iterable[PlannedPath]) -> list[dict]:
    """Paths that are alike: one module type, shape and rank."""
    groups: dict[tuple, dict] = {}
    for plan in paths:
        module = split_path(plan.name)[2]
        key = (module, plan.in_features, plan.out_features, plan.r, plan.alpha)
        group = groups.setdefault(key, {
            "module": module, "kind": "lora" if plan.site is None else "shortcut", "count": 0, "in_features": plan.in_features,
            "out_features": plan.out_features, "r": plan.r, "alpha": plan.alpha, "parameters": 0})
        group["count"] += 1
        group["parameters"] += _size(plan)
    return list(groups.values())


def _bought(paths: list[PlannedPath], config: HeteroLoraConfig) -> dict:
    """How many paths, rows and parameters the budget switches on, ``[low, high]``: if the dearest paths score best, and if the
    cheapest do."""
    costs = {plan.name: _size(plan) for plan in paths}
    kinds = {plan.name: "lora" if plan.site is None else "shortcut" for plan in paths}
    full = {plan.name: plan.r for plan in paths}
    counts = []
    for sign in (1, -1):
        # The dearest first, then the cheapest first; rows are ranked by what a row costs.
        scores = {name: sign * cost / (full[name] if get_allocator(config.ranks).per_rank else 1) for name, cost in costs.items()}
        ranks = allocate(scores, costs, config.budget, kinds=kinds, max_ranks=full, mode=config.mode, ranks=config.ranks,
                         budget_unit=config.budget_unit, rank_step=config.rank_step, min_rank=config.min_rank,
                         generator=torch.Generator().manual_seed(config.seed))
        rows = {name: rank if isinstance(rank, int) else sum(rank) for name, rank in ranks.items()}
        counts.append({"paths": sum(map(bool, rows.values())), "rows": sum(rows.values()),
                       "parameters": sum(costs[name] // full[name] * row for name, row in rows.items())})
    return {"budget": config.budget, "unit": config.budget_unit, "mode": config.mode, "ranks": config.ranks,
            **{what: sorted(count[what] for count in counts) for what in counts[0]}}


# ---- as text ----

def _line(label: str, text: object) -> None:
    print(f"{label:<19} {text}")


def _gib(size: int | None) -> str:
    return "" if size is None else f", {size / 2**30:.1f} GiB free"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _print_machine(found: Mapping) -> None:
    for name, version in found["versions"].items():
        _line(name, version or "not installed")
    _line("platform", found["platform"])
    _line("processor", found["processor"])
    for entry in found["devices"]:
        _line(entry["device"], entry["name"] + _gib(entry["free_bytes"]))
    _line("backends", ", ".join(found["backends"]["available"]))
    for name, reason in found["backends"]["unavailable"].items():
        _line(f"  not {name}", reason)
    for name, remark in found["backends"]["remarks"].items():
        _line(f"  about {name}", remark)
    kernels = found["cpu_kernels"]
    if kernels is not None:
        asked = " (HETEROLORA_CPU_ISA)" if kernels["asked_for"] else ": the most capable that runs here"
        _line("cpu kernels", kernels["chosen"] + asked)
        for name, reason in kernels["unavailable"].items():
            _line(f"  not {name}", reason)
    _line("proxies", ", ".join(found["proxies"]))
    _line("allocators", ", ".join(found["allocators"]))


def _between(bounds: list[int]) -> str:
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _print_table(groups: list[Mapping]) -> None:
    rows = [("path", "kind", "count", "in x out", "r", "alpha", "parameters")]
    rows += [(group["module"], "LoRA" if group["kind"] == "lora" else "shortcut", str(group["count"]),
              f"{group['in_features']} x {group['out_features']}", str(group["r"]), f"{group['alpha']:g}",
              f"{group['parameters']:,}") for group in groups]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        # Words to the left, numbers to the right.
        print("  ".join(cell.ljust(width) if place < 2 else cell.rjust(width)
                        for place, (cell, width) in enumerate(zip(row, widths))))


def _print_model(found: Mapping) -> None:
    print()
    _line("model", f"{found['name']}: {found['class']}, {found['base_parameters']:,} parameters")
    print()
    _print_table(found["groups"])
    print()
    paths = found["lora_paths"] + found["shortcuts"]
    _line("at full rank", f"{found['lora_paths']} LoRA paths and {found['shortcuts']} shortcuts, {found['rows']:,} rows, "
          f"{found['adapter_parameters']:,} parameters: {100 * found['share_of_base']:.3g} % of the base")
    if found["head_parameters"]:
        _line("heads", f"{found['head_parameters']:,} parameters, trained as they are")
    bought = found["budget"]
    if bought is None:
        _line("budget", "none: search is off, every path has its full rank")
    else:
        share = f"{100 * bought['budget']:g} % of the" if isinstance(bought["budget"], float) else bought["budget"]
        _line("budget", f"{share} {bought['unit']} ({bought['ranks']}, {bought['mode']}) switches on "
              f"{_between(bought['paths'])} of {paths} paths, {_between(bought['rows'])} rows, {_between(bought['parameters'])} "
              "parameters")
    packed = found["packed_bytes"]
    if packed is not None:
        limit = f", at most {100 * AUTO_SHARE:g} % of the free memory" if packed["mode"] == "auto" else ""
        _line("packed weights", f"on the CPU {_mib(packed['training'])} beside the model in training, "
              f"{_mib(packed['inference'])} without gradients (pack={packed['mode']}{limit})")
    sites = found["shortcut_sites"]
    if sites["refused"] is not None:
        _line("shortcuts", f"refused: {sites['refused']}")
    for name, site in sites["classes"].items():
        joined = " and ".join(site[part] + (f" (behind {site[f'{part}_norm']})" if site[f"{part}_norm"] else "")
                              for part in ("attention", "feed_forward"))
        _line("shortcuts", f"known for the {site['layers']} layers of class {name}: from the inputs of {site['h']} and "
              f"{site['f']} to the outputs of {joined}")
