"""The experiments of conf/experiment and the scripts around them, in real processes on generated data."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FEW, OFFLINE, SMALL, command, compose_trial

from delora import overrides, storage, tasks
from delora.cli import conf_folder
from delora.config import ConfigError
from delora.report import statistics
from delora.report.cli import main as report

ROOT = Path(__file__).parents[1]
TABLE4 = conf_folder() / "experiment" / "table4"
TASKS = list(statistics.published()["rows"][0]["scores"])


def table4(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "delora.table4", *arguments]
    return subprocess.run(line, cwd=cwd, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=240)


# --- Table 4


def test_table4_holds_the_hyperparameters_of_table9(shared):
    lines = (shared / "paper" / "delora.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | MNLI"))
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[start : start + 7]]
    tasks = [name.lower().replace("-", "") for name in rows[0]]
    assert tasks == TASKS and {path.stem for path in TABLE4.glob("*.yaml")} == {*TASKS}
    paper = {name: list(map(float, values)) for name, *values in rows[2:]}
    for i, task in enumerate(TASKS):
        trial = compose_trial(f"experiment=table4/{task}")
        ours = {"λ": trial.method.lambda_init, "learning rate": trial.rate, "batch size": trial.batch_size}
        ours |= {"epochs": trial.epochs, "dropout": trial.method.dropout}
        assert ours == {name: values[i] for name, values in paper.items()}
        assert trial.lambda_rate == (3e-3 if task in ("mnli", "sst2", "qnli", "qqp") else 1e-2)
        assert (trial.task.name, trial.method.name, trial.method.rank) == (task, "delora", 8)
        assert trial.method.targets == ("query", "value") and trial.protocol.name == "paper"


def test_the_other_rows_take_epochs_and_batch_size_of_table9():
    for task in TASKS:
        ours, theirs = (compose_trial(f"experiment={kind}/{task}") for kind in ("tuned", "table4"))
        assert (ours.task, ours.epochs, ours.batch_size) == (theirs.task, theirs.epochs, theirs.batch_size)


def test_a_row_s_rate_is_chosen_by_the_first_seed_on_validation(tmp_path):
    words = ["--methods", "red,lora", "--tasks", "rte", "--model", "tiny", "data=synthetic", "logger=none"]
    words += ["data.rows.train=64", "data.rows.validation=80", "seed=42,43", "epochs=2", "batch_size=8"]
    made = table4(*words, "lr_factor=1,300", "max_length=64", "device=cpu", cwd=tmp_path)
    assert made.returncode == 0 and "Traceback" not in made.stderr, made.stderr
    found = storage.find(tmp_path / "outputs" / "table4" / "tiny").trials
    by_seed = {seed: {} for seed in (42, 43)}
    for trial in found:
        config, best = trial.result["config"], trial.result["best"]
        place = (config["task"]["name"], config["method"]["name"])
        score = best["validation"][trial.result["headline"]]
        by_seed[config["seed"]].setdefault(place, {})[config["lr_factor"]] = score
        if place[1] == "red":
            assert config["lr"] == compose_trial(f"experiment=red/{place[0]}").lr and config["lr_factor"] == 1
    for (task, method), second in by_seed[43].items():
        first = by_seed[42][task, method]
        assert first.keys() == ({1} if method == "red" else {1, 300}) and len(second) == 1
        assert next(iter(second)) == max(first, key=lambda factor: (first[factor], -factor))
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in made.stdout.splitlines()}
    assert "published" in rows["RED", "RTE"] and "rate chosen here, at an end of the grid" in rows["LoRA", "RTE"]
    assert (tmp_path / "outputs" / "table4" / "tiny" / "report" / "hyperparameters.md").read_text() in made.stdout
    planned = table4(*words, "--plan", "name=other", cwd=tmp_path)
    assert "and 1 with the seed 43, at the best rates" in planned.stdout


def test_the_ladder_is_one_command_with_a_table_of_its_own(tmp_path):
    words = [*SMALL, *FEW, "epochs=1", "experiment=ladder", "seed=1,2", "lr_factor=1,4", "name=ladder", "-m"]
    made = command(*words, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    found = storage.find(tmp_path / "outputs" / "ladder").trials
    assert len(found) == 7 * 2 * 2
    assert report([str(tmp_path / "outputs" / "ladder"), "--only", "table", "--format", "csv"]) == 0
    [path] = (tmp_path / "outputs" / "ladder" / "report").glob("ladder-*.csv")
    _, *lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert [row["rung"] for row in rows] == [f"rung {i}" for i in range(1, 8)]
    assert rows[3]["ΔW"] == "(λ/r)(BΞA − DΦC)W" and all(row["n"] == "2" and row["MRPC"] for row in rows)
    one = command(*words[:-1], "method=ladder/2,ladder/7", "name=two", "-m", cwd=tmp_path)
    assert one.returncode == 0 and len(storage.find(tmp_path / "outputs" / "two").trials) == 2 * 2 * 2


def test_experiments_that_sweep_by_themselves_are_not_swept_over():
    told = "experiment=tuned/mrpc,tuned/rte: their own sweeps need one experiment; add lr_factor=0.1,0.3,1,3,10"
    with pytest.raises(ConfigError, match=re.escape(told)):
        overrides.check(["experiment=tuned/mrpc,tuned/rte", "model=tiny"], conf_folder(), multirun=True)
    overrides.check(["experiment=tuned/mrpc,tuned/rte", "model=tiny", "lr_factor=1,2"], conf_folder(), multirun=True)


def test_table4_of_all_tasks_and_goes_on(tmp_path):
    words = ["--model", "tiny", "data=synthetic", "data.rows.train=32", "data.rows.validation=40", "seed=42,43"]
    words += ["epochs=1", "max_length=64", "logger=none", "device=cpu"]
    planned = table4("--plan", *words, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "16 trials: 0 done, 16 to run in 8 fleets, roughly" in planned.stdout and " GB " in planned.stdout
    assert not list(tmp_path.iterdir())

    made = table4(*words, cwd=tmp_path)
    assert made.returncode == 0 and "Traceback" not in made.stderr, made.stderr
    root = tmp_path / "outputs" / "table4" / "tiny"
    found = {(t.result["config"]["task"]["name"], t.result["config"]["seed"]): t for t in storage.find(root).trials}
    assert found.keys() == {(task, seed) for task in TASKS for seed in (42, 43)}
    assert {trial.result["fleet_size"] for trial in found.values()} == {2}
    head = "| method | parameters |   n |        MNLI |       SST-2 |        MRPC |        CoLA |"
    assert re.sub(" +", " ", head) in re.sub(" +", " ", made.stdout), made.stdout
    _, *lines = (root / "report" / "scores-tiny-paper-synthetic.csv").read_text().splitlines()
    [row] = csv.DictReader(lines)
    assert row["n"] == "2" and all(row[tasks.TASKS[task].folder] for task in TASKS)

    times = {path: path.stat().st_mtime_ns for path in root.glob("*/result.json")}
    removed = found["rte", 43].folder
    for path in removed.iterdir():
        path.unlink()
    again = table4("--tasks", "rte,mrpc", *words, cwd=tmp_path)
    assert again.returncode == 0 and "3 of 4 trials are done already" in again.stderr, again.stderr
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {removed / "result.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "mrcp"], "--tasks mrcp: expected one of mnli, sst2, mrpc, cola, qnli, qqp, rte, stsb; did you"),
        (
            ["--methods", "lora,dleora"],
            "--methods dleora: expected one of full, bitfit, ia3, loreft, red, lora, adapter_",
        ),
        (["--plan", "mrpc"], "mrpc: expected KEY=VALUE"),
        (["--model", "minlm"], "model=minlm: expected one of"),
        (["epochs=0", "bach_size=4"], "2 faults in the config"),
        (["--tasks", "rte", "data.dir=nowhere", "model=tiny"], "nowhere"),
    ],
)
def test_faults_of_table4_s_options_are_explained(tmp_path, words, message):
    answer = table4(*words, cwd=tmp_path)
    assert answer.returncode == 2 and message in answer.stderr and "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


def test_an_experiment_s_options_do_not_reach_another_method(tmp_path):
    answer = command("experiment=table4/mrpc", "method=lora", "model=tiny", "data=synthetic", cwd=tmp_path)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert "method.lambda_init=4.0: set by experiment=table4/mrpc, but method=lora has no such key" in answer.stderr
    fits = command("experiment=table4/mrpc", "method=delora", "--cfg", "job", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr


# --- Figures

FIGURES = re.findall(r"^(delora-run -m .+?) +# (Fig\. \d)", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("line", "figure"), FIGURES, ids=[figure for _, figure in FIGURES])
def test_a_figure_s_command_draws_its_curves(tmp_path, line, figure):
    """The README's commands, cut to few rows and epochs."""
    words = [word for word in shlex.split(line)[1:] if not word.startswith("seed=")]
    answer = command(*words, *SMALL, *FEW, "seed=1", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    [root] = (tmp_path / "outputs").iterdir()
    factors = ["--factor", "4"] if figure == "Fig. 3" else []
    assert report([str(root), *factors]) == 0
    drawn = {path.stem for path in (root / "report").glob("*.svg")}
    expected = {
        "Fig. 2": {"LoRA", "DoRA", "DeLoRA", "ETHER+"},
        "Fig. 3": {"LoRA", "DoRA", "DeLoRA", "ETHER+"},
        "Fig. 5": {"DoRA", "DoRA (fixed magnitude)"},
        "Fig. 6": {"DeLoRA", "DeLoRA (factor on BA)", "DeLoRA (factor on λ)"},
    }
    pictures = {"training"} if figure == "Fig. 3" else {"score_by_factor", "score_by_rate", "distance_by_factor"}
    assert pictures <= drawn
    for name in pictures:
        text = (root / "report" / f"{name}.svg").read_text(encoding="utf-8")
        assert all(f"<!-- {label} -->" in text for label in expected[figure]), name


def test_prolonged_training_is_ten_times_the_usual_at_four_times_the_rate():
    usual, prolonged = compose_trial("method=lora"), compose_trial("experiment=prolonged", "method=lora")
    assert prolonged.epochs == 10 * usual.epochs and prolonged.rate == 4 * usual.rate
    assert prolonged.model_copy(update={"epochs": usual.epochs, "lr_factor": 1.0}) == usual
