"""Where the ranks went: a map of layer x module."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from heterolora_kernels.names import split_path


def rank_map(ranks: Mapping[str, int], learnt: Collection[str] = ()) -> str:
    """A text table: a row per module, a column per layer, LoRA first, then shortcuts, in the order of ``ranks``.

    Args:
        ranks: ``{path: active rows}``.
        learnt: paths whose lora_B is not 0.

    Returns:
        Lines in which a number is a rank, ``o`` a path that is off but has learnt, ``.`` one that is off and has not, and a
        blank a path that does not exist. Rows are named with their stack where the model has several.
    """
    if not ranks:
        return ""
    several = len({stack for stack, layer, _ in map(split_path, ranks) if layer}) > 1
    cells: dict[str, dict[str, str]] = {}
    layers: dict[str, None] = {}
    for name, rank in ranks.items():
        stack, layer, module = split_path(name)
        module = f"{stack}: {module}" if several and layer else module
        layers[layer] = None
        cells.setdefault(module, {})[layer] = str(rank) if rank else "o" if name in learnt else "."
    order = sorted(layers, key=lambda layer: (layer == "", int(layer or 0)))
    label = max(len(module) for module in cells)
    width = max(3, *(len(layer) + 1 for layer in order))
    lines = ["layer".ljust(label) + "".join(layer.rjust(width) for layer in order)]
    lines += [module.ljust(label) + "".join(row.get(layer, "").rjust(width) for layer in order) for module, row in cells.items()]
    return "\n".join(line.rstrip() for line in lines)
