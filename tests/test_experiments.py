"""The recorded runs: are they whole, do they follow from the plan, and can they be repeated?"""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import CourseError, experiments, statistics
from helpers.data import load_triage, ticket_json
from helpers.evaluation import score
from helpers.experiments import __main__ as command
from helpers.experiments import catalogue, runner
from helpers.experiments.catalogue import EXPERIMENTS, Trial

SUMMARY = ["experiment", "label", "seed", "settings", "data_sha256", "versions", "machine"]
CURVES = ["losses", "train", "eval", "epochs", "validation", "test"]
COSTS = ["seconds", "tokens", "peak_memory_bytes", "trainable_parameters", "saved_bytes"]
KEYS = [*SUMMARY, *CURVES, *COSTS, "prose_perplexity"]
RECORDED = [(name, record) for name in EXPERIMENTS for record in experiments.read(name)]


def ids(value: Any) -> str:
    return value if isinstance(value, str) else f"{value['label']}-{value['seed']}"


# -- what is recorded --------------------------------------------------------------------------


def test_there_are_at_least_five_experiments_and_sixty_runs() -> None:
    assert len({name for name, _ in RECORDED}) >= 5
    assert len(RECORDED) >= 60


@pytest.mark.parametrize(("name", "record"), RECORDED, ids=ids)
def test_a_record_is_whole(name: str, record: dict[str, Any]) -> None:
    assert list(record) == KEYS
    assert record["experiment"] == name
    assert (record["test"] is not None) == EXPERIMENTS[name].tested
    for split in ("validation", "test"):
        if record[split] is None:
            continue
        references = [ticket_json(row) for row in load_triage()[split]]
        answers = experiments.answers(record, split)
        again = score(answers, references)
        assert {key: record[split][key] for key in again} == pytest.approx(again)
    if record["losses"]:
        assert record["train"][-1][0] == len(record["losses"])
        assert record["train"] == runner._means(record["losses"])
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
@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items()])
def test_the_first_steps_of_a_record_can_be_repeated(name: str) -> None:
    text, agrees = runner.verify(name, steps=2)
    assert agrees, text
