"""The search for the best config: its space, its journal, what is asked and told, and what is printed."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import optuna
import pytest
from conftest import FEW, OFFLINE, RUN, SMALL, command, compose_trial
from hydra.core.override_parser.overrides_parser import OverridesParser

from delora import search, storage
from delora.errors import UserError
from delora.report.cli import main as report
from delora.search import Search, dimension


def of(word: str) -> search.Dimension:
    return dimension(OverridesParser.create().parse_override(word))


def test_spaces_are_written_as_hydra_has_them():
    known = optuna.distributions
    for word, size, distribution in (
        ("lr=interval(1e-4,1e-1)", float("inf"), known.FloatDistribution(1e-4, 0.1)),
        ("lr=tag(log,interval(1e-4,1e-1))", float("inf"), known.FloatDistribution(1e-4, 0.1, log=True)),
        ("method.rank=int(interval(2,16))", 15, known.IntDistribution(2, 16)),
        ("method.rank=tag(log,int(interval(2,16)))", 15, known.IntDistribution(2, 16, log=True)),
        ("epochs=range(1,10,4)", 3, known.IntDistribution(1, 9, step=4)),  # without its end, as Python's
        ("epochs=range(9,0,-4)", 3, known.IntDistribution(1, 9, step=4)),
        ("warmup_ratio=range(0.1,0.4,0.1)", 3, known.FloatDistribution(0.1, 0.3, step=0.1)),
        ("method=choice(lora,delora)", 2, known.CategoricalDistribution(("lora", "delora"))),
        ("lr=1e-3,1e-2,1e-3", 2, known.CategoricalDistribution(("0.001", "0.01"))),
        ("method=shuffle(ether,dora)", 2, known.CategoricalDistribution(("dora", "ether"))),  # the same each time
    ):
        found = of(word)
        assert (found.key, found.size, found.distribution()) == (word.partition("=")[0], size, distribution), word
        if size < 100:
            assert len(found.values()) == size


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("lr=interval(0.1,0.1)", "one value; write lr=0.1"),
        ("method=choice(lora)", "one value; write method=lora"),
        ("epochs=range(3,4)", "one value; write epochs=3"),
        ("lr=interval(0.2,0.1)", "the lower bound comes first"),
        ("lr=interval(0,inf)", "two finite numbers"),
        ("lr=tag(log,interval(0,1))", "above 0"),
        ("epochs=tag(log,range(1,9,2))", "have a log scale"),
        ("lr=tag(log,choice(1,2))", "have a log scale"),
        ("lr=tag(lin,interval(1,2))", "no tag lin"),
        ("seed=1,2", r"search.seeds=\[42,43\]"),
        ("task=rte,mrpc", "cannot be compared"),
    ],
)
def test_what_is_no_space_is_said(word, told):
    with pytest.raises(UserError, match=told):
        of(word)


# --- Asking and telling, with scores of the test's own


WORDS = [*SMALL, *FEW, "name=s"]
SPACE = ["lr=tag(log,interval(1e-4,1e-1))", "method=choice(lora,delora)"]


class Killed(BaseException):
    """As a kill, at a place of the test's choice."""


def searched(root: Path, *more: str, space=SPACE, dies_after: float = float("inf"), score=None) -> list[list[str]]:
    """Runs a search in which training is a function of the words; returns the jobs that were launched."""
    launched: list[list[str]] = []

    def launch(jobs: list[list[str]]) -> list[float | None]:
        if len(launched) >= dies_after:
            raise Killed
        launched.extend(jobs)
        return [(score or quality)(dict(word.split("=", 1) for word in job)) for job in jobs]

    words = [*WORDS, f"output_dir={root}", *more]
    dimensions = {word.partition("=")[0]: of(word) for word in space}
    Search(words, dimensions, lambda words: compose_trial(*words), launch).run()
    return launched


def quality(job: dict[str, str]) -> float:
    return 0.9 - abs(float(job.get("lr", 0.01)) - 0.01) - 0.01 * (int(job["seed"]) - 42)


def told(root: Path) -> list[tuple]:
    return [(one.params, one.status, one.score) for one in search.history(root / "s").tried]


def test_the_mean_over_the_seeds_is_told_and_the_best_is_printed_with_its_command(tmp_path, capsys):
    jobs = searched(tmp_path, "search.trials=12", "search.batch=4", "search.seeds=[42,43]")
    assert len(jobs) == 24 and len({tuple(job) for job in jobs}) == 24
    assert all("search.over=[lr,method]" in job for job in jobs)
    study = optuna.load_study(
        study_name="search",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "s" / ".search" / "journal.log"))
        ),
    )  # Optuna's own reader
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE and len(study.trials) == 12
    for trial in study.trials:
        assert trial.value == pytest.approx(0.895 - abs(trial.params["lr"] - 0.01))
    best = study.best_trial
    said = capsys.readouterr().out
    assert "search of 12 configs, 2 seeds each: 12 done" in said
    assert f"{best.value:.4f} on validation, the mean of 2 seeds, config {best.number + 1} of 12" in said
    line = re.search("trained by  (.*)", said)[1]
    assert line.startswith("delora-run -m model=tiny") and line.endswith(
        f"lr={best.params['lr']!r} method={best.params['method']} seed=42,43"
    )
    assert "search." not in line and "name=" not in line and re.search(r"importance  lr \d\.\d\d", said)


