"""Real llama.cpp: the endpoint under a real HTTP client, and silent faults caught by parity."""

import dataclasses
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_runs import train
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from helpers import CourseError, convert, export, models, parity, scored, serving
from helpers.encoding import encode_prompts
from helpers.profiles import PROFILES, Profile
from helpers.scored import Scored

needs_llama_cpp = pytest.mark.skipif(
    not serving.is_installed(), reason=f"llama.cpp is not here: {serving.INSTALL}"
)
pytestmark = [needs_llama_cpp]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return scored.load(scored.find(train(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def files(model: Scored, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The merged model, the base model and the adapter as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    base = Path(models.model_path(PROFILES["tiny"]))
    export.merge(model, folder / "merged")
    convert.write_model(folder / "merged", folder / "merged.gguf")
    convert.write_model(base, folder / "base.gguf")
    convert.write_adapter(model.found.folder, base, folder / "adapter.gguf")
    return {name: folder / f"{name}.gguf" for name in ("merged", "base", "adapter")} | {
        "folder": folder / "merged"
    }


@pytest.fixture(scope="module")
def asked(model: Scored) -> tuple[list, list[str]]:
    prompts = list(scored.load_split(model.found, "validation")["prompt"])
    answers = model.answer(prompts, 12)
    assert len(set(answers)) >= 3
    return prompts, answers


@pytest.fixture(scope="module")
def merged(files: dict[str, Path]) -> Iterator[serving.Server]:
    with serving.Server(files["merged"]) as server:
        yield server


# -- what is served is what was scored -------------------------------------------------------------


def test_the_merged_model_answers_as_scored(
    merged: serving.Server, model: Scored, asked: tuple[list, list[str]]
) -> None:
    prompts, answers = asked
    found = parity.compare(model, prompts, answers, merged.answers(prompts, 12), merged.prompt_ids)
    assert found.warning == "" and found.prompts == () and found.same >= 11


def test_the_scale_of_an_adapter_is_chosen_per_request(
    files: dict[str, Path], model: Scored, asked: tuple[list, list[str]]
) -> None:
    """0 is the base model: the fault that a server commits silently, and the report finds."""
    prompts, answers = asked
    with model.model.disable_adapter():
        untouched = model.answer(prompts, 12)
    assert untouched != answers
    with serving.Server(files["base"], [files["adapter"]]) as server:
        tuned = parity.compare(model, prompts, answers, server.answers(prompts, 12, [1.0]))
        assert tuned.warning == "" and tuned.same >= 11
        for forgotten in (server.answers(prompts, 12, [0.0]), server.answers(prompts, 12)):
            assert forgotten == untouched
            found = parity.compare(model, prompts, answers, forgotten)
            assert "answers differ by more than rounding" in found.warning
        with pytest.raises(CourseError, match="2 scales for 1 adapters"):
            server.answers(prompts, 12, [1.0, 0.0])


def test_two_adapters_on_one_base(
    files: dict[str, Path],
    model: Scored,
    asked: tuple[list, list[str]],
    tmp_path: Path,
) -> None:
    """A request picks one of them; the second is the first with its update turned round."""
    from safetensors.torch import load_file, save_file

    prompts, answers = asked
    shutil.copytree(model.found.folder, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: -t if "lora_B" in name else t for name, t in tensors.items()}, file)
    base = Path(models.model_path(PROFILES["tiny"]))
    convert.write_adapter(tmp_path / "other", base, tmp_path / "other.gguf")
    with serving.Server(files["base"], [files["adapter"], tmp_path / "other.gguf"]) as server:
        assert server.answers(prompts, 12, [1.0, 0.0]) == answers
        assert server.answers(prompts, 12, [0.0, 1.0]) != answers
        assert server.answers(prompts, 12, [1.0, 1.0]) == server.answers(prompts, 12, [0.0, 0.0])


def compared(
    server: serving.Server, model: Scored, asked: tuple[list, list[str]], **options: Any
) -> parity.Parity:
    prompts, answers = asked
    served = server.answers(prompts, 12, **options)
    return parity.compare(model, prompts, answers, served, server.prompt_ids)


@pytest.mark.parametrize("fault", ["another template", "a system message is added"])
def test_another_template_is_caught(
    fault: str, files: dict[str, Path], model: Scored, asked: tuple[list, list[str]]
) -> None:
    template = model.tokenizer.chat_template
    if fault == "another template":
        template = template.replace("<|im_start|>' + message['role']", "### ' + message['role']")
    else:
        template = "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}" + template
    assert template != model.tokenizer.chat_template
    with serving.Server(files["merged"], template=template) as server:
        found = compared(server, model, asked)
    assert len(found.prompts) == 12
    assert "another chat template, system message or tokenizer" in found.warning


def test_a_missing_end_token_is_caught(
    merged: serving.Server, model: Scored, asked: tuple[list, list[str]]
) -> None:
    found = compared(merged, model, asked, ignore_eos=True)
    assert "answers differ by more than rounding" in found.warning
    assert {one.scored_token for one in found.unexplained} == {"<|im_end|>"}


def test_another_rule_for_cutting_texts_is_caught(
    files: dict[str, Path], model: Scored, asked: tuple[list, list[str]], tmp_path: Path
) -> None:
    """The name of the rule is not checked by llama.cpp: with a wrong one numbers are cut apart."""
    shutil.copytree(files["folder"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rule = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), rule]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    convert.write_model(tmp_path / "model", tmp_path / "model.gguf")
    prompts = [[{"role": "user", "content": "order 55-1230, 2024-11-02"}]]
    with serving.Server(tmp_path / "model.gguf") as server:
        found = parity.compare(model, prompts, ["-"], ["-"], server.prompt_ids)
    assert found.prompts == (0,)


def test_a_name_for_every_rule_cuts_as_the_tokenizer_does(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """Hard text, through llama.cpp and through the tokenizers library, for all rules written."""
    text = "It's 12345 o'clock -- I'LL pay 1.999,50 (ok?)\n\n  x²+½ = 7\tnaïve 東京 3rd!!\r\n end "
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    from tokenizers import Regex

    rules = {
        "gpt-2": whole,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(convert.LLAMA_3), "isolated"), bare]
        ),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(convert.QWEN_2), "isolated"), bare]
        ),
    }
    for name, rule in rules.items():
        shutil.copytree(files["folder"], tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.backend_tokenizer.pre_tokenizer = rule
        tokenizer.save_pretrained(tmp_path / name)
        convert.write_model(tmp_path / name, tmp_path / f"{name}.gguf")
        messages = [{"role": "user", "content": text}]
        with serving.Server(tmp_path / f"{name}.gguf") as server:
            assert [server.prompt_ids(messages)] == encode_prompts([messages], tokenizer), name


def test_a_stretched_context_turns_as_in_transformers(
    files: dict[str, Path], model: Scored, asked: tuple[list, list[str]], tmp_path: Path
) -> None:
    """Llama 3's rope factors, in llama.cpp and in transformers, on the same random numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(files["folder"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    convert.write_model(tmp_path / "model", tmp_path / "model.gguf")
    stretched = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompts, _ = asked
    ids = encode_prompts(prompts, model.tokenizer)
    expected = []
    for row in ids:
        output = stretched.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)
        new = output[0, len(row) :]
        expected.append(model.tokenizer.decode(new, skip_special_tokens=True).strip())
    with serving.Server(tmp_path / "model.gguf") as server:
        served = server.answers(prompts, 12)
    with serving.Server(files["merged"]) as server:
        plain = server.answers(prompts, 12)
    same = [sum(a == b for a, b in zip(expected, other, strict=True)) for other in (served, plain)]
    assert same[0] >= 11 and same[1] < same[0]


# -- the endpoint ----------------------------------------------------------------------------------


def post(url: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", parts.path, json.dumps(body), headers)
    return connection.getresponse()


def test_an_http_client_gets_the_same_answers(
    merged: serving.Server, asked: tuple[list, list[str]]
) -> None:
    prompts, answers = asked
    for prompt, expected in list(zip(prompts, answers, strict=True))[:4]:
        body = {"model": "any", "messages": prompt, "max_tokens": 12, "temperature": 0}
        reply = json.load(post(f"{merged.url}/chat/completions", body))
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected}
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] >= 2
        assert reply["model"] == "merged"  # no path of this machine


def test_an_http_client_can_read_a_stream(
    merged: serving.Server, asked: tuple[list, list[str]]
) -> None:
    prompts, answers = asked
    body = {"messages": prompts[0], "max_tokens": 12, "temperature": 0, "stream": True}
    lines = [
        line.decode().removeprefix("data: ").strip()
        for line in post(f"{merged.url}/chat/completions", body)
        if line.startswith(b"data: ")
    ]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines[:-1]]
    assert "".join(filter(None, deltas)) == answers[0]


def test_the_scale_can_be_set_over_http(
    files: dict[str, Path], asked: tuple[list, list[str]]
) -> None:
    prompts, answers = asked
    with serving.Server(files["base"], [files["adapter"]]) as server:
        replies = []
        for scale in (1.0, 0.0):
            body = {"messages": prompts[0], "max_tokens": 12, "temperature": 0}
            body["lora"] = [{"id": 0, "scale": scale}]
            reply = json.load(post(f"{server.url}/chat/completions", body))
            replies.append(reply["choices"][0]["message"]["content"])
        assert replies[0] == answers[0] != replies[1]


def test_a_schema_is_kept(merged: serving.Server, asked: tuple[list, list[str]]) -> None:
    prompts, _ = asked
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    shape = {"type": "json_schema", "json_schema": {"schema": schema}}
    (answer,) = merged.answers(prompts[:1], 32, response_format=shape)
    assert json.loads(answer) in ({"a": "x"}, {"a": "y"})


def test_a_stream_in_python_gives_the_same_text(
    merged: serving.Server, asked: tuple[list, list[str]]
) -> None:
    prompts, answers = asked
    pieces: list[str] = []
    assert merged.stream(prompts[2], pieces.append, max_tokens=12) == answers[2]
    assert "".join(pieces) == answers[2] and len(pieces) >= 2
    stopped = merged.stream(prompts[2], lambda _: True, max_tokens=12)
    assert stopped == pieces[0]
    with pytest.raises(ZeroDivisionError):
        merged.stream(prompts[2], lambda _: 1 / 0, max_tokens=12)
    assert merged.answers(prompts[:1], 12) == answers[:1]


# -- safety and ends -------------------------------------------------------------------------------


def listening() -> set[tuple[str, int]]:
    """(address, port) of every TCP socket of this process that listens."""
    import psutil

    found = psutil.Process().net_connections("tcp")
    return {tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN}


def test_it_listens_on_loopback_alone_and_closes_its_port(files: dict[str, Path]) -> None:
    before = listening()
    with serving.Server(files["base"]) as server:
        (address,) = listening() - before
        assert address == ("127.0.0.1", urlsplit(server.url).port)
    assert listening() == before
    with socket.socket() as probe:
        assert probe.connect_ex(address) != 0
    server.close()
    with pytest.raises(CourseError, match="This server is closed"):
        server.answers([[{"role": "user", "content": "hi"}]])
    with pytest.raises(CourseError, match="This server is closed"):
        server.prompt_ids([{"role": "user", "content": "hi"}])


def test_no_page_of_the_web_may_read_from_it(merged: serving.Server) -> None:
    request = urllib.request.Request(
        f"{merged.url}/models", headers={"Origin": "https://example.com"}
    )
    with urllib.request.urlopen(request) as reply:
        assert reply.headers.get("Access-Control-Allow-Origin") != "*"
        assert "example.com" not in str(reply.headers)
    address = merged.url.removesuffix("/v1")
    for page in ("/", "/slots"):  # no web page of its own, no prompts of others
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + page)


def test_python_ends_though_nobody_closed_the_server(files: dict[str, Path]) -> None:
    code = (
        "from helpers import serving\n"
        f"server = serving.Server({str(files['base'])!r})\n"
        "print(server.url)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(done.stdout.strip()).port)) != 0


def test_a_port_can_be_named_and_one_that_is_taken_is_an_error(files: dict[str, Path]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving.Server(files["base"], port=port) as server:
        assert server.url == f"http://127.0.0.1:{port}/v1"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CourseError, match="is taken"):
            serving.Server(files["base"], port=taken.getsockname()[1])


def test_what_cannot_be_loaded_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="there is no such file"):
        serving.Server(tmp_path / "none.gguf")
    (tmp_path / "torn.gguf").write_bytes(files["base"].read_bytes()[:50_000])
    with pytest.raises(CourseError, match="could not load"):
        serving.Server(tmp_path / "torn.gguf")
    with pytest.raises(CourseError, match="could not load"):
        serving.Server(files["base"], [files["merged"]])


def test_what_llama_cpp_refuses_is_an_error(merged: serving.Server) -> None:
    long = [{"role": "user", "content": "kettle " * 4000}]
    for ask in (
        lambda: merged.chat([{"role": "user"}]),
        lambda: merged.answers([long]),
        lambda: merged.stream(long, print),
        lambda: merged.prompt_ids([{"role": "user"}]),
    ):
        with pytest.raises(CourseError, match="llama.cpp refuses the request"):
            ask()


# -- the command, with llama.cpp at hand -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["gguf", "lora"])
def test_an_export_reports_its_parity(
    kind: str, model: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.gguf"
    run = model.found.folder.parent
    assert export.main(["--run", str(run), "--format", kind, "--output", str(output)]) == 0
    error = capsys.readouterr().err
    assert "of 12 answers are the scored ones" in error and "warning" not in error
    record = json.loads((tmp_path / "out.export.json").read_text())
    assert record["parity"]["other_prompts"] == 0 and record["parity"]["same"] >= 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.export.json", "out.gguf"]


def test_an_export_without_llama_cpp_claims_nothing(
    model: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as where it is not installed
    output = tmp_path / "out.gguf"
    run = str(model.found.folder.parent)
    assert export.main(["--run", run, "--format", "gguf", "--output", str(output)]) == 0
    assert "parity was not measured: it needs llama.cpp (pip install" in capsys.readouterr().err
    with pytest.raises(CourseError, match="pip install xllamacpp"):
        serving.Server(output)


# -- the adapter that the course ships, in full size -----------------------------------------------

ROWS, NEAR_TIES = 56, 2  # compared, and how many of them may part where two logits nearly tie


@pytest.fixture(scope="module")
def shipped(laptop: Profile) -> Scored:
    if not (scored.SHIPPED / "adapter_config.json").is_file():
        pytest.skip(f"the shipped adapter is not here: {scored.SHIPPED}")
    found = scored.find(scored.SHIPPED)
    # In fp32 on the processor, wherever the test runs: it adds no rounding.
    return scored.load(dataclasses.replace(found, profile=laptop, precision="fp32"))


@pytest.mark.slow
def test_the_shipped_adapter_is_served_as_it_was_scored(shipped: Scored, tmp_path: Path) -> None:
    """F16 in real llama.cpp: the same answers, but for near-ties between the two best logits."""
    output = tmp_path / "tickets.gguf"
    export.merge(shipped, tmp_path / "merged")
    convert.write_model(tmp_path / "merged", output)
    found = export.check(shipped, "gguf", output, ROWS)
    assert found.rows == ROWS and found.prompts == () and found.warning == ""
    assert len(found.differences) <= NEAR_TIES, found.differences
    assert all(abs(one.gap) < parity.NEAR_TIE["fp32"] for one in found.differences)


@pytest.mark.slow
def test_the_shipped_adapter_beside_its_base_and_the_fault_of_leaving_it_out(
    shipped: Scored, gguf: Path, tmp_path: Path
) -> None:
    """On the 4-bit file that the base came from: 98 MB and an adapter, and no update rounded."""
    rows = scored.load_split(shipped.found, "validation").select(range(16))
    limit = scored.answer_limit(rows, shipped.tokenizer)
    base = Path(models.model_path(shipped.found.profile))
    convert.write_adapter(shipped.found.folder, base, tmp_path / "adapter.gguf")
    expected = shipped.answer(rows["prompt"], limit)
    with serving.Server(gguf, [tmp_path / "adapter.gguf"]) as server:
        same, none = (
            parity.compare(
                shipped,
                rows["prompt"],
                expected,
                server.answers(rows["prompt"], limit, [scale]),
                server.prompt_ids,
            )
            for scale in (1.0, 0.0)
        )
    assert same.prompts == () and same.same >= 12
    assert none.same == 0 and "answers differ by more than rounding" in none.warning
