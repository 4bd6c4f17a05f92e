"""Where the ranks went: maps of layer x module as text and as pictures, and how much changed at each reallocation.

matplotlib is imported where a picture is drawn, and without pyplot: no backend is chosen and no figure outlives its call.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from heterolora_kernels.config import SHORTCUT_SITES
from heterolora_kernels.history import turn_on_frequency
from heterolora_kernels.names import split_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = TypeVar("Value")
#: Perceptually even, and in order for readers who see no colours.
_COLOURS = "cividis_r"
_OFF = "#e8e8e8"
_CELL_INCHES = 0.32


@dataclass(frozen=True)
class _Grid:
    """``cells[module][layer]``; LoRA first, then shortcuts, layers in their order, what lies in none last (layer "")."""

    cells: dict[str, dict[str, object]]
    layers: list[str]
    shortcuts: int

    @classmethod
    def of(cls, values: Mapping[str, Value]) -> _Grid:
        several = len({stack for stack, layer, _ in map(split_path, values) if layer}) > 1
        cells: dict[str, dict[str, Value]] = {}
        for name, value in values.items():
            stack, layer, module = split_path(name)
            row = f"{stack}: {module}" if several and layer else module
            cells.setdefault(row, {})[layer] = value
        ordered = sorted(cells, key=lambda row: row.rpartition(": ")[2] in SHORTCUT_SITES)
        layers = sorted({layer for row in cells.values() for layer in row}, key=lambda layer: (layer == "", int(layer or 0)))
        return cls({row: cells[row] for row in ordered}, layers,
                   sum(row.rpartition(": ")[2] in SHORTCUT_SITES for row in cells))


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
    grid = _Grid.of({name: str(rank) if rank else "o" if name in learnt else "." for name, rank in ranks.items()})
    label = max(len(module) for module in grid.cells)
    width = max(3, *(len(layer) + 1 for layer in grid.layers))
    lines = ["layer".ljust(label) + "".join(layer.rjust(width) for layer in grid.layers)]
    lines += [module.ljust(label) + "".join(row.get(layer, "").rjust(width) for layer in grid.layers)
              for module, row in grid.cells.items()]
    return "\n".join(line.rstrip() for line in lines)


def plot_ranks(ranks: Mapping[str, int], max_ranks: Mapping[str, int], file: str | os.PathLike | None = None) -> Figure:
    """A heat map of the active rows of every path, layer x module.

    Args:
        ranks: ``{path: active rows}``.
        max_ranks: ``{path: full rank}``; the colours run up to the largest.
        file: where to write it; the suffix says how (png, pdf, svg).

    Raises:
        ValueError: there is no path.
        ImportError: matplotlib is not installed.
    """
    top = max((*max_ranks.values(), *ranks.values()), default=1)
    active = sum(ranks.values())
    return _heat_map(ranks, top, "rank", f"Active rank of every path: {active} of {sum(max_ranks.values())} rows", str, file)


def plot_frequency(history: Sequence[Mapping], file: str | os.PathLike | None = None) -> Figure:
    """A heat map of how often each path had a rank, in percent of the scored reallocations (of all, if none was scored).

    Args:
        history: that of a search, or of :func:`heterolora_kernels.history.read_jsonl`.
        file: as in :func:`plot_ranks`.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is not installed.
    """
    scored = [entry for entry in history if not entry["warmup"]] or list(history)
    counts = turn_on_frequency(scored)
    shares = {path: 100 * count / len(scored) for path, count in counts.items()}
    kind = "scored reallocations" if any(not entry["warmup"] for entry in history) else "reallocations"
    return _heat_map(shares, 100, "% of reallocations", f"How often a path had a rank: {len(scored)} {kind}",
                     lambda share: f"{share:.0f}", file)


def plot_churn(history: Sequence[Mapping], file: str | os.PathLike | None = None) -> Figure:
    """Churn and active parameters at each reallocation, over optimizer steps; the warm-up is shaded.

    Args:
        history: that of a search, or of :func:`heterolora_kernels.history.read_jsonl`.
        file: as in :func:`plot_ranks`.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is not installed.
    """
    if not history:
        raise ValueError("history is empty: no ranks were chosen")
    figure = _figure(6.4, 4.2)
    churn, parameters = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [entry["step"] for entry in history]
    churn.plot(steps, [100 * entry["churn"] for entry in history], marker="o", markersize=3, color="#00326e")
    churn.set_ylabel("new among what is on (%)")
    churn.set_ylim(-4, 104)
    churn.set_title("What each reallocation changed", loc="left", fontsize=10)
    # An allocation holds until the next one.
    parameters.step(steps, [entry["active_parameters"] / 1000 for entry in history], where="post", color="#7d6f00")
    parameters.set_ylabel("active\nparameters (k)")
    parameters.set_ylim(0, 1.15 * max(entry["active_parameters"] for entry in history) / 1000)
    parameters.set_xlabel("optimizer step")
    scored = [entry["step"] for entry in history if not entry["warmup"]]
    if len(scored) < len(history):
        for axes in (churn, parameters):
            axes.axvspan(steps[0], scored[0] if scored else steps[-1], color=_OFF, zorder=0, linewidth=0)
        parameters.annotate("warm-up", (steps[0], 0), xytext=(4, 4), textcoords="offset points", fontsize=8, color="#555555")
    for axes in (churn, parameters):
        axes.spines[["top", "right"]].set_visible(False)
    return _written(figure, file)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need the extra 'plot' (pip install 'heterolora-kernels[plot]'): {error}") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=160)


def _written(figure: Figure, file: str | os.PathLike | None) -> Figure:
    if file is not None:
        figure.savefig(file)
    return figure


def _heat_map(values: Mapping[str, float], top: float, unit: str, title: str, show, file) -> Figure:
    if not values:
        raise ValueError("there is no path to draw")
    grid = _Grid.of(values)
    rows, columns = len(grid.cells), len(grid.layers)
    has_gap = 0 < grid.shortcuts < rows
    # As wide as the title and the labels need, whatever the number of layers.
    figure = _figure(max(5.2, 2.6 + _CELL_INCHES * columns), 1.2 + _CELL_INCHES * (rows + has_gap))
    axes = figure.subplots()
    heights = [place + (has_gap and place >= rows - grid.shortcuts) * 0.6 for place in range(rows)]
    colours = _draw_cells(axes, grid, heights, top, show)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(heights[-1] + 0.5, -0.5)
    axes.set_xticks(range(columns), [layer or "–" for layer in grid.layers], fontsize=7)
    axes.set_yticks(heights, list(grid.cells), fontsize=8)
    axes.set_xlabel("layer" if "" not in grid.layers else "layer (–: in none)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
    figure.colorbar(colours, ax=axes, label=unit, fraction=0.04, pad=0.02, aspect=18)
    return _written(figure, file)


def _draw_cells(axes: Axes, grid: _Grid, heights: Sequence[float], top: float, show):
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colours = ScalarMappable(Normalize(0, top), colormaps[_COLOURS])
    for height, row in zip(heights, grid.cells.values()):
        for column, layer in enumerate(grid.layers):
            if layer not in row:
                continue
            value = row[layer]
            colour = colours.to_rgba(value) if value else _OFF
            axes.add_patch(Rectangle((column - 0.5, height - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
            if value:
                # ITU-R BT.601 luma: dark cells take white letters.
                is_dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
                axes.text(column, height, show(value), ha="center", va="center", fontsize=6,
                          color="white" if is_dark else "black")
    return colours