@pytest.mark.parametrize("dies_after", [0, 4, 8])
def test_a_killed_search_goes_on_as_an_undisturbed_one(tmp_path, dies_after):
    more = ["search.trials=10", "search.batch=4"]
    whole = searched(tmp_path / "whole", *more)
    with pytest.raises(Killed):
        searched(tmp_path / "cut", *more, dies_after=dies_after)
    journal = tmp_path / "cut" / "s" / ".search" / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"wor')  # torn
    rest = searched(tmp_path / "cut", *more)
    strip = lambda jobs: [[word for word in job if not word.startswith("output_dir")] for job in jobs]  # noqa: E731
    assert strip(rest) == strip(whole[dies_after:]) and told(tmp_path / "cut") == told(tmp_path / "whole")
    assert searched(tmp_path / "cut", *more) == []  # nothing is missing
    assert len(searched(tmp_path / "cut", "search.trials=12", "search.batch=4")) == 2


def test_a_kill_between_two_scores_doubles_none(tmp_path):
    """Every line at which the journal may end: what was asked stays asked, what was told stays told."""
    more = ["search.trials=5", "search.batch=3"]
    searched(tmp_path / "whole", *more)
    lines = (tmp_path / "whole" / "s" / ".search" / "journal.log").read_bytes().splitlines(keepends=True)
    for end in range(0, len(lines), 3):
        root = tmp_path / f"cut{end}"
        (root / "s" / ".search").mkdir(parents=True)
        (root / "s" / ".search" / "journal.log").write_bytes(b"".join(lines[:end]))
        searched(root, *more)
        params = [json.dumps(params) for params, *_ in told(root)]
        assert len(params) == len({*params}) == 5 and {status for _, status, _ in told(root)} == {"done"}, end


def test_a_finite_space_is_tried_once_each_and_no_config_twice(tmp_path):
    space = ["method.rank=range(1,4)", "method.alpha=choice(4,8)"]
    jobs = searched(tmp_path, "method=lora", "search.trials=50", "search.batch=4", space=space)
    assert len(jobs) == 6 and len({tuple(job) for job in jobs}) == 6


def test_failed_and_diverged_configs_are_told_as_such(tmp_path, capsys):
    def score(job: dict[str, str]) -> float | None:
        rank, seed = int(job["method.rank"]), int(job["seed"])
        return None if rank == 2 else -1.0 if (rank, seed) == (3, 43) else 0.5 + rank / 100

    more, space = ["method=lora", "search.seeds=[42,43]"], ["method.rank=range(1,5)"]
    assert len(searched(tmp_path, *more, space=space, score=score)) == 8
    said = {params["method.rank"]: (status, value) for params, status, value in told(tmp_path)}
    assert said == {"1": ("done", 0.51), "2": ("failed", None), "3": ("diverged", None), "4": ("done", 0.54)}
    assert "4 configs, 2 seeds each: 2 done, 1 diverged, 1 failed" in capsys.readouterr().out
    study = search._study(search._Journal(tmp_path / "s" / ".search" / "journal.log", None))
    states = {trial.params["method.rank"]: trial.state.name for trial in study.trials}
    assert states == {1: "COMPLETE", 2: "FAIL", 3: "PRUNED", 4: "COMPLETE"}
    again = searched(tmp_path, *more, space=space)  # what failed is tried once more
    assert [word for job in again for word in job if word.startswith("method.rank")] == ["method.rank=2"] * 2
    assert [status for _, status, _ in told(tmp_path)].count("done") == 3 and len(told(tmp_path)) == 4


