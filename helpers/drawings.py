"""The drawings of ideas, made by code and in one style: `drawing("lora")`.

Blue is trained, grey is frozen, white is data, orange is the loss and what it looks at. Lengths
are in pixels at display size, from the top left corner; the PNG has twice as many.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import PIL.Image
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle
from PIL import PngImagePlugin

from helpers import CourseError
from helpers.plotting import BLUE, GREEN, GREY, ORANGE

INK, FAINT = "#222222", "#C4C4C4"
WIDTH = 720
LINE = 1.2  # points
SCALE = 2  # pixels of the file for one on the screen
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"
# kind of thing: (fill, edge)
KINDS = {
    "trained": ("#D3E6F3", BLUE),
    "frozen": ("#E4E4E4", GREY),
    "data": ("#FFFFFF", INK),
    "loss": ("#FCEBC8", ORANGE),
    "check": ("#D9EFE7", GREEN),
}
Point = tuple[float, float]


class _Sheet:
    """A white card of WIDTH x height pixels and the few things that every drawing is made of."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / 96, height / 96), dpi=96 * SCALE, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, WIDTH)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")
        self._add(
            FancyBboxPatch((1, 1), WIDTH - 2, height - 2, "square,pad=0", fc="white", ec=FAINT)
        )

    def _add(self, patch: Patch, line: float = LINE, over: int = 1) -> None:
        patch.set(linewidth=line, zorder=over)
        self.axes.add_patch(patch)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 9.5,
        color: str = INK,
        bold: bool = False,
        mono: bool = False,
        ha: str = "center",
    ) -> None:
        """Lines of text with y in their middle, whichever letters they have."""
        pixels = size * 96 / 72
        lines = text.split("\n")
        top = y - 1.35 * pixels * (len(lines) - 1) / 2
        for number, line in enumerate(lines):
            self.axes.text(
                x,
                top + 1.35 * pixels * number + 0.36 * pixels,
                line,
                fontsize=size,
                color=color,
                family=MONO if mono else SANS,
                weight="bold" if bold else "normal",
                ha=ha,
                va="baseline",
                zorder=4,
                parse_math=False,
            )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        kind: str = "data",
        corner: float = 5,
        dashed: bool = False,
        line: float = LINE,
        **style: object,
    ) -> None:
        """A box with its text in the middle; `style` goes to text()."""
        fill, edge = KINDS[kind]
        shape = f"round,pad=0,rounding_size={corner}" if corner else "square,pad=0"
        patch = FancyBboxPatch((x, y), width, height, shape, fc=fill, ec=edge)
        patch.set_linestyle((0, (4, 3)) if dashed else "-")
        self._add(patch, line, over=2)
        if text:
            self.text(x + width / 2, y + height / 2, text, **style)

    def area(self, x: float, y: float, width: float, height: float, text: str = "") -> None:
        """A pale region behind other things, with a heading at its top left."""
        shape = "round,pad=0,rounding_size=8"
        self._add(FancyBboxPatch((x, y), width, height, shape, fc="#F6F6F6", ec="#E3E3E3"), 0.8)
        if text:
            self.text(x + 12, y + 17, text, ha="left", bold=True)

    def arrow(self, start: Point, end: Point, color: str = INK) -> None:
        patch = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            shrinkA=0,
            shrinkB=0,
            color=color,
            joinstyle="miter",
            capstyle="butt",
        )
        self._add(patch, over=3)

    def path(self, points: Sequence[Point]) -> None:
        """An arrow along straight pieces."""
        self.line(points[:-1])
        self.arrow(points[-2], points[-1])

    def line(
        self,
        points: Sequence[Point],
        color: str = INK,
        dashed: bool = False,
        width: float = LINE,
    ) -> None:
        self.axes.plot(
            *zip(*points, strict=True),
            color=color,
            linewidth=width,
            linestyle=(0, (4, 3)) if dashed else "-",
            solid_capstyle="butt",
            solid_joinstyle="round",
            zorder=2,
        )

    def bracket(self, left: float, right: float, y: float) -> None:
        self.line([(left, y), (left, y + 7), (right, y + 7), (right, y)], GREY)

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """A thick frame around something drawn before."""
        self._add(Rectangle((x, y), width, height, fill=False, ec=INK), 2.4, over=3)

    def shape(self, points: Sequence[Point], kind: str) -> None:
        fill, edge = KINDS[kind]
        self._add(Polygon(points, fc=fill, ec=edge, joinstyle="round"), over=2)

    def dot(self, x: float, y: float, color: str) -> None:
        self.axes.plot([x], [y], "o", color=color, markersize=7, markeredgecolor=INK, zorder=4)

    def tag(self, x: float, y: float, text: str) -> None:
        """Text in the middle of a line, which stops for it."""
        width = 7 * len(text) + 8
        self._add(Rectangle((x - width / 2, y - 9), width, 18, fc="white", ec="none"), over=3)
        self.text(x, y, text, size=9)

    def cells(
        self,
        x: float,
        y: float,
        widths: Sequence[float],
        texts: Sequence[str],
        kinds: Sequence[str],
        height: float = 24,
        **style: object,
    ) -> list[float]:
        """A row of joined cells, as tokens are drawn. Returns the middle of each."""
        middles = []
        for width, text, kind in zip(widths, texts, kinds, strict=True):
            self.box(x, y, width, height, text, kind, corner=0, line=0.9, **style)
            middles.append(x + width / 2)
            x += width
        return middles


# -- one function for each drawing -------------------------------------------------------------


