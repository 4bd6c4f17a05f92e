"""Fine-tune a model with adapters whose ranks are chosen while it trains: classification of a text or a pair, or a causal
language model, on csv, json, parquet or hub data. Ctrl-C stops after the running step; --resume goes on from there.

example:
  heterolora train --model ./encoder --data train.csv --text-columns sentence1,sentence2 --label-column label \\
      --validation test.csv --shortcuts all --mode separated --budget 0.25 --epochs 3 --output runs/first
  heterolora train --resume --output runs/first
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from heterolora_kernels.cli import data, options, run_folder
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.files import field_of, read_json
from heterolora_kernels.patching import apply_heterolora, print_trainable_parameters
from heterolora_kernels.peft_format import CONFIG_NAME

#: ``{setting: (kind, default, help)}`` of the training itself.
TRAINING = {
    "epochs": ("float", 3.0, "passes over the data"),
    "max_steps": ("int", -1, "optimizer steps; -1: as many as --epochs need"),
    "batch_size": ("int", 16, "examples of a batch on each device"),
    "accumulation": ("int", 1, "batches of an optimizer step"),
    "lr": ("float", 1e-3, "learning rate of AdamW"),
    "scheduler": ("str", "linear", "course of the learning rate: linear, constant, cosine ..."),
    "warmup_steps": ("float", 0.0, "steps in which the learning rate rises; below 1: part of the run"),
    "weight_decay": ("float", 0.01, "of AdamW"),
    "max_grad_norm": ("float", 1.0, "gradients are clipped to this norm"),
    "save_every": ("int", 0, "optimizer steps between checkpoints; 0: each epoch"),
    "checkpointing": ("bool", False, "recompute activations in the backward: less memory, more time"),
}
_LEAST = {"batch_size": 1, "accumulation": 1, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "save_every": 0}
#: How a run is started; not part of what it is.
_STARTING = ("output", "resume", "overwrite", "config", "debug", "run", "command")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of these settings; flags win over it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, with its settings")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds something")
    data.add_data_arguments(parser)
    group = parser.add_argument_group("training")
    for name, (kind, default, help) in TRAINING.items():
        options.add_flag(group, name, kind, help if kind == "bool" else f"{help} (default {default:g})" if kind != "str"
                         else f"{help} (default {default})")
    options.add_config_arguments(parser)
    parser.add_argument("--init-ranks", metavar="DIR", default=None, help="ranks that `heterolora search` chose: train fresh "
                        "weights of those ranks, without a search")


def defaults() -> dict:
    """The command's settings, but those of HeteroLoraConfig."""
    return {**data.DEFAULTS, **{name: default for name, (_, default, _) in TRAINING.items()}, "init_ranks": None}


def _settings(args: argparse.Namespace) -> dict:
    if not args.resume:
        return options.settings_of(args, defaults())
    if args.overwrite or args.config is not None:
        raise ValueError("--resume takes every setting from the run: leave --overwrite and --config out")
    written = {**defaults(), **run_folder.read_settings(args.output)}
    changed = [name for name, value in vars(args).items()
               if name not in _STARTING and value is not None and value != written.get(name)]
    if changed:
        raise ValueError(f"--{changed[0].replace('_', '-')} is {getattr(args, changed[0])!r}, and the run that is resumed has "
                         f"{written.get(changed[0])!r}: leave it out")
    return written


def _check_training(settings: Mapping) -> None:
    """Complain now, and by the flag's name, not after the model was loaded."""
    options.check_types(settings, TRAINING)
    options.check_least(settings, _LEAST)
    for name in ("epochs", "lr"):
        if settings[name] <= 0:
            raise ValueError(f"--{name} must be > 0, got {settings[name]!r}")
    if settings["max_steps"] != -1 and settings["max_steps"] < 1:
        raise ValueError(f"--max-steps must be at least 1, or -1 for as many as --epochs need, got {settings['max_steps']!r}")
    try:
        from transformers import SchedulerType
    except ImportError:
        # data.prepare says which extra is missing.
        return
    names = [kind.value for kind in SchedulerType]
    if settings["scheduler"] not in names:
        raise ValueError(f"--scheduler must be one of {names}, got {settings['scheduler']!r}")


def config_of(settings: Mapping) -> HeteroLoraConfig:
    """The config of a run; with ``init_ranks`` that of the ranks that were found."""
    if settings.get("init_ranks") is None:
        return options.config_from(settings)
    file = Path(settings["init_ranks"]) / CONFIG_NAME
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--init-ranks: {error}") from error
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    ranks = {name: field_of(found, name, (int, float, dict, list, str), file) for name in names}
    clash = [name for name in (*names, "search", "shortcuts") if settings.get(name) not in (None, "off", [])]
    if clash:
        raise ValueError(f"--init-ranks and --{clash[0].replace('_', '-')} contradict each other")
    # PEFT's alpha of such a file is the scaling times the rank; heads are the task's.
    return options.config_from({**settings, **ranks, "search": "off", "use_rslora": False, "paper": None})


