"""Make the runs of an experiment, through the same pipeline as `python -m helpers.finetune`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers import (
    CourseError,
    checkpoints,
    data,
    encoding,
    evaluation,
    memory,
    methods,
    models,
    pipeline,
    profiles,
    prompting,
    training,
)
from helpers.config import RunConfig
from helpers.experiments import RUNS, read
from helpers.experiments.catalogue import EXPERIMENTS, Experiment, Trial
from helpers.rules import Rules

PROFILE = "laptop"
NEW_TOKENS = 64  # the longest reference answer takes 47
SHORT, WATCHED = 64, 24  # notebook 07: tokens of a short row, and rows of validation to watch
# How far a repeated loss may be off, in nats: on the same kind of processor, and on another.
SAME_MACHINE, OTHER_MACHINE = 1e-3, {"fp32": 2e-2, "bf16": 5e-2}


# -- one run -----------------------------------------------------------------------------------


def make(name: str, trial: Trial, keep: Path | None = None, jobs: int = 1) -> dict[str, Any]:
    """Make one run.

    Args:
        keep: a folder in which the adapter stays, in 16 bits.
        jobs: how many runs share the machine.

    Returns:
        Its record.
    """
    experiment, triage = EXPERIMENTS[name], data.load_triage()
    way = trial.settings.get("way")
    if way == "rules":
        made = _rules(experiment, trial, triage)
    elif way:
        made = _prompted(experiment, way, triage)
    else:
        made = _trained(experiment, trial, triage, keep)
    made["machine"] = (made["machine"] or {}) | _machine() | {"runs_at_once": jobs}
    return {"experiment": name, "label": trial.label, "seed": trial.seed} | made


def subset(rows: Dataset, size: int | None, seed: int) -> Dataset:
    """`size` rows drawn by the seed, a larger size having those of a smaller one; None for all."""
    if size is None or size >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select(sorted(order[:size]))


def short_rows(rows: Dataset) -> Dataset:
    """The rows of at most `SHORT` tokens, as notebook 07 takes them."""
    profile = profiles.pick_profile(PROFILE, verbose=False)
    features = encoding.encode(rows, models.load_tokenizer(profile), profile.max_length)
    return rows.select([i for i, n in enumerate(features["length"]) if n <= SHORT])


def _rules(experiment: Experiment, trial: Trial, triage: Any) -> dict[str, Any]:
    learned = subset(triage["train"], trial.settings.get("rows"), trial.seed)
    began = time.perf_counter()
    rules = Rules.fit(learned)
    seconds = time.perf_counter() - began
    scores = {
        split: _score(rules.answer(triage[split]["message"]), triage[split])
        for split in _splits(experiment)
    }
    return _record(trial.settings, scores, seconds=seconds)


def _prompted(experiment: Experiment, way: str, triage: Any) -> dict[str, Any]:
    profile = profiles.pick_profile(PROFILE, verbose=False)
    tokenizer, model = models.load_tokenizer(profile), models.load_model(profile)
    examples = prompting.few_shot_examples(triage["train"]) if "few-shot" in way else []
    began, scores = time.perf_counter(), {}
    for split in _splits(experiment):
        prompts = triage[split]["prompt"]
        if "spelled out" in way:
            prompts = [prompting.spelled_out(prompt) for prompt in prompts]
        prompts = [prompting.few_shot(prompt, examples) for prompt in prompts]
        if "schema" in way:
            schema = prompting.TICKET_SCHEMA
            answers = prompting.constrained_answers(model, tokenizer, prompts, schema)
        else:
            answers = evaluation.generate_answers(model, tokenizer, prompts, NEW_TOKENS)
        scores[split] = _score(answers, triage[split])
    return _record(
        {"way": way},
        scores,
        seconds=time.perf_counter() - began,
        prose_perplexity=_prose(model, tokenizer),
        machine={"device": profile.device},
    )


def _trained(
    experiment: Experiment,
    trial: Trial,
    triage: Any,
    keep: Path | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        run = _resolve(trial, triage, Path(folder))
        settings = trial.settings
        prepared = pipeline.prepare(run, _adapt(trial, run))
        scoring = _Scoring(experiment.scored, prepared.tokenizer, triage["validation"], run.profile)
        options: dict[str, Any] = {}
        if "peft" in settings:
            made = methods.optimizer(prepared.model, settings["peft"], settings["learning_rate"])
            options = {"optimizers": (made, None)} if made else {}
        if run.profile.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        arguments = {"save_strategy": "no", "logging_steps": 1} | settings.get("arguments", {})
        callbacks = (_StopAfter(stop_after),) if stop_after else (scoring,)
        trained = pipeline.train(run, prepared, callbacks, arguments, **options)
        losses = [loss for _, loss in trained.train_curve]
        if stop_after:
            return {"losses": losses}
        model = prepared.model
        scored = scoring.whole if experiment.answered else scoring.after_references
        scores = {"validation": scored(model)}
        if experiment.tested:
            test = triage["test"]
            answers = scoring.answer(model, test)
            losses_of = evaluation.answer_losses(model, prepared.tokenizer, test)
            scores["test"] = _score(answers, test) | losses_of
        if keep is not None and experiment.tested and settings.get("method") is None:
            _keep(model, run, keep / f"{trial.label}-{trial.seed}")
        return _record(
            {k: v for k, v in run.settings.items() if k not in data.SPLITS} | settings,
            scores,
            versions=run.record["versions"],
            machine=run.record["machine"],
            data_sha256=run.record["data"]["train"]["sha256"],
            losses=[round(loss, 4) for loss in losses],
            train=_means(losses),
            eval=[[step, round(loss, 4)] for step, loss in trained.eval_curve],
            epochs=scoring.scores,
            seconds=round(trained.trainer.timer.seconds, 1),
            tokens=trained.tokens,
            peak_memory_bytes=max(trained.peak_memory, scoring.peak),
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            saved_bytes=_saved_bytes(model, settings),
            prose_perplexity=_prose(model, prepared.tokenizer),
        )


def _resolve(trial: Trial, triage: Any, folder: Path) -> pipeline.Run:
    """The run of the command with these settings, on rows written as anybody's would be."""
    if trial.settings.get("short"):
        drawn = short_rows(triage["train"]).shuffle(seed=trial.seed)
        learned = drawn.select(range(trial.settings["rows"]))
        watched = short_rows(triage["validation"]).select(range(WATCHED))
    else:
        learned = subset(triage["train"], trial.settings.get("rows"), trial.seed)
        watched = triage["validation"]
    for name, rows in (("train", learned), ("validation", watched)):
        lines = [
            json.dumps({key: row[key] for key in ("prompt", "completion")}, ensure_ascii=False)
            for row in rows
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = {field.name for field in dataclasses.fields(RunConfig)}
    known -= {"profile", "precision", "model", "seed", *data.SPLITS}  # told below, or not at all
    told = {k: v for k, v in trial.settings.items() if k in known and v is not None}
    if "target_modules" in told:
        told["target_modules"] = tuple(told["target_modules"])
    config = RunConfig(
        output=folder / "run",
        train=folder / "train.jsonl",
        validation=folder / "validation.jsonl",
        profile=PROFILE,
        precision=trial.settings.get("precision") or _precision(),
        seed=trial.seed,
        **told,
    )
    return pipeline.resolve(config)


def _precision() -> str | None:
    """fp32 on a GPU, so that any processor can repeat it; on a processor what suits it."""
    return "fp32" if torch.cuda.is_available() else None


def _adapt(trial: Trial, run: pipeline.Run) -> Callable[[Any], Any] | None:
    settings = trial.settings
    if "peft" in settings:
        return lambda model: methods.prepare(model, settings["peft"])
    if settings.get("scratch"):
        return _from_scratch
    if "lora" in settings:
        return lambda model: training.add_adapter(
            model, run.profile, settings["rank"], lora_alpha=settings["alpha"], **settings["lora"]
        )
    return None


def _from_scratch(model: Any) -> Any:
    """The same architecture with random parameters, drawn on the processor."""
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    fresh.generation_config = model.generation_config
    return fresh.to(model.device)


class _StopAfter(TrainerCallback):
    """Stop early in a run that is planned for longer: the schedule stays that of the whole run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


class _Scoring(TrainerCallback):
    """Score the whole validation split, while training and at its end."""

    def __init__(self, when: str, tokenizer: Any, rows: Dataset, profile: profiles.Profile) -> None:
        self.when, self.tokenizer, self.rows, self.profile = when, tokenizer, rows, profile
        self.scores: list[dict[str, Any]] = []
        self.peak = 0

    def answer(self, model: Any, rows: Dataset) -> list[str]:
        # A GPU answers all rows at once in the time that it takes for a few.
        batch_size = len(rows) if self.profile.device == "cuda" else self.profile.eval_batch_size
        prompts = rows["prompt"]
        return evaluation.generate_answers(model, self.tokenizer, prompts, NEW_TOKENS, batch_size)

    def whole(self, model: Any) -> dict[str, Any]:
        losses = evaluation.answer_losses(model, self.tokenizer, self.rows)
        return _score(self.answer(model, self.rows), self.rows) | losses

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "epoch":
            self._add(state, self.whole, kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "evaluation":
            self._add(state, self.after_references, kwargs["model"])

    def after_references(self, model: Any) -> dict[str, Any]:
        scores = evaluation.scores_after_references(model, self.tokenizer, self.rows)
        scores["row_loss"] = [round(loss, 3) for loss in scores["row_loss"]]
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in scores.items()
        }

    def _add(self, state: Any, score: Callable[[Any], dict[str, Any]], model: Any) -> None:
        cuda = self.profile.device == "cuda"
        if cuda:  # what scoring takes is not the training's
            self.peak = max(self.peak, memory.peak_memory_bytes("cuda"))
        scores = score(model)
        scores.pop("answers", None)
        scores.pop("row_right", None)
        self.scores.append({"epoch": state.epoch, "step": state.global_step} | scores)
        if cuda:
            torch.cuda.reset_peak_memory_stats()


def _score(answers: list[str], rows: Dataset) -> dict[str, Any]:
    references = evaluation.references(rows)
    kept = [None if got == ref else got for got, ref in zip(answers, references, strict=True)]
    return evaluation.score(answers, references) | {"answers": kept}


def _splits(experiment: Experiment) -> tuple[str, ...]:
    """The splits that its runs are scored on."""
    return ("validation", "test") if experiment.tested else ("validation",)


def _record(settings: dict[str, Any], scores: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Every key of a record, in order; None for what does not apply."""
    names = (
        "data_sha256 versions machine losses train eval epochs validation test seconds tokens "
        "peak_memory_bytes trainable_parameters saved_bytes prose_perplexity"
    )
    values = {"versions": pipeline.versions()} | values
    if "seconds" in values:
        values["seconds"] = round(values["seconds"], 1)
    return {"settings": settings} | {
        name: scores.get(name) if name in ("validation", "test") else values.get(name)
        for name in names.split()
    }


def _means(losses: list[float], points: int = 24) -> list[list[float]]:
    """[[step, mean loss of the steps since the last one], ...], as a run of the command logs."""
    every = max(1, -(-len(losses) // points))
    return [
        [min(start + every, len(losses)), round(sum(part) / len(part), 4)]
        for start in range(0, len(losses), every)
        if (part := losses[start : start + every])
    ]


def _saved_bytes(model: Any, settings: dict[str, Any]) -> int:
    if "peft" in settings:
        return methods.saved_bytes(model)
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


def _prose(model: Any, tokenizer: Any) -> float:
    lines = (data.DATA / "prose.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return round(evaluation.perplexity(model, tokenizer, texts), 4)


def _keep(model: Any, run: pipeline.Run, folder: Path) -> None:
    """Save an adapter in 16 bits: half the size, and what it changes in an answer is measured."""
    model.peft_config["default"].base_model_name_or_path = run.record["model"]["base"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.save_pretrained(folder, save_embedding_layers=False)


def _machine() -> dict[str, Any]:
    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    return machine | {"instructions": torch.backends.cpu.get_cpu_capability()}


# -- many runs ---------------------------------------------------------------------------------


def missing(name: str, only: str | None = None) -> list[Trial]:
    """The planned runs that are not recorded; `only` keeps those with this text in their label."""
    done = {(record["label"], record["seed"]) for record in read(name)}
    return [
        trial
        for trial in EXPERIMENTS[name].plan()
        if (trial.label, trial.seed) not in done and (only is None or only in trial.label)
    ]


def run(
    names: list[str],
    only: str | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    keep: Path | None = None,
) -> list[str]:
    """Make the runs that are missing and append their records, each as soon as it is finished.

    Whatever was killed before is simply made. Later stages are planned as earlier ones finish.

    Args:
        jobs: runs at once, each in a process of its own.
        minutes: stop by then; a run that is not finished is not recorded.

    Returns:
        A line for each run that failed.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * (minutes or 1e6)
    if jobs == 1:
        return _one_by_one(names, only, deadline, keep)
    # Each process computes with its part of the cores.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    failed: list[str] = []
    tried: set[Key] = set()
    running: dict[Future[dict[str, Any]], tuple[str, Trial]] = {}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        while time.monotonic() < deadline:
            for name, trial in itertools.islice(_waiting(names, only, tried), jobs - len(running)):
                running[pool.submit(_quietly, name, trial, keep, jobs)] = name, trial
            if not running:
                return failed
            finished, _ = wait(running, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
            for future in finished:
                name, trial = running.pop(future)
                if error := future.exception():
                    failed.append(_failure(name, trial, error))
                else:
                    _append(name, future.result())
        return failed + [_failure(*waiting, "not finished") for waiting in running.values()]
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end when its parent does, however that was killed: a run takes long."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _one_by_one(
    names: list[str], only: str | None, deadline: float, keep: Path | None
) -> list[str]:
    failed: list[str] = []
    tried: set[Key] = set()
    while time.monotonic() < deadline:
        if (following := next(_waiting(names, only, tried), None)) is None:
            return failed
        name, trial = following
        try:
            _append(name, make(name, trial, keep))
        except CourseError as error:
            failed.append(_failure(name, trial, error))
    return failed


Key = tuple[str, str, int]  # experiment, label, seed


def _waiting(names: list[str], only: str | None, tried: set[Key]) -> Iterator[tuple[str, Trial]]:
    """The runs that are neither recorded nor tried, each marked as tried when it is handed out."""
    for name in names:
        for trial in missing(name, only):
            if (key := (name, trial.label, trial.seed)) not in tried:
                tried.add(key)
                yield name, trial


def _failure(name: str, trial: Trial, why: object) -> str:
    text = f"{name}: {trial.label}, seed {trial.seed}: {why}"
    print(f"failed    {text}", flush=True)
    return text


def _quietly(name: str, trial: Trial, keep: Path | None, jobs: int) -> dict[str, Any]:
    """`make`, without what the pipeline prints. An error names its place: it crosses processes."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return make(name, trial, keep, jobs)
    except CourseError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        raise CourseError(f"{type(error).__name__} in {place}: {error}") from error


def _append(name: str, record: dict[str, Any]) -> None:
    line = json.dumps(checkpoints.finite(record), ensure_ascii=False, allow_nan=False)
    with (RUNS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    score = record["validation"]["exact_match"]
    print(
        f"{name:<9} {record['label']}, seed {record['seed']}: validation {score:.1%}, "
        f"{record['seconds'] or 0:.0f} s",
        flush=True,
    )


# -- repeat ------------------------------------------------------------------------------------


def first_losses(name: str, settings: dict[str, Any], seed: int, steps: int) -> list[float]:
    """The losses of the first optimizer steps of a run, with the schedule of the whole run.

    Args:
        name: of the experiment.
        settings: of a record or a `Trial`, changed or not.
    """
    trial = Trial(name, seed, settings)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return _trained(EXPERIMENTS[name], trial, data.load_triage(), stop_after=steps)["losses"]


def verify(name: str, only: str | None = None, steps: int = 5) -> tuple[str, bool]:
    """Repeat the first steps of a recorded run, and compare the losses.

    Args:
        only: text of the label; without it the run with the fewest tokens is taken.

    Returns:
        A line on what was compared, and whether it agrees.

    Raises:
        CourseError: no such training is recorded.
    """
    records = [r for r in read(name) if r["losses"] and (only is None or only in r["label"])]
    if not records:
        raise CourseError(
            f"{name} has no recorded training{f' with {only!r} in its label' if only else ''}. "
            f"`python -m helpers.experiments list` shows what there is."
        )
    record = min(records, key=lambda r: r["tokens"])
    threads = torch.get_num_threads()
    if record["machine"]["device"] == "cpu":  # in bf16 sums depend on how many there are
        torch.set_num_threads(record["machine"]["threads"])
    try:
        losses = first_losses(name, record["settings"], record["seed"], steps)
    finally:
        torch.set_num_threads(threads)
    pairs = list(zip(losses, record["losses"], strict=False))[:steps]
    off = max(abs(now - then) for now, then in pairs)
    here, there = _machine(), record["machine"]
    precision = record["settings"]["precision"]
    same = all(there.get(key) == here[key] for key in here) and there["device"] == "cpu"
    if precision == "bf16":  # these records are from AVX512-BF16; AMX adds in another order
        has = torch.cpu.get_capabilities()
        same = same and has.get("avx512_bf16", False) and not has.get("amx_bf16", False)
    band = SAME_MACHINE if same else OTHER_MACHINE[precision]
    kind = "this kind of machine" if same else "another kind of machine"
    text = (
        f"{name}: {record['label']}, seed {record['seed']}: {len(pairs)} steps, losses "
        f"{pairs[0][0]:.4f} ... {pairs[-1][0]:.4f}, at most {off:.1e} from the record of {kind} "
        f"(band {band:g})"
    )
    return text, off <= band
