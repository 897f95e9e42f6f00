"""A fine-tuning run from its settings to its model card.

    resolve -> prepare -> train -> save -> evaluate -> report

`python -m helpers.finetune` runs it. Whatever can be known to fail is found before a model is
loaded; what was trained is saved before it is scored.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from helpers import (
    card,
    checkpoints,
    data,
    encoding,
    evaluation,
    memory,
    models,
    profiles,
    rows,
    statistics,
    tracking,
    training,
)
from helpers.config import RunConfig, UsageError, as_json
from helpers.diagnosis import Diagnosis, diagnose
from helpers.evaluation import evaluating

UNFINISHED = ".unfinished"
FULL_LEARNING_RATE = 5e-5  # full fine-tuning moves every parameter, so it needs smaller steps
SEED = 42
MARGIN = 8  # tokens that scoring gives an answer beyond the longest reference
WATCHED_ROWS = 48  # enough to see the trend while training; more would cost more than they tell
# Everything that a run writes into its folder.
FILES = ("run.json", "metrics.json", "history.json", "diagnosis.json", "answers.json", "README.md")
FOLDERS = ("adapter", "best_adapter", "model", "best_model", "wandb")
RESULTS = {*FILES, *FOLDERS} - {"run.json", "wandb"}  # what is written after the training


def finetune(config: RunConfig) -> dict[str, Any]:
    """Fine-tune, score before and after on the same test rows, and write the run's folder.

    Returns:
        The content of metrics.json.

    Raises:
        CourseError: for rows or settings that cannot be used, before anything is trained.
        helpers.checkpoints.TrainingFailed: the training cannot go on.
    """
    began = time.perf_counter()
    run = resolve(config)
    prepared = prepare(run)
    trained = train(run, prepared)
    save(run, prepared, trained)
    scores = evaluate(run, prepared, trained)
    return report(run, prepared, trained, scores, time.perf_counter() - began)


# -- resolve: which run is this? ---------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A run with all of its settings decided.

    Attributes:
        profile: with the learning rate, batch size and so on of this run.
        record: what run.json holds.
        files: the files of rows, by the names that the user gave them.
        checkpoint: where to go on from; None from the start.
        seconds: spent in training steps before the checkpoint.
    """

    output: Path
    profile: profiles.Profile
    record: dict[str, Any]
    files: dict[str, Path]
    checkpoint: Path | None
    seconds: float
    tracking: str
    processes: PartialState

    @property
    def settings(self) -> dict[str, Any]:
        """The decided settings, by the names of `RunConfig`."""
        return self.record["settings"]

    @property
    def id(self) -> str:
        """Names the run in its checkpoints."""
        return self.record["run_id"]


def resolve(config: RunConfig) -> Run:
    """Decide every setting, from the command line, the profile or the run that is resumed."""
    output = config.output
    old = read_record(output)
    try:
        _require_output(output, old, config.resume)
    except OSError as error:
        raise UsageError(
            f"--output {output} cannot be written ({error.strerror}). Name another folder."
        ) from error
    if not config.resume:
        old = None  # a run that was stopped before its first checkpoint begins anew
    tracking.report_to(config.tracking, output)  # a missing key is noticed here
    try:
        profile = _pick(config, old)
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{output / 'run.json'} was written by another version of this command, or changed. "
            f"Start a new run in another --output folder."
        ) from error
    method = config.method or (old or {}).get("settings", {}).get("method")
    method = method or ("qlora" if profile.quantized else "lora")
    if old is None:
        profile = _with_settings(profile, config, method)
    processes = PartialState(cpu=profile.device == "cpu")  # alone, or one of several
    _require_environment(profile)
    record = old or {
        "format": 1,
        "run_id": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": _settings(config, profile, method),
        "profile": dataclasses.asdict(profile),
        "processes": processes.num_processes,
    }
    record |= {"versions": versions(), "machine": _machine(profile)}
    checkpoint, seconds = None, 0.0
    if old is not None:
        _require_same(config, old, processes.num_processes)
        checkpoint, seconds = _find_checkpoint(output, record["run_id"])
    settings = record["settings"]
    settings |= _files(config)  # of a resumed run they may have moved; their content is compared
    files = {n: getattr(config, n) or Path(settings[n]) for n in data.SPLITS if settings[n]}
    return Run(output, profile, record, files, checkpoint, seconds, config.tracking, processes)


