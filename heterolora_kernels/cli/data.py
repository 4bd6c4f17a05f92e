"""Model, tokenizer and data of a command: any local or hub model, csv, json, parquet or hub data through ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from heterolora_kernels._env import how_to_install
from heterolora_kernels.cli.options import add_flag, check_least, check_types

_TASKS = ("classification", "causal-lm")
_DTYPES = ("float32", "bfloat16", "float16")
#: ``{setting: (kind, default, help)}`` of what is read here.
DATA = {
    "model": ("str", None, "folder or hub name of a transformers model"),
    "data": ("str", None, "csv, tsv, json, jsonl or parquet file, or hub name[:configuration], to train on"),
    "data_split": ("str", "train", "split of hub data (default train)"),
    "validation": ("str", None, "file to validate on, or split of the hub data"),
    "validation_split": ("float", None, "share of the training data to validate on, where --validation is not given"),
    "task": ("str", None, "classification (default where there is a label column) or causal-lm"),
    "text_columns": ("names", None, "column of the text, or two columns with a comma"),
    "label_column": ("str", None, "column of the classes, numbers or words"),
    "max_length": ("int", 256, "tokens of an example, classification (default 256)"),
    "block_size": ("int", 256, "tokens of an example, causal-lm (default 256)"),
    "dtype": ("str", "float32", "of the base (default float32); adapters under a 16-bit base are float32"),
    "limit": ("int", None, "use only the first examples of the training data"),
}
DEFAULTS = {name: default for name, (_, default, _) in DATA.items()}
_CHOICES = {"task": _TASKS, "dtype": _DTYPES}
_LEAST = {"max_length": 1, "block_size": 2, "limit": 1}
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def add_data_arguments(parser) -> None:
    """The flags of :data:`DATA`."""
    group = parser.add_argument_group("model and data")
    for name, (kind, _, help) in DATA.items():
        add_flag(group, name, kind, help, **({"choices": _CHOICES[name]} if name in _CHOICES else {}))


@dataclass
class Prepared:
    """What a Trainer needs.

    Attributes:
        collate: examples to a batch.
        metrics: ``EvalPrediction -> {name: value}``, None where the loss says it all.
        labels: names of the classes.
    """

    model: nn.Module
    tokenizer: object
    train: object
    validation: object | None
    collate: Callable
    metrics: Callable | None
    task: str
    labels: list[str]


def check_settings(settings: Mapping) -> str:
    """The task that settings mean.

    Raises:
        ValueError, TypeError: names the flag that is missing or wrong.
    """
    check_types(settings, DATA)
    check_least(settings, _LEAST)
    for name, choices in _CHOICES.items():
        if settings[name] is not None and settings[name] not in choices:
            raise ValueError(f"--{name} must be one of {list(choices)}, got {settings[name]!r}")
    for name in ("model", "data"):
        if not settings[name]:
            raise ValueError(f"--{name} is needed")
    task = settings["task"] or ("classification" if settings["label_column"] else "causal-lm")
    if task == "classification" and not settings["label_column"]:
        raise ValueError("--label-column is needed for classification")
    columns = _text_columns(settings)
    if len(columns) > (2 if task == "classification" else 1):
        raise ValueError(f"--text-columns: {task} takes {'one or two columns' if task == 'classification' else 'one column'}, "
                         f"got {columns}")
    if settings["validation_split"] is not None and not 0 < settings["validation_split"] < 1:
        raise ValueError(f"--validation-split must be in (0, 1), got {settings['validation_split']}")
    if settings["validation"] and _is_file(settings["data"]) and not _is_file(settings["validation"]):
        raise ValueError(f"--validation must be a file where --data is one ({', '.join(sorted(_READERS))}), got "
                         f"{settings['validation']!r}")
    return task


def _is_file(source: str) -> bool:
    return Path(source).suffix.lower() in _READERS


def _text_columns(settings: Mapping) -> list[str]:
    columns = settings["text_columns"] or ["text"]
    return [columns] if isinstance(columns, str) else list(columns)


def _read(source: str, split: str, flag: str):
    import datasets

    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {source}")
        # Of csv files, only empty cells are missing: "NA" and "None" are words.
        options = {"keep_default_na": False, "na_values": [""]} if reader == "csv" else {}
        if path.suffix.lower() == ".tsv":
            options["sep"] = "\t"
        with naming(flag, source):
            return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    if path.exists():
        raise ValueError(f"{flag}: {source} must end in one of {sorted(_READERS)}")
    name, _, configuration = source.partition(":")
    with naming(flag, source):
        return datasets.load_dataset(name, configuration or None, split=split)


@contextmanager
def naming(flag: str, source: object) -> Iterator[None]:
    """Errors of other libraries, which know no flags, become one that names the flag and what it was given."""
    try:
        yield
    except Exception as error:
        # datasets wraps what went wrong.
        cause = error.__cause__ or error
        said = "holds no example" if "corresponds to no data" in str(error) else f"cannot be read: {cause}"
        raise ValueError(f"{flag}: {source} {said}") from error


def _load_data(settings: Mapping, seed: int):
    """``(training data, validation data or None)``."""
    train = _read(settings["data"], settings["data_split"], "--data")
    if settings["limit"] is not None:
        train = train.select(range(min(settings["limit"], len(train))))
    validation = None
    if settings["validation"]:
        source = settings["validation"] if _is_file(settings["validation"]) else settings["data"]
        validation = _read(source, settings["validation"], "--validation")
    elif settings["validation_split"]:
        parts = train.train_test_split(settings["validation_split"], seed=seed)
        train, validation = parts["train"], parts["test"]
    needed = _text_columns(settings) + ([settings["label_column"]] if settings["label_column"] else [])
    for flag, part in (("--data", train), ("--validation", validation)):
        missing = [] if part is None else [name for name in needed if name not in part.column_names]
        if missing:
            raise ValueError(f"{flag} has no column {missing[0]!r}; its columns are {part.column_names}")
        if part is not None and len(part) == 0:
            raise ValueError(f"{flag} holds no example")
    return train, validation


def _class_names(train, validation, column: str) -> list[str]:
    feature = train.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    values = set(train.unique(column))
    if None in values or any(isinstance(value, float) for value in values):
        raise ValueError(f"--label-column {column!r} must hold whole numbers or words without gaps")
    if len(values) < 2:
        # With one class transformers would take the task for a regression.
        raise ValueError(f"--label-column {column!r} must hold two classes or more, and holds only {values.pop()!r}")
    unseen = set() if validation is None else set(validation.unique(column)) - values
    if unseen:
        raise ValueError(f"--validation has the class {sorted(map(str, unseen))[0]!r}, which --data does not have")
    # Numbers in the order of numbers.
    return [str(value) for value in sorted(values)]


def prepare(settings: Mapping, seed: int) -> Prepared:
    """Load everything that the settings name.

    Raises:
        ValueError, FileNotFoundError: name the flag.
        ImportError: names the extra.
    """
    task = check_settings(settings)
    try:
        import datasets  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(f"this command needs the extra 'train' ({how_to_install('train')}): {error}") from error
    train, validation = _load_data(settings, seed)
    with naming("--model", settings["model"]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    transformers.set_seed(seed)  # of a new head
    if task == "causal-lm":
        model = load_model(settings, task, [])
        column, size = _text_columns(settings)[0], settings["block_size"]
        train, validation = (None if part is None else _blocks(part, tokenizer, column, size) for part in (train, validation))
        if len(train) == 0:
            raise ValueError(f"--data has fewer than --block-size ({size}) tokens")
        return Prepared(model, tokenizer, train, validation if validation is not None and len(validation) else None,
                        transformers.default_data_collator, None, task, [])
    labels = _class_names(train, validation, settings["label_column"])
    model = load_model(settings, task, labels)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    train, validation = (None if part is None else _examples(part, tokenizer, settings, labels) for part in (train, validation))
    return Prepared(model, tokenizer, train, validation, transformers.DataCollatorWithPadding(tokenizer), _accuracy, task, labels)


def quietly(load: Callable[[], nn.Module]) -> nn.Module:
    """``load()`` without transformers' announcement that a new head has no weights yet."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load()
    finally:
        logging.set_verbosity(verbosity)


