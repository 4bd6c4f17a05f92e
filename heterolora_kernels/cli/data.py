"""Model, tokenizer and data of a command: any local or hub model, csv, json, parquet or hub data through ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from heterolora_kernels.cli.options import add_flag

#: ``{setting: default}`` of what is read here.
DEFAULTS = {
    "model": None, "data": None, "data_split": "train", "validation": None, "validation_split": None, "task": None,
    "text_columns": None, "label_column": None, "max_length": 256, "block_size": 256, "dtype": "float32", "limit": None,
}
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def add_data_arguments(parser) -> None:
    """The flags of :data:`DEFAULTS`."""
    group = parser.add_argument_group("model and data")
    add_flag(group, "model", "str", "folder or hub name of a transformers model")
    add_flag(group, "data", "str", "csv, tsv, json, jsonl or parquet file, or hub name[:configuration], to train on")
    add_flag(group, "data_split", "str", "split of hub data (default train)")
    add_flag(group, "validation", "str", "file to validate on, or split of the hub data")
    add_flag(group, "validation_split", "float", "share of the training data to validate on, where --validation is not given")
    add_flag(group, "task", "str", "classification (default where there is a label column) or causal-lm",
             choices=("classification", "causal-lm"))
    add_flag(group, "text_columns", "names", "column of the text, or two columns with a comma")
    add_flag(group, "label_column", "str", "column of the classes, numbers or words")
    add_flag(group, "max_length", "int", "tokens of an example, classification (default 256)")
    add_flag(group, "block_size", "int", "tokens of an example, causal-lm (default 256)")
    add_flag(group, "dtype", "str", "of the base (default float32); adapters under a 16-bit base are float32",
             choices=("float32", "bfloat16", "float16"))
    add_flag(group, "limit", "int", "use only the first examples of the training data")


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
        ValueError: names the flag that is missing or wrong.
    """
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
    return task


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
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    if path.exists():
        raise ValueError(f"{flag}: {source} must end in one of {sorted(_READERS)}")
    name, _, configuration = source.partition(":")
    return datasets.load_dataset(name, configuration or None, split=split)


def _load_data(settings: Mapping, seed: int):
    """``(training data, validation data or None)``."""
    train = _read(settings["data"], settings["data_split"], "--data")
    if settings["limit"] is not None:
        train = train.select(range(min(settings["limit"], len(train))))
    validation = None
    if settings["validation"]:
        is_file = Path(settings["validation"]).suffix.lower() in _READERS
        source = settings["validation"] if is_file else settings["data"]
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
        raise ImportError(f"this command needs the extra 'train' (pip install 'heterolora-kernels[train]'): {error}") from error
    train, validation = _load_data(settings, seed)
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

    dtype = getattr(torch, settings["dtype"])
    if task == "causal-lm":
        return quietly(lambda: transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype))
    return quietly(lambda: transformers.AutoModelForSequenceClassification.from_pretrained(
        settings["model"], dtype=dtype, num_labels=len(labels), id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)}))


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
