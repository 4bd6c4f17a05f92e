"""Where the ranks went: maps of layer x module as text and as pictures, and what each reallocation changed.

matplotlib is imported where a picture is drawn, and without pyplot: no backend is chosen and no figure outlives its call.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heterolora_kernels._env import how_to_install
from heterolora_kernels.config import SHORTCUT_SITES
from heterolora_kernels.history import turn_on_frequency
from heterolora_kernels.names import split_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Even steps of lightness, which also readers with colour vision deficiencies and grey printers see in their order.
_COLOURS = "viridis_r"
_OFF = "#ececec"
_LINE = "#31688e"
_DPI = 220
#: Inches of a cell: 32 layers are as wide as the text of a page, few layers do not grow without bound.
_MAP_WIDTH, _MIN_CELL, _MAX_CELL = 5.2, 0.15, 0.34
#: Of the colour bar's grey end.
_OFF_INCHES = 0.12
#: Cells between LoRA and shortcuts.
_GAP = 0.5
#: Of the font's size, a digit of matplotlib's own font.
_DIGIT_WIDTH = 0.64


@dataclass(frozen=True)
class _Grid:
    """``cells[module][layer]``; LoRA first, then shortcuts, layers in their order, what lies in none last (layer "")."""

    cells: dict[str, dict[str, Any]]
    layers: list[str]
    n_shortcut: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> _Grid:
        several = len({stack for stack, layer, _ in map(split_path, values) if layer}) > 1
        lora: dict[str, dict[str, Any]] = {}
        shortcuts: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            stack, layer, module = split_path(name)
            row = f"{stack}: {module}" if several and layer else module
            kind = shortcuts if name.rpartition(".")[2] in SHORTCUT_SITES else lora
            kind.setdefault(row, {})[layer] = value
        layers = sorted({split_path(name)[1] for name in values}, key=lambda layer: (layer == "", int(layer or 0)))
        return cls({**lora, **shortcuts}, layers, len(shortcuts))


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


def plot_ranks(ranks: Mapping[str, int], max_ranks: Mapping[str, int] | None = None,
               file: str | os.PathLike | None = None) -> Figure:
    """A heat map of the active rows of every path, layer x module.

    Args:
        ranks: ``{path: active rows}``.
        max_ranks: ``{path: full rank}``; the colours run up to the largest. None: up to the largest of ``ranks``.
        file: where to write it; the suffix says how (png, pdf, svg).

    Returns:
        The figure, which belongs to no window.

    Raises:
        ValueError: there is no path.
        ImportError: matplotlib is not installed.
    """
    top = max((1, *ranks.values(), *(max_ranks or {}).values()))
    is_known = max_ranks is not None and ranks.keys() <= max_ranks.keys()
    of = f" of {sum(max_ranks[path] for path in ranks):,}" if is_known else ""
    return _heat_map(ranks, top, "rank", f"Ranks: {sum(ranks.values()):,}{of} rows are active", str, file)


def plot_frequency(history: Sequence[Mapping], file: str | os.PathLike | None = None) -> Figure:
    """A heat map of how often each path had a rank, in percent of the scored reallocations (of all, if none was scored).

    Those of the warm-up would blur it: there every path has its turn.

    Args:
        history: that of a search, or of :func:`heterolora_kernels.history.read_jsonl`.
        file: as in :func:`plot_ranks`.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is not installed.
    """
    _check_not_empty(history)
    scored = [entry for entry in history if not entry["warmup"]]
    counted = scored or history
    shares = {path: 100 * count / len(counted) for path, count in turn_on_frequency(counted).items()}
    of = f"{len(counted)} {'scored' if scored else 'warm-up'} reallocation{'s' if len(counted) > 1 else ''}"
    return _heat_map(shares, 100, "share of reallocations (%)", f"How often a path was on in {of}",
                     lambda share: f"{share:.0f}", file)


def plot_churn(history: Sequence[Mapping], file: str | os.PathLike | None = None) -> Figure:
    """Churn above and active parameters below, at each reallocation over optimizer steps; the warm-up is shaded.

    Args:
        history: that of a search, or of :func:`heterolora_kernels.history.read_jsonl`.
        file: as in :func:`plot_ranks`.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is not installed.
    """
    _check_not_empty(history)
    figure = _figure(6.0, 3.6, layout="constrained")
    churn, parameters = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = [entry["step"] for entry in history]
    if len(set(steps)) == 1:
        churn.set_xlim(steps[0] - 1, steps[0] + 1)
    dots = {"color": _LINE, "marker": "o", "markersize": 2.5, "linewidth": 1.2, "clip_on": False}
    churn.plot(steps, [100 * entry["churn"] for entry in history], **dots)
    churn.set_ylabel("newly switched on\n(% of what is on)", fontsize=8)
    churn.set_ylim(0, 100)
    churn.set_title("What each reallocation changed", fontsize=9)
    numbers = [entry["active_parameters"] for entry in history]
    divisor, unit = next(((10**power, unit) for power, unit in ((9, "billions"), (6, "millions"), (3, "thousands"))
                          if max(numbers) >= 10**power), (1, "number"))
    # An allocation holds until the next one.
    parameters.plot(steps, [number / divisor for number in numbers], drawstyle="steps-post", **dots)
    parameters.set_ylabel(f"active parameters\n({unit})", fontsize=8)
    parameters.set_ylim(0, 1.25 * max(*numbers, 1) / divisor)
    parameters.set_xlabel("optimizer step", fontsize=8)
    _shade_warmup((churn, parameters), history)
    for axes in (churn, parameters):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _written(figure, file)


def _shade_warmup(panels: Sequence, history: Sequence[Mapping]) -> None:
    """From the first reallocation to the first scored one, whose predecessor's ranks held until then."""
    scored = [entry["step"] for entry in history if not entry["warmup"]]
    first, last = history[0]["step"], scored[0] if scored else history[-1]["step"]
    if history[0]["warmup"] and last > first:
        for axes in panels:
            span = axes.axvspan(first, last, color=_OFF, zorder=0, linewidth=0)
        panels[0].legend([span], ["warm-up"], fontsize=7, frameon=False, loc="upper right")


