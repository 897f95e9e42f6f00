"""The course as a learner meets it: JupyterLab in a real browser.

Debian's Chromium, driven by Playwright, opens notebooks on loopback, runs all cells, moves sliders
and presses buttons. What the cells show is compared with what is stored, by nbval's rules, and
nbval leaves these notebooks out: none runs twice (tests/conftest.py). Screenshots stay in
tests/screenshots. COURSE_BROWSER names another browser; where none is found these tests skip and
nbval runs all notebooks, unless COURSE_BROWSER_REQUIRED is set, as CI does.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from masks import mask

playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Page, expect  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCREENSHOTS = Path(__file__).parent / "screenshots"
TOKEN = "course"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# All cells stay in the page, so that any of them can be looked at; no news from the network.
SETTINGS = {
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a JupyterLab on loopback, and the folder with copies that it serves."""
    folder = tmp_path_factory.mktemp("lab")
    served = folder / "notebooks"
    shutil.copytree(ROOT / "notebooks", served, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, content in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}"]
    command += ["--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}", "--allow-root"]
    command += ["--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True"]
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    environment |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=served, env=environment, stdout=log, stderr=log)
        try:
            wait_for_server(f"http://127.0.0.1:{port}/api", server, folder / "server.log")
            yield f"http://127.0.0.1:{port}", served
        finally:
            server.terminate()
            server.wait(30)


def wait_for_server(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not answer in two minutes:\n{log.read_text()}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, browser: str | None) -> Iterator[Page]:
    if browser is None:
        assert "COURSE_BROWSER_REQUIRED" not in os.environ, "no Chromium, and CI needs one"
        pytest.skip("no Chromium is here (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=browser,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 1000},
        )
        yield context.new_page()
        context.close()


def open_notebook(page: Page, lab: tuple[str, Path], name: str) -> Path:
    """Open a notebook and wait for its kernel. Returns the file that JupyterLab saves to."""
    address, folder = lab
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
    page.locator(".jp-Notebook").wait_for(timeout=120_000)
    page.wait_for_function(
        "() => { const panel = jupyterapp.shell.currentWidget;"
        " return panel?.sessionContext?.session?.kernel?.status === 'idle' }",
        timeout=120_000,
    )
    return folder / name


def run_all(page: Page) -> None:
    """Run → Run All Cells, as a learner does."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()


def wait_until_run(page: Page, path: Path, minutes: float) -> nbformat.NotebookNode:
    """Wait until all cells ran, save, and return the notebook. Fails at the first error output."""
    deadline = time.monotonic() + 60 * minutes
    while True:
        page.wait_for_timeout(5000)
        busy = page.evaluate(
            "() => jupyterapp.shell.currentWidget.content.widgets.some("
            "cell => cell.model.type === 'code' && cell.model.executionState === 'running')"
        )
        page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell in cells:
            for output in cell.outputs:
                assert output.output_type != "error", (cell.source, output.evalue)
                assert output.get("name") != "stderr", (cell.source, output.text)
        if not busy and all(cell.execution_count for cell in cells):
            return notebook
        assert time.monotonic() < deadline, "the notebook did not come to its end"


def screenshots(page: Page, name: str) -> None:
    """Keep pictures of the whole notebook, one screen each."""
    SCREENSHOTS.mkdir(exist_ok=True)
    scroller = page.locator(".jp-WindowedPanel-outer").first
    height = scroller.evaluate("panel => panel.scrollHeight")
    for number, top in enumerate(range(0, height, 850)):
        scroller.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
        page.wait_for_timeout(150)
        scroller.screenshot(path=SCREENSHOTS / f"{name}-{number:02}.png")


def clear_counts(path: Path) -> None:
    """Empty the outputs of the copy, so that what is found afterwards comes from this run."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


