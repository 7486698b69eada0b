"""The command `delora-run` as a user has it: from a wheel, in a clean environment, in a folder of no checkout."""

import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from delora import storage
from delora.cli import conf_folder
from delora.overrides import tidy

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = ["model=tiny", "data=synthetic", "data.rows.train=64", "data.rows.validation=40", "logger=none"]
TINY += ["batch_size=16", "max_length=64", "device=cpu"]
OUTSIDE = ("HF_", "HUGGINGFACE_", "HYDRA_", "TRANSFORMERS_", "DELORA_", "PYTHON")  # settings of the tests' own machine


@pytest.fixture(scope="module")
def delora_run(tmp_path_factory) -> Path:
    """The script that the wheel installs in an environment of its own, which shares only the dependencies."""
    folder = tmp_path_factory.mktemp("clean")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    # A path in a .pth file adds a folder without the .pth files in it, so an editable delora there stays unseen.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    [site] = (folder / "venv" / "lib").glob("*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)))
    return python.with_name("delora-run")


def environment(**variables: str) -> dict[str, str]:
    """The environment without settings of the tests' own machine, and offline unless told otherwise."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(OUTSIDE)}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables


def command(delora_run: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    line = [str(delora_run), *arguments]
    return subprocess.run(line, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=120)


def start(delora_run: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    line, pipe = [str(delora_run), *arguments], subprocess.PIPE
    return subprocess.Popen(line, cwd=cwd, env=environment(), stdout=pipe, stderr=pipe, text=True)


def test_the_wheel_holds_code_and_every_config(delora_run, tmp_path):
    script = "import delora, delora.cli; print(delora.__file__, delora.cli.conf_folder())"
    python = delora_run.with_name("python")
    line = [str(python), "-c", script]
    answer = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    package, conf = map(Path, answer.stdout.split())
    assert package.is_relative_to(python.parents[1]) and conf == package.parent / "conf"
    ours, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.yaml")} for root in (CHECKOUT / "conf", conf)
    )
    assert ours == theirs


def test_table4_is_a_command_of_the_wheel(delora_run, tmp_path):
    words = ["--tasks", "rte", "--model", "tiny", "data=synthetic", "data.rows.train=32", "data.rows.validation=40"]
    words += ["seed=42", "epochs=1", "max_length=64", "logger=none", "device=cpu"]
    answer = command(delora_run.with_name("delora-table4"), *words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "| DeLoRA | RTE | 0.01 | 1 | 32 | published |" in re.sub(" +", " ", answer.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert (tmp_path / "outputs" / "table4" / "tiny" / "report" / "hyperparameters.md").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve"]], ids=" ".join)
def test_answers_about_configs_are_quick_and_import_nothing_heavy(delora_run, tmp_path, flags):
    seconds = []
    for _ in range(10):  # the best counts: the machine may be busy
        begun = time.monotonic()
        answer = command(delora_run, *flags, cwd=tmp_path)
        seconds.append(time.monotonic() - begun)
        assert answer.returncode == 0, answer.stderr
        if seconds[-1] < 1.5:
            break
    assert min(seconds) < 1.5
    line = [str(delora_run.with_name("python")), "-X", "importtime", str(delora_run), *flags]
    told = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    imported = set(re.findall(r"^import time:.*\| +(\w+)", told.stderr, re.MULTILINE))
    assert "delora" in imported and not imported & {"torch", "transformers"}
    assert not list(tmp_path.iterdir())


def test_help_names_every_option_and_key(delora_run, tmp_path):
    text = command(delora_run, "-h", cwd=tmp_path).stdout
    for path in conf_folder().glob("[!h]*/**/*.yaml"):  # all but Hydra's own
        group, _, option = path.relative_to(conf_folder()).with_suffix("").as_posix().partition("/")
        assert f"{group}={option} " in text
    config = yaml.safe_load((conf_folder() / "config.yaml").read_text())
    for key in storage.flatten({name: config[name] for name in config.keys() - {"defaults", "hydra"}}):
        assert f"  {key}=" in text
    keys = text.partition("Keys of the options")[2]
    for path in conf_folder().glob("*/*.yaml"):
        group, option = path.parent.name, path.stem
        if group not in ("method", "model", "data", "logger"):
            continue
        _, begun, own = keys.partition(f"\n  {group}={option}")
        for key, value in storage.flatten(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
            if key.partition(".")[0] not in ("_target_", "name", "title", "place", "styles", "defaults"):
                pattern = rf"^ +{group}\.{re.escape(key)}=(.*?)(?:  .*)?$"
                of_option = re.search(pattern, own.partition(f"\n  {group}=")[0] if begun else "", re.MULTILINE)
                found = of_option or re.search(pattern.replace(" +", "  ", 1), keys, re.MULTILINE)
                assert yaml.safe_load(found[1]) == value, (path, key)
    comment = "learning rate of λ; the paper takes 3e-3 for MNLI, SST-2, QNLI and QQP"
    assert re.search(rf"^    method.lambda_lr=1.0e-2 +{re.escape(comment)}$", text, re.MULTILINE)
    assert "Exit status" in text


COMPLETION = """
eval "$(delora-run -sc install=bash)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
hydra_bash_completion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("delora-run +experiment=study/m", ["+experiment=study/mrpc"]),
        ("delora-run -m experiment=tuned/r", ["experiment=tuned/rates", "experiment=tuned/rte"]),
        ("delora-run +experiment=cu", ["+experiment=curves"]),
        ("delora-run task=mrpc method=lora method.al", ["method.alpha="]),
    ],
)
def test_bash_completes_options_and_keys(delora_run, tmp_path, line, expected):
    path = f"{delora_run.parent}:{os.environ['PATH']}"
    words = ["bash", "--norc", "-c", COMPLETION, "bash", line]
    answer = subprocess.run(words, cwd=tmp_path, env=environment(PATH=path), capture_output=True, text=True, check=True)
    assert answer.stdout.split() == expected, answer.stderr


