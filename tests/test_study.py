"""The study in docs/study: its pictures and tables follow from its CSV files, whose trials are not trained again."""

import csv
import itertools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
from conftest import conf_folder, load_script

from delora import results
from delora.config import NOT_THE_TRIAL, Trial
from delora.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "study"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("study")


def test_pictures_and_tables_are_made_of_the_csv_files(study, tmp_path):
    for name in ("trials.csv", "training.csv"):
        (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    study.report(tmp_path)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    texts = [name for name in made if name.suffix != ".png"]  # a picture's bytes follow the fonts' library
    committed = {path.relative_to(DOCS) for folder in study.REPORTS for path in (DOCS / folder).glob("*")}
    assert made.keys() - {Path("trials.csv"), Path("training.csv")} == committed
    assert [name for name in texts if made[name].read_bytes() != (DOCS / name).read_bytes()] == []


def test_the_pages_tables_are_those_of_the_csv_files():
    text = (DOCS / "robust" / "robustness-minilm-paper-glue.csv").read_text(encoding="utf-8")
    cells = defaultdict(dict)
    for line in csv.DictReader(text.splitlines()[1:]):
        drop, low, high = (float(line[f"worst drop{end}"]) for end in ("", " low", " high"))
        cells[line["method"]][line["task"]] = f"{float(line['best score']):.1f}", f"{drop:.1f} [{low:.1f}, {high:.1f}]"
    front, page = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, DOCS))
    assert len(cells) == 6
    for method, by_task in cells.items():
        scores, drops = zip(*(by_task[task] for task in ("MRPC", "CoLA", "RTE", "STS-B")), strict=True)
        assert f"\n| {' | '.join((method, *scores, *drops))} |\n" in front
        assert f"\n  | {' | '.join((method, *drops))} |\n" in page


def test_the_comparison_with_peft_is_that_of_its_csv_file():
    script = load_script("peft_check")
    assert "\n".join(script.table(script.CSV)) in (DOCS / "README.md").read_text(encoding="utf-8")


def test_a_changed_line_is_refused(study, tmp_path):
    (tmp_path / "training.csv").write_bytes((DOCS / "training.csv").read_bytes())
    text = (DOCS / "trials.csv").read_text(encoding="utf-8")
    place = next(csv.DictReader([*text.splitlines()[:2]]))["best.validation.loss"]
    (tmp_path / "trials.csv").write_text(text.replace(place, "0.99", 1), encoding="utf-8")
    with pytest.raises(UserError, match="line 2: not the result"):
        list(study.restore(tmp_path))


def test_a_trial_in_the_csv_files_is_finished(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sweep, result, evaluations in itertools.islice(study.restore(DOCS), 0, 400, 40):
        study.write_trial(study.OUTPUTS / sweep / result["id"], result, evaluations)
        trial = Trial.from_config(result["config"])
        assert trial.folder == study.OUTPUTS / sweep / result["id"]
        assert results.finished(trial.folder, trial.resolved(), NOT_THE_TRIAL) == result


def test_every_config_of_the_study_is_planned(study):
    words = " ".join(itertools.chain(*study.planned().values()))
    for path in (conf_folder() / "experiment" / "study").glob("*.yaml"):
        assert f"study/{path.stem}" in words


def test_a_plan_is_of_every_sweep(tmp_path):
    words = ["--plan", "--sweeps", "parts,magnitude", "--output", "none", "data=synthetic", "model=tiny"]
    command = [sys.executable, ROOT / "scripts" / "study.py", *words]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "80 trials: 0 done, 80 to run" in answer.stdout and "40 trials: 0 done, 40 to run" in answer.stdout
    assert not any(tmp_path.iterdir())


def test_no_line_holds_a_folder_of_one_machine(study, tmp_path, monkeypatch):
    assert all(not Path(result["config"]["data"]["dir"] or ".").is_absolute() for _, result, _ in study.restore(DOCS))
    monkeypatch.chdir(tmp_path)
    result = {"id": "one", "config": {"seed": 42, "data": {"name": "glue", "dir": str(tmp_path / "glue")}}}
    assert study.portable(result) == {"id": "one", "config": {"seed": 42, "data": {"name": "glue", "dir": "glue"}}}
