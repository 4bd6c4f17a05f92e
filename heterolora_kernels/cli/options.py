"""Settings of a command from three places: its defaults, a TOML file, and flags, which win."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

from heterolora_kernels.config import HeteroLoraConfig

#: ``{field of HeteroLoraConfig: (type of its flag, help)}``. ``sites`` has no written form short enough for a flag.
CONFIG_FLAGS = {
    "r": ("int", "full rank of every LoRA path"),
    "lora_alpha": ("float", "scaling is alpha / r"),
    "lora_dropout": ("float", "dropout on the paths' sources"),
    "target_modules": ("names", "'all-linear', or names or suffixes with commas, or one regular expression"),
    "exclude_modules": ("names", "the same; what matches gets no LoRA"),
    "modules_to_save": ("names", "heads that are trained as they are (default: those that the checkpoint does not hold)"),
    "layers_to_transform": ("numbers", "numbers of the layers in which a list of --target-modules selects, with commas"),
    "layers_pattern": ("names", "names before the number of a layer, with commas (default: any)"),
    "rank_pattern": ("pattern", "name=8,name=4"),
    "alpha_pattern": ("pattern", "name=16,name=8"),
    "use_rslora": ("bool", "scaling is alpha / sqrt(r)"),
    "adapter_dtype": ("str", "default: float32 under a 16-bit base, else the base's"),
    "init_B": ("str", "zeros or kaiming_uniform"),
    "shortcuts": ("names", "'all', or residual_1,residual_2,shortcut_sa,shortcut_ffn"),
    "shortcut_r": ("int", "rank of the shortcuts (default: r)"),
    "shortcut_alpha": ("float", "alpha of the shortcuts"),
    "budget": ("number", "a share with a decimal point (0.25), or a number (36), of what --budget-unit counts"),
    "budget_unit": ("str", "modules or parameters"),
    "mode": ("str", "combined, separated or lora_only"),
    "search": ("str", "dynamic, static or off"),
    "proxy": ("str", "what scores a path"),
    "normalize": ("str", "none, scale, size or type"),
    "score": ("str", "in_step or probe"),
    "score_decay": ("float", "weight of the past in a moving average of the scores"),
    "ranks": ("str", "binary or graded"),
    "rank_step": ("int", "graded: rows are switched in units of so many"),
    "min_rank": ("int", "graded: rows that every path keeps"),
    "hysteresis": ("float", "advantage of what is on"),
    "interval": ("number", "between reallocations: optimizer steps (40), or part of an epoch (0.2)"),
    "num_batches": ("int", "batches of a probe, or optimizer steps of the in_step window"),
    "warmup": ("int", "reallocations that cover all paths first (default: until every path was on once)"),
    "on_reactivate": ("str", "keep or reset: optimizer state of what is switched on again"),
    "synflow_target": ("str", "outputs or loss"),
    "pack": ("str", "packed copies of frozen weights: auto, copy or off"),
    "group": ("str", "auto or off: linears that read one tensor run as one op"),
    "init_from": ("str", "folder of a PEFT LoRA adapter to start from"),
    "seed": ("int", "of everything that is drawn"),
}


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_names(text: str) -> str | list[str]:
    """A list where there are commas; one word without a dot or a wildcard too, but for the two that mean all."""
    if "," in text:
        return [name for name in (part.strip() for part in text.split(",")) if name]
    return text if text in ("all", "all-linear") or not text.replace("_", "").replace(".", "").isalnum() else [text]


def _pattern(text: str) -> dict[str, int | float]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"must be name=value,name=value, got {text!r}")
    try:
        return {name.strip(): _number(value) for name, _, value in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be name=value,name=value with numbers, got {text!r}") from error


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


_TYPES = {"numbers": _numbers, "int": int, "float": float, "str": str, "number": _number, "names": parse_names,
          "pattern": _pattern, "path": Path}


#: What a TOML file may hold, by kind of flag.
_WRITTEN = {"int": (int, "a whole number"), "float": ((int, float), "a number"), "str": (str, "a string"),
            "names": ((str, list), "a name or a list of names"), "numbers": ((int, list), "a number or a list of numbers"),
            "bool": (bool, "true or false")}


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-").lower()


def check_types(settings: Mapping, table: Mapping[str, tuple]) -> None:
    """Hold settings to be what their flags take, wherever they come from.

    Args:
        table: ``{setting: (kind, default, help)}``; None is "not given".

    Raises:
        TypeError, ValueError: name the flag.
    """
    for name, (kind, *_) in table.items():
        value, (kinds, word) = settings.get(name), _WRITTEN[kind]
        if value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind != "bool"):
            raise TypeError(f"{flag_of(name)} must be {word}, got {value!r}")
        if isinstance(value, list) and not all(isinstance(entry, int if kind == "numbers" else str) for entry in value):
            raise TypeError(f"{flag_of(name)} must be {word}, got {value!r}")
        if kind == "float" and not math.isfinite(value):
            raise ValueError(f"{flag_of(name)} must be finite, got {value!r}")


def check_least(settings: Mapping, least: Mapping[str, float]) -> None:
    """Hold settings that are given to be at least so large.

    Raises:
        ValueError: names the flag.
    """
    for name, low in least.items():
        if settings.get(name) is not None and settings[name] < low:
            raise ValueError(f"{flag_of(name)} must be at least {low}, got {settings[name]!r}")


def add_flag(parser, name: str, kind: str, help: str, **more) -> None:
    """A flag whose default is None: not given."""
    flag = flag_of(name)
    if kind == "bool":
        parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=help)
    else:
        parser.add_argument(flag, dest=name, type=_TYPES[kind], default=None, help=help.replace("%", "%%"), **more)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of HeteroLoraConfig."""
    group = parser.add_argument_group("adapters and search (fields of HeteroLoraConfig)")
    defaults = HeteroLoraConfig()
    for name, (kind, help) in CONFIG_FLAGS.items():
        default = getattr(defaults, name)
        shown = "" if default in (None, (), {}, False) or "default" in help else f" (default {default})"
        add_flag(group, name, kind, help + shown, metavar=kind.upper()) if kind != "bool" else add_flag(group, name, kind, help)
    group.add_argument("--paper", choices=("dynamic", "static", "llama"), default=None,
                       help="the published settings in the place of the defaults")