def load_model(settings: Mapping, task: str, labels: list[str]) -> nn.Module:
    """The base model for a task."""
    import transformers

    kind = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModelForSequenceClassification
    return load_pretrained(kind, settings["model"], settings["dtype"], **label_options(labels))


def label_options(labels: list[str]) -> dict:
    """Arguments of ``from_pretrained`` for a classifier of these classes; none without classes."""
    if not labels:
        return {}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)),
            "label2id": {name: index for index, name in enumerate(labels)}}


def load_pretrained(kind: type, source: str, dtype: str, **options) -> nn.Module:
    """``kind.from_pretrained``, its announcement that a new head has no weights left out.

    Raises:
        ValueError: names --model.
    """
    with naming("--model", source):
        return quietly(lambda: kind.from_pretrained(source, dtype=getattr(torch, dtype), **options))


def _checked_texts(batch: Mapping, column: str) -> list[str]:
    odd = [value for value in batch[column] if not isinstance(value, str)]
    if odd:
        raise ValueError(f"--text-columns: column {column!r} must hold texts, and has {odd[0]!r}"
                         f"{' (an empty cell)' if odd[0] is None else ''}")
    return batch[column]


def _examples(part, tokenizer, settings: Mapping, labels: list[str]):
    columns, label = _text_columns(settings), settings["label_column"]
    has_names = hasattr(part.features[label], "names")

    def encode(batch: Mapping) -> dict:
        texts = [_checked_texts(batch, column) for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=settings["max_length"])
        return {**encoded, "labels": batch[label] if has_names else [labels.index(str(value)) for value in batch[label]]}

    return part.map(encode, batched=True, remove_columns=part.column_names, desc="tokenise")


def _blocks(part, tokenizer, column: str, size: int):
    """All texts in one row, an end-of-text token after each, cut into blocks; what is left at the end is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: Mapping) -> dict:
        rows = tokenizer(_checked_texts(batch, column), add_special_tokens=False)["input_ids"]
        ids = [token for row in rows for token in (*row, *end)]
        blocks = [ids[i:i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    return part.map(encode, batched=True, remove_columns=part.column_names, desc="tokenise")


def _accuracy(prediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
