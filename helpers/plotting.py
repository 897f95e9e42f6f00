"""Every figure of the course, in one style.

The title of a figure says what was found. Colors are Okabe and Ito's, which people with any kind
of color vision can tell apart; lines differ in dashes or markers too, so grey prints read well.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from cycler import cycler
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

if TYPE_CHECKING:
    from helpers.memory import Plan

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
INK = "#333333"
SIZE = (7.0, 3.4)  # inches
_CYCLE = (
    cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY])
    + cycler(linewidth=[1.8] * 6)
    + cycler(markersize=[4.5] * 6)
)


class Chart(Figure):
    """A figure that a notebook shows as a PNG where it is the last expression of a cell.

    It never enters pyplot: nothing has to be closed, and no setting of the learner's own plots
    changes.
    """

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _chart(size: tuple[float, float] = SIZE) -> Chart:
    return Chart(figsize=size, dpi=110, layout="constrained")


def _styled(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_prop_cycle(_CYCLE)
    return axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _axes(
    title: str, xlabel: str, ylabel: str, size: tuple[float, float] = SIZE
) -> tuple[Chart, Axes]:
    figure = _chart(size)
    axes = _styled(figure.add_subplot())
    _title(axes, title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _equal_ratios(axes: Axes, amounts: Iterable[Iterable[float]]) -> None:
    """Let equal distances on the horizontal axis stand for equal ratios, and name every amount."""
    ticks = sorted({amount for each in amounts for amount in each})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)


def _legend(axes: Axes, outside: bool = False, **options: Any) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if outside else {}
    axes.legend(frameon=False, **place | options)


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
    _draw_losses(axes, train, evals)
    if best_step is not None:
        axes.axvline(best_step, color=ORANGE, linestyle=":", label=f"lowest (step {best_step})")
    axes.set_ylim(bottom=0)
    if train or evals:
        _legend(axes)
    return figure


def _draw_losses(
    axes: Axes, train: Sequence[Sequence[float]], evals: Sequence[Sequence[float]]
) -> None:
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=GREY, linewidth=1.2, linestyle="--", label="training")
    if evals:
        steps, losses = zip(*evals, strict=True)
        axes.plot(steps, losses, color=BLUE, marker="o", label="validation")


def fractions(
    groups: Mapping[str, Mapping[str, float]],
    title: str,
    ylabel: str = "right (%)",
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """Draw bars of percentages, side by side for every group.

    Args:
        groups: {"base": {"category": 0.1, ...}, "tuned": {...}}, fractions from 0 to 1.
        title: the finding.
        intervals: the same shape with (low, high), drawn as error bars.
    """
    figure, axes = _axes(title, "", ylabel)
    names = list(next(iter(groups.values())))
    width = 0.8 / len(groups)
    colors, hatches = cycle([GREY, BLUE, ORANGE, GREEN]), cycle(["", "", "//", ".."])
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
            color=next(colors),
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
    _legend(axes, outside=True)
    return figure


def ladder(
    scores: Mapping[str, Sequence[float]],
    title: str,
    xlabel: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    highlight: Sequence[str] = (),
) -> Figure:
    """Draw one line per name: a bar up to the mean, a dot for each run, an interval.

    Args:
        scores: {"rules": [0.53], "lora": [0.76, 0.75, 0.80]}, fractions from 0 to 1, drawn from the
            first name at the top to the last.
        title: the finding.
        xlabel: what was scored, in percent.
        intervals: (low, high) of some names, drawn around the mean.
        highlight: names whose bars are colored.
    """
    figure, axes = _axes(title, xlabel, "")
    for line, (name, seen) in enumerate(scores.items()):
        mean, color = sum(seen) / len(seen), BLUE if name in highlight else GREY
        low, high = (intervals or {}).get(name, (mean, mean))
        axes.barh(line, 100 * mean, 0.62, color=color, alpha=0.55)
        axes.plot([100 * low, 100 * high], [line, line], color=INK, linewidth=1.2, marker="|")
        if len(seen) > 1:
            places = [line + 0.16 * (n - (len(seen) - 1) / 2) for n in range(len(seen))]
            axes.plot([100 * x for x in seen], places, "o", color=color, markersize=4)
        right = 100 * max(high, *seen)
        axes.text(right + 1.5, line, f"{100 * mean:.0f} %", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlim(0, 104)
    axes.grid(False, axis="y")
    figure.set_size_inches(7.6, 0.9 + 0.34 * len(scores))
    return figure


def spread(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str = "exact match (%)",
    doubling: bool = False,
) -> Figure:
    """Draw scores against an amount: a line through the means, a dot a run, a band around them.

    Args:
        curves: {"lora": {16: [0.14, 0.10], 32: [0.18, 0.2]}, "rules": ...}, fractions from 0 to 1.
        title: the finding.
        doubling: equal distances on the horizontal axis stand for equal ratios.
    """
    figure, axes = _axes(title, xlabel, ylabel)
    looks = cycle([(BLUE, "o", "-"), (ORANGE, "D", "--"), (GREEN, "^", "-."), (RED, "s", ":")])
    for (name, values), (color, marker, dashes) in zip(curves.items(), looks, strict=False):
        amounts = sorted(values)
        seen = [[100 * score for score in values[amount]] for amount in amounts]
        means = [sum(scores) / len(scores) for scores in seen]
        axes.plot(amounts, means, color=color, linestyle=dashes, marker=marker, label=name)
        low, high = ([pick(scores) for scores in seen] for pick in (min, max))
        axes.fill_between(amounts, low, high, color=color, alpha=0.18, linewidth=0)
        for amount, scores in zip(amounts, seen, strict=True):
            axes.plot([amount] * len(scores), scores, ".", color=color, markersize=4)
    if doubling:
        _equal_ratios(axes, curves.values())
    axes.set_ylim(0, 100)
    _legend(axes)
    return figure


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    doubling: bool = False,
) -> Figure:
    """Draw one line per name: {"name": (x values, y values)}.

    Args:
        doubling: equal distances on the horizontal axis stand for equal ratios, and each point is
            marked.
    """
    figure, axes = _axes(title, xlabel, ylabel)
    looks = zip(cycle(["-", "--", "-.", ":"]), cycle("oD^s") if doubling else cycle([""]))
    for (name, (x, y)), (style, marker) in zip(curves.items(), looks, strict=False):
        axes.plot(x, y, linestyle=style, marker=marker, label=name)
    if doubling:
        _equal_ratios(axes, (x for x, _ in curves.values()))
    if len(curves) > 1:
        _legend(axes)
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
    return figure


def _set_tokens(
    groups: Sequence[tuple[Sequence[str], Sequence[str]]], columns: int
) -> tuple[list[list[tuple[float, int, float, str]]], int]:
    """Set tokens, each with a caption below it, in lines of `columns` characters.

    Returns:
        For every group a list with (x, line, width, text) of each token, and how many lines it
        all takes. A group begins on a new line.
    """
    placed, line = [], 0
    for texts, captions in groups:
        x, group = 0.0, []
        for text, caption in zip(texts, captions, strict=True):
            shown = text.replace(" ", "·").replace("\n", "↵")
            width = max(len(shown), len(caption) * 0.8 if caption else 1) + 0.9
            if x and x + width > columns:
                x, line = 0.0, line + 1
            group.append((x, line, width, shown))
            x += width + 0.5
        placed.append(group)
        line += 1
    return placed, line


def token_map(
    groups: Mapping[str, tuple[Sequence[str], Sequence[float]]],
    title: str,
    label: str,
    highest: float | None = None,
    fmt: str = "%.1f",
) -> Figure:
    """Draw texts token by token; the darker a token's box, the higher its value.

    Args:
        groups: {"before": (tokens as text, a value for each), ...}; one block of lines each.
        title: the finding.
        label: what the values are, with their unit.
        highest: the value that is drawn darkest; without it the highest of all. The lightest is 0.
        fmt: how the value under a token is written; "" leaves it out.
    """
    columns = 78
    captions = [[fmt % value if fmt else "" for value in values] for _, values in groups.values()]
    texts = [texts for texts, _ in groups.values()]
    placed, lines_needed = _set_tokens(list(zip(texts, captions, strict=True)), columns)
    every = [value for _, values in groups.values() for value in values]
    top = highest if highest is not None else max(every, default=1.0)
    colors = colormaps["Blues"]
    figure, axes = _axes(title, "", "", (8.4, 0.75 + 0.52 * lines_needed))
    style = {"ha": "center", "va": "center", "parse_math": False}  # a token may be "$$"
    for group, (_, values), under in zip(placed, groups.values(), captions, strict=True):
        for (x, row, width, shown), value, caption in zip(group, values, under, strict=True):
            strength = min(1.0, max(0.0, value / top)) if top else 0.0
            box = {"color": colors(strength), "ec": GREY, "lw": 0.5}
            axes.add_patch(Rectangle((x, row + 0.06), width, 0.52, **box))
            ink, middle = "white" if strength > 0.55 else "black", x + width / 2
            axes.text(middle, row + 0.33, shown, color=ink, family="monospace", fontsize=9, **style)
            axes.text(middle, row + 0.75, caption, color="#333333", fontsize=7, **style)
    for name, group in zip(groups, placed, strict=True):
        if group:
            axes.text(-1, group[0][1] + 0.33, name, ha="right", va="center", fontsize=10)
    axes.set_xlim(0, columns)
    axes.set_ylim(lines_needed, 0)
    axes.axis("off")
    scale = ScalarMappable(Normalize(0, top), colors)
    figure.colorbar(scale, ax=axes, orientation="horizontal", aspect=60, pad=0.02, label=label)
    return figure


def levels(
    values: Sequence[float], tables: Mapping[str, Sequence[float]], title: str, xlabel: str
) -> Figure:
    """Draw how values are spread, and below it, as ticks, the levels of each number format.

    Args:
        values: many numbers, for the histogram.
        tables: {"NF4": its levels, ...}; one row of ticks each.
        title: the finding.
    """
    figure = _chart((7.0, 3.8))
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    top, bottom = (_styled(axes) for axes in panels)
    fraction_each = [1 / len(values)] * len(values)
    top.hist(values, bins=81, weights=fraction_each, color="#C9C9C9", edgecolor=GREY, linewidth=0.3)
    top.set_ylabel("fraction of weights")
    _title(top, title)
    for row, ((_, ticks), color) in enumerate(
        zip(tables.items(), cycle([GREY, ORANGE, BLUE]), strict=False)
    ):
        bottom.vlines(ticks, row - 0.36, row + 0.36, color=color, linewidth=2)
    bottom.set_yticks(range(len(tables)), list(tables))
    bottom.set_ylim(len(tables) - 0.5, -0.5)
    bottom.grid(False)
    bottom.set_xlabel(xlabel)
    return figure


def trade_off(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Draw what is got against what it costs: marked points, joined, on a logarithmic y axis."""
    figure, axes = _axes(title, xlabel, ylabel)
    markers = cycle(["o", "s", "^", "D", "v"])
    for (name, (x, y)), marker, style in zip(
        curves.items(), markers, cycle(["-", "--", "-.", ":"]), strict=False
    ):
        axes.plot(x, y, marker=marker, linestyle=style, markersize=6, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    _legend(axes)
    return figure


def token_ids(
    groups: Mapping[str, tuple[Sequence[str], Sequence[int], bool]], title: str
) -> Figure:
    """Draw texts token by token with the id under each; the boxes of trained ones are filled.

    Args:
        groups: {"prompt": (tokens as text, their ids, trained?), ...}; one block of lines each.
        title: the finding.
    """
    columns = 84
    placed, lines_needed = _set_tokens(
        [(texts, [str(number) for number in ids]) for texts, ids, _ in groups.values()], columns
    )
    figure, axes = _axes(title + " (filled)", "", "", (8.4, 0.5 + 0.5 * lines_needed))
    style = {"ha": "center", "va": "center", "parse_math": False}  # a token may be "$$"
    for (name, (_, ids, trained)), group in zip(groups.items(), placed, strict=True):
        face = {"fc": BLUE, "ec": BLUE} if trained else {"fc": "white", "ec": GREY}
        ink = "white" if trained else "black"
        if group:
            axes.text(-1, group[0][1] + 0.33, name, ha="right", va="center")
        for (x, row, width, shown), number in zip(group, ids, strict=True):
            axes.add_patch(Rectangle((x, row + 0.06), width, 0.52, lw=0.6, **face))
            middle = x + width / 2
            axes.text(middle, row + 0.32, shown, color=ink, family="monospace", fontsize=9, **style)
            axes.text(middle, row + 0.75, str(number), color="#333333", fontsize=7, **style)
    axes.set_xlim(0, columns)
    axes.set_ylim(lines_needed, 0)
    axes.axis("off")
    return figure


def levels_on_histogram(values: Sequence[float], levels: Sequence[float], title: str) -> Figure:
    """Draw how often scaled weights occur, and the levels that they are rounded to."""
    figure, axes = _axes(title, "weight divided by the largest of its block", "weights (%)")
    axes.hist(values, bins=81, weights=[100 / len(values)] * len(values), color=SKY)
    for number, level in enumerate(levels):
        label = f"{len(levels)} levels" if number == 0 else None
        axes.axvline(level, ymax=0.9, color=RED, linewidth=0.9, label=label)
    axes.set_xlim(-1.04, 1.04)
    _legend(axes, loc="upper right")
    return figure


def matrices(named: Mapping[str, Sequence[Sequence[float]]], title: str) -> Figure:
    """Draw matrices side by side on one scale of colors, symmetric around zero."""
    figure = _chart((7.0, 3.6))
    every = figure.subplots(1, len(named), squeeze=False)
    bound = max(abs(float(value)) for matrix in named.values() for row in matrix for value in row)
    for axes, (name, matrix) in zip(every[0], named.items(), strict=True):
        drawn = axes.imshow(matrix, cmap="PuOr", vmin=-bound / 2, vmax=bound / 2)
        axes.set_title(name, fontweight="normal", fontsize=10)
        axes.set_xlabel("column")
        axes.grid(False)
    every[0][0].set_ylabel("row")
    figure.colorbar(drawn, ax=every[0].tolist(), shrink=0.8, label="value")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def points(
    places: Mapping[str, tuple[float, float]], title: str, xlabel: str, ylabel: str
) -> Figure:
    """Draw one labelled point per name: {"name": (x, y)}. Both axes begin at zero."""
    figure, axes = _axes(title, xlabel, ylabel)
    right, top = (1.08 * max(place[axis] for place in places.values()) for axis in (0, 1))
    shapes, colors = cycle("osD^vPX*"), cycle([BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY])
    # Boxes in fractions of the axes: (left, right, bottom, top). Markers first, then labels.
    spots = {
        name: ((x / right + 0.04) / 1.04, (y / top + 0.08) / 1.08)
        for name, (x, y) in places.items()
    }
    taken = [(a - 0.012, a + 0.012, b - 0.03, b + 0.03) for a, b in spots.values()]
    for name, (a, b) in spots.items():
        axes.plot(*places[name], next(shapes), color=next(colors), markersize=8)
        wide, high = 0.0135 * len(name), 0.035
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):  # right of the marker, left, above, below
            x, y = a + dx * (0.018 + wide / 2), b + dy * 0.075
            box = (x - wide / 2, x + wide / 2, y - high, y + high)
            inside = box[0] > 0 and box[1] < 1 and box[2] > 0 and box[3] < 1
            if inside and not any(
                box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3]
                for other in taken
            ):
                break
        taken.append(box)
        side = {1: ("left", a + 0.018), -1: ("right", a - 0.018), 0: ("center", a)}[dx]
        axes.annotate(name, (side[1], y), xycoords="axes fraction", ha=side[0], va="center")
    axes.set_xlim(-0.04 * right, right)
    axes.set_ylim(-0.08 * top, top)
    return figure


