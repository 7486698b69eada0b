"""Multiruns through the real command in real processes: fleets, interruptions, failures, other launchers."""

import contextlib
import cProfile
import itertools
import json
import os
import pstats
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FEW, OFFLINE, RUN, SMALL, command, compose_trial, compose_trials, load_script
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from delora import cost, overrides, storage, sweep
from delora.cli import conf_folder
from delora.config import ConfigError, Trial
from delora.errors import UserError
from delora.fleets import Group
from delora.interrupts import Interrupted
from delora.methods.lora import LoRA
from delora.plan import plan
from delora.pretrained import byte_tokenizer
from delora.run import Recorder, StateFile, read_state, write_state
from delora.sweep import Sweep, run
from hydra_plugins.delora_fleet import FleetLauncher

GRID = ["method=delora,lora", "lr_factor=0.5,2", "seed=1,2", "name=s", "-m"]
WANDB = ["logger=wandb", "logger.mode=offline"]
QUICK = ["epochs=4", "log_every=1", "fleet.checkpoint_seconds=0"]  # a checkpoint after every step

crash_test = load_script("crash_test")
everything, times, written = crash_test.everything, crash_test.times, crash_test.written


def begin(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = os.environ | OFFLINE | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*RUN, *arguments], cwd=cwd, env=environment, text=True, **pipes)


def logged(folders: Path) -> int:
    """Bytes that training logged in the folders of that pattern."""
    return sum(path.stat().st_size for path in folders.parent.glob(f"{folders.name}/metrics.jsonl"))


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.02)


# --- Which trials train together


def test_fleets_are_made_of_what_may_differ():
    same = [
        ["lr=1e-3", "seed=1"],
        ["lr=1e-3", "seed=2"],
        ["lr_factor=8", "weight_decay=0.3"],
        ["warmup_ratio=0.5", "method.lambda_init=3", "method.lambda_lr=0.1", "method.dropout=0.2"],
        ["lr_factor=2", "lr_factor_on=lambda"],
    ]
    other = [["method.rank=4"], ["epochs=3"], ["batch_size=8"], ["method=lora"], ["task=rte"], ["precision=float64"]]
    trials = [compose_trial(*SMALL, "fleet.size=50", *words) for words in [*same, *other]]
    groups = plan(trials, {trial.folder: trial for trial in trials})
    assert [len(group.trials) for group in groups] == [len(same)] + [1] * len(other)


@pytest.mark.parametrize(("size", "parts"), [(1, [1] * 5), (2, [1, 2, 2]), (4, [2, 3]), (5, [5]), (9, [5])])
def test_fleets_are_of_even_size(size, parts):
    trials = [compose_trial(*SMALL, f"fleet.size={size}", f"seed={seed}") for seed in range(5)]
    groups = plan(trials, {trial.folder: trial for trial in trials})
    assert [len(group.trials) for group in groups] == parts
    assert [trial for group in groups for trial in group.trials] == trials


