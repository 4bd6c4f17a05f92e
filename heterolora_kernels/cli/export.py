"""Write an adapter for other libraries: PEFT (mixed ranks), vLLM (one rank, the scaling in B), or merged into the model.

example:
  heterolora export runs/first --format peft --output adapter
  heterolora export runs/first --format merged --drop-shortcuts --output model
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from pathlib import Path

import torch

from heterolora_kernels.cli import data
from heterolora_kernels.files import field_of, read_json
from heterolora_kernels.save_and_load import load_adapter, load_search_state, save_adapter
from heterolora_kernels.saved_files import NATIVE_NAME
from heterolora_kernels.search import RankSearch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a run, or of an adapter in the native format")
    parser.add_argument("--format", choices=("peft", "vllm", "merged", "native"), required=True, help="what to write")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--model", help="the base model (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the base (default: as it was trained)")
    parser.add_argument("--drop-shortcuts", action="store_true", help="leave active shortcuts out, and say what that does")
    parser.add_argument("--drop-heads", action="store_true", help="leave trained heads out (vLLM refuses them)")


def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {args.output} is a file")
    folder = args.adapter / "adapter" if (args.adapter / "adapter" / NATIVE_NAME).exists() else args.adapter
    file = folder / NATIVE_NAME
    if not file.exists():
        raise FileNotFoundError(f"ADAPTER: {file} is missing: name the folder of a run, or of an adapter in the native format")
    base = field_of(read_json(file), "base", dict, file)
    source = args.model or base.get("name_or_path")
    if not source:
        raise ValueError(f"--model is needed: {file} does not name its base model")
    kind = field_of(base, "class", str, file)
    dtypes = Counter(field_of(sample, "dtype", str, f"{file}: base weight {name!r}")
                     for name, sample in field_of(base, "weights", dict, file).items())
    # Norms may be wider than the rest.
    dtype = args.dtype or (dtypes.most_common(1)[0][0] if dtypes else "float32")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{file}: field 'dtype' of a base weight is {dtype!r}, which is no dtype of torch")
    model = _load_base(kind, source, dtype, file)
    model = load_adapter(model, folder)
    search = None
    if args.format == "native" and read_json(file).get("search") is not None:
        search = RankSearch(model)
        search.load_state_dict(load_search_state(folder))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_adapter(model, args.output, args.format, search=search, drop_shortcuts=args.drop_shortcuts,
                     drop_heads=args.drop_heads)
    for warning in said:
        print(warning.message)
    if args.format == "merged" and not _copy_tokenizer(source, args.output):
        print(f"{source} has no tokenizer that could be put beside the model")
    print(f"{args.output}: {args.format} format")
    return 0


def _load_base(kind: str, source: str, dtype: str, file: Path):
    import transformers

    cls = getattr(transformers, kind, None)
    if cls is None:
        raise ValueError(f"{file}: transformers has no model class {kind!r}")
    record = read_json(file)
    base = field_of(record, "base", dict, file)
    options = data.label_options([str(name) for name in base.get("labels") or ()])
    heads = record.get("heads") or {}
    # The size of a trained classifier is that of its output.
    sizes = [head["shape"][0] for name, head in heads.items() if name.endswith("weight") and len(head["shape"]) == 2]
    if not options and sizes and kind.endswith("Classification"):
        options = {"num_labels": sizes[-1]}
    if isinstance(base.get("pad_token_id"), int):
        options["pad_token_id"] = base["pad_token_id"]
    return data.load_pretrained(cls, source, dtype, **options)


def _copy_tokenizer(source: str, folder: Path) -> bool:
    """Put the base's tokenizer beside a merged model, which is of little use without; whether there is one."""
    import transformers

    try:
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    except Exception:
        # The model is written; whatever is the matter with the tokenizer does not undo that.
        return False
    return True
