"""Choose ranks once, without training a model for use: score every path, share the budget out, and write a rank pattern that
PEFT and `heterolora train --init-ranks` read.

example:
  heterolora search --model ./encoder --data train.csv --text-columns sentence1,sentence2 --label-column label \\
      --budget 0.25 --proxy snip --train-steps 100 --output ranks
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from heterolora_kernels.allocation import get_allocator
from heterolora_kernels.alpha_test import accuracy, perplexity
from heterolora_kernels.cli import data, options, run_folder
from heterolora_kernels.patching import apply_heterolora, print_trainable_parameters
from heterolora_kernels.peft_format import CONFIG_NAME
from heterolora_kernels.plotting import plot_ranks, rank_map
from heterolora_kernels.save_and_load import peft_config
from heterolora_kernels.scoring import default_loss
from heterolora_kernels.search import PROBE_BATCHES, RankSearch
from heterolora_kernels.state import state_of

_SETTINGS = {"batch_size": ("int", 8, "examples of a batch"),
             "train_steps": ("int", 0, "optimizer steps with everything on before scoring: most proxies are 0 before the first"),
             "lr": ("float", 1e-3, "learning rate of those steps")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the ranks")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of these settings; flags win over it")
    parser.add_argument("--overwrite", action="store_true", help="replace files in a folder that holds something")
    data.add_data_arguments(parser)
    for name, (kind, default, help) in _SETTINGS.items():
        options.add_flag(parser, name, kind, f"{help} (default {default:g})")
    options.add_config_arguments(parser)


def _train(model: nn.Module, loader: DataLoader, steps: int, lr: float) -> None:
    from tqdm import tqdm

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    model.train()
    batches = (batch for _ in iter(int, 1) for batch in loader)
    for _, batch in zip(tqdm(range(steps), desc="train with everything on"), batches):
        default_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


class _Shown:
    """A loader in the order of the data, with a progress bar whenever it is read."""

    def __init__(self, loader: DataLoader, batches: int):
        self._loader, self._batches = loader, min(batches, len(loader))

    def __iter__(self):
        from tqdm import tqdm

        return iter(tqdm(self._loader, total=self._batches, desc="batches to score with"))


def _shown_metric(task: str, evaluations: int) -> dict:
    """Arguments of RankSearch for alpha_test, whose evaluations move a progress bar."""
    from tqdm import tqdm

    bar = tqdm(total=evaluations, desc="evaluations (at most)")

    def metric(model: nn.Module, batches) -> float:
        bar.update()
        return accuracy(model, batches) if task == "classification" else perplexity(model, batches, default_loss)

    return {"metric": metric, "greater_is_better": task == "classification"}


def run(args: argparse.Namespace) -> int:
    """The command."""
    settings = options.settings_of(args, {**data.DEFAULTS, **{name: default for name, (_, default, _) in _SETTINGS.items()}})
    options.check_types(settings, _SETTINGS)
    options.check_least(settings, {"batch_size": 1, "train_steps": 0})
    if settings["lr"] <= 0:
        raise ValueError(f"--lr must be > 0, got {settings['lr']!r}")
    for name, only in (("search", "static"), ("score", "probe")):
        if settings.get(name) not in (None, only):
            raise ValueError(f"--{name} must be {only!r} here, where ranks are chosen once, got {settings[name]!r}")
    config = dataclasses.replace(options.config_from({**settings, "search": "static"}), score="probe")
    run_folder.open_folder(args.output, args.overwrite)
    prepared = data.prepare(settings, config.seed)
    model = apply_heterolora(prepared.model, config)
    if torch.cuda.is_available():
        model.cuda()
    loader = DataLoader(prepared.train, settings["batch_size"], shuffle=True, collate_fn=prepared.collate,
                        generator=torch.Generator().manual_seed(config.seed))
    units = state_of(model).paths.values()
    measures = {} if config.proxy != "alpha_test" else _shown_metric(
        prepared.task, 1 + 4 * (sum(path.r for path in units) if get_allocator(config.ranks).per_rank else len(units)))
    head = DataLoader(prepared.train, settings["batch_size"], collate_fn=prepared.collate)
    search = RankSearch(model, dataloader=_Shown(head, config.num_batches or PROBE_BATCHES), **measures)
    if settings["train_steps"]:
        _train(model, loader, settings["train_steps"], settings["lr"])
    print(f"scoring {len(search.paths)} paths by {config.proxy}")
    search.start()
    entry = search.history[0]
    run_folder.write_settings(args.output, settings)
    run_folder.write_json_file(args.output / CONFIG_NAME, peft_config(model))
    run_folder.write_json_file(args.output / "ranks.json", entry["ranks"])
    run_folder.write_json_file(args.output / "scores.json", entry["scores"])
    print(rank_map(search.ranks))
    print_trainable_parameters(model)
    shortcuts = [name for name, rank in search.ranks.items() if rank and name.rpartition(".")[2] in config.shortcuts]
    if shortcuts:
        print(f"{len(shortcuts)} of the chosen paths are shortcuts, which {CONFIG_NAME} cannot say; ranks.json has them")
    try:
        plot_ranks(search.ranks, {name: path.r for name, path in search._state.paths.items()}, args.output / "ranks.png")
    except ImportError as error:
        print(f"no picture: {error}")
    print(f"{args.output / CONFIG_NAME}: peft.LoraConfig.from_pretrained({str(args.output)!r}) reads it")
    return 0