def read_record(output: Path) -> dict[str, Any] | None:
    """The run.json of a folder; None where there is none of this course's."""
    try:
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        return record if record["format"] == 1 and record["run_id"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_output(output: Path, old: dict[str, Any] | None, resume: bool) -> None:
    """Refuse a folder that cannot be written, that holds other files, or another kind of run."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file. Name a folder.")
    if old is None:
        if resume:
            raise UsageError(
                f"{output} holds no run to resume (no run.json of this command). "
                f"Leave out --resume to start one."
            )
        names = [f"{name}{end}" for end in ("", UNFINISHED) for name in (*FILES, *FOLDERS)]
        names = [name for name in names if (output / name).exists()]
        names += [path.name for path in checkpoints.all_checkpoints(output)]
        if names:
            raise UsageError(
                f"{output} holds {names[0]} already, and this command did not write it. "
                f"Name another --output folder."
            )
    elif (output / "metrics.json").exists():
        raise UsageError(f"{output} holds a finished run. Name another --output folder.")
    elif not resume and any(
        checkpoints.owns(path, old["run_id"]) for path in checkpoints.all_checkpoints(output)
    ):
        raise UsageError(
            f"{output} holds an interrupted run. Add --resume to continue it, or name another "
            f"--output folder."
        )
    elif foreign := _foreign_results(output, old):
        raise UsageError(
            f"{output} holds {foreign[0]}, which this run has not written. Move it away, then use "
            f"the same command again."
        )
    if os.environ.get("RANK", "0") == "0":  # several processes would remove each other's folder
        _try_to_write(output)


def _foreign_results(output: Path, record: dict[str, Any]) -> list[str]:
    """Files and folders that are named like results, in a run that has not begun to write any."""
    if record.get("saving"):
        return []
    return sorted(name for name in RESULTS if (output / name).exists())


def _try_to_write(output: Path) -> None:
    """Make the folder and a file in it, and remove what is new: the run may yet be refused."""
    new = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"0")
    finally:
        for path in new:
            if path.exists():
                path.rmdir()


def _pick(config: RunConfig, old: dict[str, Any] | None) -> profiles.Profile:
    if old is None:
        profile = profiles.pick_profile(config.profile)
        if config.model and config.model != profile.model_id:
            print(f"model     {config.model} instead: asked for")
        if config.precision and config.precision != profile.precision:
            print(f"precision {config.precision} instead: asked for")
            profile = _in_precision(profile, config.precision)
        return profile
    stored = old["profile"]
    profile = profiles.from_json(stored)
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("This run was started on a GPU, and none is here. Resume it on one.")
    print(f"resuming  {profile.model_id} on {profile.device} in {profile.precision}, as it began")
    return profile


def _in_precision(profile: profiles.Profile, precision: str) -> profiles.Profile:
    attention = profile.attn_implementation
    if profiles.PROFILES[profile.name].attn_implementation == "auto":
        attention, _ = profiles.pick_attention(profile.device, precision)
    return dataclasses.replace(profile, precision=precision, attn_implementation=attention)


def _with_settings(profile: profiles.Profile, config: RunConfig, method: str) -> profiles.Profile:
    default_rate = FULL_LEARNING_RATE if method == "full" else profile.learning_rate
    return dataclasses.replace(
        profile,
        model_id=_model_id(config.model) or profile.model_id,
        epochs=config.epochs or profile.epochs,
        learning_rate=config.learning_rate or default_rate,
        batch_size=config.batch_size or profile.batch_size,
        lora_rank=config.rank or profile.lora_rank,
        max_length=config.max_length or profile.max_length,
    )


def _model_id(named: str | None) -> str | None:
    """A folder by its whole path: the run may be resumed from another folder."""
    return os.path.abspath(named) if named and models.is_folder(named) else named


def _files(config: RunConfig) -> dict[str, str]:
    """The files of rows that were named, by their whole paths."""
    named = {name: getattr(config, name) for name in data.SPLITS}
    return {name: os.path.abspath(path) for name, path in named.items() if path is not None}


def _settings(config: RunConfig, profile: profiles.Profile, method: str) -> dict[str, Any]:
    """Every setting of the run with its decided value; of LoRA's only for LoRA."""
    decided = {
        **dict.fromkeys(data.SPLITS),
        **_files(config),
        "model": profile.model_id,
        "profile": profile.name,
        "precision": profile.precision,
        "method": method,
        "epochs": profile.epochs,
        "learning_rate": profile.learning_rate,
        "batch_size": profile.batch_size,
        "accumulation": config.accumulation or 1,
        "rank": None if method == "full" else profile.lora_rank,
        "alpha": None if method == "full" else config.alpha or 2 * profile.lora_rank,
        "target_modules": config.target_modules,
        "max_length": config.max_length,
        "seed": SEED if config.seed is None else config.seed,
    }
    return {name: as_json(value) for name, value in decided.items()}


def _require_environment(profile: profiles.Profile) -> None:
    """Accelerate reads its precision from the environment; it has to be the run's."""
    for way in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise UsageError(
                f"accelerate is set to {way}, which splits the model between processes; here each "
                f"process holds all of it. Launch with --multi_gpu."
            )
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if named not in ("no", "bf16", "fp16") or named not in ("no", profile.precision):
        raise UsageError(
            f"ACCELERATE_MIXED_PRECISION is {named!r}, and this run computes in "
            f"{profile.precision}. Unset it, or launch with --mixed_precision no."
        )


def _require_same(config: RunConfig, old: dict[str, Any], processes: int) -> None:
    """Refuse to resume with settings other than those that the run was started with."""
    settings = old["settings"]
    given = config.given() | ({"model": _model_id(config.model)} if config.model else {})
    # Files are compared by their content, in prepare.
    given = {name: value for name, value in given.items() if name not in data.SPLITS}
    differ = [
        f"--{name.replace('_', '-')} {_shown(value)} (the run has {_shown(settings.get(name))})"
        for name, value in given.items()
        if value != settings.get(name)
    ]
    if processes != old["processes"]:
        differ.append(f"{processes} processes (the run has {old['processes']})")
    if differ:
        raise UsageError(
            f"--resume continues a run as it was started, and this differs: {', '.join(differ)}. "
            f"Leave it out, or start a new run in another --output folder."
        )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _find_checkpoint(output: Path, run_id: str) -> tuple[Path | None, float]:
    newest, torn = checkpoints.newest_good(output, run_id)
    if torn:
        print(f"{torn[0].name} is not whole or not of this run; it is not used")
    if newest is None:
        print("there is no whole checkpoint yet: the run starts from its beginning")
        return None, 0.0
    facts = checkpoints.read_seal(newest, run_id) or {}
    print(f"continuing from {newest.name}")
    return newest, facts["seconds"]


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def _machine(profile: profiles.Profile) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": profile.device,
    }
    if profile.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


