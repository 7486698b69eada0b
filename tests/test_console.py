"""The live view of a sweep."""

import re
import time

import rich.console
from conftest import FEW, SMALL, command, compose_trial, compose_trials

from delora.console import Console, Rows
from delora.train import Score


def rendered(console: Console, width: int = 120, height: int = 40) -> str:
    terminal = console.rich = rich.console.Console(
        stderr=True, width=width, height=height, force_terminal=True, color_system=None, legacy_windows=False
    )
    with terminal.capture() as capture:
        terminal.print(console.live.get_renderable())
    return capture.get()


def test_the_live_view_tells_what_runs_the_best_scores_and_the_time_left(capsys):
    trials = [compose_trial(*SMALL, f"lr_factor={factor}", f"seed={seed}") for factor in (1, 4) for seed in (1, 2)]
    console = Console(trials, {})
    assert "best accuracy on validation" in rendered(console) and "0 of 4 done" in rendered(console)
    console.begin(trials[:3], "accuracy", 100)
    console.diverged(1, 20)
    console.evaluation(2, {"epoch": 1, "step": 50}, Score(1, 50, {"accuracy": 0.75}))
    console.start = time.monotonic() - 10  # one is over, two are in the middle: half of the work is done
    view = rendered(console)
    assert "0 of 4 done, 2 running, 1 diverged, 10 s left" in view
    header, row = view.splitlines()[1:3]
    assert header.split() == ["×1", "×4"] and row.split() == ["mrpc", "delora", "-,", "1", "diverged", "0.7500"]
    assert f"{trials[1].id} diverged in step 20" in capsys.readouterr().err


def test_a_sweep_that_is_over_is_shown():
    trials = [compose_trial(*SMALL, f"seed={seed}") for seed in (1, 2)]
    found = {
        trial.folder: {"status": status, "best": None}
        for trial, status in zip(trials, ("done", "diverged"), strict=True)
    }
    assert "1 of 2 done, 1 diverged\n" in rendered(Console(trials, found))


def test_rows_name_the_encoder_where_there_are_several():
    """By its name; of those of one name, what differs."""
    words = [("minilm",), ("tiny",), ("tiny", "model.shape.layers=1")]
    trials = [compose_trial(*SMALL, f"model={m}", *more, f"seed={s}") for m, *more in words for s in (1, 2)]
    expected = ["minilm", "tiny model.shape.layers=2", "tiny model.shape.layers=1"]
    assert Rows(trials).labels == [f"mrpc delora {name}" for name in expected for _ in range(2)]
    assert set(Rows(trials[2:4]).labels) == {"mrpc delora"}


def test_eight_factors_fit_eighty_columns():
    factors = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    values = [{"lr_factor": factor, "seed": seed} for factor in factors for seed in (1, 2)]
    trials = [t for method in ("delora", "etherplus") for t in compose_trials([*SMALL, f"method={method}"], values)]
    console = Console(trials, {})
    console.begin(trials, "accuracy", 100)
    for place in range(len(trials)):
        console.evaluation(place, {"epoch": 1, "step": 50}, Score(1, 50, {"accuracy": 0.5 + place / 100}))
    console.diverged(1, 20)
    lines = rendered(console, width=80).splitlines()
    assert lines[0].split(",")[0] == "best accuracy in %" and max(map(len, lines)) <= 80
    assert lines[1].split() == ["×0.25", "×0.5", "×1", "×2", "×4", "×8", "×16", "×32"]
    assert lines[2].split() == ["mrpc", "delora", "50.5×", "52.5", "54.5", "56.5", "58.5", "60.5", "62.5", "64.5"]
    assert "0.5250 ± 0.0071 (2)" in rendered(console, width=220)


def test_more_rows_than_a_terminal_has_leave_room_for_the_bar():
    trials = compose_trials(SMALL, [{"epochs": epochs} for epochs in range(1, 41)])
    console = Console(trials, {})
    console.begin(trials[20:21], "accuracy", 100)
    lines = rendered(console, height=20).splitlines()
    assert len(lines) <= 20 and "and 26 more rows" in lines
    assert "mrpc delora epochs=21" in lines[2] and "mrpc delora, 1 trial " in lines[-1]


def test_what_takes_time_before_training_is_said():
    console = Console([compose_trial(*SMALL)], {})
    assert "starting" in rendered(console)
    console.doing("reading data")
    assert "reading data" in rendered(console)


def test_cut_texts_are_told_once_a_sweep(tmp_path):
    """Two fleets of each task, whose data are read for the plan and again for each."""
    answer = command("-m", *SMALL, *FEW, "epochs=1", "task=mrpc,rte", "method=lora,delora", "name=s", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    for task in ("mrpc", "rte"):
        assert len(re.findall(rf"^{task}: \d+ of 32 examples are longer than max_length=64", answer.stderr, re.M)) == 1