def memory_bars(
    plans: Mapping[str, Mapping[str, float]], devices: Mapping[str, float], title: str
) -> Figure:
    """Draw one stacked bar per plan against the memory of devices.

    Args:
        plans: {"QLoRA": {"weights": bytes, "optimizer": bytes, ...}}, as `Plan.components`.
        devices: {"T4": bytes}; each becomes a vertical line.
        title: the finding.
    """
    gib = 2**30
    figure, axes = _axes(title, "memory (GiB)", "")
    names, parts = list(plans), list(next(iter(plans.values())))
    colors, hatches = [GREY, SKY, ORANGE, PURPLE, BLUE, GREEN], ["", "//", "..", "xx", "", "\\\\"]
    ends = [0.0] * len(names)
    for part, color, hatch in zip(parts, cycle(colors), cycle(hatches), strict=False):
        sizes = [plans[name][part] / gib for name in names]
        if any(sizes):
            axes.barh(
                names, sizes, 0.6, ends, label=part, color=color, hatch=hatch, edgecolor="white"
            )
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the devices' lines
    for name, size in devices.items():
        axes.axvline(size / gib, color="#333333", linestyle="--", linewidth=1)
        axes.text(size / gib, -0.75, name, ha="center", va="center", fontsize=8.5, bbox=box)
    reach = 1.1 * max(*ends, *(size / gib for size in devices.values()))
    for position, end in enumerate(ends):
        axes.text(end + reach / 90, position, f"{end:.1f}", va="center", fontsize=9, bbox=box)
    axes.set_ylim(len(names) - 0.5, -1)
    axes.set_xlim(0, reach)
    axes.grid(False, axis="y")
    _legend(axes, outside=True)
    return figure


