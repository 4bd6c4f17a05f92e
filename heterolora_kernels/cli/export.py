"""Write an adapter for other libraries: PEFT (mixed ranks), vLLM (one rank, the scaling in B), or merged into the model.

example:
  heterolora export runs/first --format peft --output adapter
  heterolora export runs/first --format merged --drop-shortcuts --output model
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from heterolora_kernels.cli import data
from heterolora_kernels.files import field_of, read_json
from heterolora_kernels.save_and_load import NATIVE_NAME, load_adapter, save_adapter


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
    folder = args.adapter / "adapter" if (args.adapter / "adapter" / NATIVE_NAME).exists() else args.adapter
    file = folder / NATIVE_NAME
    base = field_of(read_json(file), "base", dict, file)
    source = args.model or base.get("name_or_path")
    if not source:
        raise ValueError(f"--model is needed: {file} does not name its base model")
    kind = field_of(base, "class", str, file)
    dtypes = {sample["dtype"] for sample in field_of(base, "weights", dict, file).values()}
    model = _load_base(kind, source, args.dtype or (dtypes.pop() if len(dtypes) == 1 else "float32"), folder)
    model = load_adapter(model, folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_adapter(model, args.output, args.format, drop_shortcuts=args.drop_shortcuts, drop_heads=args.drop_heads)
    for warning in said:
        print(warning.message)
    print(f"{args.output}: {args.format} format")
    return 0


def _load_base(kind: str, source: str, dtype: str, folder: Path):
    import torch
    import transformers

    cls = getattr(transformers, kind, None)
    if cls is None:
        raise ValueError(f"{folder / NATIVE_NAME}: transformers has no model class {kind!r}")
    heads = read_json(folder / NATIVE_NAME).get("heads") or {}
    # The size of a trained classifier is that of its output.
    sizes = [head["shape"][0] for name, head in heads.items() if name.endswith("weight") and len(head["shape"]) == 2]
    labels = {"num_labels": sizes[-1]} if sizes and kind.endswith("Classification") else {}
    return data.quietly(lambda: cls.from_pretrained(source, dtype=getattr(torch, dtype), **labels))