# -- prepare: rows, tokens, model --------------------------------------------------------------


@dataclasses.dataclass
class Prepared:
    """What the training needs.

    Attributes:
        rows: {"train": rows, "validation": rows, "test": rows if there are any}.
        features: the same, encoded.
        model: with its adapter, if it gets one.
        base_answers: of the model before training, one for each test row.
    """

    rows: dict[str, Dataset]
    features: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    model: Any
    base_answers: list[str]


def prepare(run: Run, adapt: Callable[[Any], Any] | None = None) -> Prepared:
    """Check the rows, the model and the disk, write run.json, and load the model.

    Args:
        adapt: makes the loaded model one to train, in place of the LoRA adapter of the settings.
    """
    settings, profile = run.settings, run.profile
    loaded = _load_rows(run)
    tokenizer = models.load_tokenizer(profile)
    found = models.inspect_model(
        profile, settings["method"], settings["rank"], settings["target_modules"]
    )
    if found.context_length is not None and found.context_length < profile.max_length:
        if settings["max_length"] is not None:
            raise UsageError(
                f"--max-length {settings['max_length']} is more than the context length of "
                f"{profile.model_id}, {found.context_length}."
            )
        run.profile = profile = dataclasses.replace(profile, max_length=found.context_length)
        run.record["profile"]["max_length"] = found.context_length
    features = {
        name: encoding.encode(split, tokenizer, profile.max_length, found.context_length)
        for name, split in loaded.items()
    }
    _require_vocabulary(profile, features, tokenizer, found.vocabulary_size)
    trained = sum(
        sum(label != encoding.IGNORED for label in labels) for labels in features["train"]["labels"]
    )
    tokens = sum(features["train"]["length"])
    print(
        f"train: {len(loaded['train'])} rows, {tokens:,} tokens, of which {trained:,} are trained "
        f"(the answers); the loss ignores the rest"
    )
    run.output.mkdir(parents=True, exist_ok=True)
    _require_disk(run, found.checkpoint_bytes)
    if run.processes.is_main_process:
        checkpoints.write_json(run.output / "run.json", run.record)

    set_seed(settings["seed"])
    model = models.load_model(profile, base_precision(settings["method"], profile))
    _require_causal(model, profile)
    answers = _answer(run, model, tokenizer, loaded, features) if "test" in loaded else []
    set_seed(settings["seed"])
    if adapt is not None:
        model = adapt(model)
    elif settings["method"] != "full":
        model = training.add_adapter(
            model,
            profile,
            settings["rank"],
            lora_alpha=settings["alpha"],
            target_modules=list(found.target_modules),
        )
    print(
        f"{settings['method']}: training {found.trainable_parameters:,} of "
        f"{found.total_parameters:,} parameters "
        f"({found.trainable_parameters / found.total_parameters:.2%})"
    )
    run.record["model"] = {
        "base": found.base_id,
        "on_the_hub": models.is_on_the_hub(profile.model_id),
        "parameters": found.total_parameters,
        "trainable": found.trainable_parameters,
    }
    return Prepared(loaded, features, tokenizer, model, answers)


