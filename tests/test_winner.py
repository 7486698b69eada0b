"""The table of all trials, the one to take, and its repetition."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_trials
import pandas
import pytest
import torch
import yaml
from conftest import FEW, SMALL, command, compose_trial
from fake_trials import write

import delora
from delora import again, storage
from delora.console import print_results
from delora.errors import UserError
from delora.report.cli import main as report
from delora.sweep import run


def taken(root: Path, **options) -> tuple[str, float]:
    """The name of the folder of the trial to take, and the mean of its config."""
    best = delora.best(root, **options)
    return best.folder.name, round(best.mean, 6)


def test_the_config_with_the_best_mean_is_taken_and_of_it_the_best_seed(tmp_path):
    """Validation decides, not test; a seed that stands out does not win for its config."""
    for name, factor, seed, test, validation in (
        *(("a1", 1, 1, 0.5, 0.9), ("a2", 1, 2, 0.5, 0.7)),
        *(("b1", 2, 1, 0.4, 0.79), ("b2", 2, 2, 0.3, 0.83)),
        *(("c1", 4, 1, 0.99, 0.78), ("c2", 4, 2, 0.99, 0.8)),
    ):
        write(tmp_path / name, test, validation, factor=factor, seed=seed)
    best = delora.best(tmp_path)
    assert taken(tmp_path) == ("b2", 0.81) and best.score == 0.83 and best.result["best"]["test"]["accuracy"] == 0.3
    assert [trial.folder.name for trial in best.seeds] == ["b1", "b2"] and best.metric == "accuracy"


def test_seeds_that_diverged_failed_or_are_missing_do_not_make_a_config_win(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path / f"a{seed}", 0.7, factor=1, seed=seed)
    for name, seed, status in (("d1", 1, "done"), ("d2", 2, "diverged"), ("d3", 3, "done")):
        write(tmp_path / name, 0.9, factor=2, seed=seed, status=status)
    write(tmp_path / "f1", 0.95, factor=4, seed=1)
    write(tmp_path / "f2", 0.95, factor=4, seed=2, status="failed")
    write(tmp_path / "n1", None, factor=8, seed=1)  # its metric is not defined
    assert taken(tmp_path) == ("a1", 0.7)
    for seed in (1, 2, 3):
        shutil.rmtree(tmp_path / f"a{seed}")
    best = delora.best(tmp_path)
    assert best.folder.name == "d1" and best.diverged == 1 and "1 more diverged" in str(best)
    for name in ("d1", "d3", "f1"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match=r"no trial is done \(.*1 diverged.*1 failed"):
        delora.best(tmp_path)


def test_equals_go_to_fewer_trained_values_then_to_the_first(tmp_path):
    for name, factor in (("b", 1), ("a", 2), ("c", 4)):
        for seed in (2, 1):
            write(tmp_path / f"{name}{seed}", 0.8, factor=factor, seed=seed)
    assert taken(tmp_path) == ("a1", 0.8)
    for seed in (1, 2):
        fake_trials.change(tmp_path / f"c{seed}", parameters__adapter=5)
    assert taken(tmp_path) == ("c1", 0.8)


def test_several_tasks_or_data_are_asked_about(tmp_path):
    for task in ("mrpc", "cola"):
        for method in ("lora", "dora"):
            write(tmp_path / f"{task}-{method}", 0.7 + 0.1 * (method == "dora"), task=task, method=method)
    with pytest.raises(UserError, match="several tasks, say which task: cola, mrpc"):
        delora.best(tmp_path)
    assert taken(tmp_path, task="cola") == ("cola-dora", 0.8)
    assert taken(tmp_path, task="cola", method="lora") == ("cola-lora", 0.7)
    for options, told in (
        ({"task": "rte"}, "task=rte: expected one of cola, mrpc"),
        ({"method": "dorra"}, "method=dorra: expected one of dora, lora; did you mean dora"),
        ({"task": "mrpc", "by": "f2"}, "by=f2: expected one of validation, accuracy"),
        ({"task": "mrpc", "by": "test"}, "by=test: expected one of"),
    ):
        with pytest.raises(UserError, match=told):
            delora.best(tmp_path, **options)
    write(tmp_path / "standard", 0.9, protocol="standard")
    with pytest.raises(UserError, match="several protocols or data"):
        delora.best(tmp_path, task="mrpc")
    with pytest.raises(UserError, match="no such folder"):
        delora.best(tmp_path / "nowhere")


def test_the_table_holds_all_trials_and_what_differs(tmp_path):
    write(tmp_path / "a", 0.8, 0.7, method="lora", seed=1)
    write(tmp_path / "b", 0.6, 0.5, method="dora", seed=2, factor=2, status="diverged")
    write(tmp_path / "c", 0.6, 0.5, method="lora", seed=3, status="failed", epochs=3)
    (write(tmp_path / "d", 0.6, method="lora", seed=4) / "result.json").unlink()
    table = delora.results(tmp_path)
    assert list(table.status) == ["done", "diverged", "failed", "unfinished"] and list(table.seed) == [1, 2, 3, 4]
    first = table.iloc[0]
    assert (first.task, first.method, first.model, first.metric) == ("mrpc", "lora", "minilm", "accuracy")
    assert (first.validation, first.test, first["validation.loss"]) == (0.7, 0.8, 0.4)
    assert (first.parameters, first.head_parameters, first.seconds) == (73728, 770, 61.0 / 8)
    assert first.folder == str(tmp_path / "a") and table.lr.tolist() == [6e-4, 12e-4, 6e-4, 6e-4]
    assert table["method.train_magnitude"].tolist()[1] and pandas.isna(table["method.train_magnitude"][0])
    assert table.epochs.tolist() == [10, 10, 3, 10] and "batch_size" not in table
    assert table.validation.isna().tolist() == [False, False, True, True]


def test_the_package_shows_what_there_is_and_imports_nothing_heavy(tmp_path):
    write(tmp_path / "a", 0.8)
    code = f"""
import sys, delora
assert dir(delora) == ["__version__", "best", "load", "predictions", "results"], dir(delora)
assert delora.best({str(tmp_path)!r}).score == 0.8
heavy = {{"torch", "transformers", "pandas"}} & set(sys.modules)
assert not heavy, heavy
assert len(delora.results({str(tmp_path)!r})) == 1 and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Path(delora.__file__).with_name("py.typed").exists()
    with pytest.raises(AttributeError, match="bst"):
        _ = delora.bst


def test_the_report_and_the_loading_of_a_sweep_say_it(tmp_path, capsys):
    for seed, score in ((1, 0.7), (2, 0.8)):
        write(tmp_path / f"a {seed}", score, seed=seed)
    folder = tmp_path / "a 2"
    told = [
        "best mrpc: lora, accuracy 0.8000 on validation, 0.7500 in the mean of 2 seeds, 0.8000 on test",
        f"  folder      {folder}",
        f"  made again  delora-run --again '{folder}'",
        f'  loaded      delora.load("{folder}")',
    ]
    assert report([str(tmp_path), "--only", "page"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == told
    assert report([str(tmp_path), "--only", "table", "--format", "csv"]) == 0
    output = capsys.readouterr()
    assert "best mrpc" not in output.out and output.err.splitlines()[:4] == told
    with pytest.raises(UserError) as raised:
        delora.load(tmp_path)
    assert str(raised.value).splitlines() == [f"{tmp_path} is no trial's folder, but holds 2 of them.", *told]
    with pytest.raises(UserError, match="no trial has ended here"):
        delora.load(Path(os.devnull).parent)


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    """A trial's folder."""
    folder = tmp_path_factory.mktemp("first")
    run([compose_trial(*SMALL, *FEW, "method=lora", "epochs=1", "seed=7", f"output_dir={folder}", "sweep=s", "name=x")])
    return folder / "s" / "x"


def test_a_trial_is_repeated_from_its_folder(trial, tmp_path):
    answer = command("--again", str(trial), cwd=tmp_path)
    assert answer.returncode == 0 and "Traceback" not in answer.stderr, answer.stderr
    first, second = storage.read(trial), storage.read(tmp_path / "outputs" / "x-again")
    for name in (storage.ADAPTER, storage.PREDICTIONS):
        ours, theirs = first.tensors(name, "pt"), second.tensors(name, "pt")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = again.differences(first.result, second.result)
    if lines:  # processes may have other numbers of threads
        assert all("determinism" in line for line in lines) and "\n".join(lines) in answer.stdout
    else:
        assert f"the same config, versions, data, weights and scores as {trial}\n" in answer.stdout


def test_a_repetition_says_what_it_was_told_to_change_and_what_is_other(trial, tmp_path):
    stored = storage.without_hashes(storage.read(trial).result)
    stored["made_by"]["torch"], stored["made_by"]["data"]["sha256"] = "1.0", "0" * 64
    shutil.copytree(trial, tmp_path / "x")
    (tmp_path / "x" / "result.json").write_text(json.dumps(stored))
    answer = command("--again=x", "method.rank=4", "name=y", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "x was made by other versions than those here:\n" in answer.stderr and "  torch: 1.0 → " in answer.stderr
    told = answer.stdout.partition("what differs from x:\n")[2]
    assert "  method.rank: 8 → 4\n" in told and "  torch: 1.0 → " in told and f"  data.sha256: {'0' * 64} → " in told
    config = yaml.safe_load((tmp_path / "outputs" / "y" / "config.yaml").read_text())
    assert config["seed"] == 7 and config["method"]["rank"] == 4 and config["sweep"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--again", "{}", "method=dora"], "method=dora: --again keeps the trial's method"),
        (["--again", "{}", "method.rnk=4"], "did you mean method.rank?"),
        (["--again", "{}/.."], "is no trial's folder, but holds 1 of them"),
        (["seed=1", "--again"], "--again FOLDER: expected the folder"),
        (["--again", "{}", "--config-name", "x"], "without --config-dir"),
        (["--config-dir", "{}", "--config-name", "config"], "to repeat the trial there, --again {}"),
    ],
)
def test_what_cannot_be_repeated_is_refused(trial, tmp_path, words, told):
    answer = command(*(word.format(trial) for word in words), cwd=tmp_path)
    assert answer.returncode == 2 and told.format(trial) in answer.stderr and "Traceback" not in answer.stderr
    assert answer.stdout == "" and not list(tmp_path.iterdir())


def test_a_stranger_s_folder_runs_no_code_of_its_own(trial, tmp_path):
    for key, value in (
        ("method._target_", "evil.Method"),
        ("model.package", "evil"),
        ("output_dir", "${oc.env:HOME}"),
        ("task.metric", ["evil"]),
    ):
        stored = storage.without_hashes(storage.read(trial).result)
        part, _, name = key.rpartition(".")
        (stored["config"][part] if part else stored["config"])[name] = value
        folder = tmp_path / name
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(stored))
        with pytest.raises(
            UserError, match=r"no method of delora|no file of conf/model|no value of a resolved|none of delora's"
        ):
            again.take(str(folder), [])
    assert "evil" not in sys.modules


def test_the_end_of_a_sweep_says_which_trial_to_take(trial, capsys):
    result = storage.read(trial).result
    trials = [compose_trial(*SMALL, *FEW, "method=lora", f"seed={seed}", "sweep=s") for seed in (7, 8)]
    other = {**result, "config": {**result["config"], "seed": 8}}
    print_results(trials, [result, other])
    out = capsys.readouterr().out
    assert out.startswith("best mrpc: lora, accuracy ") and f"delora-run --again {trials[0].folder}\n" in out