def tokens_and_labels() -> Figure:
    sheet = _Sheet(416)
    sheet.text(24, 26, "one row of the data", bold=True, ha="left")
    sheet.box(24, 42, 204, 40, "The kettle from 7312 leaks.", mono=True, size=9)
    sheet.text(126, 94, "message", color=GREY, size=9)
    answer = '{"category":"defect",\n… "order":"7312"}'
    sheet.box(24, 110, 204, 46, answer, "loss", mono=True, size=9)
    sheet.text(126, 168, "answer", color=GREY, size=9)
    sheet.text(271, 78, "chat\ntemplate", size=9)
    sheet.arrow((236, 104), (306, 104))

    sheet.text(314, 26, "one text", bold=True, ha="left")
    sheet.box(314, 42, 382, 122)
    prompt = [
        "<|im_start|>system",
        "Turn the message into a JSON ticket.<|im_end|>",
        "<|im_start|>user",
        "The kettle from 7312 leaks.<|im_end|>",
        "<|im_start|>assistant",
    ]
    for number, line in enumerate(prompt):
        sheet.text(326, 56 + 18 * number, line, mono=True, ha="left", size=9, color="#555555")
    last = '{"category":"defect", … "7312"}<|im_end|>'
    sheet.box(321, 140, 300, 19, "", "loss", corner=3, line=0.9)
    sheet.text(326, 149, last, mono=True, ha="left", size=9)
    sheet.arrow((505, 170), (505, 210))
    sheet.text(515, 189, "tokenizer", size=9, ha="left")

    # Tokens and ids of SmolLM2's tokenizer.
    asked = [("…", "…", 22), ("·kettle", "44328", 56), ("…", "…", 22)]
    asked += [("ass", "520", 34), ("istant", "9531", 50), ("↵", "198", 34)]
    told = [('{"', "39428", 44), ("category", "15833", 66), ('":"', "25535", 44)]
    told += [("def", "1604", 36), ("ect", "374", 34), ("…", "…", 22), ('"}', "23597", 44)]
    told += [("<|im_end|>", "2", 80)]
    texts, ids, widths = zip(*asked, *told, strict=True)
    kinds, first = ["data"] * len(texts), len(asked)
    left = WIDTH - 22 - sum(widths)
    sheet.cells(left, 218, widths, texts, kinds, mono=True, size=9)
    middles = sheet.cells(left, 246, widths, ids, kinds, mono=True, size=9)
    labels = ["…" if text == "…" else "-100" for text, _, _ in asked] + list(ids[first:])
    kinds = ["frozen"] * first + ["loss"] * len(told)
    sheet.cells(left, 318, widths, labels, kinds, mono=True, size=9)
    for name, y in (("tokens", 230), ("input_ids", 258), ("labels", 330)):
        sheet.text(left - 8, y, name, ha="right", size=9, mono=name != "tokens")
    for before, after in zip(middles[first - 1 :], middles[first:], strict=False):
        sheet.arrow((before, 272), (after - 3, 316), ORANGE)
    sheet.text(middles[first - 1] - 8, 294, "position t predicts token t + 1", ha="right", size=9)

    sheet.text(left, 207, "· a space, ↵ a line break", ha="left", size=9, color=GREY)
    border = left + sum(widths[:first])
    sheet.bracket(left + 1, border - 4, 352)
    sheet.text((left + border) / 2, 382, "prompt: −100,\nthe loss skips it", size=9)
    sheet.bracket(border + 4, WIDTH - 23, 352)
    middle = (border + WIDTH - 22) / 2
    sheet.text(
        middle,
        382,
        "answer: trained, and <|im_end|> with it,\nso the model learns where to stop",
        size=9,
    )
    return sheet.figure


def training_step() -> Figure:
    sheet = _Sheet(448)
    left, column = 214, 121
    end = left + 4 * column
    steps = [
        ("1 forward", "rows → model\n→ logits", "data"),
        ("2 loss", "logits against\nlabels", "loss"),
        ("3 backward", "gradients of\nthe adapter", "data"),
        ("4 optimizer", "changes the\nadapter a bit", "trained"),
    ]
    sheet.text(24, 60, "one training step", ha="left", bold=True, size=11)
    for number, (name, what, kind) in enumerate(steps):
        x = left + column * number
        sheet.box(x + 10, 20, column - 20, 80, "", kind)
        sheet.text(x + column / 2, 38, name, bold=True)
        sheet.text(x + column / 2, 72, what, size=9)
        if number:
            sheet.arrow((x - 9, 60), (x + 9, 60))
            sheet.line([(x, 152), (x, 418)], FAINT, dashed=True, width=0.8)
    first, last = left + column / 2, end - column / 2
    sheet.path([(last, 101), (last, 124), (first, 124), (first, 102)])
    sheet.tag((first + last) / 2, 124, "next batch")

    sheet.text(24, 146, "what it keeps in memory", ha="left", bold=True, size=11)
    notes = [
        ("frozen weights", "read, never changed"),
        ("adapter", "trained, and far smaller"),
        ("activations", "kept for the backward pass"),
        ("gradients", "one per trained parameter"),
        ("optimizer state", "two per trained parameter"),
    ]
    for number, (name, note) in enumerate(notes):
        y = 188 + 53 * number
        sheet.text(24, y - 8, name, ha="left", bold=True)
        sheet.text(24, y + 9, note, ha="left", size=9, color=GREY)
    width = 4 * column
    sheet.box(left, 171, width, 34, "", "frozen", corner=0)
    sheet.box(left, 236, width, 10, "", "trained", corner=0)
    loss, backward, optimizer = (left + column * number for number in (1, 2, 3))
    sheet.shape([(left, 311), (loss, 277), (backward, 277), (optimizer, 311)], "data")
    sheet.text((loss + backward) / 2, 295, "grow, then shrink", size=9)
    sheet.shape([(backward, 352), (optimizer, 342), (end, 342), (end, 352)], "trained")
    sheet.box(left, 389, width, 10, "", "trained", corner=0)
    sheet.box(left, 402, width, 10, "", "trained", corner=0)
    sheet.text(end, 431, "time →   (heights not to scale)", ha="right", size=9, color=GREY)
    return sheet.figure