@pytest.fixture
def launcher():
    """As Hydra sets it up for a multirun."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        launcher = FleetLauncher()
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        launcher.setup(hydra_context=context, task_function=lambda config: None, config=master)
    return launcher


def test_jobs_are_composed_as_hydra_composes_them(launcher):
    choices = itertools.product(("delora", "lora", "ether", "dora"), ("mrpc", "rte"), range(25))
    jobs = [
        [f"method={m}", f"task={t}", f"seed={s}", "lr_factor=3", "experiment=quickstart", "+method.targets=[key]"]
        for m, t, s in choices
    ]
    rows = ("{train:8}", "{train:9,validation:8}", "null", "{validation:7}")
    parts = [["data=synthetic", f"data.rows={r}", f"lr={lr}"] for r in rows for lr in ("1", "${seed}", "2")]
    parts += [["data=synthetic", "data.rows=null"], ["data=synthetic", "data.rows.train=5"], ["seed=7"]]
    jobs = [*jobs[::23], *parts, *jobs[::31]]
    for words, trial in zip(jobs, launcher.trials(jobs), strict=True):
        theirs = launcher.context.config_loader.load_sweep_config(launcher.config, words)
        with open_dict(theirs):
            theirs.pop("hydra")
        assert trial == Trial.from_config(theirs), words


def test_a_job_is_checked_and_composed_in_less_calls_than_copying_its_config_takes(launcher):
    jobs = [["model=minilm", "method=lora", f"seed={seed}"] for seed in range(100)]
    config = launcher.context.config_loader.load_sweep_config(launcher.config, jobs[0])
    with open_dict(config):
        config.pop("hydra")

    def calls(work: Callable[[], object]) -> int:
        """How many calls Python makes: what takes time here, and the same on a busy machine."""
        profile = cProfile.Profile()
        profile.runcall(work)
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    copying = calls(lambda: [OmegaConf.to_container(config.copy(), resolve=False) for _ in jobs])
    assert calls(lambda: launcher.trials(jobs)) < copying
    words = [*jobs[0][:2], "seed=range(100)"]
    assert calls(lambda: overrides.check(words, conf_folder(), multirun=True)) < copying


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["seed=range(0,10000000)"], "seed=range(0,10000000): 10,000,000 trials, a sweep has at most 100,000"),
        (["lr=range(0.1,1e9,0.1)"], "lr=range(0.1,1e9,0.1): 9,999,999,999 trials"),
        (["seed=range(100000)", "method=lora"], None),
        (["seed=range(50001)", "lr=1,2", "task=mrpc"], "seed=range(50001) lr=1,2: 100,002 trials"),
        (["epochs=range(1,100001)", "lr=choice(1,2)", "hydra/sweeper=search"], None),
    ],
)
def test_a_sweep_of_too_many_trials_is_refused_before_it_is_expanded(words, fault, monkeypatch):
    monkeypatch.setattr(Trial, "check", classmethod(lambda *_: (None, [])))  # of each value, which takes its time
    if fault is None:
        overrides.check(words, conf_folder(), multirun=True)
        return
    with pytest.raises(ConfigError) as caught:
        overrides.check(words, conf_folder(), multirun=True)
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(fault)


def test_an_interrupted_fleet_goes_on_whole_or_not_at_all(tmp_path, capsys):
    common = [*SMALL, *FEW, "method=lora", "sweep=s", f"output_dir={tmp_path}", "fleet.size=8"]
    trials = compose_trials(common, [{"seed": seed} for seed in range(4)])
    known, group = {trial.folder: trial for trial in trials}, Group(tuple(trials[:3]))

    def fleets(missing) -> list[list[int]]:
        return [[trial.seed for trial in one.trials] for one in plan(missing, known)]

    group.keep()
    assert fleets(trials) == [[0, 1, 2], [3]]
    assert fleets(trials[1:]) == [[1, 2, 3]]  # nothing was trained, so nobody needs the first one's company
    group.state.write_bytes(b"")
    assert fleets(trials) == fleets(trials[1:]) == [[0, 1, 2], [3]]
    assert fleets(trials[3:]) == [[3]]
    sweep.print_plan(trials)
    told = capsys.readouterr().out
    assert told.count(", begun") == 1 and "4 trials: 0 done, 4 to run in 2 fleets" in told


def test_a_sweep_grows_by_tasks_with_values_of_their_own(tmp_path):
    common = [*SMALL, *FEW, "method=lora", "sweep=s", f"output_dir={tmp_path}"]
    [first] = compose_trials([*common, "task=mrpc", "epochs=2"], [{}])
    storage.open_trial(first.folder, first.resolved()).close()
    Sweep(compose_trials([*common, "task=rte", "epochs=3"], [{}]))
    with pytest.raises(UserError, match="epochs: 2 → 3"):
        Sweep(compose_trials([*common, "task=mrpc", "epochs=3"], [{}]))


def test_a_plan_adds_up_what_was_measured_and_what_is_estimated(monkeypatch, capsys):
    """Three of five trials have run, in a fleet that took 90 s; of another method nothing is known."""
    lora = [compose_trial(*SMALL, *FEW, "method=lora", "fleet.size=1", f"seed={seed}") for seed in range(5)]
    dora = [compose_trial(*SMALL, *FEW, "method=dora", "fleet.size=2", f"seed={seed}") for seed in range(4)]
    run = {"seconds": {"total": 90.0}, "fleet_size": 3}
    monkeypatch.setattr(sweep, "finished", lambda trial: run if trial in lora[:3] else None)
    monkeypatch.setattr(cost, "seconds", lambda trials, tokens, device: 110.0 * len(trials))
    sweep.print_plan([*lora, *dora])
    *table, total = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in table[-4:]]
    assert [(row[1], " ".join(row[-2:])) for row in rows] == [("1", "30 s")] * 2 + [("2", "4 min")] * 2
    assert total == "9 trials: 3 done, 6 to run in 4 fleets, roughly 8 min. Nothing was trained."
    monkeypatch.setattr(cost, "seconds", lambda *_: None)
    sweep.print_plan([*lora, *dora])
    *table, total = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in table[-2:]] == ["unknown"] * 2 and "roughly 60 s and what is unknown" in total


# --- One sweep


def test_forty_trials_with_minilm(tmp_path):
    words = ["-m", "model=minilm", "data=synthetic", "data.rows.train=8", "data.rows.validation=8", "epochs=1"]
    words += ["batch_size=4", "max_length=16", "method=delora,lora,dora,ether,etherplus", "lr_factor=0.5,1,2,4"]
    words += ["seed=42,43", "name=forty", "logger=none"]
    planned = command(*words, "plan=true", cwd=tmp_path)
    assert "40 trials: 0 done, 40 to run in 5 fleets" in planned.stdout, planned.stderr
    assert not (tmp_path / "outputs").exists()
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    root = tmp_path / "outputs" / "forty"
    assert all(f"mrpc {method} " in answer.stdout for method in ("delora", "lora", "dora", "ether", "etherplus"))
    assert "×0.5" in answer.stdout and "synthetic data" in answer.stdout
    assert answer.stdout.endswith("delora-report outputs/forty\n")
    found = storage.find(root)
    assert len(found.trials) == 40 and not found.problems and {t.result["fleet_size"] for t in found.trials} == {8}
    assert {(t.result["sweep"], t.result["status"]) for t in found.trials} == {("forty", "done")}
    assert not (root / ".fleets").exists() and not list(tmp_path.glob("outputs/*.yaml"))

    before = times(root)
    removed = found.trials[7].folder
    shutil.rmtree(removed)
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0 and "39 of 40 trials are done already" in again.stderr
    after = times(root)
    assert [name for name in after if before[name] != after[name]] == [removed.name]
    nothing = command(*words, cwd=tmp_path)
    assert nothing.returncode == 0 and nothing.stdout == answer.stdout
    assert "40 of 40 trials are done already" in nothing.stderr and times(root) == after
    assert "40 done, 0 to run" in command(*words, "plan=true", cwd=tmp_path).stdout


def test_the_same_name_with_another_config_is_refused_with_the_difference(tmp_path):
    words = [*SMALL, *FEW, "-m", "method=lora", "name=s"]
    assert command(*words, "seed=1,2", "epochs=1", cwd=tmp_path).returncode == 0
    changed = command(*words, "seed=1,2", "epochs=2", "method.rank=4", cwd=tmp_path)
    assert changed.returncode == 2 and "Traceback" not in changed.stderr
    assert "epochs: 1 → 2" in changed.stderr and "method.rank: 8 → 4" in changed.stderr
    assert "resume=force" in changed.stderr
    # other seeds, rates and more values are no change
    grown = command(*words, "epochs=1,2", "lr_factor=2", "seed=3", cwd=tmp_path)
    assert grown.returncode == 0, grown.stderr
    forced = command(*words, "seed=1,2", "epochs=3", "resume=force", cwd=tmp_path)
    assert forced.returncode == 0, forced.stderr
    assert len(storage.find(tmp_path / "outputs" / "s").trials) == 6


# --- One training under several names


ONE = ["all", "adapter", "lambda"]  # the same at factor 1


def names_of_one(folder: Path, *words: str, on: list[str] = ONE) -> list[Trial]:
    common = [*SMALL, *QUICK, "epochs=2", "method=delora", "method.dropout=0.1", "sweep=s", f"output_dir={folder}"]
    return compose_trials([*common, *words], [{"lr_factor_on": name} for name in on])


def test_what_is_one_training():
    delora, lora = (["model=tiny", "data=synthetic", f"method={method}"] for method in ("delora", "lora"))
    changes: list[dict[str, object]] = [
        {"lr": 0.002, "lr_factor": 0.5},
        {"lr": 0.001},
        {"lr": 0.001, "method.base_lr": 7.0},
        {"lr": 0.001, "lr_factor_on": "adapter"},
        {"lr": 0.001, "weight_decay": 0.3},
        {"lr": 0.001, "seed": 7},
        {"lr": 0.002, "lr_factor": 0.5, "lr_factor_on": "adapter"},
    ]
    trials = compose_trials(lora, changes)
    assert [trial.training == trials[0].training for trial in trials] == [True] * 4 + [False, False, True]
    trials = compose_trials(delora, changes)  # the factor is on λ's rate too
    assert [trial.training == trials[1].training for trial in trials] == [False, True, True, True, False, False, True]
    assert len({trial.id for trial in trials}) == len(trials)


def test_one_training_stands_under_each_name(tmp_path):
    trials = names_of_one(tmp_path)
    first, *others = run(trials)
    assert "trained_as" not in first and {other["trained_as"] for other in others} == {trials[0].id}
    assert [other["fleet_size"] for other in others] == [1, 1]
    stored = [storage.read(trial.folder) for trial in trials]
    for trial, one in zip(trials, stored, strict=True):
        assert one.result["config"] == trial.resolved() and one.result["id"] == trial.id
        for name in (storage.METRICS, storage.ADAPTER, storage.PREDICTIONS):
            assert one.content(name) == stored[0].content(name)
    alone = names_of_one(tmp_path / "alone", on=["lambda"])
    run(alone)
    parts = ["steps", "evaluations", "tensors"]
    ours, theirs = (everything(t.folder.parent)[t.folder.name][1:] for t in (trials[2], alone[0]))
    assert dict(zip(parts, ours, strict=True)) == dict(zip(parts, theirs, strict=True))


def test_a_name_is_added_without_training(tmp_path, monkeypatch):
    [first] = names_of_one(tmp_path, on=["lambda"])
    run([first])
    trials = names_of_one(tmp_path)

    def train(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr("delora.run.run_fleet", train)
        assert [result.get("trained_as") for result in run(trials)] == [first.id, first.id, None]
        shutil.rmtree(trials[1].folder)
        assert [result.get("trained_as") for result in run(trials)] == [first.id, first.id, None]


@pytest.mark.parametrize("until", [storage.METRICS, storage.ADAPTER, storage.PREDICTIONS, storage.RESULT])
def test_a_copy_that_was_killed_is_made_again(tmp_path, until, monkeypatch):
    trials = names_of_one(tmp_path, on=["all", "adapter"])
    save = storage.TrialFolder.save

    def killed(folder: storage.TrialFolder, name: str, data: bytes) -> None:
        if folder.path == trials[1].folder and name == until:
            raise KeyboardInterrupt
        save(folder, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(storage.TrialFolder, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(trials)
    assert not (trials[1].folder / storage.RESULT).exists()
    assert [result["status"] for result in run(trials)] == ["done", "done"]
    first, second = (storage.read(trial.folder) for trial in trials)
    assert second.result["trained_as"] == first.result["id"] and list(second.steps()) == list(first.steps())


def test_a_damaged_file_stands_for_nothing(tmp_path, capsys):
    trials = names_of_one(tmp_path, on=["all", "adapter"])
    run(trials[:1])
    adapter = trials[0].folder / storage.ADAPTER
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x7f")
    assert [bool(result) for result in run(trials)] == [True, False]
    assert f"{adapter}: damaged" in " ".join(capsys.readouterr().err.split())
    assert not (trials[1].folder / storage.RESULT).exists()


def test_a_failed_training_is_tried_under_its_other_names(tmp_path, plugin):
    words = [*SMALL, *FEW, "--config-dir", "conf", "-m", "method=fails", "method.alpha=13", "name=s"]
    answer = command(*words, "lr_factor_on=all,adapter", cwd=tmp_path, env=plugin)
    assert answer.returncode == 1 and answer.stderr.count("failed: ZeroDivisionError: thirteen") == 2, answer.stderr


# --- Interruptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a sweep finds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    answer = command(*SMALL, *QUICK, *GRID, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return everything(folder / "outputs" / "s")


def test_killed_and_without_power_the_results_are_the_same_to_the_bit(tmp_path):
    """With an encoder that was saved and loaded, dropout on. scripts/crash_test kills more often."""
    encoder = tmp_path / "encoder"
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=261, max_position_embeddings=64, pad_token_id=1, **shape)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(encoder)
    byte_tokenizer().save_pretrained(encoder)
    words = [f"model.source={encoder}", "model=roberta_base", "model.shape=null", "epochs=3"]
    script = [sys.executable, crash_test.__file__, "--output", tmp_path / "crash"]

    def kill(times: int) -> str:
        environment = os.environ | {"PYTHONPATH": str(Path(crash_test.__file__).parents[1])}
        command = [*script, "--kills", str(times), *words]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout.splitlines()[-1]

    assert kill(3).startswith("3 kills") and (told := kill(5)).startswith("5 kills") and "0 mismatches" in told
    assert "(2 kills in" in told and not told.endswith("0 then without power")


def test_what_the_crash_test_compares():
    """A check that finds nothing in anything would find nothing."""
    safe, there = b"one\ntwo\n", b"one\ntwo\nthree\n"
    left = {crash_test.torn(there, safe, random.Random(seed)) for seed in range(200)}
    assert there in left and safe in left and safe + bytes(6) in left and all(one.startswith(safe) for one in left)
    assert {crash_test.torn(b"two\n", safe, random.Random(seed)) for seed in range(20)} == {safe, b"two\n"}


def test_a_signal_saves_first(tmp_path, whole):
    words, root = [*SMALL, *QUICK, *GRID, "fleet.checkpoint_seconds=1000"], tmp_path / "outputs" / "s"
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        files, size = written(root), logged(root / "*delora*")
        process = begin(*words, cwd=tmp_path)
        wait_for(process, lambda size=size: logged(root / "*delora*") > size)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert "goes on from the last checkpoint" in errors and "Traceback" not in errors
        [state] = (root / ".fleets").glob("*/state.safetensors")
        assert load_file(state)["values"].shape[0] == 4
        assert written(root)[str(state)] != files.get(str(state))
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert everything(root) == whole


def test_two_processes_share_a_sweep(tmp_path, whole):
    pair = [begin(*SMALL, *QUICK, *GRID, "fleet.size=2", cwd=tmp_path) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    assert everything(tmp_path / "outputs" / "s").keys() == whole.keys()
    assert all(trial.result["fleet_size"] == 2 for trial in storage.find(tmp_path / "outputs" / "s").trials)
    assert any("in use by process" in error and "Waiting for it;" in error for error in errors)


# --- What kills and disks leave


PAIR = [*SMALL, *QUICK, "method=delora", "method.dropout=0.1", "sweep=s"]


def pair(folder: Path, *words: str) -> list[Trial]:
    """Two trials of one fleet."""
    return [compose_trial(*PAIR, f"output_dir={folder}", f"seed={seed}", *words) for seed in (1, 2)]


def interrupt(trials: list[Trial], monkeypatch, step: int = 6) -> Path:
    """Trains until a signal comes in that step; the fleet's folder."""

    def stop(recorder: Recorder, at: int, *others: object) -> None:
        record(recorder, at, *others)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    record = Recorder.step
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "step", stop)
        with pytest.raises(Interrupted):
            run(trials)
    [fleet] = (trials[0].folder.parent / ".fleets").iterdir()
    return fleet


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the pair finds undisturbed."""
    trials = pair(tmp_path_factory.mktemp("both"))
    run(trials)
    return everything(trials[0].folder.parent)


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "gone", "state"])
def test_a_log_that_lost_what_its_checkpoint_promised_begins_anew(tmp_path, both, damage, monkeypatch, caplog):
    trials = pair(tmp_path)
    fleet = interrupt(trials, monkeypatch)
    log = trials[1].folder / storage.METRICS
    data = log.read_bytes()
    assert len(data.splitlines()) == 8  # 6 steps, 2 evaluations
    match damage:
        case "cut":
            log.write_bytes(data[: data.index(b"\n") + 1])
        case "flipped":
            log.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        case "gone":
            shutil.rmtree(trials[1].folder)
        case "state":
            state = fleet / "state.safetensors"
            state.write_bytes(state.read_bytes()[:-1] + b"\x7f")
    assert [result["status"] for result in run(trials)] == ["done", "done"]
    assert everything(trials[0].folder.parent).keys() == both.keys()
    told = {"none": "", "state": "not a fleet's state"}.get(damage, f"{log} is not as the last checkpoint left it")
    assert told in caplog.text and bool(told) == bool(caplog.text)
    found, sizes = everything(trials[0].folder.parent), [r.result["fleet_size"] for r in storage.find(tmp_path).trials]
    anew = damage in ("cut", "flipped", "gone")
    for trial in trials[: 1 if anew else 2]:
        assert found[trial.folder.name] == both[trial.folder.name]
    if anew:  # alone, so that its last digits are others
        ours, theirs = (one[trials[1].folder.name] for one in (found, both))
        assert [line["step"] for line in ours[1]] == [line["step"] for line in theirs[1]]
        assert [line["epoch"] for line in ours[2]] == [line["epoch"] for line in theirs[2]]
        for part in (1, 2):
            assert [line["loss"] for line in ours[part]] == pytest.approx([line["loss"] for line in theirs[part]])
    assert sizes.count(1) == anew and not fleet.parent.exists()


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        *(
            "",
            "{",
            "null",
            "[]",
            '["a"]',
            "[1, 2]",
            '{"a": 1}',
            '"text"',
            '["../x", "y"]',
            '["\\ud800"]',
            "[" * 100_000,
        ),
        *("folder", "pipe", "link", "gone"),
    ],
)
def test_damaged_trials_of_a_fleet_are_set_aside(tmp_path, caplog, damage, begun):
    trials = pair(tmp_path)
    group = Group(tuple(trials))
    group.keep()
    if begun:
        about = {"folders": [trial.folder.name for trial in trials]}
        write_state(group.state, tmp_path, {"values": torch.ones(2, 3)}, about)
    path = group.folder / "trials.json"
    path.unlink()
    match damage:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to("/dev/zero")
        case "gone":
            pass
        case _:
            path.write_text(damage)
    sweep = Sweep(trials)
    assert [len(one.trials) for one in plan(trials, sweep.trials)] == [2]
    sweep._tidy()
    assert [one.state.exists() for one in plan(trials, sweep.trials)] == [begun]
    if begun:  # the state knows its trials
        assert json.loads(path.read_text()) == [trial.folder.name for trial in trials]
        assert damage == "gone" or (f"{path}: damaged" in caplog.text and (group.folder / "trials.json.old-1").exists())
    else:
        assert not group.folder.exists()
        assert damage == "gone" or group.folder.with_name(f"{group.folder.name}.old-1").exists()
    caplog.clear()
    sweep._tidy()
    assert not caplog.text


def test_no_flipped_bit_of_a_state_is_taken(tmp_path):
    path, draw = tmp_path / "state.safetensors", random.Random(0)
    tensors = {"values": torch.arange(6.0).view(2, 3), "alive": torch.tensor([True, False]), "step": torch.tensor(7)}
    write_state(path, tmp_path, tensors, {"folders": ["a", "b"], "scored": 3})
    data, wanted = path.read_bytes(), repr(read_state(path))
    assert "arange" not in wanted and wanted != "None"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        stored = read_state(path)
        assert stored is None or same(stored, tensors)
    os.unlink(path)
    os.mkfifo(path)
    assert read_state(path) is None


def same(stored: tuple[dict, dict], tensors: dict[str, torch.Tensor]) -> bool:
    equal = all(torch.equal(stored[0][name], tensor) for name, tensor in tensors.items())
    return equal and stored[0].keys() == tensors.keys() and stored[1] == {"folders": ["a", "b"], "scored": 3}


def test_what_a_kill_after_the_last_result_leaves_is_mended_by_the_same_command(tmp_path, monkeypatch):
    """The fleet's folder, and the sweep's summary, which wandb did not get."""
    monkeypatch.delenv("WANDB_DIR", raising=False)
    trials = pair(tmp_path, *WANDB, "lr_factor=2")
    root = trials[0].folder.parent

    class Kill(BaseException):
        pass

    def kill(_: StateFile) -> None:
        raise Kill

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(StateFile, "delete", kill)
        run(trials)
    assert len(times(root)) == 2 and list(root.glob(".fleets/*/state.safetensors"))
    assert not list(root.glob("wandb/*summary*"))
    before = times(root)
    run(trials)
    assert times(root) == before and not (root / ".fleets").exists()
    assert len(list(root.glob("wandb/offline-run-*summary*"))) == 1
    run(trials)
    assert len(list(root.glob("wandb/offline-run-*summary*"))) == 1


def test_what_a_kill_leaves_of_a_fleet_that_has_not_begun_or_has_ended_is_removed(tmp_path, caplog):
    trials, fleets = pair(tmp_path, *FEW, "epochs=1"), tmp_path / "s" / ".fleets"
    run(trials)
    for files in ([], [".trials.json.tmp"], [".trials.json.tmp", ".state.safetensors.tmp"]):
        for with_folder in (True, False):
            fleets.mkdir()
            if with_folder or files:
                (fleets / "0123456789abcdef").mkdir()
            for name in files:
                (fleets / "0123456789abcdef" / name).write_text("[")
            run(trials)
            assert not fleets.exists() and "set aside" not in caplog.text


# --- What leaves no folder


TARGETS = ["delora.methods.nosuch.X", "delora.methods.lora.Nope", "delora.methods.base.Method", "os.system", "nosuch.X"]
TARGETS += ["delora.methods.lora.Tensor", "builtins.print", "collections.OrderedDict", "delora.nosuch", "antigravity.x"]


@pytest.mark.parametrize(
    "words",
    [
        *([f"method._target_={target}"] for target in TARGETS),
        *(["data.rows.validation=1"], ["batch_size=65"], ["method.targets=[pooler.nosuch]", "model.shape=null"]),
        *(["+method.nosuch=1"], ["method.lambda_init=null"], ["output_dir=OUT/file/deeper"]),
    ],
)
@pytest.mark.parametrize("size", ["null", "1"])
def test_an_error_found_before_training_leaves_no_folder(tmp_path, words, size, both):
    (tmp_path / "file").touch()
    if "model.shape=null" in words:
        words = [*words, "model=minilm"]
    words = [word.replace("OUT", str(tmp_path)) for word in words]
    try:
        trials = pair(tmp_path / "outputs" / "deeper", f"fleet.size={size}", *words)
        single = compose_trial(*PAIR[:-1], f"output_dir={tmp_path / 'outputs'}", f"fleet.size={size}", *words)
    except ConfigError:
        return  # found even earlier
    with pytest.raises(UserError):
        run([single])
    with contextlib.suppress(UserError):
        assert run(trials) == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Refuses(LoRA):
    """A user's method whose values are refused when it is built, with the encoder loaded and the folders open."""

    def __init__(self, weight_OI, draw, **options):
        raise ValueError("no such rank")


