"""Model, tokenizer and data of a command: any local or hub model, csv, json, parquet or hub data through ``datasets``."""

from __future__ import annotations

import sys
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
    "max_length": ("int", None, "tokens of an example, classification (default 256, or what the model takes)"),
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
        is_empty = "corresponds to no data" in str(error) or not str(cause).strip()
        said = "holds no example" if is_empty else f"cannot be read: {str(cause).splitlines()[0]}"
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
    try:
        values = set(train.unique(column))
    except Exception as error:
        # datasets keeps a column of several kinds as JSON, which it cannot compare.
        raise ValueError(f"--label-column {column!r} holds values of several kinds ({_kinds(train, column)}): write all of "
                         "them as whole numbers or all as words") from error
    if None in values or any(isinstance(value, float) for value in values):
        odd = next(value for value in values if value is None or isinstance(value, float))
        raise ValueError(f"--label-column {column!r} must hold whole numbers or words without gaps, and has "
                         f"{'an empty cell' if odd is None else odd}: leave such rows out, or name the classes")
    if len(values) < 2:
        # With one class transformers would take the task for a regression.
        raise ValueError(f"--label-column {column!r} must hold two classes or more, and holds only {values.pop()!r}")
    unseen = set() if validation is None else set(validation.unique(column)) - values
    if unseen:
        raise ValueError(f"--validation has the class {sorted(map(str, unseen))[0]!r}, which --data does not have")
    # Numbers in the order of numbers.
    return [str(value) for value in sorted(values)]


def _kinds(part, column: str) -> str:
    seen: dict[str, object] = {}
    for row in part.select(range(min(len(part), 10_000))):
        seen.setdefault(type(row[column]).__name__, row[column])
    return ", ".join(f"{value!r}" for value in seen.values())


#: Families whose positions begin behind that of the padding token.
_SHIFTED = ("roberta", "camembert", "longformer", "mpnet", "ibert", "data2vec-text", "xmod", "luke", "esm")


def _positions(config, tokenizer) -> int | None:
    """Tokens that a model takes, where it says so."""
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and any(name in config.model_type for name in _SHIFTED):
        most -= (config.pad_token_id or 0) + 1
    # A tokenizer that knows no limit has an enormous one.
    limits = [limit for limit in (most, tokenizer.model_max_length) if isinstance(limit, int) and 0 < limit < 10**9]
    return min(limits, default=None)


def _length(settings: Mapping, config, tokenizer) -> int:
    """Tokens of an example.

    Raises:
        ValueError: --max-length is more than the model takes.
    """
    positions, asked = _positions(config, tokenizer), settings["max_length"]
    if asked is not None and positions is not None and asked > positions:
        raise ValueError(f"--max-length is {asked}, and the model takes {positions} tokens: texts beyond it are cut, so give "
                         f"{positions} or less")
    return asked or min(256, positions or 256)


def _check_model(settings: Mapping, task: str, labels: list[str]):
    """The config of ``--model``, held to fit the task.

    Raises:
        ValueError: it is no model, or classifies into other classes.
    """
    import transformers

    name = settings["model"]
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"--model: there is no folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"--model: {name} holds no model of transformers: it has no config.json")
    with naming("--model", name):
        config = transformers.AutoConfig.from_pretrained(name)
    is_classifier = any(each.endswith("ForSequenceClassification") for each in config.architectures or ())
    if task == "classification" and is_classifier and config.num_labels != len(labels):
        raise ValueError(f"--model: {name} classifies into {config.num_labels} classes, and --label-column has {len(labels)}: "
                         "start from the model that it was made from, or save its base "
                         "(AutoModel.from_pretrained(...).save_pretrained)")
    return config


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
    labels = [] if task == "causal-lm" else _class_names(train, validation, settings["label_column"])
    config = _check_model(settings, task, labels)
    with naming("--model", settings["model"]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    transformers.set_seed(seed)  # of a new head
    if task == "causal-lm":
        model = load_model(settings, task, [])
        column, size = _text_columns(settings)[0], settings["block_size"]
        positions = _positions(config, tokenizer)
        if positions is not None and size > positions:
            raise ValueError(f"--block-size is {size}, and the model takes {positions} tokens: give {positions} or less")
        train, validation = (None if part is None else _blocks(part, tokenizer, column, size) for part in (train, validation))
        if len(train) == 0:
            raise ValueError(f"--data has fewer than --block-size ({size}) tokens")
        return Prepared(model, tokenizer, train, validation if validation is not None and len(validation) else None,
                        transformers.default_data_collator, None, task, [])
    settings = {**settings, "max_length": _length(settings, config, tokenizer)}
    model = load_model(settings, task, labels)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    train, validation = (None if part is None else _examples(part, tokenizer, settings, labels) for part in (train, validation))
    cut = sum(length == settings["max_length"] for length in map(len, train["input_ids"]))
    if cut:
        print(f"{cut} of {len(train)} texts have {settings['max_length']} tokens or more and are cut there (--max-length)",
              file=sys.stderr)
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
        raise ValueError(f"--text-columns: column {column!r} must hold texts, and has "
                         f"{odd[0]!r}{' (an empty cell)' if odd[0] is None else ''}")
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