LENGTHS, FIXED = (5, 9, 7, 12), 20  # of the four rows of padding()


def _wasted(width: int) -> str:
    """The percentage of cells that hold no token."""
    return f"{100 - 100 * sum(LENGTHS) / (width * len(LENGTHS)):.0f} %"


def padding() -> Figure:
    lengths, fixed, cell, names = LENGTHS, FIXED, 15, "ABCD"
    sheet = _Sheet(414)
    left = 196

    def grid(y: float, width: int) -> None:
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            texts = [name] * length + [""] * (width - length)
            kinds = ["data"] * length + ["frozen"] * (width - length)
            sheet.cells(left, y + 20 * row, [cell] * width, texts, kinds, height=17, size=9)

    def waste(x: float, y: float, width: int) -> None:
        total = width * len(lengths)
        sheet.text(x, y - 9, f"{_wasted(width)} wasted", ha="left", bold=True, size=11)
        note = f"{total - sum(lengths)} of {total} cells"
        sheet.text(x, y + 11, note, ha="left", size=9, color=GREY)

    longest, total = max(lengths), sum(lengths)
    heads = [
        (24, "fixed length", f"every row padded to {fixed},\nwhatever the batch holds"),
        (138, "dynamic padding", "every row padded to the\nlongest of its batch"),
        (252, "packed", "rows one after the other,\nno padding at all"),
    ]
    for y, name, note in heads:
        sheet.text(24, y + 14, name, ha="left", bold=True)
        sheet.text(24, y + 42, note, ha="left", size=9, color=GREY)
    grid(24, fixed)
    waste(left + fixed * cell + 22, 62, fixed)
    grid(138, longest)
    waste(left + longest * cell + 22, 176, longest)

    texts = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    sheet.cells(left, 256, [cell] * total, texts, ["data"] * total, height=17, size=9)
    x = left
    for length in lengths:
        sheet.line([(x, 250), (x, 279)], width=2)
        sheet.text(x + cell / 2, 288, "0", size=9)
        sheet.text(x + cell * (length - 0.5), 288, str(length - 1), size=9)
        sheet.line([(x + 14, 288), (x + cell * (length - 1) - 4, 288)], FAINT, width=1)
        x += cell * length
    sheet.line([(x, 250), (x, 279)], width=2)
    sheet.text(left, 318, "0 % wasted", ha="left", bold=True, size=11)
    note = "Positions start at 0 again in every row,\nand no token looks across a border."
    sheet.text(left + 116, 318, note, ha="left", size=9)

    sheet.line([(24, 354), (WIDTH - 24, 354)], FAINT, width=0.8)
    sheet.cells(24, 374, [cell], ["A"], ["data"], height=17, size=9)
    sheet.text(48, 382, "a token of row A", ha="left", size=9)
    sheet.cells(196, 374, [cell], [""], ["frozen"], height=17)
    sheet.text(220, 382, "padding: computed like a token, then thrown away", ha="left", size=9)
    return sheet.figure


# Source: bitsandbytes, functional.get_4bit_type("nf4"), to six places.
NF4 = (-1.0, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.09105, 0.0)
NF4 += (0.07958, 0.16093, 0.246112, 0.337915, 0.44071, 0.562617, 0.722957, 1.0)


def nf4() -> Figure:
    weights = (0.021, -0.047, 0.083, -0.006, 0.034, -0.112, 0.009, 0.058)
    block, scale_bits = 64, 32
    scale = max(abs(weight) for weight in weights)
    scaled = [weight / scale for weight in weights]
    codes = [min(range(16), key=lambda code: abs(NF4[code] - value)) for value in scaled]
    restored = [scale * NF4[code] for code in codes]
    sheet = _Sheet(462)
    left, cell = 168, 56

    def row(y: float, name: str, note: str, texts: Sequence[str], kind: str = "data") -> None:
        texts = [text.replace("-", "−") for text in texts]
        sheet.text(24, y + 3, name, ha="left", bold=True)
        sheet.text(24, y + 20, note, ha="left", size=9, color=GREY)
        sheet.cells(left, y, [cell] * 8, texts, [kind] * 8, mono=True, size=9)
        sheet.text(left + cell * 8 + 12, y + 12, "…", ha="left", color=GREY)

    def step(y: float, text: str) -> None:
        sheet.arrow((left + cell / 2, y), (left + cell / 2, y + 34))
        sheet.text(left + cell / 2 + 12, y + 16, text, ha="left", size=9)

    row(24, "weights", f"8 of a block of {block}", [f"{weight:+.3f}" for weight in weights])
    sheet.frame(left + cell * scaled.index(-1), 24, cell, 24)
    step(51, f"÷ {scale:.3f}: the largest of the block, without its sign (absmax)")
    row(88, "scaled", "from −1 to 1", [f"{value:+.2f}" for value in scaled])
    step(115, "▽ each on the code table")

    sheet.text(24, 168, "code table", ha="left", bold=True)
    sheet.text(24, 185, "code over value", ha="left", size=9, color=GREY)
    middle, half = (left + WIDTH - 32) / 2, (WIDTH - 32 - left) / 2
    sheet.line([(left, 175), (WIDTH - 32, 175)])
    for code, value in enumerate(NF4):
        x = middle + half * value
        sheet.line([(x, 167), (x, 183)])
        sheet.text(x, 195, str(code), size=9)
    for value in scaled:
        x = middle + half * value
        sheet.shape([(x, 165), (x - 4.5, 156), (x + 4.5, 156)], "data")
    for value in (-1, 0, 1):
        text = str(value).replace("-", "−")
        sheet.text(middle + half * value, 214, text, size=9, color=GREY)

    step(222, "the nearest of the 16 values, which lie closest together near 0")
    row(259, "4-bit code", "stored", [f"{code:04b}" for code in codes], "frozen")
    step(286, f"the table’s value × {scale:.3f}")
    row(323, "restored", "dequantized", [f"{value:+.3f}" for value in restored])
    errors = [f"{new - old:+.3f}" for new, old in zip(restored, weights, strict=True)]
    errors = ["0.000" if float(error) == 0 else error for error in errors]
    row(370, "error", "restored − weight", errors)
    sheet.line([(24, 414), (WIDTH - 24, 414)], FAINT, width=0.8)
    each = (block * 4 + scale_bits) / block
    text = f"stored: {block} codes of 4 bits and one scale of {scale_bits} bits, "
    sheet.text(24, 439, text + f"so {each:.1f} bits per weight instead of 32", ha="left")
    return sheet.figure


