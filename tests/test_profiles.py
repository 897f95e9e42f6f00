"""Tests of helpers/profiles.py, and of how a foreseen fault looks in a notebook.

The machine is not under test: what torch says about it is set, so that every test means the same
on a laptop and on a GPU.
"""

from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from helpers import CourseError
from helpers.profiles import (
    ENVIRONMENT_VARIABLE,
    GIB,
    PROFILES,
    pick_attention,
    pick_precision,
    pick_profile,
)
from helpers.rows import DataError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, memory: int, bf16: bool) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return bf16 or including_emulation  # as torch answers: with emulation always yes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory, memory))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


def test_without_a_gpu_the_laptop_profile_is_picked_and_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = pick_profile()
    printed = capsys.readouterr().out
    assert (profile.name, profile.device) == ("laptop", "cpu")
    assert "laptop: no CUDA GPU is here" in printed
    assert f"precision {profile.precision}: this processor" in printed
    assert f"attention {profile.attn_implementation}: " in printed


def test_nothing_stays_on_auto() -> None:
    for name in ("tiny", "laptop"):
        profile = pick_profile(name, verbose=False)
        assert "auto" not in (profile.device, profile.precision, profile.attn_implementation)
        assert isinstance(profile.dtype, torch.dtype)


def test_verbose_false_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pick_profile("laptop", verbose=False)
    assert capsys.readouterr().out == ""


def test_environment_variable_overrides_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "tiny")
    assert pick_profile().name == "tiny"
    assert f"tiny: set by {ENVIRONMENT_VARIABLE}" in capsys.readouterr().out


def test_a_name_overrides_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "tiny")
    assert pick_profile("laptop").name == "laptop"


def test_unknown_name_is_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CourseError, match=r"'laptopp'.*tiny, laptop, falcon-7b"):
        pick_profile("laptopp")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "laptopp")
    with pytest.raises(CourseError, match=rf"'laptopp'.*{ENVIRONMENT_VARIABLE}"):
        pick_profile()


def test_falcon_without_a_gpu_is_refused_with_a_way_out() -> None:
    with pytest.raises(CourseError, match=r"needs a CUDA GPU.*Use the profile 'laptop'"):
        pick_profile("falcon-7b")


@pytest.mark.parametrize(
    ("memory", "name"), [(8 * GIB, "laptop"), (14 * GIB, "falcon-7b"), (80 * GIB, "falcon-7b")]
)
def test_the_gpu_memory_decides(monkeypatch: pytest.MonkeyPatch, memory: int, name: str) -> None:
    pretend_gpu(monkeypatch, memory, bf16=True)
    profile = pick_profile()
    assert (profile.name, profile.device, profile.attn_implementation) == (name, "cuda", "sdpa")


@pytest.mark.parametrize(
    ("device", "precision", "attention"),
    [("cpu", "fp32", "sdpa"), ("cpu", "bf16", "eager"), ("cuda", "fp16", "sdpa")],
)
def test_attention_follows_device_and_number_format(
    device: str, precision: str, attention: str
) -> None:
    assert pick_attention(device, precision)[0] == attention


def test_a_gpu_that_only_emulates_bf16_gets_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, 15 * GIB, bf16=False)
    assert pick_precision("cuda") == ("fp16", "Tesla T4 only emulates bf16")
    pretend_gpu(monkeypatch, 15 * GIB, bf16=True)
    assert pick_precision("cuda")[0] == "bf16"


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({}, "fp32"),  # what torch says of a processor it does not know
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_the_processor_decides(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_precision("cpu")[0] == precision


def test_this_machine_has_an_answer() -> None:
    # The names above are torch's own: a renamed key would silently read as "no bf16".
    assert PROFILES["laptop"].precision == "auto"
    if torch.cpu.get_capabilities().get("architecture", "").startswith("x86"):
        assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()


@pytest.mark.parametrize("error", [CourseError, DataError])
def test_jupyter_shows_a_foreseen_fault_in_one_line(
    error: type[CourseError],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert error("too long")._render_traceback_() == [f"{error.__name__}: too long"]
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cell = f"from {error.__module__} import {error.__name__} as Fault; raise Fault('too long')"
    shell = InteractiveShell()
    try:
        result = shell.run_cell(cell)
    finally:
        shell.history_manager.end_session()
    assert isinstance(result.error_in_exec, error)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).strip() == f"{error.__name__}: too long"