def test_all_faults_of_a_command_come_together(delora_run, tmp_path):
    words = ["tsak=mrpc", "task=mprc", "method.rnk=4", "method.targets=[qeury]", "lr=nan", "epochs=0", "batch_size=x"]
    words += ["alpha=8", "clip_norm=1,", "rte"]
    answer = command(delora_run, *words, "model=tiny", "max_length=513", "seed=1,2", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == "" and "Traceback" not in answer.stderr
    heading, *faults = answer.stderr.splitlines()
    assert heading == "delora-run: error: 12 faults in the config"
    for expected in (
        "tsak: no such key; did you mean task?",
        "did you mean mrpc?",
        "alpha: no such key; did you mean method.alpha, of method=dora,lora,loraplus,pissa,rslora?",
        "clip_norm=1,: a value is missing beside a comma",
        "rte: expected KEY=VALUE",
        "did you mean method.rank?",
        "method.targets=qeury: matches no layer or place of model=tiny; did you mean query?",
        "lr=nan: expected a finite number",
        "epochs=0: must be at least 1",
        "batch_size=x: expected a whole number",
        "max_length=513: above 512",
        "seed=1,2: several values need -m",
    ):
        assert sum(expected in fault for fault in faults) == 1, (expected, answer.stderr)
    assert not list(tmp_path.iterdir())


def test_a_key_written_as_a_flag_is_refused(delora_run, tmp_path):
    answer = command(delora_run, "task=rte", "--lr=1e-3", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr == ("delora-run: error: --lr=1e-3: no such flag; keys are written without dashes: lr=1e-3\n")


@pytest.mark.parametrize("answers", ["refused", "silent"])
def test_what_is_missing_is_one_error_with_the_commands_that_work(delora_run, tmp_path, answers):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers == "silent":
            listener.listen()  # the system accepts connections, nobody ever answers
        network = {"HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        for _ in range(3):  # the machine may be busy
            begun = time.monotonic()
            words = ("task=mrpc", "method=delora", "lr=1e-3")
            answer = command(delora_run, *words, cwd=tmp_path, HF_HOME=str(tmp_path / "cache"), **network)
            if (seconds := time.monotonic() - begun) < 10:
                break
        assert seconds < 10
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.count("error:") == 1 and "Traceback" not in answer.stderr
    assert "nyu-mll/glue is not in the Hugging Face cache" in answer.stderr
    assert "FacebookAI/roberta-base is not in the Hugging Face cache" in answer.stderr
    for words in (
        "hf download --repo-type dataset nyu-mll/glue --include 'mrpc/*'",
        "hf download FacebookAI/roberta-base",
    ):
        assert f"    {words} " in answer.stderr
    ways = re.findall(r"^    delora-run (.+?)(?:   .*)?$", answer.stderr, re.MULTILINE)
    assert any({"model=minilm", "data=synthetic"} <= {*words.split()} for words in ways)
    for words in ways:
        assert command(delora_run, *words.split(), "--cfg", "job", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.rglob("result.json"))


def test_a_run_and_what_the_same_name_does_afterwards(delora_run, tmp_path):
    words = [*TINY, "epochs=2", "name=a"]
    first = command(delora_run, *words, cwd=tmp_path)
    assert first.returncode == 0 and "Traceback" not in first.stderr, first.stderr
    assert re.search(r"104 .*max_length=64 .*\bcut\b", first.stderr)  # a byte is a token of model=tiny
    assert "synthetic" in first.stdout and first.stdout.endswith("results in outputs/a\n")
    stored = storage.read(tmp_path / "outputs" / "a")
    assert stored.result["status"] == "done" and stored.result["made_by"]["data"]["source"] == "synthetic"
    assert stored.result["made_by"]["commit"] is None  # a wheel knows none
    assert stored.result["best"]["test"]["accuracy"] >= 0
    evaluations = list(stored.evaluations())
    assert [line["epoch"] for line in evaluations] == [0, 1, 2]
    assert set(evaluations[0]["distance"].values()) == {0.0} and min(evaluations[2]["distance"].values()) > 0
    assert set(evaluations[0]["lambda"].values()) == {4.0}
    assert not (tmp_path / "multirun").exists() and [p.name for p in tmp_path.iterdir()] == ["outputs"]

    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").rglob("*") if p.is_file()}
    again = command(delora_run, *words, cwd=tmp_path)
    assert (
        again.returncode == 0 and again.stdout == first.stdout and again.stderr == "done already, not trained again\n"
    )
    changed = command(delora_run, *words, "lr=1e-4", "method.rank=4", cwd=tmp_path)
    assert changed.returncode == 2 and changed.stdout == "" and "Traceback" not in changed.stderr
    assert "lr: 0.006 → 0.0001" in changed.stderr and "method.rank: 8 → 4" in changed.stderr
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_terminal_shows_a_bar_and_then_whole_scores(delora_run, tmp_path):
    ours, theirs = pty.openpty()
    line, written = [str(delora_run), *TINY, "epochs=3", "log_every=1"], b""
    with subprocess.Popen(line, cwd=tmp_path, env=environment(COLUMNS="80"), stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 10_000):
                written += part
    os.close(ours)
    assert process.returncode == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert all(what in shown for what in ("loading PyTorch", "reading data", "loading the encoder"))
    assert re.search(r"mrpc delora .*step +\d+/12 +loss \d\.\d{4} +best accuracy \d\.\d{4} +\d:\d\d:\d\d", shown)
    assert re.search(r"^test +accuracy \d\.\d{4}, f1 \d\.\d{4}\s*$", shown, re.MULTILINE)


def test_a_diverged_trial_is_recorded_and_ends_with_status_3(delora_run, tmp_path):
    answer = command(delora_run, *TINY, "epochs=4", "lr=1e9", "name=d", cwd=tmp_path)
    assert answer.returncode == 3 and "diverged" in answer.stdout and "Traceback" not in answer.stderr
    result = json.loads((tmp_path / "outputs" / "d" / "result.json").read_text())
    assert result["status"] == "diverged" and 1 <= result["diverged_step"] <= result["steps"]


def test_ctrl_c_in_training_leaves_no_result_and_the_same_command_finishes(delora_run, tmp_path):
    words, folder = [*TINY, "epochs=12", "name=c"], tmp_path / "outputs" / "c"
    with start(delora_run, *words, cwd=tmp_path) as process:
        metrics, scored = folder / "metrics.jsonl", '"kind": "evaluation", "epoch": 1,'
        while not (metrics.exists() and scored in metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert errors.splitlines()[-1].startswith("delora-run: interrupted")
    assert not (folder / "result.json").exists() and [folder] == storage.find(tmp_path).unfinished
    answer = command(delora_run, *words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    stored = storage.read(folder)
    assert stored.result["status"] == "done" and stored.result["steps"] == 48
    assert [line["epoch"] for line in stored.evaluations()] == list(range(13))


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5])  # Hydra's imports, torch's, the model's
def test_ctrl_c_before_training_is_as_quiet(delora_run, tmp_path, seconds):
    with start(delora_run, *TINY, "epochs=60", "name=c", cwd=tmp_path) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and output == "" and "Traceback" not in errors, errors
    assert errors.splitlines()[-1].startswith("delora-run: interrupted")
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize(
    "word", ["output_dir=结果", "output_dir=~/glue,'b c'", "method.targets=[a,'ü']", "lr=1e-3", "x=${y}"]
)
def test_letters_that_hydra_does_not_know_are_quoted(word):
    expected = {"output_dir=结果": "output_dir='结果'", "output_dir=~/glue,'b c'": "output_dir='~/glue','b c'"}
    assert tidy([word]) == [expected.get(word, word)]


def test_the_version_is_delora_s(delora_run, tmp_path):
    answer = command(delora_run, "--version", cwd=tmp_path)
    assert re.fullmatch(
        r"delora \d\S+ \(torch \d\S+, transformers \d\S+, hydra-core 1\.3\S*, Python 3\S+\)\n", answer.stdout
    )


def test_ascii_and_a_reader_that_leaves_do_not_change_how_a_run_ends(delora_run, tmp_path):
    assert command(delora_run, "--help", cwd=tmp_path, PYTHONIOENCODING="ascii").returncode == 0
    words = shlex.join([str(delora_run), *TINY, "epochs=1", "output_dir=结果"])
    line = f"{words} | true; exit ${{PIPESTATUS[0]}}"
    answer = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True
    )
    assert (answer.returncode, "Traceback" in answer.stderr) == (0, False), answer.stderr
    assert len(list((tmp_path / "结果").glob("*/result.json"))) == 1
