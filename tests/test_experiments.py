"""The recorded runs: are they whole, do they follow from the plan, and can they be repeated?"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from helpers import CourseError, adapters, evaluation, experiments, models, profiles, statistics
from helpers.data import load_triage, ticket_json
from helpers.experiments import __main__ as command
from helpers.experiments import catalogue, readme, runner
from helpers.experiments.catalogue import EXPERIMENTS, Trial

SUMMARY = ["experiment", "label", "seed", "settings", "data_sha256", "versions", "machine"]
CURVES = ["losses", "train", "eval", "epochs", "validation", "test"]
COSTS = ["seconds", "tokens", "peak_memory_bytes", "trainable_parameters", "saved_bytes"]
KEYS = [*SUMMARY, *CURVES, *COSTS, "prose_perplexity"]
RECORDED = [(name, record) for name in EXPERIMENTS for record in experiments.read(name)]


def ids(value: Any) -> str:
    return value if isinstance(value, str) else f"{value['label']}-{value['seed']}"


# -- what is recorded --------------------------------------------------------------------------


def test_what_the_notebooks_rest_on_is_recorded() -> None:
    assert len(RECORDED) >= 150
    trials = [t for t in EXPERIMENTS["rates"].plan() if t.label in catalogue.CANDIDATES]
    trials += [Trial(label, 0) for label in ("rules", *catalogue.PROMPTS)]
    trials += [Trial("lora", seed) for seed in catalogue.SEEDS]
    trials += [
        Trial(f"{way}, {size} rows", seed)
        for way in ("lora", "rules")
        for size in (64, 128)
        for seed in catalogue.SEEDS
    ]
    trials += EXPERIMENTS["cures"].plan()
    later = {"LoRA+", "OLoRA", "VeRA", "prefix tuning"}  # not all of their runs are made yet
    trials += [t for t in EXPERIMENTS["methods"].plan() if t.settings["peft"] not in later]
    seen = {(record["label"], record["seed"]) for _, record in RECORDED}
    assert {(trial.label, trial.seed) for trial in trials} <= seen


@pytest.mark.parametrize(("name", "record"), RECORDED, ids=ids)
def test_a_record_is_whole(name: str, record: dict[str, Any]) -> None:
    assert list(record) == KEYS
    assert record["experiment"] == name
    assert (record["test"] is not None) == EXPERIMENTS[name].tested
    for split in ("validation", "test"):
        if record[split] is None:
            continue
        references = [ticket_json(row) for row in load_triage()[split]]
        if not EXPERIMENTS[name].answered:
            right = record[split]["row_right"]
            assert len(right) == len(references)
            assert record[split]["exact_match"] == pytest.approx(sum(right) / len(right), abs=1e-4)
            continue
        answers = experiments.answers(record, split)
        again = evaluation.score(answers, references)
        assert {key: record[split][key] for key in again} == again
    for scores in record["epochs"] or []:
        if EXPERIMENTS[name].scored == "evaluation" and scores["step"] == len(record["losses"]):
            # The last generated answers; a tie may fall differently in another batch.
            generated = record["validation"]["exact_match"]
            assert scores["exact_match"] == pytest.approx(generated, abs=2.5 / 114)
    if record["losses"]:
        assert record["train"][-1][0] == len(record["losses"])
        means = [loss for _, loss in runner._means(record["losses"])]
        assert [loss for _, loss in record["train"]] == pytest.approx(means, abs=2e-4)
        assert record["tokens"] > 0 and record["seconds"] > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_records_follow_from_the_plan(name: str) -> None:
    planned = {(trial.label, trial.seed): trial.settings for trial in EXPERIMENTS[name].plan()}
    assert len(planned) == len(EXPERIMENTS[name].plan())
    seen = set()
    for record in experiments.read(name):
        key = (record["label"], record["seed"])
        assert key not in seen
        seen.add(key)
        assert planned[key].items() <= record["settings"].items()


def test_rows_of_one_seed_are_nested() -> None:
    train = load_triage()["train"]
    sizes = [set(runner.subset(train, size, 1)["message"]) for size in (16, 64, 256)]
    assert [len(size) for size in sizes] == [16, 64, 256]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[0] != set(runner.subset(train, 16, 2)["message"])


# -- what the course claims --------------------------------------------------------------------


def hits(label: str) -> list[int]:
    runs = [record for record in experiments.read("ways") if record["label"] == label]
    rows = len(load_triage()["test"])
    return [round(record["test"]["exact_match"] * rows) for record in runs]


def test_lora_is_above_rules_by_more_than_their_intervals() -> None:
    rows = len(load_triage()["test"])
    (rules,) = hits("rules")
    tuned = hits("lora")
    assert len(tuned) == 3
    for right in tuned:
        assert (
            statistics.wilson_interval(right / rows, rows)[0]
            > (statistics.wilson_interval(rules / rows, rows)[1])
        )


def test_lora_overtakes_rules_between_64_and_256_rows_in_every_seed() -> None:
    scores = {
        (record["label"], record["seed"]): record["test"]["exact_match"]
        for record in experiments.read("rows")
    }

    def lead(size: int, seed: int) -> float | None:
        tuned = scores.get((f"lora, {size} rows", seed))
        return None if tuned is None else tuned - scores[f"rules, {size} rows", seed]

    for seed in catalogue.SEEDS:
        leads = {size: lead(size, seed) for size in (64, 128, 256)}
        assert leads[64] is not None and leads[64] < 0
        assert leads[256] is None or leads[256] > 0


def test_the_recipe_is_the_best_candidate_on_validation() -> None:
    frame = experiments.load("rates")
    means = frame[frame["label"].isin(catalogue.CANDIDATES)].groupby("label")["exact_match"].mean()
    chosen = catalogue.recipe()
    assert chosen is not None
    best = catalogue.CANDIDATES[str(means.idxmax())]
    assert chosen == catalogue.START | best


def test_load_gives_a_row_a_run() -> None:
    frame = experiments.load("ways")
    assert len(frame) == len(experiments.read("ways"))
    assert {"label", "seed", "exact_match", "test_exact_match", "learning_rate"} <= set(frame)
    with pytest.raises(FileNotFoundError, match="no recorded runs"):
        experiments.load("nothing")


# -- making runs -------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Trial]:
    """The tiny model, few rows to score, and an experiment of three short trainings."""
    triage = load_triage()
    for split in ("validation", "test"):
        triage[split] = triage[split].select(range(4))
    monkeypatch.setattr(runner.data, "load_triage", lambda: triage)
    monkeypatch.setattr(runner, "PROFILE", "tiny")
    monkeypatch.setattr(runner, "NEW_TOKENS", 4)
    monkeypatch.setattr(runner, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    lora = {"rows": 8, "epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "rank": 4, "alpha": 8}
    trials = [
        Trial("lora", 0, lora),
        Trial("lora with dropout", 0, lora | {"lora": {"lora_dropout": 0.5}}),
        Trial("lora", 1, lora),
    ]
    experiment = catalogue.Experiment("?", lambda: trials, "epoch", tested=True)
    monkeypatch.setitem(EXPERIMENTS, "small", experiment)
    return trials


def test_runs_are_made_once_and_continue_after_a_stop(
    small: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runner.make
    monkeypatch.setattr(
        runner, "make", lambda *a: pytest.fail("stopped") if RECORDED_ONE() else made(*a)
    )

    def RECORDED_ONE() -> bool:
        return (tmp_path / "small.jsonl").is_file()

    with pytest.raises(pytest.fail.Exception):
        runner.run(["small"])
    assert [r["label"] for r in experiments.read("small")] == ["lora"]
    monkeypatch.setattr(runner, "make", made)
    assert runner.run(["small"]) == []
    records = experiments.read("small")
    assert [(r["label"], r["seed"]) for r in records] == [(t.label, t.seed) for t in small]
    assert runner.run(["small"]) == [] and len(experiments.read("small")) == 3
    for record in records:
        assert list(record) == KEYS
        assert len(record["losses"]) == 4 and [e["step"] for e in record["epochs"]] == [2, 4]
        assert record["saved_bytes"] == 4 * record["trainable_parameters"]
    first, dropped, other = (record["losses"] for record in records)
    assert first != dropped and first != other


def test_a_killed_recorder_leaves_no_training_behind(tmp_path: Path) -> None:
    script = tmp_path / "recorder.py"
    script.write_text(
        """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from helpers.experiments.runner import _end_with_parent

if __name__ == "__main__":
    context = get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
""",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as recorder:
        try:
            assert recorder.stdout is not None
            # transformers may print a line of its own at import.
            told = next(line for line in recorder.stdout if line.strip().isdigit())
            worker = psutil.Process(int(told))
        finally:
            recorder.kill()
    gone, alive = psutil.wait_procs([worker], timeout=20)
    assert gone and not alive


def test_scores_while_training_are_those_after_references(
    small: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SHORT", 512)
    monkeypatch.setattr(runner, "WATCHED", 2)
    settings = small[0].settings | {"short": True, "arguments": {"max_steps": 4, "eval_steps": 2}}
    trial = Trial("few rows", 3, settings)
    experiment = catalogue.Experiment("?", lambda: [trial], "evaluation")
    monkeypatch.setitem(EXPERIMENTS, "small", experiment)
    assert runner.run(["small"]) == []
    (record,) = experiments.read("small")
    assert [step for step, _ in record["eval"]] == [2, 4]
    assert [scores["step"] for scores in record["epochs"]] == [2, 4]
    for scores in record["epochs"]:
        assert len(scores["row_loss"]) == 4 and 0 <= scores["fields_right"] <= 1
    assert record["epochs"][-1]["loss"] == pytest.approx(record["validation"]["loss"], abs=1e-3)


def test_validation_is_judged_after_references_where_nothing_is_answered(
    small: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("judged", 3, small[0].settings)
    experiment = catalogue.Experiment("?", lambda: [trial], answered=False)
    monkeypatch.setitem(EXPERIMENTS, "small", experiment)
    assert runner.run(["small"]) == []
    (record,) = experiments.read("small")
    scores = record["validation"]
    assert "answers" not in scores and not record["epochs"]
    assert sum(scores["row_right"]) / len(scores["row_right"]) == scores["exact_match"]


def test_a_rate_at_the_end_of_a_sweep_asks_for_one_beyond_it_at_most_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses: dict[str, float] = {}
    monkeypatch.setattr(
        catalogue,
        "read",
        lambda name: [
            {"label": label, "validation": {"loss": loss}} for label, loss in losses.items()
        ],
    )

    def told(name: str) -> list[tuple[int, float, int]]:
        """(epochs, learning rate, seed) of the planned runs of a method."""
        plan = (trial for trial in catalogue.methods() if trial.settings["peft"] == name)
        return [(t.settings["epochs"], t.settings["learning_rate"], t.seed) for t in plan]

    def record(name: str, rate: float, loss: float) -> None:
        losses[f"{catalogue._at(name, rate)}, one epoch"] = loss

    tried = [(1, 3e-4, 0), (1, 1e-3, 0), (1, 3e-3, 0)]
    assert told("LoRA") == tried
    record("LoRA", 3e-4, 0.4)
    record("LoRA", 1e-3, 0.2)
    assert told("LoRA") == tried
    record("LoRA", 3e-3, 0.3)
    assert told("LoRA") == [*tried, (3, 1e-3, 0), (3, 1e-3, 1), (3, 1e-3, 2)]

    record("LoRA", 3e-3, 0.195)  # lower, but by less than the tie
    assert told("LoRA") == [*tried, (1, 9e-3, 0)]
    record("LoRA", 9e-3, 0.4)
    both = [(3, rate, seed) for seed in (0, 1, 2) for rate in (1e-3, 3e-3)]
    assert told("LoRA")[4:] == both

    for rate, loss in ((3e-3, 0.5), (1e-2, 0.4), (3e-2, 0.3)):
        record("LayerNorm tuning", rate, loss)
    assert told("LayerNorm tuning")[3:] == [(1, 9e-2, 0)]
    record("LayerNorm tuning", 9e-2, 0.2)
    assert told("LayerNorm tuning")[3:] == [(1, 9e-2, 0), (1, 0.3, 0)]
    record("LayerNorm tuning", 0.3, 0.1)
    assert told("LayerNorm tuning")[5:] == [(3, 0.3, 0), (3, 0.3, 1), (3, 0.3, 2)]

    for rate, loss in ((3e-5, 0.1), (1e-4, 0.2), (3e-4, 0.3)):
        record("full", rate, loss)
    assert told("full")[3:] == [(1, 1e-5, 0)]


def test_the_first_steps_are_those_of_the_whole_run(small: list[Trial]) -> None:
    (trial,) = [t for t in small if "dropout" in t.label]
    assert runner.run(["small"], only="dropout") == []
    (record,) = experiments.read("small")
    again = runner.first_losses("small", record["settings"], trial.seed, 3)
    assert again == pytest.approx(record["losses"][:3], abs=1e-3)


def test_verify_agrees_with_a_record_and_notices_a_changed_one(
    small: list[Trial], tmp_path: Path
) -> None:
    assert runner.run(["small"], only="dropout") == []
    text, agrees = runner.verify("small", steps=3)
    assert agrees and "3 steps" in text and "this kind of machine" in text
    record = experiments.read("small")[0]
    record["losses"][2] += 0.01
    (tmp_path / "small.jsonl").write_text(json.dumps(record) + "\n")
    text, agrees = runner.verify("small", steps=3)
    assert not agrees
    with pytest.raises(CourseError, match="no recorded training with 'other'"):
        runner.verify("small", only="other")


def test_list_and_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert command.main(["run", "nothing"]) == 2
    assert "no experiment 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in RECORDED}))
def test_the_first_steps_of_a_record_can_be_repeated(name: str) -> None:
    text, agrees = runner.verify(name, steps=2)
    assert agrees, text


def test_the_laptop_profile_follows_the_recipe() -> None:
    profile, chosen = profiles.PROFILES["laptop"], catalogue.recipe()
    assert chosen == {
        "learning_rate": profile.learning_rate,
        "batch_size": profile.batch_size,
        "epochs": profile.epochs,
        "rank": profile.lora_rank,
        "alpha": 2 * profile.lora_rank,
    }


def test_the_readme_shows_what_is_recorded() -> None:
    """Where they differ: python -m helpers.experiments readme."""
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.updated(text) == text
    assert "fine-tuned (LoRA)" in text
    # The picture itself depends on the version of matplotlib; what it shows does not.
    shown = json.loads(Image.open(readme.PICTURE).text["Description"])
    assert shown == readme.shown()


# -- the adapter that the course ships ---------------------------------------------------------


def test_the_card_of_the_adapter_says_what_is_recorded() -> None:
    """Where they differ: python -m helpers.experiments readme."""
    text = (adapters.SHIPPED / "README.md").read_text(encoding="utf-8")
    assert text == readme.card()
    size = sum(path.stat().st_size for path in adapters.SHIPPED.iterdir())
    assert size <= 10_000_000
    tensors = load_file(adapters.SHIPPED / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(t.numel() for t in tensors.values()) == readme.shipped()["trainable_parameters"]


@pytest.mark.slow
def test_the_adapter_holds_its_recorded_score() -> None:
    """On validation. Rounding, to 16 bits and on this processor, may change few answers."""
    record = readme.shipped()
    profile = profiles.pick_profile("laptop", verbose=False)
    tokenizer, rows = models.load_tokenizer(profile), load_triage()["validation"]
    model = PeftModel.from_pretrained(models.load_model(profile), adapters.SHIPPED)
    answers = evaluation.generate_answers(model, tokenizer, rows["prompt"])
    recorded = experiments.answers(record, "validation")
    same = sum(map(str.__eq__, answers, recorded))
    found = evaluation.score(answers, evaluation.references(rows))["exact_match"]
    print(f"{same} of {len(rows)} answers as recorded, exact match {found:.1%}")
    assert same >= 0.93 * len(rows)
    assert abs(found - record["validation"]["exact_match"]) <= 0.03