def lora() -> Figure:
    size, rank, side = 576, 16, 184
    thin = side * rank / size
    frozen, trained = size * size, 2 * rank * size
    sheet = _Sheet(408)
    top, x = 66, 58.0
    middle, under = top + side / 2, top + side + 18

    def block(name: str, shape: str, width: float, height: float, kind: str) -> float:
        nonlocal x
        sheet.box(x, middle - height / 2, width, height, "", kind, corner=0)
        sheet.text(x + width / 2, under, name, bold=True, size=11)
        sheet.text(x + width / 2, under + 18, shape, size=9, color=GREY)
        x += width
        return x - width / 2

    def sign(text: str, width: float) -> None:
        nonlocal x
        sheet.text(x + width / 2, middle, text, size=11)
        x += width

    block("h", "d_out", thin, side, "data")
    sign("=", 40)
    base = block("W", "d_out × d_in", side, side, "frozen")
    sheet.text(base, middle, f"frozen\n{size} × {size}\n= {frozen:,}")
    sign("·", 26)
    block("x", "d_in", thin, side, "data")
    sign("+", 34)
    sign("α / r  ·", 58)
    block("B", "d_out × r", thin, side, "trained")
    sign("·", 30)
    update = block("A", "r × d_in", side, thin, "trained")
    sign("·", 26)
    block("x", "d_in", thin, side, "data")
    sheet.text(update, middle - 53, f"trained, rank r = {rank}")
    sheet.text(update, middle - 31, f"{size} × {rank} + {rank} × {size} = {trained:,}", size=9)
    sheet.text(update, middle + 35, "B starts at zero,\nso h starts as W x", size=9)
    sheet.text(24, 32, "h = W x + (α / r) B A x", size=11, bold=True, ha="left")
    sheet.text(WIDTH - 24, 32, "shapes to scale", size=9, color=GREY, ha="right")

    y, length = 324, 420
    sheet.line([(24, y), (WIDTH - 24, y)], FAINT, width=0.8)
    bars = [("frozen", frozen, f"{frozen:,}")]
    bars += [("trained", trained, f"{trained:,} ({100 * trained / frozen:.1f} % as many)")]
    for number, (name, count, text) in enumerate(bars):
        line = y + 28 + 29 * number
        sheet.text(24, line, f"{name}", ha="left")
        sheet.box(96, line - 9, length * count / frozen, 18, "", name, corner=0)
        sheet.text(106 + length * count / frozen, line, text, ha="left")
    return sheet.figure


def overfitting() -> Figure:
    sheet = _Sheet(376)
    left, right, top, bottom = 60, 696, 56, 288

    def at(time: float, loss: float) -> Point:
        return left + (right - 20 - left) * time, bottom - (bottom - top) * loss

    times = [number / 100 for number in range(101)]
    train = [0.06 + 0.80 * math.exp(-4.2 * time) for time in times]
    valid = [
        0.30 + 0.56 * math.exp(-6.5 * time) + 0.5 * max(0.0, time - 0.28) ** 1.4 for time in times
    ]
    lowest = min(range(101), key=valid.__getitem__)
    best = times[lowest]
    before, after = at(best, 0)[0] - 46, at(best, 0)[0] + 46
    sheet.area(left + 1, 20, before - left - 1, bottom - 21)
    sheet.area(after, 20, right - after - 6, bottom - 21)
    sheet.text((left + before) / 2, 40, "still learning", bold=True)
    sheet.text((left + before) / 2, 60, "both losses fall", size=9)
    sheet.text((before + after) / 2, 40, "best step", bold=True)
    sheet.text((after + right - 6) / 2, 40, "memorizing", bold=True)
    note = "training loss falls, validation loss rises"
    sheet.text((after + right - 6) / 2, 60, note, size=9)

    sheet.arrow((left, bottom), (right, bottom))
    sheet.arrow((left, bottom), (left, 14))
    sheet.text(left - 10, 32, "loss", size=9, ha="right")
    for losses, color, dashed in ((train, GREY, True), (valid, BLUE, False)):
        points = [at(time, loss) for time, loss in zip(times, losses, strict=True)]
        sheet.line(points, color, dashed, width=1.8)
    sheet.text(*at(0.84, valid[84] + 0.11), "validation", color=BLUE)
    sheet.text(*at(0.84, train[84] + 0.08), "training", color=GREY)
    x, y = at(best, valid[lowest])
    sheet.line([(x, y + 8), (x, bottom)], ORANGE, dashed=True)
    sheet.dot(x, y, ORANGE)

    for number in range(1, 11):
        mark, kind = at(best * number / 4, 0)[0], "trained" if number == 4 else "frozen"
        sheet.box(mark - 9, bottom + 12, 18, 18, "", kind, corner=2)
    sheet.text(24, bottom + 21, "checkpoints", size=9, ha="left")
    sheet.text(x, bottom + 44, "keep this one: the lowest validation loss", bold=True)
    sheet.text(24, bottom + 70, "a sketch, not a measured run", size=9, ha="left", color=GREY)
    sheet.text(right, bottom + 70, "optimizer steps →", size=9, ha="right")
    return sheet.figure