def _load_rows(run: Run) -> dict[str, Dataset]:
    """Read and check the rows; of a resumed run they must be those that it began with."""
    if not run.files:
        loaded = dict(data.load_triage())
        files = {name: data.DATA / "triage" / f"{name}.jsonl" for name in data.SPLITS}
    else:
        files = run.files
        loaded = {name: rows.load_examples(path) for name, path in files.items()}
        rows.check_splits(**loaded)
    found = {
        name: {"rows": len(loaded[name]), "sha256": checkpoints.sha256(path)}
        for name, path in files.items()
    }
    began = run.record.get("data", found)
    changed = [n for n in data.SPLITS if found.get(n) != began.get(n)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"The {name} rows are not those that this run began with ({files.get(name, 'none')}). "
            f"Name or restore the file that it began with, or start a new run in another --output "
            f"folder."
        )
    run.record["data"] = found
    return loaded


def _require_vocabulary(
    profile: profiles.Profile,
    features: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
) -> None:
    highest = max(max(ids) for split in features.values() for ids in split["input_ids"])
    highest = max(highest, tokenizer.pad_token_id)
    if highest >= size:
        raise UsageError(
            f"The tokenizer of {profile.model_id} does not belong to the model: it makes the token "
            f"id {highest}, and the model has {size} embeddings. Use the tokenizer it came with."
        )