def read_toml(file: Path) -> dict:
    """A TOML file's top level.

    Raises:
        FileNotFoundError, ValueError, ImportError: name the file.
    """
    try:
        import tomllib
    except ImportError:
        # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {file}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no valid TOML: {error}") from error


def settings_of(args: argparse.Namespace, defaults: Mapping) -> dict:
    """Every setting of a command: ``defaults``, over them ``--config``, over it the flags that were given.

    Args:
        defaults: the command's own settings; those of HeteroLoraConfig join them when they are set.

    Raises:
        ValueError: the TOML file has a key that is no setting.
    """
    known = {*defaults, *CONFIG_FLAGS, "paper", "sites"}
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    try:
        written = {} if getattr(args, "config", None) is None else read_toml(args.config)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: {error}") from error
    written = {name if name in known else name.replace("-", "_"): value for name, value in written.items()}
    unknown = sorted(set(written) - known)
    if unknown:
        raise ValueError(f"{args.config}: there is no setting {unknown[0]!r}; the settings are {sorted(known)}")
    return {**defaults, **written, **given}


def config_from(settings: Mapping) -> HeteroLoraConfig:
    """The HeteroLoraConfig that settings say.

    Raises:
        ValueError, TypeError: name the field.
    """
    fields = {name: value for name, value in settings.items() if name in CONFIG_FLAGS or name == "sites"}
    setting = settings.get("paper")
    if setting is None:
        return HeteroLoraConfig.from_dict(fields)
    return HeteroLoraConfig.from_dict({**HeteroLoraConfig.paper(setting).to_dict(), **fields})