def three_ways() -> Figure:
    sheet = _Sheet(446)
    wide, height = 218, 446 - 40
    columns = [
        (
            "prompt",
            ("instruction", "some examples", "message"),
            "only the input:\nno parameter changes",
            "no training; a longer prompt\nfor every message",
        ),
        (
            "fine-tune",
            ("message",),
            "an adapter (or all parameters),\nfrom the pretrained model on",
            "a few hundred labelled rows,\nminutes of training",
        ),
        (
            "train from scratch",
            ("message",),
            "all parameters,\nfrom random numbers on",
            "trillions of tokens of text,\nweeks on many GPUs",
        ),
    ]
    for number, (name, inputs, changes, needs) in enumerate(columns):
        x = 20 + (wide + 13) * number
        middle = x + wide / 2
        sheet.area(x, 18, wide, height + 4)
        sheet.text(middle, 40, name, bold=True, size=11)
        for line, text in enumerate(reversed(inputs)):
            own = number == 0 and line > 0
            sheet.box(x + 44, 114 - 27 * line, wide - 88, 24, text, size=9, line=2 if own else LINE)
        sheet.arrow((middle, 140), (middle, 162))
        if number == 2:
            sheet.box(
                x + 30, 166, wide - 60, 64, "starts random,\nall of it trained", "trained", size=9
            )
        else:
            sheet.box(
                x + 30,
                166,
                wide - 60,
                64 if number == 0 else 38,
                "pretrained, frozen",
                "frozen",
                size=9,
            )
        if number == 1:
            sheet.box(x + 30, 206, wide - 60, 24, "adapter, trained", "trained", size=9)
        sheet.arrow((middle, 232), (middle, 254))
        sheet.box(x + 44, 258, wide - 88, 26, "ticket")
        for y, head, text in ((308, "what changes", changes), (368, "what it needs", needs)):
            sheet.text(middle, y, head, size=9, color=GREY)
            sheet.text(middle, y + 27, text, size=9)
    return sheet.figure


def adapter_to_server() -> Figure:
    sheet = _Sheet(304)
    line = 67
    sheet.box(24, 28, 116, 44, "base", "frozen")
    sheet.box(24, 78, 116, 28, "adapter", "trained")
    sheet.arrow((145, line), (205, line))
    sheet.text(174, line - 14, "merge", size=9)
    sheet.box(210, 32, 122, 70, "", "frozen")
    sheet.text(271, 58, "one model\nW + (α / r) B A")
    sheet.box(218, 86, 106, 9, "", "trained", corner=2)
    sheet.arrow((337, line), (407, line))
    sheet.text(371, line - 22, "convert,\nquantize", size=9)
    sheet.box(412, 32, 96, 70, "one file\n(GGUF)")
    sheet.arrow((513, line), (561, line))
    sheet.text(536, line - 14, "load", size=9)
    sheet.box(566, 32, 130, 70, "server\n(HTTP)")

    sheet.arrow((82, 112), (82, 196))
    sheet.text(92, 153, "answers\nsome rows", size=9, ha="left")
    sheet.box(24, 201, 130, 54, "scored answers")
    sheet.arrow((631, 108), (631, 196))
    sheet.text(621, 153, "answers the\nsame rows", size=9, ha="right")
    sheet.box(566, 201, 130, 54, "served answers")
    sheet.box(246, 192, 228, 72, "", "check")
    sheet.text(360, 215, "served = scored?", bold=True)
    sheet.text(360, 241, "compared row by row", size=9)
    sheet.arrow((159, 228), (241, 228))
    sheet.arrow((561, 228), (479, 228))
    note = "if not: wrong chat template, adapter not applied, or too few bits"
    sheet.text(360, 283, note, size=9, color=GREY)
    return sheet.figure


def fine_tuning() -> Figure:
    sheet = _Sheet(468)
    sheet.area(18, 18, 684, 182, "training, once")
    for shift in (10, 5, 0):
        sheet.box(36 + shift, 62 - shift, 222, 60)
    sheet.text(147, 77, "My order 4471 never came.", size=9, mono=True)
    sheet.box(44, 92, 206, 23, '{"category":"delivery", …', "loss", mono=True, size=9, corner=3)
    sheet.arrow((274, 92), (410, 92))
    sheet.text(342, 78, "labelled rows", size=9)
    sheet.box(36, 138, 232, 44, "base model", "frozen")
    sheet.arrow((274, 160), (410, 160))
    sheet.box(416, 62, 142, 120)
    sheet.text(487, 90, "training", bold=True)
    sheet.text(487, 134, "the loss looks\nat the ticket only", size=9)
    sheet.arrow((564, 122), (594, 122))
    sheet.box(600, 96, 86, 52, "adapter", "trained")

    sheet.area(18, 214, 684, 236, "answering, for every new message")
    sheet.box(36, 306, 178, 56, "Where is 7312?\nI need it today!", mono=True, size=9)
    sheet.text(125, 378, "new message", size=9, color=GREY)
    sheet.box(286, 256, 100, 50, "base", "frozen")
    sheet.box(286, 343, 100, 44, "base", "frozen")
    sheet.box(286, 393, 100, 28, "adapter", "trained")
    sheet.path([(220, 324), (250, 324), (250, 281), (280, 281)])
    sheet.path([(220, 344), (250, 344), (250, 382), (280, 382)])
    sheet.arrow((392, 281), (434, 281))
    sheet.arrow((392, 382), (434, 382))
    sheet.box(440, 252, 246, 58, "I’m sorry to hear that! Could\nyou tell me more about …", size=9)
    sheet.text(563, 325, "prose", size=9, color=GREY)
    text = '{"category":"delivery",\n"urgency":"high","product":null,\n"order":"7312"}'
    sheet.box(440, 346, 246, 72, text, mono=True, size=9)
    sheet.text(563, 433, "ticket", size=9, color=GREY)
    return sheet.figure


