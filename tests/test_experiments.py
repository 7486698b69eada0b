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

from delora import results
from delora.cli import conf_folder
from delora.report import statistics
from delora.report.cli import main as report

ROOT = Path(__file__).parents[1]
TABLE4 = conf_folder() / "experiment" / "table4"
TASKS = list(statistics.published()["rows"][0]["scores"])


def table4(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "scripts" / "table4.py"), *arguments]
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
    found = {(t.result["config"]["task"]["name"], t.result["config"]["seed"]): t for t in results.find(root).trials}
    assert found.keys() == {(task, seed) for task in TASKS for seed in (42, 43)}
    assert {trial.result["fleet_size"] for trial in found.values()} == {2}
    head = "| method | parameters |   n |        MNLI |       SST-2 |        MRPC |        CoLA |"
    assert re.sub(" +", " ", head) in re.sub(" +", " ", made.stdout), made.stdout
    _, *lines = (root / "report" / "scores-tiny-paper-synthetic.csv").read_text().splitlines()
    [row] = csv.DictReader(lines)
    assert row["n"] == "2" and all(row[statistics.TASKS[task].folder] for task in TASKS)

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
