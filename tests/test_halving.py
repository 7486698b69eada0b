"""Halving: who trains on, that a trial's numbers are those of the lone trial, and that no kill changes either."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FEW, SMALL, command, compose_trial, compose_trials, load_script

from delora import fleets, halving, storage
from delora.config import ConfigError, Trial
from delora.storage import TrialFolder
from delora.sweep import run

everything = load_script("crash_test").everything
RUNGS = "halving.rungs=[1,2]"
EXACT = [*SMALL, "epochs=4", "precision=float64", "method=lora", "method.dropout=0.1", "log_every=2"]
FACTORS, SEEDS = (0.5, 2, 8, 32), (1, 2)


def trials_of(folder: Path, *words: str, factors=FACTORS, name: str = "s") -> list[Trial]:
    values = [{"lr_factor": factor, "seed": seed} for seed in SEEDS for factor in factors]
    return compose_trials([*EXACT, *words, f"sweep={name}", f"output_dir={folder}"], values)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> dict[str, storage.StoredTrial]:
    """Each trial alone, to its end."""
    trials = trials_of(tmp_path_factory.mktemp("full"), "fleet.size=1")
    run(trials)
    return {trial.folder.name: storage.read(trial.folder) for trial in trials}


def best_until(trial: storage.StoredTrial, rung: int) -> float:
    return max(line["metrics"]["accuracy"] for line in trial.evaluations() if 1 <= line["epoch"] <= rung)


def expected_stops(full: dict[str, storage.StoredTrial], trials: list[Trial], kept=(1, 1)) -> dict[str, int]:
    """At which rung each trial loses, computed from logs of lone trials; without those that win."""
    configs: dict[float, list[str]] = {}
    for trial in trials:
        configs.setdefault(trial.lr_factor, []).append(trial.folder.name)
    found: dict[str, int] = {}
    for rung, count in enumerate(kept, start=1):
        mean = {factor: sum(best_until(full[name], rung) for name in names) for factor, names in configs.items()}
        ranked = sorted(configs, key=lambda factor: -mean[factor])
        for factor in ranked[count:]:
            found |= dict.fromkeys(configs.pop(factor), rung)
    return found


@pytest.mark.parametrize("size", [1, 3, None])
def test_numbers_are_those_of_the_lone_trial(tmp_path, full, size):
    words = [RUNGS, "halving.keep=0.5", f"fleet.size={size or 'null'}"]
    trials = trials_of(tmp_path, *words)
    results = run(trials)
    stops = expected_stops(full, trials, kept=(2, 1))
    assert {n: r["stopped_epoch"] for n, r in of_status(trials, results, "stopped").items()} == stops
    assert of_status(trials, results, "done").keys() == full.keys() - stops.keys() and len(stops) == 6
    with_adapter = 0
    for trial, result in zip(trials, results, strict=True):
        lone, mine = full[trial.folder.name], storage.read(trial.folder)
        end = stops.get(trial.folder.name, 4)
        theirs = [line for line in lone.evaluations() if line["epoch"] <= end]
        close = 0 if size == 1 else 1e-10
        assert_equal([line for line in mine.evaluations()], theirs, close)
        steps = [{**line, "seconds": 0} for line in lone.steps() if line["epoch"] <= end]
        assert_equal([{**line, "seconds": 0} for line in mine.steps()], steps, close)
        assert result["last"]["epoch"] == end and result["steps"] == 4 * end
        if lone.result["best"]["epoch"] <= end:
            with_adapter += end < 4
            assert_equal(result["best"], lone.result["best"], close)
            for name in (storage.ADAPTER, storage.PREDICTIONS):
                ours, others = mine.tensors(name, "pt"), lone.tensors(name, "pt")
                assert ours.keys() == others.keys()
                for key, tensor in ours.items():
                    torch.testing.assert_close(tensor, others[key], rtol=0, atol=close)
    assert with_adapter and not (tmp_path / "s" / fleets.FLEETS).exists()
    sizes = [result["fleet_size"] for result in of_status(trials, results, "done").values()]
    assert sizes == ([1, 1] if size == 1 else [2, 2])  # survivors of several fleets are one


def of_status(trials: list[Trial], results: list[storage.Result | None], status: str) -> dict[str, storage.Result]:
    return {t.folder.name: r for t, r in zip(trials, results, strict=True) if r and r["status"] == status}


def assert_equal(ours: object, theirs: object, close: float) -> None:
    """Compares nested plain data; numbers to within `close`."""
    if isinstance(ours, dict):
        assert isinstance(theirs, dict) and ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_equal(value, theirs[key], close)
    elif isinstance(ours, list):
        assert isinstance(theirs, list) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other, close)
    elif isinstance(ours, float) and close:
        assert math.isclose(ours, theirs, rel_tol=close, abs_tol=close)
    else:
        assert ours == theirs


# --- Kills


class Kill(BaseException):
    pass


def few_of(folder: Path) -> list[Trial]:
    """Of three fleets, of two or three trials; the two trials of each config are in two of them."""
    return trials_of(folder, *FEW, RUNGS, "fleet.size=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What nothing disturbs, in fleets of three."""
    folder = tmp_path_factory.mktemp("whole")
    results = run(few_of(folder))
    assert sorted(result.get("stopped_epoch", 4) for result in results) == [1, 1, 1, 1, 1, 1, 4, 4]
    return everything(folder / "s")