def test_an_error_of_one_fleet_leaves_others_as_they_are(tmp_path, both):
    good, bad = pair(tmp_path), pair(tmp_path, f"method._target_={__name__}.Refuses")
    assert [bool(result) for result in run([*good, *bad])] == [True, True, False, False]
    assert everything(tmp_path / "s") == both and len(list((tmp_path / "s").iterdir())) == 2
    assert [bool(result) for result in run([*good, *bad])] == [True, True, False, False]


# --- Folders of strangers


@pytest.mark.parametrize("link", ["s", "s/.fleets", "trial"])
def test_a_sweep_writes_through_no_link(tmp_path, link):
    trials, elsewhere = pair(tmp_path / "outputs"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = trials[0].folder if link == "trial" else tmp_path / "outputs" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere)
    with contextlib.suppress(UserError):
        assert run(trials)[0] is None
    assert not list(elsewhere.iterdir()) and place.is_symlink()


# --- Failures


PLUGIN = """
import torch
from delora.methods.lora import LoRA

class Fails(LoRA):
    def forward(self, x_KNI, *others):
        if (self.scale_K == 13 / 8).any():
            raise ZeroDivisionError("thirteen")
        return super().forward(x_KNI, *others)

class Large(LoRA):
    def forward(self, x_KNI, *others):
        if len(x_KNI) > 2:
            raise torch.OutOfMemoryError("no memory for more than two")
        return super().forward(x_KNI, *others)
"""


