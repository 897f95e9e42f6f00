"""Every figure of the course, in one style.

The title of a figure says what was found. Colours are Okabe and Ito's, which people with any kind
of colour vision can tell apart; lines differ in dashes or markers too, so grey prints read well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Source: Okabe and Ito, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
)
GREY = "#6B6B6B"
STYLE = {
    "figure.figsize": (7.0, 3.4),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}
plt.rcParams.update(STYLE)


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots()
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def loss_curves(
    train: Sequence[Sequence[float]],
    evals: Sequence[Sequence[float]],
    title: str,
    best_step: int | None = None,
) -> Figure:
    """Draw training and validation loss against the optimizer step.

    Args:
        train, evals: pairs of (step, loss in nats per answer token).
        title: the finding.
        best_step: where the validation loss was lowest; marked if given.
    """
    figure, axes = _axes(title, "optimizer step", "loss (nats per answer token)")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=GREY, linewidth=1.2, linestyle="--", label="training")
    if evals:
        steps, losses = zip(*evals, strict=True)
        axes.plot(steps, losses, color=BLUE, marker="o", label="validation")
    if best_step is not None:
        axes.axvline(best_step, color=ORANGE, linestyle=":", label=f"lowest (step {best_step})")
    axes.set_ylim(bottom=0)
    axes.legend()
    plt.close(figure)
    return figure


def shares(
    groups: Mapping[str, Mapping[str, float]],
    title: str,
    ylabel: str = "share right (%)",
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """Draw bars of shares, side by side for every group.

    Args:
        groups: {"base": {"category": 0.1, ...}, "tuned": {...}}, shares from 0 to 1.
        title: the finding.
        intervals: the same shape with (low, high), drawn as error bars.
    """
    figure, axes = _axes(title, "", ylabel)
    names = list(next(iter(groups.values())))
    width = 0.8 / len(groups)
    colours, hatches = cycle([GREY, BLUE, ORANGE, GREEN]), cycle(["", "", "//", ".."])
    for number, (group, values) in enumerate(groups.items()):
        positions = [
            index + (number - (len(groups) - 1) / 2) * width for index in range(len(names))
        ]
        heights = [100 * values[name] for name in names]
        errors = None
        if intervals and group in intervals:
            bounds = [intervals[group][name] for name in names]
            errors = [
                [
                    max(0.0, height - 100 * low)
                    for height, (low, _) in zip(heights, bounds, strict=True)
                ],
                [
                    max(0.0, 100 * high - height)
                    for height, (_, high) in zip(heights, bounds, strict=True)
                ],
            ]
        bars = axes.bar(
            positions,
            heights,
            width * 0.92,
            label=group,
            color=next(colours),
            hatch=next(hatches),
            edgecolor="white",
            yerr=errors,
            ecolor="#333333",
            capsize=3,
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    plt.close(figure)
    return figure


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Draw one line per name: {"name": (x values, y values)}."""
    figure, axes = _axes(title, xlabel, ylabel)
    for (name, (x, y)), style in zip(curves.items(), cycle(["-", "--", "-.", ":"]), strict=False):
        axes.plot(x, y, linestyle=style, label=name)
    if len(curves) > 1:
        axes.legend()
    plt.close(figure)
    return figure


def bars(values: Mapping[str, float], title: str, xlabel: str, fmt: str = "%.0f") -> Figure:
    """Draw one horizontal bar per name."""
    figure, axes = _axes(title, xlabel, "")
    names = list(values)
    drawn = axes.barh(names, [values[name] for name in names], color=BLUE, height=0.6)
    axes.bar_label(drawn, fmt=fmt, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(False, axis="y")
    plt.close(figure)
    return figure