def tracking() -> Figure:
    sheet = _Sheet(312)
    sheet.area(18, 18, 462, 276, "your computer: no account, no network")
    sheet.box(34, 58, 88, 66, "Trainer")
    sheet.arrow((127, 91), (181, 91))
    sheet.text(153, 77, "metrics", size=9)
    sheet.box(186, 58, 92, 66, "wandb\nclient")
    sheet.arrow((283, 91), (311, 91))
    sheet.box(316, 58, 148, 66, "folder on disk\nwandb/offline-run-…", size=9)
    sheet.arrow((390, 129), (390, 175))
    sheet.text(380, 152, "read", size=9, ha="right")
    sheet.box(34, 180, 430, 96)
    sheet.text(250, 228, "comparison of runs:\nreads the folders, needs no page", ha="left", size=9)

    sheet.area(574, 18, 128, 276)
    sheet.text(638, 41, "optional, with\nan account", bold=True)
    sheet.line([(469, 91), (570, 91)], dashed=True)
    sheet.arrow((570, 91), (583, 91))
    sheet.text(527, 77, "wandb sync", size=9, mono=True)
    sheet.box(588, 66, 100, 164, "", dashed=True)
    sheet.text(638, 86, "W&B page")
    sheet.text(638, 260, "the same curves,\nin a browser", size=9)
    for x, y, wide, high in ((58, 194, 166, 66), (602, 108, 74, 108)):
        sheet.line([(x, y), (x, y + high), (x + wide, y + high)], GREY)
        for color, fall, floor in ((GREY, 2.0, 0.35), (BLUE, 4.0, 0.2), (ORANGE, 7.0, 0.06)):
            curve = [floor + (0.95 - floor) * math.exp(-fall * step / 30) for step in range(31)]
            points = [
                (x + 4 + (wide - 8) * n / 30, y + high * (1 - v)) for n, v in enumerate(curve)
            ]
            sheet.line(points, color, width=1.6)
    return sheet.figure


def data_parallel() -> Figure:
    sheet = _Sheet(368)
    for number, (rows, gradient) in enumerate((("rows 1–4", "+0.4"), ("rows 5–8", "+0.2"))):
        y = 18 + 148 * number
        sheet.area(18, y, 684, 136, f"process {number}")
        middle = y + 80
        sheet.box(34, middle - 30, 88, 60, f"{rows}\nof the batch", size=9)
        sheet.arrow((127, middle), (153, middle))
        sheet.box(158, middle - 42, 120, 50, "frozen weights", "frozen", size=9)
        sheet.box(158, middle + 13, 120, 28, "adapter", "trained", size=9)
        sheet.arrow((283, middle), (309, middle))
        sheet.box(314, middle - 30, 92, 60, f"gradient\n{gradient}", "trained", size=9)
        sheet.arrow((411, middle), (441, middle))
        sheet.arrow((559, middle), (587, middle))
        sheet.box(592, middle - 30, 94, 60, "step with\n+0.3", "trained", size=9)
    sheet.box(446, 56, 108, 226)
    sheet.text(500, 125, "all-reduce", bold=True)
    sheet.text(500, 169, "the mean of\nthe gradients", size=9)
    sheet.text(500, 219, "(0.4 + 0.2) / 2\n= 0.3", size=9)
    note = (
        "Same weights before, same step: same weights after. Only the adapter’s gradients are sent."
    )
    sheet.text(360, 337, note)
    return sheet.figure


class Drawing(NamedTuple):
    """How a drawing is made, and what it says in words."""

    function: Callable[[], Figure]
    alternative: str