def _require_causal(model: Any, profile: profiles.Profile) -> None:
    """Refuse a model that sees later tokens: in training it would read the answer, not learn it."""
    if getattr(model.config, "is_decoder", True):  # what has been an encoder has it, and GPT-NeoX
        return
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    with evaluating(model):
        first, second = (model(input_ids=row[None], use_cache=False).logits[0] for row in ids)
    change = (first - second).abs().amax(dim=-1)  # (positions,)
    if change[:-1].max() > 0.01 * change[-1]:
        raise UsageError(
            f"{profile.model_id} reads text in both directions, as an encoder does. Choose a model "
            f"that writes text from left to right."
        )


def _require_disk(run: Run, checkpoint_bytes: int) -> None:
    """Three checkpoints lie side by side while a fourth is written, and then the result."""
    output = run.output
    needed = 5 * checkpoint_bytes - sum(  # those of an earlier part are there already
        path.stat().st_size
        for folder in checkpoints.all_checkpoints(output)
        if checkpoints.owns(folder, run.id)
        for path in folder.rglob("*")
    )
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UsageError(
            f"The disk of {output} has {free / 1e6:,.0f} MB free, and the checkpoints of this run "
            f"take up to {needed / 1e6:,.0f} MB. Free some space, or name a folder on another disk."
        )


def base_precision(method: str, profile: profiles.Profile) -> str:
    """The precision that the base model is loaded in: see `helpers.models.load_model`."""
    if method == "qlora":
        return "nf4"
    # In bf16 most updates of full fine-tuning are so small that rounding removes them.
    return "fp32" if method == "full" else profile.precision


# -- train -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Trained:
    """The trained model and what the training cost."""

    trainer: checkpoints.ResumableTrainer
    train_curve: list[list[float]]
    eval_curve: list[list[float]]
    tokens: int
    peak_memory: int
    validation_rows: int


def train(
    run: Run,
    prepared: Prepared,
    callbacks: Sequence[TrainerCallback] = (),
    arguments: Mapping[str, Any] = {},
    **options: Any,
) -> Trained:
    """Train, from the start or from the checkpoint.

    Args:
        callbacks: besides the line of progress.
        arguments: of `TrainingArguments`, in place of the run's own.
        options: of `Trainer` itself, such as `optimizers`.
    """
    settings, profile, processes = run.settings, run.profile, run.processes
    watched = prepared.features["validation"].shuffle(seed=0)
    count, eval_batch_size = _evaluation_batches(
        min(WATCHED_ROWS, len(watched)), profile.eval_batch_size, processes.num_processes
    )
    watched = watched.select(range(count))
    print(f"while training, the validation loss is that of {count} rows")
    rows_per_batch = profile.batch_size * processes.num_processes
    values: dict[str, Any] = {
        "seed": settings["seed"],
        "gradient_accumulation_steps": settings["accumulation"],
        "per_device_eval_batch_size": eval_batch_size,
        "save_total_limit": None,  # ResumableTrainer deletes, and only what this run wrote
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "include_num_input_tokens_seen": "non_padding",
        "ddp_find_unused_parameters": False,  # every adapter takes part in every step
        "report_to": tracking.report_to(run.tracking, run.output),
    }
    made = training.training_arguments(
        profile,
        run.output,
        training.optimizer_steps(
            len(prepared.features["train"]),
            rows_per_batch,
            profile.epochs,
            settings["accumulation"],
        ),
        **values | dict(arguments),
    )
    trainer = training.make_trainer(
        prepared.model,
        made,
        prepared.features["train"],
        watched,
        prepared.tokenizer,
        (training.Progress(), *callbacks),
        checkpoints.ResumableTrainer,
        run_id=run.id,
        **options,
    )
    trainer.timer.seconds = run.seconds
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    peak = max(_gather([memory.peak_memory_bytes(profile.device)], processes))
    tokens = int(trainer.state.num_input_tokens_seen)
    return Trained(trainer, *training.curves(trainer), tokens, peak, count)