def _check_not_empty(history: Sequence[Mapping]) -> None:
    if not history:
        raise ValueError("history is empty: no ranks were chosen")


def _figure(width: float, height: float, **options) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need the extra 'plot' ({how_to_install('plot')}): {error}") from error
    return Figure(figsize=(width, height), dpi=_DPI, **options)


def _written(figure: Figure, file: str | os.PathLike | None) -> Figure:
    if file is not None:
        figure.savefig(file, bbox_inches="tight", pad_inches=0.05)
    return figure


def _heat_map(values: Mapping[str, float], top: float, unit: str, title: str, show: Callable[[float], str],
              file: str | os.PathLike | None) -> Figure:
    if not values:
        raise ValueError("there is no path to draw")
    grid = _Grid.of(values)
    n_lora, columns = len(grid.cells) - grid.n_shortcut, len(grid.layers)
    gap = _GAP if n_lora and grid.n_shortcut else 0
    places = [row + (gap if row >= n_lora else 0) for row in range(len(grid.cells))]
    cell = min(max(_MAP_WIDTH / columns, _MIN_CELL), _MAX_CELL)
    width, height = cell * columns, cell * (places[-1] + 1)
    # Exactly so many inches, for cells to be squares; what stands around them is cut to size when it is written.
    figure = _figure(width + 2.6, height + 0.9)
    inch_x, inch_y = 1 / (width + 2.6), 1 / (height + 0.9)
    axes = figure.add_axes((1.8 * inch_x, 0.5 * inch_y, width * inch_x, height * inch_y))
    bar = figure.add_axes(((1.88 + width) * inch_x, 0.5 * inch_y, 0.1 * inch_x, height * inch_y))
    colours = _draw_cells(axes, grid, places, top, show, 72 * cell)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(places[-1] + 0.5, -0.5))
    # From a hundred layers on, every second one has its number.
    stride = math.ceil(6 * _DIGIT_WIDTH * (max(map(len, grid.layers)) + 0.5) / (72 * cell))
    axes.set_xticks(range(0, columns, stride), [layer or "–" for layer in grid.layers[::stride]], fontsize=6)
    axes.set_yticks(places, list(grid.cells), fontsize=7)
    axes.set_xlabel("layer (–: in none)" if "" in grid.layers else "layer", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _draw_bar(figure, bar, colours, unit, _OFF_INCHES / height)
    return _written(figure, file)


def _draw_bar(figure: Figure, axes, colours, unit: str, end: float) -> None:
    """The colour bar, with a grey end of this share of its height for what is off."""
    from matplotlib.ticker import MaxNLocator

    # 0 is what is off.
    ticks = MaxNLocator("auto", steps=[1, 2, 4, 5, 8, 10], integer=True, prune="lower")
    scale = figure.colorbar(colours, cax=axes, extend="min", extendrect=True, extendfrac=end, ticks=ticks)
    scale.set_label(unit, fontsize=8)
    scale.ax.annotate("off", (1, -end / 2), xycoords="axes fraction", xytext=(5.5, 0), textcoords="offset points", fontsize=6,
                      va="center", annotation_clip=False)
    scale.ax.tick_params(labelsize=6, length=2)
    scale.outline.set_linewidth(0.5)


def _draw_cells(axes, grid: _Grid, places: Sequence[float], top: float, show: Callable[[float], str], points: float):
    """Squares of ``points`` size with their values where these can be read; the mapping of values to colours."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colours = ScalarMappable(Normalize(0, top), colormaps[_COLOURS].with_extremes(under=_OFF))
    shown = {(row, layer): show(value) for row, cells in grid.cells.items() for layer, value in cells.items() if value}
    longest = max(map(len, shown.values()), default=1)
    size = min(7.0, points / 2, 0.85 * points / (_DIGIT_WIDTH * longest))
    for place, (row, cells) in zip(places, grid.cells.items()):
        for column, layer in enumerate(grid.layers):
            if layer not in cells:
                continue
            colour = colours.to_rgba(cells[layer]) if cells[layer] else _OFF
            axes.add_patch(Rectangle((column - 0.5, place - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.7))
            if cells[layer] and size >= 4:
                # ITU-R BT.601 luma: dark cells take white digits.
                is_dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
                axes.text(column, place, shown[row, layer], ha="center", va="center_baseline", fontsize=size,
                          color="white" if is_dark else "black")
    return colours
