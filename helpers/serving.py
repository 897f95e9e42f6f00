"""Real llama.cpp in this process, and behind an endpoint in OpenAI's style, on loopback only.

    with serving.Server("model.gguf", adapters=["adapter.gguf"]) as server:
        server.answers([messages], scales=[1.0])
        server.url  # http://127.0.0.1:PORT/v1 for any client of OpenAI's kind

It runs what the package xllamacpp carries: llama.cpp with its server, in ready-made wheels. Nobody
on another machine can reach the endpoint, and it ends with its `with` block, or with Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from helpers import CourseError

Messages = Sequence[dict[str, str]]

HOST = "127.0.0.1"
INSTALL = "pip install xllamacpp==2026.10.11549"
CONTEXT = 2048  # tokens that question and answer may have together
SILENT = -1  # llama.cpp's level of verbosity
# The likeliest token at each step, as in scoring; each answer computed by itself, so that none
# depends on those before it. The last is what scoring tells templates of reasoning models.
GREEDY: dict[str, Any] = {
    "temperature": 0,
    "top_k": 1,
    "cache_prompt": False,
    "chat_template_kwargs": {"enable_thinking": False},
}


def is_installed() -> bool:
    """True where xllamacpp can be imported."""
    with contextlib.suppress(ImportError):
        import xllamacpp  # noqa: F401

        return True
    return False


class Server:
    """A GGUF model in llama.cpp, with adapters beside it that each request can weigh.

    Args:
        model: a GGUF file of a model.
        adapters: GGUF files of LoRA adapters. Their scales are 0 until a request says otherwise.
        context: the most tokens of question and answer together.
        threads: OMP_NUM_THREADS or as many as there are cores, if not given.
        port: a free one, if not given.
        template: a chat template (Jinja) instead of the file's own.
        name: what the model is called in replies; the file's name without its ending otherwise.

    Attributes:
        url: the address for clients of OpenAI's kind, "http://127.0.0.1:PORT/v1"

    Raises:
        CourseError: xllamacpp is not installed, a file is missing or not one that llama.cpp loads,
            or the port is taken.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Sequence[str | Path] = (),
        *,
        context: int = CONTEXT,
        threads: int | None = None,
        port: int = 0,
        template: str | None = None,
        name: str | None = None,
    ) -> None:
        for file in (model, *adapters):
            if not Path(file).is_file():
                raise CourseError(f"{file}: there is no such file. Make it with helpers.export.")
        self.adapters = [Path(file) for file in adapters]
        server = _start(_parameters(model, adapters, context, threads, port, template, name))
        self._address = server.listening_address
        self._server = [server]  # emptied to stop it: llama.cpp stops when its object is gone
        self._finalizer = weakref.finalize(
            self, self._server.clear
        )  # at the latest when Python ends
        self.url = f"{self._address}/v1"
        # llama.cpp cannot be stopped before its loop runs (it would wait for ever); this answer
        # comes from the loop.
        self._ask("/lora-adapters")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop llama.cpp, and give its memory and its port back. May be called twice."""
        self._finalizer()

    # -- questions and answers -----------------------------------------------------------------

    def chat(self, messages: Messages, **options: Any) -> dict[str, Any]:
        """One reply in OpenAI's shape, greedy unless told otherwise, without HTTP.

        Args:
            options: of the request, such as max_tokens, response_format, or `lora`:
                [{"id": 0, "scale": 1.0}].

        Raises:
            CourseError: llama.cpp refuses the request, or the server is closed.
        """
        request = self._request(messages, options)
        return _checked(_refused(lambda: self._open().handle_chat_completions(request)))

    def stream(self, messages: Messages, show: Callable[[str], Any], **options: Any) -> str:
        """One reply, piece by piece: `show` gets each piece, and stops the reply if it says True.

        Returns:
            The whole text.
        """
        pieces: list[str] = []
        faults: list[BaseException] = []

        def receive(chunk: dict[str, Any]) -> bool:
            try:
                delta = _checked(chunk)["choices"][0]["delta"].get("content")
                if delta:
                    pieces.append(delta)
                    return show(delta) is True
            except BaseException as error:  # llama.cpp's thread cannot carry it
                faults.append(error)
                return True
            return False

        request = self._request(messages, options) | {"stream": True}
        _refused(lambda: self._open().handle_chat_completions(request, receive))
        if faults:
            raise faults[0]
        return "".join(pieces)

    def answers(
        self,
        prompts: Sequence[Messages],
        max_new_tokens: int = 64,
        scales: Sequence[float] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[str]:
        """Answer each prompt greedily, as `helpers.evaluation.generate_answers` does.

        Args:
            scales: one number for each adapter: 0 is the base model, 1 the adapter as trained.
        """
        options = {"max_tokens": max_new_tokens} | options
        if scales is not None:
            options["lora"] = self.scaled(scales)
        replies = [
            self.chat(prompt, **options)
            for prompt in tqdm(prompts, desc="llama.cpp", disable=not progress, leave=False)
        ]
        return [(r["choices"][0]["message"]["content"] or "").strip() for r in replies]

    def scaled(self, scales: Sequence[float]) -> list[dict[str, Any]]:
        """The value of `lora` in a request, from one scale for each adapter."""
        if len(scales) != len(self.adapters):
            raise CourseError(
                f"{len(scales)} scales for {len(self.adapters)} adapters. Give one for each."
            )
        return [{"id": number, "scale": float(scale)} for number, scale in enumerate(scales)]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The token ids that llama.cpp reads for chat messages."""
        options = {"chat_template_kwargs": GREEDY["chat_template_kwargs"]}
        text = self._ask("/apply-template", {"messages": list(messages), **options})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._ask("/tokenize", body)["tokens"]

    # -- inside --------------------------------------------------------------------------------

    def _open(self) -> Any:
        if not self._server:
            raise CourseError("This server is closed. Make a new one.")
        return self._server[0]

    def _request(self, messages: Messages, options: dict[str, Any]) -> dict[str, Any]:
        request = {**GREEDY, "messages": list(messages), **options}
        if self.adapters and "lora" not in request:
            request["lora"] = self.scaled([0.0] * len(self.adapters))
        return request

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST a body, or GET where there is none."""
        self._open()
        content = None if body is None else json.dumps(body).encode("utf-8")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, content, headers)
        # Without a proxy: the address is this machine's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            return _checked(json.load(error))


def _parameters(
    model: str | Path,
    adapters: Sequence[str | Path],
    context: int,
    threads: int | None,
    port: int,
    template: str | None,
    name: str | None,
) -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise CourseError(
            f"This needs llama.cpp, from the package xllamacpp: {INSTALL}. There are wheels for "
            f"Linux x86-64, Windows and macOS."
        ) from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {name or Path(model).stem}  # otherwise replies name a path
    parameters.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(file), 0.0) for file in adapters
    ]
    parameters.n_ctx = context
    parameters.verbosity = SILENT
    parameters.warmup = False
    for cores in (parameters.cpuparams, parameters.cpuparams_batch):
        cores.n_threads = threads or _threads()
    if template is not None:
        parameters.chat_template = template
    # Loopback, and no page of the web may ask a browser on this machine to read from it.
    parameters.hostnames = [HOST]
    parameters.port = port
    parameters.cors_origins = f"http://{HOST}"
    parameters.ui = False
    parameters.endpoint_slots = False  # it would show the prompts of others
    return parameters


def _threads() -> int:
    """As many as torch takes: OMP_NUM_THREADS, or one for each core."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() and int(named) else os.cpu_count() or 1


def _start(parameters: Any) -> Any:
    import xllamacpp

    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        port = f", or the port {parameters.port} is taken" if parameters.port else ""
        raise CourseError(
            f"llama.cpp could not load {parameters.model.path} with its adapters{port}. A model "
            f"must be whole, and an adapter must belong to it: export both again."
        ) from error


def _refused(ask: Callable[[], Any]) -> Any:
    """What `ask` returns; llama.cpp's refusal of a request as a `CourseError`."""
    try:
        return ask()
    except ValueError as error:
        raise CourseError(_refusal(error)) from error


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    if "error" in reply or "code" in reply:
        error = reply.get("error", reply)
        raise CourseError(_refusal(error.get("message", error)))
    return reply


def _refusal(reason: Any) -> str:
    return f"llama.cpp refuses the request ({reason}). Change the request."