# -- save --------------------------------------------------------------------------------------


def save(run: Run, prepared: Prepared, trained: Trained) -> None:
    """Write what was trained, and the state with the lowest validation loss where it differs."""
    full = run.settings["method"] == "full"
    name = "model" if full else "adapter"
    model = trained.trainer.accelerator.unwrap_model(trained.trainer.model)
    if not run.processes.is_main_process:
        return
    if foreign := _foreign_results(run.output, run.record):
        raise checkpoints.TrainingFailed(
            f"{run.output} holds {foreign[0]}, which this run has not written. Move it away, then "
            f"use the same command with --resume."
        )
    run.record["saving"] = True
    checkpoints.write_json(run.output / "run.json", run.record)
    if not full:
        model.peft_config["default"].base_model_name_or_path = run.record["model"]["base"]
    _write_folder(run.output / name, lambda folder: _save_model(model, prepared.tokenizer, folder))
    state = trained.trainer.state
    best = run.output / f"{checkpoints.PREFIX}{state.best_global_step}"
    whole = checkpoints.read_seal(best, run.id) is not None
    if state.best_global_step not in (None, state.global_step) and whole:

        def best_model(folder: Path) -> None:
            shutil.copytree(run.output / name, folder, dirs_exist_ok=True)
            (folder / "README.md").unlink(missing_ok=True)
            for weights in best.glob("*.safetensors*"):
                shutil.copy(weights, folder)

        _write_folder(run.output / f"best_{name}", best_model)
    checkpoints.write_json(
        run.output / "history.json", {"train": trained.train_curve, "eval": trained.eval_curve}
    )


def _save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # peft would otherwise ask the Hub whether the vocabulary has grown.
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template; the run's card replaces it


def _write_folder(folder: Path, write: Any) -> None:
    """Make a folder whole or not at all; what a killed part of this run made is replaced."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write(unfinished)
    if not folder.exists():
        os.replace(unfinished, folder)
        return
    shutil.copytree(unfinished, folder, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(unfinished)


# -- evaluate ----------------------------------------------------------------------------------


def evaluate(run: Run, prepared: Prepared, trained: Trained) -> dict[str, Any]:
    """Score the test rows before and after: answers, scores and losses. Empty without test rows."""
    if "test" not in prepared.rows:
        return {}
    test, model = prepared.rows["test"], trained.trainer.model
    answers = _answer(run, model, prepared.tokenizer, prepared.rows, prepared.features)
    references = evaluation.references(test)
    return {
        "answers": {"base": prepared.base_answers, "test": answers},
        "base": evaluation.score(prepared.base_answers, references),
        "test": evaluation.score(answers, references),
        "losses": evaluation.answer_losses(model, prepared.tokenizer, test),
    }


def _answer(
    run: Run,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, Dataset],
    features: dict[str, Dataset],
) -> list[str]:
    """The model's answers to the test rows, shared out over the processes."""
    processes, test = run.processes, loaded["test"]
    longest = max(
        sum(label != encoding.IGNORED for label in labels) for labels in features["test"]["labels"]
    )  # of a chat with several answers all together: enough for its last one
    mine = range(processes.process_index, len(test), processes.num_processes)
    answered = evaluation.generate_answers(
        model,
        tokenizer,
        test.select(mine)["prompt"],
        max_new_tokens=longest + MARGIN,
        batch_size=run.profile.eval_batch_size,
    )
    pairs = _gather(list(zip(mine, answered, strict=True)), processes)
    return [answer for _, answer in sorted(pairs)]


