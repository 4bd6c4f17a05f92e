"""The maps of ranks, as text and as pictures, and the course of a search."""

from __future__ import annotations

import subprocess
import sys

import pytest

from heterolora_kernels.plotting import plot_churn, plot_frequency, plot_ranks, rank_map, split_path

MODULES = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
SHORTCUTS = ["residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"]


def names(layers: int) -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(layers) for module in MODULES + SHORTCUTS
            if layer or module != "shortcut_ffn"]


def entry(step: int, ranks: dict[str, int], warmup: bool = False, churn: float = 0.25, parameters: int = 4096) -> dict:
    return {"step": step, "warmup": warmup, "scores": None, "ranks": ranks, "churn": churn, "active_parameters": parameters}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def places(axes) -> set[tuple[float, float]]:
    """``(column, height)`` of the middle of every cell that is drawn."""
    return {(cell.get_x() + 0.5, cell.get_y() + 0.5) for cell in axes.patches}


def test_split_path_finds_the_layer():
    assert split_path("model.layers.11.self_attn.q_proj") == ("model.layers", "11", "self_attn.q_proj")
    assert split_path("model.layers.3.shortcut_sa") == ("model.layers", "3", "shortcut_sa")
    assert split_path("bert.pooler.dense") == ("", "", "bert.pooler.dense")


def test_rank_map_tells_off_learnt_and_missing_apart():
    ranks = {"m.0.q": 8, "m.1.q": 0, "m.10.q": 0, "m.1.shortcut_ffn": 16}
    assert rank_map(ranks, learnt={"m.1.q"}).splitlines() == [
        "layer         0  1 10",
        "q             8  o  .",
        "shortcut_ffn    16",
    ]


def test_rank_map_keeps_stacks_apart():
    assert rank_map({"encoder.block.0.q": 8, "decoder.block.0.q": 0}).splitlines()[1:] == [
        "encoder.block: q  8",
        "decoder.block: q  .",
    ]


def test_rank_map_of_nothing_is_empty():
    assert rank_map({}) == ""


def test_rank_map_puts_shortcuts_below_lora():
    assert [line.split()[0] for line in rank_map({"m.0.residual_1": 8, "m.0.q": 8}).splitlines()] == ["layer", "q", "residual_1"]


# ---- pictures ----

@pytest.mark.parametrize("suffix,start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")], ids=["png", "pdf", "svg"])
def test_pictures_are_written_as_their_suffix_says(tmp_path, suffix, start):
    history = [entry(0, dict.fromkeys(names(2), 8), warmup=True), entry(10, dict.fromkeys(names(2), 0)), entry(20, {})]
    for draw, file in ((lambda file: plot_ranks(history[0]["ranks"], None, file), tmp_path / f"a.{suffix}"),
                       (lambda file: plot_frequency(history[:2], file), str(tmp_path / f"b.{suffix}")),
                       (lambda file: plot_churn(history, file), tmp_path / f"c.{suffix}")):
        draw(file)
    assert all((tmp_path / f"{name}.{suffix}").read_bytes().startswith(start) for name in "abc")


@pytest.mark.parametrize("layers", [1, 6, 32])
def test_plot_ranks_has_a_cell_for_every_path_and_none_for_others(layers):
    ranks = {name: 8 * (i % 3 == 0) for i, name in enumerate(names(layers))}
    axes, bar = plot_ranks(ranks, dict.fromkeys(ranks, 8)).axes
    assert len(axes.patches) == len(ranks) == 7 * layers - 1
    assert texts(axes) == ["8"] * sum(rank > 0 for rank in ranks.values())
    assert labels(axes.get_xticklabels()) == [str(layer) for layer in range(layers)]
    drawn = labels(axes.get_yticklabels())
    assert drawn == MODULES + (SHORTCUTS if layers > 1 else SHORTCUTS[:3])
    assert axes.get_xlabel() == "layer" and bar.get_ylabel() == "rank"
    assert axes.get_title() == f"Ranks: {sum(ranks.values())} of {8 * len(ranks):,} rows are active"


def test_plot_ranks_leaves_a_gap_between_lora_and_shortcuts_and_missing_cells_blank():
    axes, _ = plot_ranks(dict.fromkeys(names(2), 4), None).axes
    heights = list(axes.get_yticks())
    assert [later - sooner for sooner, later in zip(heights, heights[1:])] == [1, 1, 1.5, 1, 1, 1]
    assert (0.0, heights[-1]) not in places(axes) and (1.0, heights[-1]) in places(axes)
    low, high = axes.get_ylim()
    assert low == heights[-1] + 0.5 and high == -0.5  # LoRA above


def test_plot_ranks_colours_grow_with_the_rank_up_to_the_full_one():
    ranks = {"m.0.q": 0, "m.1.q": 1, "m.2.q": 4, "m.3.q": 8}
    axes, bar = plot_ranks(ranks, dict.fromkeys(ranks, 16)).axes
    colours = [cell.get_facecolor()[:3] for cell in axes.patches]
    lightness = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in colours]
    assert lightness == sorted(lightness, reverse=True) and len(set(colours)) == 4
    assert len(set(colours[0])) == 1  # off: grey
    assert bar.get_ylim()[1] == 16 and texts(bar) == ["off"]


def test_plot_ranks_without_all_full_ranks_does_not_claim_their_sum():
    assert plot_ranks({"m.0.q": 4}, {"m.1.q": 8}).axes[0].get_title() == "Ranks: 4 rows are active"


