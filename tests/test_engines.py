"""Workers: who takes which fleet, what becomes of those that are lost, and that the numbers are those of one process.

scripts/clusters.py does the same on real clusters of SLURM and Ray.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FEW, OFFLINE, RUN, SMALL, command, compose_trial, compose_trials, load_script

from delora import fleets
from delora.config import Trial
from delora.fleets import Claim, Group, Lost
from delora.plan import share_out
from delora.storage import find

everything = load_script("crash_test").everything
SWEEP = [
    *SMALL,
    "-m",
    "method=delora,lora",
    "lr_factor=0.5,2",
    "seed=1,2",
    "fleet.size=2",
    "method.dropout=0.1",
    "name=s",
]
SWEEP += ["log_every=1", "fleet.checkpoint_seconds=0.2"]
LOCAL = ["engine=local", "engine.workers=2"]
TRIALS = 8


# --- Claims


@pytest.fixture
def fleet(tmp_path) -> Path:
    folder = tmp_path / fleets.FLEETS / ("0" * 16)
    folder.mkdir(parents=True)
    return folder


def elsewhere(claim: Claim) -> None:
    """Has a claim look like one of another machine, and give no more signs of life."""
    claim._over.set()
    about = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**about, "machine": "elsewhere", "host": "node7", "pid": 1}))


def test_a_fleet_is_held_by_one(fleet, tmp_path):
    script = "import sys; from pathlib import Path; from delora.fleets import Claim; import time\n"
    script += "claim = Claim.take(Path(sys.argv[1]), Path(sys.argv[2]))\nprint(bool(claim), flush=True)\n"
    script += "sys.stdin.read()"
    words = [sys.executable, "-c", script, str(fleet), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    many = [subprocess.Popen(words, **pipes) for _ in range(4)]
    taken = [process.stdout.readline().strip() == "True" for process in many]
    assert taken.count(True) == 1
    holder = fleets.holder(fleet)
    assert holder is not None and holder.about["pid"] == many[taken.index(True)].pid
    assert Claim.take(fleet, tmp_path) is None
    for process in many:
        process.kill()
        process.communicate()
    assert fleets.holder(fleet) is None  # it is seen at once that a process of this machine has ended
    with Claim.take(fleet, tmp_path) as claim:
        assert claim.number == 2
    assert fleets.holder(fleet) is None and not claim.path.exists()


def test_a_worker_of_another_machine_is_lost_when_it_gives_no_sign(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(fleets, "SECONDS_TO_LOSS", 0.4)
    claim = Claim.take(fleet, tmp_path)
    elsewhere(claim)
    assert Claim.take(fleet, tmp_path) is None
    time.sleep(0.25)
    claim.path.write_text(claim.path.read_text() + " ")  # a sign
    assert Claim.take(fleet, tmp_path) is None
    time.sleep(0.25)
    assert Claim.take(fleet, tmp_path) is None
    time.sleep(0.25)
    with Claim.take(fleet, tmp_path) as second:
        assert second.number == 2


def test_who_was_taken_for_lost_writes_nothing_more(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(fleets, "SECONDS_BETWEEN_SIGNS", 1000)
    first = Claim.take(fleet, tmp_path)
    first.check()
    (fleet / ".claim-0002").write_text("{}")
    first.check()  # within the time in which nobody takes it for lost
    monkeypatch.setattr(fleets, "SECONDS_TO_LOSS", 0)
    time.sleep(0.01)
    with pytest.raises(Lost):
        first.check()


def test_failures_are_counted_by_process_and_forgotten_with_progress(fleet, tmp_path):
    first = Claim.take(fleet, tmp_path)
    first.release(failed="out of luck")
    second = Claim.take(fleet, tmp_path)
    second.release(failed="again")
    assert [one.about["failed"] for one in fleets.failures(fleet)] == ["out of luck"]  # one process, twice
    third = Claim.take(fleet, tmp_path)
    elsewhere(third)
    third.path.write_text(
        third.path.read_text().replace('"elsewhere"', json.dumps(fleets.machine()))
    )  # pid 1, other start
    assert len(fleets.failures(fleet)) == 2
    (fleet / fleets.STATE).write_bytes(b"progress")
    assert fleets.failures(fleet) == []
    fleets.tidy(fleet)
    assert fleets.holders(fleet) == []


def test_a_fleet_is_forgotten_at_once(fleet, tmp_path, monkeypatch):
    """Nobody makes a claim in one that is half removed."""
    removed = []

    def remove(folder: Path, **_: object) -> None:
        removed.append(folder)
        assert Claim.take(fleet, tmp_path) is None and not fleet.exists()

    (fleet / fleets.TRIALS).write_text("[]")
    with monkeypatch.context() as patched:
        patched.setattr(fleets.shutil, "rmtree", remove)
        fleets.forget(fleet)
    assert removed and not list(fleet.parent.glob(fleets.NAME))
    fleets.forget_gone(fleet.parent)
    assert not list(fleet.parent.iterdir())


# --- Plans


def trials_of(folder: Path, count: int, *words: str) -> list[Trial]:
    common = [*SMALL, *FEW, "method=lora", "sweep=s", f"output_dir={folder}", *words]
    return compose_trials(common, [{"seed": seed, "lr_factor": 2.0} for seed in range(count)])


@pytest.mark.parametrize(
    ("workers", "sizes"), [(1, (64,) * 4), (3, (64,) * 4), (8, (64, 3)), (64, (64,) * 16), (5, (2,))]
)
def test_workers_end_together(tmp_path, workers, sizes):
    trials = trials_of(tmp_path, sum(sizes))
    borders = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    groups = [Group(tuple(trials[a:b])) for a, b in itertools.pairwise(borders)]
    works = share_out(groups, [20.0 + i for i in range(len(groups))], workers)
    assert sorted(t.seed for work in works for t in work.group.trials) == list(range(len(trials)))
    assert [work.seconds for work in works] == sorted((work.seconds for work in works), reverse=True)
    ends = [0.0] * workers
    for work in works:
        ends[ends.index(min(ends))] += work.seconds
    if len(trials) >= workers:  # neither a trial nor the start of a fleet is split
        assert max(ends) < 1.03 * sum(ends) / workers + 60
    else:
        assert len(works) == len(trials)


def test_fleets_whose_size_is_said_or_that_others_may_take_stay_whole(tmp_path):
    said = Group(tuple(trials_of(tmp_path, 6, "fleet.size=6")))
    assert [work.group for work in share_out([said], [100.0], 4)] == [said]
    known = Group(tuple(trials_of(tmp_path, 6)))
    assert len(share_out([known], [100.0], 4)) > 1
    known.keep()
    assert [work.group for work in share_out([known], [100.0], 4)] == [known]


def test_trials_are_handed_out_as_they_are(tmp_path, monkeypatch):
    """Their configs, and so their names, whichever folder the worker is in."""
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "method=delora", "sweep=s", "output_dir=out"]
    changes = [{"seed": 3, "lr": 0.01}, {"method.lambda_init": 3.0, "weight_decay": 0.1}, {"lr_factor_on": "lambda"}]
    trials = [*compose_trials(words, changes), compose_trial(*words[:-1], "output_dir=out", "method=ether")]
    folder = tmp_path / "out" / "s"
    folder.mkdir(parents=True)
    plain = json.loads(json.dumps(fleets.packed(trials)))
    assert len(plain) == 2 and fleets.unpacked(plain, folder) == trials
    monkeypatch.chdir("/")
    moved = fleets.unpacked(plain, folder)
    assert [t.folder for t in moved] == [folder / t.folder.name for t in trials]
    assert [(t.id, t.training) for t in moved] == [(t.id, t.training) for t in trials]


# --- Sweeps with workers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process finds that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    answer = command(*SWEEP, "engine=here", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return everything(folder / "outputs" / "s")


def begin(*words: str, cwd: Path) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*RUN, *words], cwd=cwd, env=os.environ | OFFLINE, **pipes)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found


def test_lost_workers_and_an_interrupted_command_change_no_number(tmp_path, whole):
    words, root = [*SWEEP, *LOCAL], tmp_path / "outputs" / "s"
    process = begin(*words, cwd=tmp_path)
    running = wait_for(lambda: fleets_held(root, 2), process)
    killed = next(iter(running.values()))
    os.kill(killed["pid"], signal.SIGKILL)
    others = wait_for(lambda: [a for a in fleets_held(root, 2).values() if a["pid"] != killed["pid"]], process)
    assert others
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors, errors
    assert not [pid for about in others if process_lives(pid := about["pid"])]
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert everything(root) == whole and not (root / fleets.FLEETS).exists()


def fleets_held(root: Path, least: int) -> dict[str, dict]:
    """What the holders of fleets tell, if there are so many."""
    found = {
        path.name: one.about for path in root.glob(f"{fleets.FLEETS}/{fleets.NAME}") if (one := fleets.holder(path))
    }
    return found if len(found) >= least else {}


def process_lives(pid: int) -> bool:
    return fleets._process_start(pid) is not None


def test_a_detached_sweep_is_told_of_from_its_folder(tmp_path, whole):
    status = [sys.executable, "-m", "delora.status", "outputs/s"]

    def look() -> subprocess.CompletedProcess[str]:
        return subprocess.run(status, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    answer = command(*SWEEP, *LOCAL, "detach=true", cwd=tmp_path)
    assert answer.returncode == 0 and "delora-status outputs/s" in answer.stdout, answer.stderr
    told = look()
    assert told.returncode == 3 and f"of {TRIALS} done" in told.stdout, told.stdout + told.stderr
    end = time.monotonic() + 150
    while (told := look()).returncode == 3:
        assert time.monotonic() < end, told.stdout
        time.sleep(0.5)
    assert told.returncode == 0 and f"{TRIALS} of {TRIALS} done" in told.stdout, told.stdout + told.stderr
    assert everything(tmp_path / "outputs" / "s") == whole
    again = command(*SWEEP, *LOCAL, "detach=true", cwd=tmp_path)
    assert again.returncode == 0 and f"{TRIALS} of {TRIALS} trials are done already" in again.stderr


def test_wandb_has_a_run_of_each_trial_from_its_worker_and_one_summary(tmp_path):
    words = [word for word in SMALL if word != "logger=none"] + [*FEW, "logger.mode=offline", "epochs=1"]
    environment = {"WANDB_DIR": ""}
    answer = command(*words, "-m", "method=lora", "seed=1,2,3", "name=w", *LOCAL, cwd=tmp_path, env=environment)
    assert answer.returncode == 0, answer.stderr
    runs = [path.name for path in (tmp_path / "outputs" / "w").glob("**/offline-run-*") if path.is_dir()]
    assert len(runs) == 4 and sum("summary" in run for run in runs) == 1
    assert all(sum(trial.result["id"] in run for run in runs) == 1 for trial in find(tmp_path / "outputs" / "w").trials)


FAILS = """
from delora.methods.lora import LoRA

class Fails(LoRA):
    def forward(self, x_KNI, *others):
        if (self.scale_K == 13 / 8).any():
            raise ZeroDivisionError("thirteen")
        return super().forward(x_KNI, *others)
"""


def test_what_fails_on_two_workers_is_named_with_its_log(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FAILS)
    conf = tmp_path / "conf" / "method"
    conf.mkdir(parents=True)
    lora = (Path(__file__).parents[1] / "conf" / "method" / "lora.yaml").read_text()
    (conf / "fails.yaml").write_text(
        lora.replace("delora.methods.lora.LoRA", "mine.Fails").replace(": lora", ": fails")
    )
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}
    words = [*SMALL, *FEW, "--config-dir", "conf", "-m", "method=fails", "method.alpha=8,13", "name=f", *LOCAL]
    answer = command(*words, cwd=tmp_path, env=env)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr
    assert answer.stderr.count("failed on 2 workers: ") == 1 and "ZeroDivisionError: thirteen" in answer.stderr
    assert "log in " in answer.stderr
    [done] = find(tmp_path / "outputs" / "f").trials
    assert done.result["config"]["method"]["alpha"] == 8


def handed_out(folder: Path) -> Path:
    """A sweep whose command has handed out its trials and was killed; its folder."""
    words = [*SMALL, *FEW, "-m", "method=lora", "seed=1,2", "name=s", *LOCAL, "detach=true"]
    script = "import sys; sys.modules['torch'] = None  # a login node may have none\n"
    script += "from delora.engines.local import Local; Local.start = lambda *_: None\n"
    script += "from delora import cli; sys.exit(cli.main())"
    environment = os.environ | OFFLINE
    subprocess.run([sys.executable, "-c", script, *words], cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "outputs" / "s"


def test_anybody_may_start_a_worker_by_hand_where_versions_and_inputs_are_the_same(tmp_path):
    root = handed_out(tmp_path)
    [path] = root.glob(f"{fleets.FLEETS}/command-*/command.json")
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "host": "login1", "versions": {**about["versions"], "torch": "1.0"}}))
    refused = command("--worker", str(root), cwd=tmp_path)
    assert refused.returncode == 2 and "versions on login1, of the command → on " in refused.stderr
    assert f"torch: 1.0 → {about['versions']['torch']}" in refused.stderr and "Traceback" not in refused.stderr
    path.write_text(json.dumps(about))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    answer = command("--worker", str(root), cwd=elsewhere)  # another folder than the command's
    assert answer.returncode == 0, answer.stderr
    assert len(find(root).trials) == 2 and not list(elsewhere.iterdir())
    nothing = command("--worker", str(root), cwd=tmp_path)
    assert nothing.returncode == 2 and "nothing waits for workers there" in nothing.stderr


def test_other_inputs_than_the_plan_s_are_refused_with_both_sides(tmp_path):
    root = handed_out(tmp_path)
    [path] = root.glob(f"{fleets.FLEETS}/command-*/command.json")
    script = "import json, sys; from pathlib import Path; from delora.worker import Command, PLAN\n"
    script += "command = Command(Path(sys.argv[1])); command.cut(1.0, None); path = command.folder / PLAN\n"
    script += "plan = json.loads(path.read_text()); plan['host'] = 'node3'\n"
    script += "for fleet in plan['fleets'].values(): fleet['data'] = 'f' * 64\n"
    script += "path.write_text(json.dumps(plan))"
    subprocess.run([sys.executable, "-c", script, path.parent], cwd=tmp_path, env=os.environ | OFFLINE, check=True)
    command("--worker", str(root), cwd=tmp_path)
    answer = command("--worker", str(root), cwd=tmp_path)  # a second process, which fails as the first
    assert not find(root).trials
    told = subprocess.run(
        [sys.executable, "-m", "delora.status", root], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "inputs on node3, of the plan → on " in answer.stderr + told.stdout
    assert f"data: {'f' * 64} → " in answer.stderr + told.stdout


def test_a_fleet_too_large_for_a_worker_s_device_is_halved_there(tmp_path):
    root = handed_out(tmp_path)
    [path] = root.glob(f"{fleets.FLEETS}/command-*/command.json")
    script = "import sys; from pathlib import Path; from delora.worker import Command\n"
    script += "command = Command(Path(sys.argv[1])); command.about['workers'] = 1; command.cut(1.0, None)"
    subprocess.run([sys.executable, "-c", script, path.parent], cwd=tmp_path, env=os.environ | OFFLINE, check=True)
    assert len(list(root.glob(f"{fleets.FLEETS}/{fleets.NAME}"))) == 1
    answer = command("--worker", str(root), "--memory", "0.001", cwd=tmp_path)
    assert answer.returncode == 0 and "2 trials are too many for this device" in answer.stderr, answer.stderr
    assert [trial.result["fleet_size"] for trial in find(root).trials] == [1, 1]


# --- Bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine=local", "device=cuda:1"], "device=cuda:1: a worker is given its GPU"),
        (["engine=here", "detach=true"], "detach=true: engine=here trains in this process"),
        (["engine=local", "engine.workers=0"], "engine.workers=0: must be at least 1"),
        (["engine=local", "+engine.worker=2"], "engine.worker"),
        (["engine=cluster"], "engine=cluster: expected one of here, local, ray, slurm"),
        (["engine=slurm", "engine.partition=gpu"], "engine=slurm: "),
        (["engine=ray"], "engine=ray needs Ray: pip install 'delora[ray]'"),
        (["engine._target_=delora.nosuch.X"], "engine._target_=delora.nosuch.X: "),
        (["engine._target_=delora.config.Trial"], "engine._target_=delora.config.Trial: is no engine"),
    ],
)
def test_an_engine_that_cannot_be_had_is_told_in_one_line_and_leaves_nothing(tmp_path, words, told):
    if "ray" in told and "needs" in told:
        try:
            import ray  # noqa: F401

            pytest.skip("Ray is installed")
        except ImportError:
            pass
    env = {"PATH": str(tmp_path)} if shutil.which("srun") and "slurm" in told else {}
    answer = command(*SMALL, *FEW, "-m", "method=lora", "seed=1,2", "name=s", *words, cwd=tmp_path, env=env)
    assert answer.returncode == 2 and told in answer.stderr and "Traceback" not in answer.stderr, answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