@contextmanager
def _stops_at_ctrl_c(trainer) -> Iterator[list[bool]]:
    """Ctrl-C lets the Trainer finish its step, save and stop; a second one stops at once. Yields [whether it came]."""
    from transformers import TrainerCallback

    came: list[bool] = []

    class Stop(TrainerCallback):
        """The checkpoint must be one that the unbroken run passes through: an evaluation draws random numbers too.

        So there is none but at the end of an epoch, where the unbroken run has one, before it saves.
        """

        def on_step_end(self, args, state, control, **kwargs):
            if came:
                control.should_training_stop = True
                control.should_save = not float(state.epoch).is_integer()

        def on_epoch_end(self, args, state, control, **kwargs):
            if came:
                control.should_save = float(state.epoch).is_integer()
                control.should_evaluate = control.should_evaluate and control.should_save

    def handle(number, frame):
        if came:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        came.append(True)
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    trainer.add_callback(Stop())
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def build_trainer(prepared: data.Prepared, settings: Mapping, folder: Path, callback, seed: int):
    """The HF Trainer of a run."""
    from transformers import Trainer, TrainingArguments

    saving = {"save_strategy": "steps", "save_steps": int(settings["save_every"])} if settings["save_every"] else {
        "save_strategy": "epoch"}
    arguments = TrainingArguments(
        str(folder), num_train_epochs=settings["epochs"], max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"], per_device_eval_batch_size=4 * settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"], learning_rate=settings["lr"],
        lr_scheduler_type=settings["scheduler"], warmup_steps=settings["warmup_steps"], weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"], seed=seed, save_total_limit=2,
        eval_strategy="epoch" if prepared.validation is not None else "no", logging_steps=20, report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(), **saving)
    if settings["checkpointing"]:
        # Not by the argument, whose name changes with transformers' versions.
        prepared.model.gradient_checkpointing_enable({"use_reentrant": False})
    return Trainer(prepared.model, arguments, train_dataset=prepared.train, eval_dataset=prepared.validation,
                   data_collator=prepared.collate, compute_metrics=prepared.metrics, callbacks=[callback])


def _evaluate(trainer, name: str) -> dict[str, float]:
    """Loss and metric on the validation data, as ``<name>_loss`` and so on; not run again where the last step did."""
    if trainer.eval_dataset is None:
        return {}
    now = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == trainer.state.global_step]
    found = now[-1] if now and trainer.state.global_step > 0 else trainer.evaluate()
    return {f"{name}_{key.removeprefix('eval_')}": value for key, value in found.items()
            if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_time"))}


def run(args: argparse.Namespace) -> int:
    """The command."""
    settings = _settings(args)
    settings["task"] = data.check_settings(settings)
    _check_training(settings)
    config = config_of(settings)
    output: Path = args.output
    if not args.resume:
        run_folder.open_folder(output, args.overwrite)
    prepared = data.prepare(settings, config.seed)
    model = apply_heterolora(prepared.model, config)
    if not args.resume:
        run_folder.clear(output)
        run_folder.write_settings(output, settings)
    print_trainable_parameters(model)
    return _train(prepared, model, settings, output, args.resume)


def _train(prepared: data.Prepared, model: nn.Module, settings: Mapping, output: Path, resume: bool) -> int:
    from heterolora_kernels.callback import HeteroLoraCallback

    config = config_of(settings)
    checkpoints = output / "checkpoints"
    last = run_folder.last_checkpoint(checkpoints) if resume else None
    if resume and last is None:
        raise FileNotFoundError(f"--resume: {checkpoints} has no checkpoint that was written to its end: begin anew with "
                                "--overwrite")
    callback = HeteroLoraCallback(at_last_step=False)
    trainer = build_trainer(prepared, settings, checkpoints, callback, config.seed)
    began = time.perf_counter()
    before = run_folder.read_before(output) if resume else _evaluate(trainer, "before")
    run_folder.write_json_file(output / "metrics.json", before)
    with _stops_at_ctrl_c(trainer) as stopped:
        result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    search = callback.search
    done = trainer.state.global_step >= trainer.state.max_steps
    steps_per_epoch = max(1, round(trainer.state.max_steps / max(trainer.state.num_train_epochs, 1)))
    missing = run_folder.write_run(output, model, search, steps_per_epoch)
    if stopped and not done:
        print(f"\nstopped after {trainer.state.global_step} of {trainer.state.max_steps} steps. The adapter so far is in "
              f"{output / 'adapter'}; go on with\n  heterolora train --resume --output {output}")
        return 130
    broken = [name for name, parameter in model.named_parameters()
              if parameter.requires_grad and not bool(torch.isfinite(parameter).all())]
    if broken:
        raise FloatingPointError(f"the run diverged: {len(broken)} trained tensors are not finite ({broken[0]}, ...); its "
                                 f"checkpoints are in {checkpoints}. Try a smaller --lr")
    after = _evaluate(trainer, "after")
    metrics = {**before, **after, "train_loss": result.training_loss, "steps": trainer.state.global_step,
               "seconds": round(time.perf_counter() - began, 1), **run_folder.peak_memory(), **run_folder.budget_reached(model),
               "reallocations": len(search.history), "log": trainer.state.log_history, "versions": run_folder.versions()}
    run_folder.write_json_file(output / "metrics.json", metrics)
    run_folder.write_card(output, model, search, settings, metrics)
    for line in missing:
        print(f"no pictures: {line}", file=sys.stderr)
    _report(metrics, output)
    return 0


def _report(metrics: Mapping, output: Path) -> None:
    shown = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()
             if name.startswith(("before_", "after_")) and isinstance(value, float)]
    print("\n" + (", ".join(shown) or f"train loss {metrics['train_loss']:.4g}"))
    print(f"{metrics['paths_on']} of {metrics['paths']} paths and {metrics['adapter_parameters_on']:,} of "
          f"{metrics['adapter_parameters']:,} adapter parameters have a rank, after {metrics['reallocations']} reallocations "
          f"({metrics['seconds']:.0f} s)")
    print(f"the run is in {output}: adapter/, history.jsonl, metrics.json, README.md")