def _evaluation_batches(rows: int, batch_size: int, processes: int) -> tuple[int, int]:
    """(rows to evaluate, batch size), so that all processes get as many rows as the others.

    Otherwise accelerate repeats rows to fill the last batches, and Trainer (5.24), which divides by
    the tokens of all processes, reports another mean than one process would.
    """
    if processes == 1:
        return rows, batch_size
    each = max(1, rows // processes)
    fitting = [size for size in range(1, min(batch_size, each) + 1) if each % size == 0]
    return min(rows, each * processes), fitting[-1]


def _gather(values: list[Any], processes: PartialState) -> list[Any]:
    """The lists of all processes, one after the other."""
    return gather_object(values) if processes.num_processes > 1 else values


# -- report ------------------------------------------------------------------------------------


def report(
    run: Run, prepared: Prepared, trained: Trained, scores: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Write metrics, diagnosis, answers and the model card, and print what came out."""
    diagnosis = diagnose(trained.train_curve, trained.eval_curve)
    metrics = _metrics(run, prepared, trained, scores, seconds)
    if run.processes.is_main_process:
        write = checkpoints.write_json
        write(run.output / "diagnosis.json", diagnosis.to_dict())
        if scores:
            write(run.output / "answers.json", scores["answers"])
        text = card.model_card(run.record, metrics, diagnosis)
        name = "model" if run.settings["method"] == "full" else "adapter"
        for folder in (run.output, run.output / name):
            (folder / "README.md").write_text(text, encoding="utf-8")
        write(run.output / "run.json", run.record)
        write(run.output / "metrics.json", metrics)  # last: it marks the run as finished
    _print_result(run, metrics, diagnosis)
    if run.processes.num_processes > 1:
        run.processes.wait_for_everyone()
        run.processes.destroy_process_group()
    return metrics


def _metrics(
    run: Run, prepared: Prepared, trained: Trained, scores: dict[str, Any], seconds: float
) -> dict[str, Any]:
    test, losses = scores.get("test", {}), scores.get("losses", {})
    trained_seconds, state = trained.trainer.timer.seconds, trained.trainer.state
    best = state.best_global_step
    return {
        "base_exact_match": scores["base"]["exact_match"] if scores else None,
        "test_exact_match": test.get("exact_match"),
        "test_fields": test.get("fields"),
        "test_valid_json": test.get("valid_json"),
        "test_rows": len(prepared.rows.get("test", ())),
        "test_loss": losses.get("loss"),
        "test_value_loss": losses.get("value_loss"),
        "validation_rows": trained.validation_rows,  # that the losses below are of
        "validation_loss": trained.eval_curve[-1][1] if trained.eval_curve else None,
        "best_validation_loss": state.best_metric,
        "best_step": best,
        "steps": state.global_step,
        "tokens": trained.tokens,
        "train_seconds": round(trained_seconds, 3),
        "total_seconds": round(seconds, 1),  # of this part; train_seconds is of all parts
        "tokens_per_second": round(trained.tokens / trained_seconds, 1)
        if trained_seconds
        else None,
        "peak_memory_bytes": trained.peak_memory,
        "trainable_parameters": run.record["model"]["trainable"],
        "total_parameters": run.record["model"]["parameters"],
        "method": run.settings["method"],
        "processes": run.processes.num_processes,
        "seed": run.settings["seed"],
        "profile": dataclasses.asdict(run.profile),
    }


def _print_result(run: Run, metrics: dict[str, Any], diagnosis: Diagnosis) -> None:
    print(f"diagnosis: {diagnosis.verdict}. {diagnosis.explanation}")
    name = "model" if run.settings["method"] == "full" else "adapter"
    if (run.output / f"best_{name}").is_dir():
        print(
            f"the lowest validation loss was at step {metrics['best_step']}; that state is in "
            f"best_{name}/"
        )
    if metrics["test_rows"]:
        low, high = statistics.wilson_interval(metrics["test_exact_match"], metrics["test_rows"])
        print(
            f"exact match on the test split: {metrics['base_exact_match']:.1%} before, "
            f"{metrics['test_exact_match']:.1%} after (95 % interval {low:.0%} to {high:.0%})"
        )
    print(f"{metrics['total_seconds']:.0f} s; everything is in {run.output}")