def shown(cell: nbformat.NotebookNode) -> dict[str, str]:
    """What a cell shows, by kind, with its numbers masked. Like nbval, leave out pictures and the
    widgets' own state."""
    texts: dict[str, str] = {}
    for output in cell.outputs:
        kinds = {output.name: output.text} if output.output_type == "stream" else output.data
        for kind, text in kinds.items():
            if not kind.startswith("image/") and "widget" not in kind:
                texts[kind] = texts.get(kind, "") + text
    return {kind: mask(text) for kind, text in texts.items()}


def compare(ran: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> None:
    """Every cell that is not marked as changing shows what is stored."""
    for new, old in zip(ran.cells, stored.cells, strict=True):
        if old.cell_type == "code" and "nbval-ignore-output" not in old.metadata.get("tags", []):
            assert shown(new) == shown(old), old.source


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["00_start_here", "03_quantization", "05_training", "07_overfitting_diagnosis"]
)
def test_a_notebook_runs_to_its_end(name: str, page: Page, lab: tuple[str, Path]) -> None:
    clear_counts(lab[1] / f"{name}.ipynb")
    path = open_notebook(page, lab, f"{name}.ipynb")
    run_all(page)
    ran = wait_until_run(page, path, minutes=25)
    compare(ran, nbformat.read(ROOT / "notebooks" / path.name, as_version=4))
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    move_every_slider(page)
    screenshots(page, name)
    page.evaluate("() => jupyterapp.commands.execute('kernelmenu:shutdown')")


def move_every_slider(page: Page) -> None:
    """Press the right arrow on the first slider of every widget: its picture must change."""
    for box in page.locator(".jp-OutputArea-output .course-widget").all():
        handle = box.locator(".noUi-handle").first
        if handle.count() == 0:
            continue
        box.scroll_into_view_if_needed()
        before = box.locator("img").first.get_attribute("src")
        for key in ("ArrowRight", "ArrowLeft"):
            handle.focus()
            page.keyboard.press(key)
            try:
                expect(box.locator("img").first).not_to_have_attribute(
                    "src", before, timeout=20_000
                )
                break
            except AssertionError:
                continue  # the slider stood at its right end
        else:
            raise AssertionError("a slider moved and its picture stayed the same")


STOPPABLE = [
    """\
from helpers import data, encoding, models, profiles, training, widgets

profile = profiles.pick_profile("tiny")
tokenizer = models.load_tokenizer(profile)
rows = encoding.encode(data.load_triage()["train"], tokenizer, profile.max_length)
model = training.add_adapter(models.load_model(profile), profile)
live = widgets.LiveTraining()
arguments = training.training_arguments(
    profile, "stopped", 57, num_train_epochs=10_000, save_strategy="no", eval_strategy="no"
)
trainer = training.make_trainer(model, arguments, rows, None, tokenizer, (live,))""",
    "live.show()",
    "with live:\n    trainer.train()",
    """\
learned = sum(p.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n)
assert 0 < live.stopped_at < trainer.state.max_steps
assert learned > 0
print("stopped, adapter kept")""",
]


@pytest.mark.timeout(300)
def test_the_stop_button_stops_and_keeps_the_adapter(page: Page, lab: tuple[str, Path]) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in STOPPABLE])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab[1] / "stop.ipynb")
    path = open_notebook(page, lab, "stop.ipynb")
    run_all(page)
    button = page.get_by_role("button", name="Stop training")
    expect(button).to_be_enabled(timeout=120_000)
    expect(page.get_by_text(re.compile(r"step [3-9]\d* of"))).to_be_visible(timeout=60_000)
    first = page.locator(".course-widget img").first.get_attribute("src")
    expect(page.locator(".course-widget img").first).not_to_have_attribute("src", first)
    button.click()
    expect(page.get_by_text(re.compile(r"stopped at step \d+ of"))).to_be_visible(timeout=60_000)
    ran = wait_until_run(page, path, minutes=2)
    text = "".join(output.get("text", "") for output in ran.cells[-1].outputs)
    assert text == "stopped, adapter kept\n"
    screenshots(page, "stop")
    page.evaluate("() => jupyterapp.commands.execute('kernelmenu:shutdown')")