def test_cells_are_squares_of_a_size_that_fits_a_page():
    for layers in (1, 6, 32, 80):
        figure = plot_ranks(dict.fromkeys(names(layers), 8), None)
        box = figure.axes[0].get_position()
        width, height = box.width * figure.get_figwidth(), box.height * figure.get_figheight()
        low, high = figure.axes[0].get_ylim()
        assert width / layers == pytest.approx(height / (low - high))
        assert 0.1 < width / layers < 0.5
        if layers <= 32:
            assert figure.get_figwidth() < 8.0


def test_numbers_are_left_out_where_they_would_not_fit():
    ranks = {f"m.{layer}.q": 10_000 for layer in range(80)}
    assert texts(plot_ranks(ranks, None).axes[0]) == []
    assert len(texts(plot_ranks(dict.fromkeys(ranks, 128), None).axes[0])) == 80


def test_layer_numbers_do_not_run_into_each_other():
    drawn = labels(plot_ranks({f"m.{layer}.q": 1 for layer in range(126)}, None).axes[0].get_xticklabels())
    assert drawn == [str(layer) for layer in range(0, 126, 2)]


def test_plot_ranks_keeps_stacks_apart_and_shows_paths_in_no_layer():
    axes, _ = plot_ranks({"encoder.layers.0.q": 8, "decoder.layers.0.q": 0, "decoder.layers.1.q": 8, "head.out": 8}, None).axes
    assert labels(axes.get_yticklabels()) == ["encoder.layers: q", "decoder.layers: q", "head.out"]
    assert labels(axes.get_xticklabels()) == ["0", "1", "–"] and axes.get_xlabel() == "layer (–: in none)"
    assert places(axes) == {(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (2.0, 2.0)}


def test_plot_ranks_of_a_model_without_layers():
    axes, _ = plot_ranks({"first": 1, "second": 0}, None).axes
    assert len(axes.patches) == 2 and labels(axes.get_xticklabels()) == ["–"]


def test_plot_frequency_counts_scored_reallocations():
    on = {"m.0.q": 8, "m.0.v": 0}
    history = [entry(0, {"m.0.q": 0, "m.0.v": 8}, warmup=True), entry(1, on), entry(2, on), entry(3, {"m.0.q": 0, "m.0.v": 8})]
    axes, bar = plot_frequency(history).axes
    assert texts(axes) == ["67", "33"]
    assert axes.get_title() == "How often a path was on in 3 scored reallocations"
    assert bar.get_ylim()[1] == 100 and bar.get_ylabel() == "share of reallocations (%)"


def test_plot_frequency_of_a_warmup_alone_shows_it():
    axes, _ = plot_frequency([entry(0, {"m.0.q": 8, "m.0.v": 0}, warmup=True)]).axes
    assert texts(axes) == ["100"] and axes.get_title() == "How often a path was on in 1 warm-up reallocation"


def test_plot_churn_draws_both_courses_and_shades_the_warmup():
    ranks = {"m.0.q": 8}
    history = [entry(0, ranks, True, 0.0, 2_000_000), entry(40, ranks, True, 0.5, 1_000_000),
               entry(80, ranks, False, 0.25, 500_000), entry(120, ranks, False, 0.0, 1_500_000)]
    churn, parameters = plot_churn(history).axes
    assert churn.lines[0].get_xydata().tolist() == [[0, 0], [40, 50], [80, 25], [120, 0]]
    assert parameters.lines[0].get_xydata().tolist() == [[0, 2], [40, 1], [80, 0.5], [120, 1.5]]
    assert "millions" in parameters.get_ylabel() and parameters.get_xlabel() == "optimizer step" and "%" in churn.get_ylabel()
    for axes in (churn, parameters):
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_width()) == (0, 80)
    assert labels(churn.get_legend().get_texts()) == ["warm-up"]


@pytest.mark.parametrize("parameters,unit", [(0, "number"), (999, "number"), (1000, "thousands"), (3_000_000_000, "billions")])
def test_plot_churn_names_the_unit(parameters, unit):
    assert unit in plot_churn([entry(5, {"q": 1}, parameters=parameters)]).axes[1].get_ylabel()


def test_plot_churn_of_one_reallocation_has_whole_steps():
    figure = plot_churn([entry(7, {"q": 1}, warmup=True)])
    figure.canvas.draw()
    shown = [float(tick) for tick in figure.axes[1].get_xticks()]
    assert figure.axes[0].get_xlim() == (6, 8) and all(tick == round(tick) for tick in shown)
    assert not figure.axes[0].patches


@pytest.mark.parametrize("draw,message", [
    (lambda: plot_ranks({}, {}), "no path"), (lambda: plot_frequency([]), "history is empty"),
    (lambda: plot_churn([]), "history is empty")], ids=["ranks", "frequency", "churn"])
def test_pictures_of_nothing_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_pictures_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="extra 'plot'"):
        plot_ranks({"m.0.q": 1}, None)


def test_pictures_leave_matplotlibs_state_alone(tmp_path):
    code = ("import sys; from heterolora_kernels import plotting; before = 'matplotlib' in sys.modules; "
            f"plotting.plot_ranks({{'m.0.q': 1}}, None, {str(tmp_path / 'r.png')!r}); "
            "print(before, 'matplotlib.pyplot' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr
