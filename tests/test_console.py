"""The live view of a sweep."""

import time

import rich.console
from conftest import SMALL, compose_trial

from delora.console import Console, Rows
from delora.train import Score


def rendered(console: Console) -> str:
    terminal = rich.console.Console(width=120, force_terminal=True, color_system=None)
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