def peft_methods() -> Figure:
    sheet = _Sheet(560)
    left, wide = 232, 224  # of the layer
    middle, right = left + wide / 2, left + wide

    def note(x: float, y: float, where: str, method: str, text: str) -> None:
        """Where something is added, by which method, and what."""
        sheet.text(x, y, where, size=9, ha="left", color=GREY)
        sheet.text(x, y + 17, method, bold=True, ha="left")
        lines = text.count("\n") + 1
        sheet.text(x, y + 25 + 8.1 * lines, text, size=9, ha="left")

    def pointer(*points: Point) -> None:
        sheet.line(points, BLUE, width=0.9)

    def matrix(x: float, y: float, width: float, text: str) -> None:
        """A frozen matrix with the thin trained ones beside it."""
        sheet.box(x, y, width - 8, 28, text, "frozen", corner=0, size=9)
        sheet.box(x + width - 8, y, 8, 28, "", "trained", corner=0)

    def norm(y: float) -> None:
        sheet.box(left + 14, y, wide - 28, 20, "norm", "frozen", corner=0, size=9)
        sheet.box(left + 14, y, 8, 20, "", "trained", corner=0)

    def times(x: float, y: float) -> None:
        sheet.box(x - 9, y - 9, 18, 18, "×", "trained", corner=9, size=9)

    sheet.text(24, 32, "what is added, and where", bold=True, size=11, ha="left")
    # The layer, from its output at the top to the input at the bottom.
    sheet.area(left, 42, wide, 424)
    sheet.text(middle, 59, "one of 30 layers", bold=True)
    sheet.arrow((middle, 41), (middle, 14))
    matrix(middle - 48, 76, 96, "down")
    sheet.arrow((middle, 128), (middle, 106))
    times(middle, 138)
    sheet.line([(middle, 147), (middle, 157), (middle - 52, 157), (middle - 52, 166)])
    sheet.line([(middle, 157), (middle + 52, 157), (middle + 52, 166)])
    matrix(left + 14, 166, 94, "gate")
    matrix(right - 108, 166, 94, "up")
    norm(212)
    matrix(middle - 48, 250, 96, "o")
    sheet.box(left + 14, 296, wide - 28, 26, "attention", size=9)
    thirds = [left + 14, left + 82, left + 150]
    for x, name in zip(thirds, ("q", "k", "v"), strict=True):
        matrix(x, 398, 60, name)
        center = x + 30
        if name == "q":
            sheet.arrow((center, 397), (center, 324))
        else:
            times(center, 378)
            kinds = ["trained"] * 2 + ["data"] * 4
            sheet.cells(x, 340, [10] * 6, [""] * 6, kinds, height=16)
            sheet.line([(center, 397), (center, 387)])
            sheet.arrow((center, 368), (center, 358))
            sheet.arrow((center, 339), (center, 324))
    norm(438)
    for low, high in ((249, 234), (295, 280), (211, 196)):
        sheet.arrow((middle, low), (middle, high))
    sheet.arrow((middle, 437), (middle, 428))

    # The input.
    words = ["The", "kettle", "leaks"]
    kinds = ["trained"] * 3 + ["data"] * 3
    widths = [22] * 3 + [36, 56, 48]
    sheet.cells(left + 9, 494, widths, [""] * 3 + words, kinds, size=9)
    sheet.arrow((middle, 492), (middle, 468))
    sheet.text(middle, 534, "embeddings of the tokens", size=9, color=GREY)
    sheet.text(24, 53, "residual paths left out", size=9, ha="left", color=GREY)

    # Activations, inputs and norms, at the left.
    note(24, 96, "activations", "IA3", "keys, values and the MLP’s\ninner values × vectors")
    pointer((56, 113), (218, 113), (218, 138), (middle - 9, 138))
    note(24, 316, "keys and values", "prefix tuning", "20 more virtual tokens\nin every layer")
    pointer((146, 333), (218, 333), (218, 348), (thirds[1], 348))
    note(24, 206, "norms", "LayerNorm tuning", "the scales the norms\nalready have")
    pointer((166, 223), (left + 13, 223))
    note(24, 474, "inputs", "prompt tuning", "20 virtual tokens in front\nof every text")
    pointer((136, 491), (218, 491), (218, 506), (left + 8, 506))

    # Weights, at the right.
    x = 482
    sheet.text(x, 32, "weights: beside every matrix W", size=9, ha="left", color=GREY)
    sheet.box(x, 46, 72, 72, "W", "frozen", corner=0)
    sheet.text(x + 87, 82, "+", size=11)
    sheet.box(x + 102, 46, 12, 72, "", "trained", corner=0)
    sheet.box(x + 120, 46, 72, 12, "", "trained", corner=0)
    sheet.text(x + 108, 130, "B", size=9)
    sheet.text(x + 156, 70, "A", size=9)
    rows = [
        ("LoRA", "learns B and A; adds α / r · B A"),
        ("rsLoRA", "adds α / √r · B A"),
        ("LoRA+", "has a higher rate for B than for A"),
        ("DoRA", "learns the length of each row too"),
        ("PiSSA, OLoRA", "start from W’s own directions"),
        ("VeRA", "B, A random; learns two vectors"),
    ]
    for number, (name, text) in enumerate(rows):
        y = 154 + 40 * number
        sheet.text(x, y, name, bold=True, ha="left")
        sheet.text(x, y + 17, text, size=9, ha="left")
    sheet.line([(x, 400), (WIDTH - 24, 400)], FAINT, width=0.8)
    sheet.text(x, 419, "weights: W itself, in which layers", size=9, ha="left", color=GREY)
    for y, name, trained in ((440, "last layers", 5), (490, "full", 30)):
        sheet.text(x, y, name, bold=True, ha="left")
        kinds = ["frozen"] * (30 - trained) + ["trained"] * trained
        sheet.cells(x, y + 11, [7] * 30, [""] * 30, kinds, height=18)
    sheet.text(x, 534, "blue is trained, grey is frozen", size=9, ha="left", color=GREY)
    return sheet.figure