def loss_panels(
    runs: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]], title: str
) -> Figure:
    """Draw several runs side by side, with the same axes: {"A": (train, evals), ...}.

    Args:
        runs: for each name the pairs of (step, loss in nats per answer token), as `loss_curves`.
        title: the finding, or what to look for.
    """
    figure = _chart((2.4 * len(runs) + 0.6, 2.9))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)
    for axes, (name, (train, evals)) in zip(panels[0], runs.items(), strict=True):
        _title(_styled(axes), name)
        axes.set_xlabel("optimizer step")
        _draw_losses(axes, train, evals)
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].set_ylabel("loss (nats per\nanswer token)")
    _legend(panels[0][-1])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def ranges(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
    xlabel: str,
) -> Figure:
    """Draw repeated measurements: a marker for each value and a bar from the lowest to the highest.

    Args:
        groups: {"at the end": {"baseline": [1.10, 0.61], ...}, ...}; every group the same names,
            one line of the figure per name.
        title: the finding.
        xlabel: what was measured, with its unit. The axis begins at zero.
    """
    figure, axes = _axes(title, xlabel, "")
    names = list(next(iter(groups.values())))
    looks = cycle([(ORANGE, "o"), (BLUE, "D"), (GREEN, "^")])
    for number, ((group, values), (color, marker)) in enumerate(
        zip(groups.items(), looks, strict=False)
    ):
        shift = 0.26 * (number - (len(groups) - 1) / 2)
        for line, name in enumerate(names):
            y, seen = line + shift, values[name]
            axes.plot([min(seen), max(seen)], [y, y], color=color, linewidth=3, alpha=0.45)
            label = group if line == 0 else None
            axes.plot(seen, [y] * len(seen), marker, color=color, linestyle="", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    _legend(axes, outside=True)
    figure.set_size_inches(7.6, 0.9 + 0.42 * len(names))
    return figure


def memory_plan(plan: Plan, devices: Mapping[str, int]) -> Figure:
    """Draw one plan against the memory of devices, up to the smallest that it fits on.

    Args:
        plan: from `helpers.memory.plan` or `simulate`.
        devices: {"T4": bytes, ...}.
    """
    shown, fits = {}, False
    for name, size in sorted(devices.items(), key=lambda device: device[1]):
        shown[name] = size
        if fits := plan.fits(size):
            break
    where = f"fits on: {name}" if fits else "fits on none of these"
    title = f"{plan.method} takes {plan.total / 2**30:.1f} GiB and {where}"
    return memory_bars({plan.method: plan.components}, shown, title)


def methods(
    scores: Mapping[str, Sequence[float]],
    trained: Mapping[str, int],
    title: str,
    xlabel: str,
    reference: tuple[str, tuple[float, float]],
) -> Figure:
    """Draw trained parameters and scores of methods side by side, a line for each method.

    Args:
        scores: {"LoRA": [0.5, 0.6, 0.5], ...}: the score of each seed, from 0 to 1.
        trained: how many parameters each method trains; the most stand at the top.
        title: the finding.
        xlabel: what was scored, in percent.
        reference: a method and its interval, drawn as a band behind all others.
    """
    names = sorted(scores, key=lambda name: -trained[name])
    figure = _chart((7.6, 1.3 + 0.3 * len(names)))
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2.3])
    sizes, axes = (_styled(panel) for panel in panels)
    for line, name in enumerate(names):
        sizes.plot([1, trained[name]], [line, line], color=GREY, linewidth=1.2)
        sizes.plot([trained[name]], [line], "o", color=GREY, markersize=5)
        seen = [100 * score for score in scores[name]]
        mean = sum(seen) / len(seen)
        axes.plot([min(seen), max(seen)], [line, line], color=BLUE, linewidth=3, alpha=0.4)
        axes.plot(seen, [line] * len(seen), "o", color=BLUE, markersize=5)
        axes.plot([mean, mean], [line - 0.3, line + 0.3], color=INK, linewidth=1.4)
    method, (low, high) = reference
    axes.axvspan(100 * low, 100 * high, color=SKY, alpha=0.2, linewidth=0, zorder=0)
    sizes.set_xscale("log")
    sizes.set_xlim(left=3e3)
    sizes.xaxis.set_minor_formatter(NullFormatter())
    sizes.set_xlabel("trained parameters")
    sizes.set_yticks(range(len(names)), names)
    sizes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=-2)
    axes.set_xlabel(xlabel)
    axes.plot([], [], "o", color=BLUE, markersize=5, label="a dot a seed")
    axes.plot([], [], color=INK, marker="|", linestyle="", markersize=10, label="their mean")
    band = {"color": SKY, "alpha": 0.2, "linewidth": 0}
    axes.fill_between([], [], [], label=f"95 % interval of {method}", **band)
    for panel in (sizes, axes):
        panel.grid(False, axis="y")
    labels = axes.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure
