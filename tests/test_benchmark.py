"""The benchmark: what it measures does the same work, and its figures follow from its measurements."""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE, compose_trial, load_script

from delora.model import Fleet
from delora.pretrained import load
from delora.randomness import Dropout
from delora.run import prepare
from delora.tasks import TASKS

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
SMALL = ["--model", "tiny", "--trials", "1", "3", "--steps", "1", "--turns", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """The figures, and what is printed."""
    path = tmp_path_factory.mktemp("benchmark") / "figures.json"
    rows = ["--rows", "packed floor", "trainer", "peft compiled", "--methods", "dora", "delora", "--without", "pruning"]
    command = [sys.executable, str(SCRIPT), *SMALL, *rows, "--profile", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_each_row_is_measured_each_turn(run):
    figures, printed = run
    rows = ["fleet 1", "fleet 3", "packed floor", "trainer", "dora 3", "delora 3", "no pruning 3"]
    assert list(figures["seconds_per_step"]) == rows  # PEFT is compiled on a GPU alone
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in figures["seconds_per_step"].values())
    assert "lora, 3 trials" in printed and "dora, 3 trials" in printed and "lora without pruning, 3 trials" in printed
    assert figures["versions"].keys() == {"torch", "transformers", "peft"} and figures["hardware"]


def test_goals_are_compared_with_medians(run):
    figures, printed = run
    median = {name: statistics.median(seconds) for name, seconds in figures["seconds_per_step"].items()}
    achieved = figures["achieved"]
    assert achieved["trainer"] == pytest.approx(median["trainer"] / median["fleet 3"] * 3)
    slower = max(median["fleet 3"], median["dora 3"], median["delora 3"]) / 3
    assert achieved["floor"] == pytest.approx(slower / median["packed floor"])
    assert 1 <= achieved["tokens"] < 1.3
    for name, reached in (("trainer", achieved["trainer"] >= 2.5), ("floor", achieved["floor"] <= 1.15)):
        goals = (line for line in printed.splitlines() if re.search("at (least|most)", line))
        line = next(line for line in goals if f" {achieved[name]:.3g} " in line)
        assert ("reached" if reached else "missed by") in line


def test_profile_and_memory_are_of_the_fleet_alone(run):
    figures, printed = run
    spent = figures["profile_seconds"]
    assert spent["matrix products"] > 0 and spent["hashing for dropout"] > 0 and "under the profiler" in printed
    small, large = (figures["peak_bytes"][size] for size in "13")
    assert 1e8 < small < 2e9 and small * 0.9 < large < 2e9


def test_rows_for_which_the_time_is_up_are_named():
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--trials", "2", "--steps", "1", "--minutes", "0"]
    done = subprocess.run([*command, "--rows", "peft"], capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 0, done.stderr
    assert "not reached in 0 minutes: peft" in done.stdout and "lora, 2 trials" in done.stdout


@pytest.mark.parametrize("model", ["tiny", "minilm"])
def test_without_pruning_the_same_is_computed(model):
    trials = [compose_trial(f"model={model}", "data=synthetic", f"seed={seed}") for seed in range(2)]
    _, tokens, _ = prepare(trials[0])
    losses = []
    for what in (None, "pruning"):
        base = load(trials[0].model, TASKS["mrpc"]).model
        with load_script("benchmark").left_out(base, what):
            fleet = Fleet(base, trials, torch.device("cpu"))
        assert any(module.of_first for module in fleet.modules() if isinstance(module, Dropout)) == (what is None)
        batch = tokens["train"].gather(torch.arange(8).expand(2, -1))
        fleet.keys.set(batch.layout, torch.tensor(3), 0)
        losses.append(fleet.train().logits(batch))
    assert torch.allclose(*losses, rtol=0, atol=1e-6)


def test_a_users_mistake_is_told_in_one_line():
    command = [sys.executable, str(SCRIPT), *SMALL, "--methods", "dorra"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE)
    assert done.returncode == 1 and "did you mean dora?" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_pairs_are_as_long_as_mnlis_and_their_tokens_are_timed():
    benchmark = load_script("benchmark")
    options = argparse.Namespace(
        model="minilm", method="lora", batch_size=32, device="cpu", precision="float32", data=None, task="mrpc"
    )
    pairs = benchmark.pairs_like_mnli(options, 2000)
    premise, hypothesis = (
        statistics.fmean(len(text.split()) - 1 for text in column) for column in zip(*pairs, strict=True)
    )
    assert len(pairs) == 2000 and premise == pytest.approx(20, abs=1) and hypothesis == pytest.approx(10, abs=0.5)
    measured = benchmark.tokenize(options, 2000)
    assert 32 < measured["tokens"] / 2000 < 42 and measured["seconds"] > 0
    assert 1e8 < measured["loaded_bytes"] <= measured["peak_bytes"]


def test_texts_are_predicted_beside_a_pipeline_with_the_same_probabilities(tmp_path, capsys):
    benchmark = load_script("benchmark")
    options = argparse.Namespace(
        **{"model": "tiny", "method": "lora", "batch_size": 4, "device": "cpu", "precision": "float32", "data": None},
        **{"task": "mrpc", "predict": 12, "turns": 2, "json": tmp_path / "rates.json"},
    )
    benchmark.report_predicting(options)
    rates, lines = json.loads((tmp_path / "rates.json").read_text()), capsys.readouterr().out.splitlines()
    assert list(rates) == ["delora", "pipeline, batch 8", "pipeline, batch 4"]
    assert all(len(several) == 2 and min(several) > 0 for several in rates.values())
    assert all(float(line.rpartition(" ")[2]) < 1e-5 for line in lines)
