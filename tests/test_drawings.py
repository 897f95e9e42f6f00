"""Every drawing is a small PNG that says what it shows in words, with no text over other things."""

import io
import subprocess
import sys
from itertools import combinations

import matplotlib
import PIL.Image
import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.transforms import Bbox

from helpers import CourseError
from helpers.drawings import DRAWINGS, NAMES, NF4, SCALE, WIDTH, drawing
from helpers.quantization import make_levels

TOUCH = 2.0 * SCALE  # pixels of the file by which two things may overlap


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def picture(name: str) -> Image:
    return drawing(name)


@pytest.fixture(scope="module")
def figure(name: str) -> Figure:
    figure = DRAWINGS[name].function()
    figure.draw_without_rendering()
    return figure


def extents(figure: Figure) -> dict[str, Bbox]:
    texts = [text for text in figure.axes[0].texts if text.get_text().strip()]
    return {
        f"{number} {text.get_text()}": text.get_window_extent() for number, text in enumerate(texts)
    }


def test_names_are_the_contract():
    assert set(NAMES) == {
        "tokens_and_labels",
        "training_step",
        "padding",
        "nf4",
        "lora",
        "overfitting",
        "three_ways",
        "adapter_to_server",
        "fine_tuning",
        "tracking",
        "data_parallel",
        "peft_methods",
    }


def test_a_cell_shows_a_small_png_and_its_alternative(name: str, picture: Image):
    bundle, metadata = DisplayFormatter().format(picture)
    assert set(bundle) == {"image/png", "text/plain"}
    png = PIL.Image.open(io.BytesIO(picture.data))
    assert png.format == "PNG"
    assert len(picture.data) <= 100_000
    assert png.width == SCALE * WIDTH <= 1520
    assert "transparency" not in png.info and png.mode in ("P", "RGB")  # opaque
    assert metadata["image/png"]["width"] == WIDTH
    alternative = metadata["image/png"]["alt"]
    assert bundle["text/plain"] == alternative == DRAWINGS[name].alternative
    assert 15 <= len(alternative.split()) <= 60


def test_the_same_bytes_every_time(name: str, picture: Image):
    assert drawing(name).data == picture.data


def test_a_notebook_that_changes_matplotlib_changes_no_drawing():
    before = drawing("lora").data
    with matplotlib.rc_context(
        {"text.hinting": "none", "savefig.dpi": 50, "savefig.bbox": "tight"}
    ):
        assert drawing("lora").data == before


def test_text_is_inside_the_canvas_and_readable(figure: Figure):
    inner = figure.bbox.padded(-4 * SCALE)
    for text, box in extents(figure).items():
        assert inner.x0 <= box.x0 and box.x1 <= inner.x1, text
        assert inner.y0 <= box.y0 and box.y1 <= inner.y1, text
    assert min(text.get_fontsize() for text in figure.axes[0].texts) >= 9


def test_no_text_over_another(figure: Figure):
    for (one, a), (other, b) in combinations(extents(figure).items(), 2):
        common = Bbox.intersection(a, b)
        assert common is None or min(common.width, common.height) <= TOUCH, (one, other)


def test_no_arrow_through_a_text(figure: Figure):
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    for text, box in extents(figure).items():
        for arrow in arrows:
            path = arrow.get_path()  # line and head, each corner once
            path = Path(path.vertices[path.codes != Path.CLOSEPOLY])
            path = path.transformed(figure.axes[0].transData)
            assert not path.intersects_bbox(box, filled=False), (text, arrow)


def test_no_text_across_the_border_of_a_box(figure: Figure):
    boxes = [
        patch.get_window_extent()
        for patch in figure.axes[0].patches
        if isinstance(patch, FancyBboxPatch)
    ]
    for text, extent in extents(figure).items():
        for box in boxes:
            # Ascent and descent of the font reach farther than most letters do: sideways only.
            if box.y0 <= (extent.y0 + extent.y1) / 2 <= box.y1:
                inside = box.x0 + SCALE <= extent.x0 and extent.x1 <= box.x1 - SCALE
                outside = extent.x1 <= box.x0 - SCALE or extent.x0 >= box.x1 + SCALE
                assert inside or outside, text


def test_an_unknown_name_lists_the_names():
    with pytest.raises(CourseError, match="'lore'.*tokens_and_labels, .*, data_parallel"):
        drawing("lore")


def test_the_table_in_the_drawing_is_that_of_nf4():
    assert list(NF4) == pytest.approx(make_levels(4, "normal quantiles").tolist(), abs=1e-6)


def test_drawings_need_neither_torch_nor_pyplot():
    code = (
        "import sys; from helpers.drawings import drawing; drawing('lora'); "
        "print({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