@pytest.fixture
def plugin(tmp_path):
    """A user's own methods, in a folder beside the run."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    lora = (Path(__file__).parents[1] / "conf" / "method" / "lora.yaml").read_text()
    for name in ("Fails", "Large"):
        text = lora.replace("delora.methods.lora.LoRA", f"mine.{name}").replace("name: lora", f"name: {name.lower()}")
        (tmp_path / "conf" / "method" / f"{name.lower()}.yaml").write_text(text)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}


def test_a_trial_that_fails_leaves_the_others_alone(tmp_path, plugin):
    words = [*SMALL, *FEW, "--config-dir", "conf", "-m", "method=fails", "method.alpha=8,9,13,10", "name=f"]
    answer = command(*words, cwd=tmp_path, env=plugin)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "failed: ZeroDivisionError: thirteen" in answer.stderr and "failed: outputs/f/" in answer.stdout
    found = storage.find(tmp_path / "outputs" / "f")
    assert sorted(t.result["config"]["method"]["alpha"] for t in found.trials) == [8, 9, 10]
    [failed] = found.unfinished
    assert "Traceback" in (failed / "log.txt").read_text() and "thirteen" in (failed / "log.txt").read_text()
    before = times(tmp_path / "outputs" / "f")
    again = command(*words, "on_error=retry", cwd=tmp_path, env=plugin)
    assert again.returncode == 1 and "once more" in again.stderr
    assert times(tmp_path / "outputs" / "f") == before
    words[-2] = "method.alpha=13,11"
    stopped = command(*words, "on_error=stop", "fleet.size=1", cwd=tmp_path, env=plugin)
    assert stopped.returncode == 1 and "thirteen" in stopped.stderr
    assert times(tmp_path / "outputs" / "f") == before


def test_a_fleet_that_does_not_fit_into_memory_is_halved(tmp_path, plugin):
    words = [*SMALL, *FEW, "--config-dir", "conf", "-m", "method=large", "seed=range(5)", "name=m"]
    answer = command(*words, cwd=tmp_path, env=plugin)
    assert answer.returncode == 0, answer.stderr
    assert "5 trials together do not fit into memory" in answer.stderr
    assert sorted(t.result["fleet_size"] for t in storage.find(tmp_path / "outputs" / "m").trials) == [1, 2, 2, 2, 2]


def test_halves_go_on_where_the_fleet_was(tmp_path):
    words = [*SMALL, *QUICK, "-m", "method=delora", "lr_factor=0.5,2", "seed=1,2", "name=s"]
    process = begin(*words, cwd=tmp_path)
    wait_for(process, lambda: logged(tmp_path / "outputs" / "s" / "*"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    [kept] = (tmp_path / "outputs" / "s" / ".fleets").glob("*/trials.json")
    seeds = ["seed=1,2", "lr_factor=0.5,2"]
    common = [*SMALL, *QUICK, "method=delora", "sweep=s", f"output_dir={tmp_path / 'outputs'}"]
    trials = [compose_trial(*common, f"lr_factor={factor}", f"seed={seed}") for factor in (0.5, 2) for seed in (1, 2)]
    assert json.loads(kept.read_text()) == [trial.folder.name for trial in trials], seeds
    whole_state = load_file(kept.with_name("state.safetensors"))
    halves = Group(tuple(trials)).halves()
    assert not kept.exists()
    for half, rows in zip(halves, (slice(0, 2), slice(2, 4)), strict=True):
        state = load_file(half.state)
        assert state.keys() == whole_state.keys() and all((state[n] == whole_state[n][rows]).all() for n in state)
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert {t.result["fleet_size"] for t in storage.find(tmp_path / "outputs" / "s").trials} == {2}


def test_a_removed_folder_ends_its_trial_alone(tmp_path):
    words = [*SMALL, *FEW, "epochs=60", "log_every=1", "name=r"]
    words += ["-m", "method=lora", "seed=1,2"]
    process = begin(*words, cwd=tmp_path)
    root = tmp_path / "outputs" / "r"
    wait_for(process, lambda: logged(root / "*seed2*"))
    [folder] = root.glob("*seed1*")
    shutil.rmtree(folder)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "was removed while the trial ran" in errors
    assert [trial.result["config"]["seed"] for trial in storage.find(root).trials] == [2]


# --- Hydra's other launchers and sweepers


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_under_other_launchers_each_job_is_a_fleet_of_one(tmp_path, launcher):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    answer = command(
        *SMALL, *FEW, "-m", "method=lora", "seed=1,2", "name=o", f"hydra/launcher={launcher}", *more, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    found = storage.find(tmp_path / "outputs" / "o").trials
    assert [trial.result["fleet_size"] for trial in found] == [1, 1]