def before(module, name: str, hit: Callable[..., bool], monkeypatch) -> None:
    """Has a call that is hit end the process in its place."""
    function = getattr(module, name)

    def killed(*arguments, **options):
        if hit(*arguments):
            raise Kill
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, killed)


def nth(number: int, hit: Callable[..., bool] = lambda *_: True) -> Callable[..., bool]:
    left = [number]

    def counted(*arguments: object) -> bool:
        left[0] -= hit(*arguments)
        return left[0] == 0

    return counted


def writes(name: str) -> Callable[..., bool]:
    return lambda path, *_: path.name == name


KILLS = {
    "second fleet at its rung": (storage, "replace", lambda: nth(2, writes(fleets.PAUSED))),
    "decided": (storage, "replace", lambda: nth(1, writes(halving.REGROUP))),
    "no state of the new fleets": (fleets.Group, "keep", lambda: nth(4)),  # three were kept for the first rung
    "some of the new fleets": (fleets.Group, "keep", lambda: nth(5)),
    "all new fleets, no old one forgotten": (fleets, "forget", lambda: nth(1)),
    "some old ones forgotten": (fleets, "forget", lambda: nth(2)),
    "a loser has ended": (TrialFolder, "finish", lambda: nth(2)),
    "survivors are at the next rung": (storage, "replace", lambda: nth(4, writes(fleets.PAUSED))),
}


@pytest.mark.parametrize("step", KILLS)
def test_no_kill_changes_a_number_or_who_is_stopped(tmp_path, whole, monkeypatch, step):
    trials = few_of(tmp_path)
    module, name, hit = KILLS[step]
    with monkeypatch.context() as patched, pytest.raises(Kill):
        before(module, name, hit(), patched)
        run(trials)
    assert len(list((tmp_path / "s").glob("*/result.json"))) < len(trials)
    run(trials)
    assert everything(tmp_path / "s") == whole
    assert not (tmp_path / "s" / fleets.FLEETS).exists()


def test_workers_halve_as_one_process_does(tmp_path, whole):
    words = [*EXACT, *FEW, RUNGS, "fleet.size=3", "-m", "name=s", "engine=local", "engine.workers=2"]
    words += [f"seed={','.join(map(str, SEEDS))}", f"lr_factor={','.join(map(str, FACTORS))}"]
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert everything(tmp_path / "outputs" / "s") == whole
    assert "halving: 2 trials train to epoch 2, 6 trials end" in answer.stderr


def test_a_lost_log_has_its_trial_begin_anew_and_no_other(tmp_path, whole, monkeypatch, caplog):
    trials = few_of(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Kill):
        before(*KILLS["survivors are at the next rung"][:2], nth(4, writes(fleets.PAUSED)), patched)
        run(trials)
    [left, *_] = [trial for trial in trials if not (trial.folder / storage.RESULT).exists()]
    (left.folder / storage.METRICS).write_bytes(b"")
    run(trials)
    assert "begins anew" in caplog.text
    found = everything(tmp_path / "s")
    assert {name: one[0]["status"] for name, one in found.items()} == {n: one[0]["status"] for n, one in whole.items()}
    assert_equal([one[2] for one in found.values()], [one[2] for one in whole.values()], 1e-10)


