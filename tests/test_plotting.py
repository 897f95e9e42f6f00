"""helpers/plotting.py: every chart is drawn, and shows what it was given."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from helpers import plotting

CURVE = [(1, 2.0), (2, 1.0), (3, 0.5)]
COMPONENTS = {"weights": 2**30, "optimizer": 2**29}
CHARTS = {
    "loss_curves": lambda: plotting.loss_curves(CURVE, CURVE, "Title", 3),
    "loss_panels": lambda: plotting.loss_panels({"A": (CURVE, CURVE), "B": (CURVE, [])}, "Title"),
    "fractions": lambda: plotting.fractions(
        {"base": {"a": 0.1, "b": 0.2}, "tuned": {"a": 0.6, "b": 1.0}},
        "Title",
        intervals={"tuned": {"a": (0.5, 0.7), "b": (0.9, 1.0)}},
    ),
    "ladder": lambda: plotting.ladder(
        {"rules": [0.5], "lora": [0.7, 0.8]}, "Title", "x", {"rules": (0.4, 0.6)}, ["lora"]
    ),
    "spread": lambda: plotting.spread(
        {"rules": {16: [0.2], 32: [0.3]}, "lora": {16: [0.1, 0.2], 32: [0.4, 0.5]}},
        "Title",
        "x",
        doubling=True,
    ),
    "lines": lambda: plotting.lines({"x": ([1, 2], [3, 4])}, "Title", "x", "y"),
    "methods": lambda: plotting.methods(
        {"a": [0.4, 0.5], "b": [0.1]}, {"a": 1000, "b": 100_000}, "Title", "x", ("a", (0.3, 0.6))
    ),
    "bars": lambda: plotting.bars({"x": 1.0, "y": 2.0}, "Title", "x"),
    "trade_off": lambda: plotting.trade_off({"x": ([1, 2], [3, 4])}, "Title", "x", "y"),
    "points": lambda: plotting.points({"x": (1, 2), "y": (3, 4)}, "Title", "x", "y"),
    "ranges": lambda: plotting.ranges({"end": {"a": [1, 2], "b": [2, 3]}}, "Title", "x"),
    "matrices": lambda: plotting.matrices({"W": [[1.0, -1.0], [0.5, 0.0]]}, "Title"),
    "levels": lambda: plotting.levels([0.1, -0.2] * 50, {"NF4": [-1, 0, 1]}, "Title", "x"),
    "levels_on_histogram": lambda: plotting.levels_on_histogram([0.1] * 50, [-1, 0, 1], "Title"),
    "token_map": lambda: plotting.token_map({"x": (["$$", " a$"], [0.1, 2.0])}, "Title", "nats"),
    "token_ids": lambda: plotting.token_ids({"x": (["$$", "\n"], [5, 6], True)}, "Title"),
    "memory_bars": lambda: plotting.memory_bars({"x": COMPONENTS}, {"T4": 15 * 2**30}, "Title"),
    "memory_plan": lambda: plotting.memory_plan(
        SimpleNamespace(
            method="lora",
            components=COMPONENTS,
            total=sum(COMPONENTS.values()),
            fits=lambda size: size > 2 * 2**30,
        ),
        {"small": 2**30, "large": 4 * 2**30},
    ),
}


def titles(figure: Figure) -> str:
    parts = [figure._suptitle.get_text()] if figure._suptitle else []
    return " ".join([*parts, *(axes.get_title("left") for axes in figure.axes)])


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_shows_itself_as_a_png(name: str) -> None:
    figure = CHARTS[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "Title" in titles(figure) or name == "memory_plan"
    with_axis = (
        "loss_curves",
        "lines",
        "bars",
        "points",
        "ranges",
        "trade_off",
        "ladder",
        "spread",
    )
    if name in with_axis:
        assert figure.axes[0].get_xlabel()


def test_a_plan_is_drawn_up_to_the_first_device_that_it_fits_on() -> None:
    figure = CHARTS["memory_plan"]()
    assert titles(figure) == "lora takes 1.5 GiB and fits on: large"


def test_bars_carry_their_percentages_and_intervals() -> None:
    axes = CHARTS["fractions"]().axes[0]
    assert {text.get_text() for text in axes.texts} == {"10", "20", "60", "100"}
    assert [bar.get_height() for bar in axes.patches] == [10, 20, 60, 100]


def test_charts_change_no_setting_and_need_neither_pyplot_nor_torch() -> None:
    code = (
        "import sys, matplotlib\n"
        "stored = lambda: list(dict.items(matplotlib.rcParams))  # reading one may import pyplot\n"
        "before = stored()\n"
        "from helpers import plotting\n"
        "plotting.lines({'x': ([1], [2])}, 't', 'x', 'y')._repr_png_()\n"
        "assert stored() == before\n"
        "print([m for m in ('matplotlib.pyplot', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_ladder_shows_means_runs_and_intervals() -> None:
    axes = CHARTS["ladder"]().axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([50, 75])
    assert {text.get_text() for text in axes.texts} == {"50 %", "75 %"}
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert any(x == pytest.approx([40, 60]) for x in drawn)
    assert any(x == pytest.approx([70, 80]) for x in drawn)


def test_a_spread_shows_the_means_and_every_run() -> None:
    axes = CHARTS["spread"]().axes[0]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert any(y == pytest.approx([15, 45]) for y in drawn)
    assert any(y == pytest.approx([40, 50]) for y in drawn)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32"]


def test_methods_stand_from_the_most_to_the_fewest_parameters() -> None:
    sizes, axes = CHARTS["methods"]().axes
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["b", "a"]
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[10], [40, 50], []]  # the last is the legend's
    assert [text.get_text() for text in axes.get_figure().legends[0].texts][2].endswith("of a")


def test_lines_name_every_amount_where_distances_are_ratios() -> None:
    curves = {"a": ([1e-4, 3e-4], [2, 1]), "b": ([3e-4, 1e-3], [1, 2])}
    axes = plotting.lines(curves, "Title", "x", "y", doubling=True).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0001", "0.0003", "0.001"]
    assert axes.get_xscale() == "log"