def test_another_space_and_a_damaged_journal_lose_nothing(tmp_path):
    more = ["search.trials=3", "search.batch=3"]
    searched(tmp_path, *more)
    journal = tmp_path / "s" / ".search" / "journal.log"
    before = journal.read_bytes()
    for words, space, said in (
        ([], ["lr=tag(log,interval(1e-4,1))", SPACE[1]], r"space.lr: 0.0001 to 0.1 \(log\) → 0.0001 to 1.0 \(log\)"),
        ([], SPACE[:1], "space.method"),
        (["epochs=3"], SPACE, "fixed.epochs: 2 → 3"),
        (["method.rank=4"], SPACE, "fixed.method.rank"),
        (["search.seeds=[1,2]"], SPACE, "seeds"),
    ):
        with pytest.raises(UserError, match=f"(?s)s holds a search of another space.*{said}.*name=... begins"):
            searched(tmp_path, *more, *words, space=space)
    searched(tmp_path, *more, "log_every=7")  # is not what a trial is
    assert journal.read_bytes() == before
    for damaged, said in (
        (before.replace(b"\n", b"\n}\n", 1), "line 2 is not Optuna's"),
        (b'{"op_code":99,"worker_id":"x"}\n' + before, "damaged"),
        (before[: before.index(b"\n") + 1] + b'{"op_code":4,"worker_id":"x"}\n', "damaged"),
    ):
        journal.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{said}.*Without it the search begins anew.*mv ") as raised:
            searched(tmp_path, *more)
        assert "\n" not in str(raised.value) and journal.read_bytes() == damaged
    journal.unlink()
    os.symlink("/dev/null", journal)
    with pytest.raises(UserError):
        searched(tmp_path, *more)


def test_what_cannot_begin_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="nothing to search for"):
        searched(tmp_path, space=[])
    with pytest.raises(UserError, match="name=NAME"):
        searched(tmp_path, "name=null")

    def lacking(_: dict[str, str]) -> float:
        raise UserError("the data are missing")

    with pytest.raises(UserError, match="the data are missing"):
        searched(tmp_path / "new", score=lacking)
    assert not list(tmp_path.iterdir())


def test_a_search_in_use_is_not_searched_twice(tmp_path):
    def second(job: dict[str, str]) -> float:
        with pytest.raises(UserError, match="is in use by process"):
            searched(tmp_path)
        return quality(job)

    searched(tmp_path, "search.trials=1", score=second)


# --- The command


def test_a_search_trains_in_fleets_and_is_reported(tmp_path, capsys):
    words = [*SMALL, *FEW, "-m", "hydra/sweeper=search", "name=t", "epochs=1", "search.trials=4", "search.batch=2"]
    words += ["search.seeds=[1,2]", "method=lora", "lr=choice(1e-4,1e-3,1e-2,1e30)", "method.rank=choice(2,4)"]
    plan = command(*words, "plan=true", cwd=tmp_path)
    assert plan.returncode == 0 and "a search of 4 configs in batches of 2" in plan.stdout, plan.stderr
    assert not list(tmp_path.iterdir())
    with subprocess.Popen([*RUN, *words], cwd=tmp_path, env=os.environ | OFFLINE, stderr=subprocess.PIPE) as process:
        while not list((tmp_path).glob("outputs/t/*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    found = storage.find(tmp_path / "outputs" / "t").trials
    assert len(found) == 8 and {trial.result["fleet_size"] for trial in found} <= {2, 4}
    scores: dict[tuple[str, str], list[float | None]] = {}
    for trial in sorted(found, key=lambda trial: trial.result["config"]["seed"]):
        config, best = trial.result["config"], trial.result["best"]
        done = trial.result["status"] == "done"
        key = f"{config['lr']:g}", str(config["method"]["rank"])
        scores.setdefault(key, []).append(best["validation"]["accuracy"] if done else None)
    history = search.history(tmp_path / "outputs" / "t")
    assert len(history.tried) == 4 and history.metric == "accuracy"
    for one in history.tried:
        of_seeds = scores[f"{float(one.params['lr']):g}", one.params["method.rank"]]
        assert one.scores == of_seeds
        assert one.score == (None if None in of_seeds else pytest.approx(sum(of_seeds) / 2))
    assert answer.stdout.count("best mrpc") == 1 and "results in outputs/t; curves" in answer.stdout
    assert command(*words, cwd=tmp_path).stdout == answer.stdout
    assert report([str(tmp_path / "outputs" / "t")]) == 0
    folder = tmp_path / "outputs" / "t" / "report"
    assert "search of 4 configs, 2 seeds each" in capsys.readouterr().out
    (table,) = [line for line in (folder / "tables.md").read_text().splitlines() if line.startswith("### Search")]
    assert table == "### Search of t: mrpc" and (folder / "search.png").stat().st_size > 5000
    rows = (folder / "search-t.csv").read_text().splitlines()
    assert rows[1] == "config,lr,method.rank,accuracy,by seed,status" and len(rows) == 6
    page = (folder / "index.html").read_text()
    assert '"name":"search"' in page and "Trained by: delora-run -m " in page
    (tmp_path / "outputs" / "t" / ".search" / "journal.log").write_text("{}\n")
    assert report([str(tmp_path / "outputs" / "t"), "--only", "page"]) == 0
    assert "journal.log: damaged: line 1" in capsys.readouterr().err