DRAWINGS: dict[str, Drawing] = {
    "tokens_and_labels": Drawing(
        tokens_and_labels,
        "A customer message and its answer become one text with <|im_start|> and <|im_end|>, "
        "then tokens and input_ids. Below the ids stand the labels: −100 for every token of "
        "the prompt, and the ids themselves for the answer and its final <|im_end|>. Each "
        "position predicts the next token.",
    ),
    "training_step": Drawing(
        training_step,
        "A training step has four parts: forward, loss, backward, optimizer. Frozen weights, "
        "the adapter and the optimizer state (two numbers per trained parameter) stay in "
        "memory throughout. Activations grow in the forward pass and shrink in the backward "
        "pass. Gradients, of the adapter only, last from backward to optimizer.",
    ),
    "padding": Drawing(
        padding,
        f"Four rows of {', '.join(map(str, LENGTHS))} tokens in three layouts. Padded to a fixed "
        f"length of {FIXED}, {_wasted(FIXED)} of the cells are wasted. Padded to the longest row "
        f"of the batch, {_wasted(max(LENGTHS))} are. Packed one after the other, none are, and "
        "positions start at 0 again in every row.",
    ),
    "nf4": Drawing(
        nf4,
        "Eight of a block of 64 weights are divided by the block’s largest absolute value. "
        "Each is then replaced by the 4-bit code of the nearest of 16 fixed values. The "
        "table’s value times that scale restores it with a small error. Stored are 4.5 bits "
        "per weight.",
    ),
    "lora": Drawing(
        lora,
        "The output h is W x plus (α / r) B A x. The square matrix W, 576 × 576 = 331,776 "
        "parameters, is frozen. The thin matrices B (576 × 16) and A (16 × 576) are trained: "
        "18,432 parameters, 5.6 % as many.",
    ),
    "overfitting": Drawing(
        overfitting,
        "A sketch of two loss curves. First both fall: the model is still learning. Then the "
        "validation loss reaches its lowest point, the checkpoint to keep. After that only "
        "the training loss falls and the validation loss rises: the model memorizes.",
    ),
    "three_ways": Drawing(
        three_ways,
        "Three ways to get a ticket from a message. A prompt changes only the input of a "
        "frozen pretrained model. Fine-tuning trains an adapter, or all parameters, from the "
        "pretrained model on, with a few hundred rows. Training from scratch starts with "
        "random parameters and needs trillions of tokens.",
    ),
    "adapter_to_server": Drawing(
        adapter_to_server,
        "Base and adapter are merged into one model, which is converted and quantized into "
        "one file that a server loads. A check compares row by row: the answers that the "
        "server gives must equal the answers of base and adapter that were scored.",
    ),
    "fine_tuning": Drawing(
        fine_tuning,
        "Training, once: labelled rows and the base model give an adapter. Answering, for "
        "every new message: the base model alone replies with prose, but the base model with "
        "the adapter returns the ticket as JSON.",
    ),
    "tracking": Drawing(
        tracking,
        "The Trainer sends metrics to the wandb client, which writes them to a folder on disk "
        "without an account or a network. The comparison of runs reads these folders. "
        "Optionally, wandb sync uploads a folder to a W&B page.",
    ),
    "data_parallel": Drawing(
        data_parallel,
        "Two processes hold the same frozen weights and the same adapter, but each has its "
        "own rows of the batch. All-reduce averages their gradients, 0.4 and 0.2, to 0.3. "
        "Both take the same step, so their adapters stay equal.",
    ),
    "peft_methods": Drawing(
        peft_methods,
        "Where each method adds what it trains. Beside the matrices of a layer: LoRA and its "
        "variants, VeRA. On activations: IA3 multiplies, prefix tuning adds keys and values. At "
        "the input: prompt tuning adds virtual tokens. In the norms: LayerNorm tuning. Last "
        "layers and full train the matrices themselves.",
    ),
}
NAMES = tuple(DRAWINGS)


def result(
    message: str,
    answers: Sequence[tuple[str, str, bool]],
    scores: Sequence[tuple[str, float]],
    rows: int,
) -> Figure:
    """The course's result in one picture, for the README.

    Args:
        message: of a customer.
        answers: (who answers, the answer, whether it is right), from the top to the bottom.
        scores: (who answers, fraction of tickets that are right).
        rows: messages that were scored.
    """
    sheet = _Sheet(96 + 74 * len(answers))
    sheet.text(24, 26, "a customer writes", bold=True, ha="left")
    sheet.box(24, 40, 452, 32, message, mono=True, size=9)
    for number, (name, answer, right) in enumerate(answers):
        top = 84 + 74 * number
        sheet.text(24, top + 10, name, size=9, ha="left", bold=right)
        lines = answer.replace(',"product"', ',\n"product"').split("\n")
        text = "\n".join([part for line in lines for part in textwrap.wrap(line, 62)][:2])
        sheet.box(24, top + 20, 424, 42, text, "check" if right else "frozen", mono=True, size=8)
        sheet.text(462, top + 41, "✓" if right else "✗", 14, GREEN if right else GREY, bold=True)
    sheet.line([(496, 24), (496, sheet.height - 24)], FAINT)
    sheet.text(516, 26, "tickets right in every field", bold=True, ha="left")
    sheet.text(516, 46, f"of {rows} unseen messages", size=9, ha="left")
    for number, (name, fraction) in enumerate(scores):
        top = 84 + 74 * number
        best = fraction == max(score for _, score in scores)
        sheet.text(516, top + 10, name, size=9, ha="left", bold=best)
        if fraction:
            sheet.box(516, top + 20, 140 * fraction, 28, "", "trained" if best else "frozen", 2)
        sheet.text(522 + 140 * fraction, top + 34, f"{fraction:.0%}", 11, bold=best, ha="left")
    return sheet.figure


def picture(figure: Figure, description: str) -> bytes:
    """A drawing as the bytes of a PNG file, with a text in it that says what it shows."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Description", description)
    return _png(figure, pnginfo=notes)


class _Picture(Image):
    """A PNG whose plain text is its text alternative."""

    def __repr__(self) -> str:
        return self.alt


def _png(figure: Figure, **options: object) -> bytes:
    """The figure as a PNG of at most 256 colors: less than half the size, and it looks the same."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    picture = PIL.Image.open(buffer).convert("RGB")
    picture.quantize(256, dither=PIL.Image.Dither.NONE).save(small, "PNG", optimize=True, **options)
    return small.getvalue()


def drawing(name: str) -> Image:
    """One of NAMES, as the last expression of a cell: a PNG, and in plain text what it says.

    Raises:
        CourseError: there is no drawing of this name.
    """
    if name not in DRAWINGS:
        raise CourseError(f"There is no drawing {name!r}. There are: {', '.join(NAMES)}.")
    function, alternative = DRAWINGS[name]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        data = _png(function())
    return _Picture(data=data, format="png", width=WIDTH, alt=alternative)