# --- Who is kept


def scored(trials: list[Trial], scores: dict[tuple[float, int], float | None]) -> dict[Path, float | None]:
    return {t.folder: scores[t.lr_factor, t.seed] for t in trials if (t.lr_factor, t.seed) in scores}


def test_configs_are_ranked_by_the_mean_over_seeds_and_those_that_diverged_come_last(tmp_path):
    trials = trials_of(tmp_path, RUNGS, "halving.keep=0.5")
    scores = {(0.5, 1): 0.9, (0.5, 2): 0.1, (2, 1): 0.6, (2, 2): 0.6, (8, 1): 0.99, (8, 2): None, (32, 1): 0.2}
    scores[32, 2] = 0.3
    kept = halving.survivors(trials, scored(trials, scores), trials[0].halving)
    assert {(t.lr_factor, t.seed) for t in trials if t.folder in kept} == {(0.5, 1), (0.5, 2), (2, 1), (2, 2)}
    lonely = {key: None for key in scores} | {(8, 1): 0.1}
    kept = halving.survivors(trials, scored(trials, lonely), trials[0].halving)
    assert [(t.lr_factor, t.seed) for t in trials if t.folder in kept] == [(8, 1)]


@pytest.mark.parametrize(("by", "kept"), [("method", {"lora", "delora"}), ("none", {"delora"})])
def test_methods_are_halved_apart_unless_the_config_says_otherwise(tmp_path, by, kept):
    words = [*EXACT, RUNGS, f"halving.by={by}", f"output_dir={tmp_path}"]
    trials = [compose_trial(*words, f"method={m}", f"lr_factor={f}") for m in ("lora", "delora") for f in (1, 2)]
    scores = dict(zip([t.folder for t in trials], [0.1, 0.2, 0.3, 0.4], strict=True))
    best = halving.survivors(trials, scores, trials[0].halving)
    assert {t.method.name for t in trials if t.folder in best} == kept


def test_a_diverged_trial_ends_as_such_at_its_rung(tmp_path):
    trials = trials_of(tmp_path, RUNGS, "halving.keep=0.5", factors=(1, 1e200))
    results = run(trials)
    assert [r["status"] for r in results] == ["done", "diverged", "done", "diverged"]
    assert results[1]["steps"] == 4 and not (tmp_path / "s" / fleets.FLEETS).exists()


def test_another_halving_trains_stopped_trials_anew_and_the_same_one_nothing(tmp_path, full, capsys):
    trials = trials_of(tmp_path, RUNGS, "fleet.size=1")
    first = run(trials)
    stamps = {trial.folder: (trial.folder / storage.RESULT).stat().st_mtime_ns for trial in trials}
    assert [result["status"] for result in run(trials)] == [result["status"] for result in first]
    assert {f: (f / storage.RESULT).stat().st_mtime_ns for f in stamps} == stamps
    capsys.readouterr()
    second = run(trials_of(tmp_path, "fleet.size=1"))
    assert {result["status"] for result in second} == {"done"}
    assert [result["best"] for result in second] == [full[trial.folder.name].result["best"] for trial in trials]
    assert "6 trials that another halving had stopped: trained anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("halving.rungs=[2,1]", "halving.rungs=[2,1]: expected epochs that rise, such as [1,3]"),
        ("halving.rungs=[1,2]", "halving.rungs=[1,2]: each below epochs=2, which is the last rung"),
        ("halving.rungs=[]", "halving.rungs=[]: expected a list that is not empty"),
        ("halving.keep=1", "halving.keep=1: must be below 1"),
        ("halving.by=task", "halving.by=task: expected one of method, none"),
    ],
)
def test_what_is_no_halving_is_told_in_one_line(word, told):
    with pytest.raises(ConfigError) as error:
        compose_trial(*SMALL, word)
    assert str(error.value) == told


def test_halving_is_no_part_of_a_trial(tmp_path):
    with_it, without = trials_of(tmp_path, RUNGS), trials_of(tmp_path)
    assert [(t.id, t.training) for t in with_it] == [(t.id, t.training) for t in without]
    config = json.loads(json.dumps(without[0].resolved()))
    del config["halving"]
    assert Trial.from_config(config).id == without[0].id
