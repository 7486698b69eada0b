"""Input that cannot be used, and disks that fail: a clear message, a status that is not 0, nothing half-written.

Single faults of TSV files are in test_data_glue.py, of values in test_config.py, of writes in test_storage.py.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import transformers
from conftest import compose_trial

from delora import pretrained, storage
from delora.data import Rows, load
from delora.data.batches import Tokens
from delora.errors import UserError
from delora.model import Fleet
from delora.pretrained import byte_tokenizer
from delora.tasks import TASKS

CPU = torch.device("cpu")
TINY = ["model=tiny", "logger=none", "device=cpu", "batch_size=16", "name=x"]
SMALL = [*TINY, "data=synthetic", "data.rows.train=64", "data.rows.validation=40", "max_length=64"]


def line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "delora.cli", *map(str, arguments)]


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(line(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# --- Data


@pytest.fixture
def glue(tmp_path) -> Path:
    """RTE's files in full size, with generated sentences."""
    folder, dataset = tmp_path / "glue" / "RTE", load(TASKS["rte"], source="synthetic")
    folder.mkdir(parents=True)
    for split, name in (("train", "train.tsv"), ("validation", "dev.tsv")):
        rows = dataset.splits[split]
        fields = zip(rows.texts, rows.labels, strict=True)
        lines = [f"{i}\t{a}\t{b}\t{dataset.task.labels[y]}\n" for i, ((a, b), y) in enumerate(fields)]
        (folder / name).write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    return folder.parent


def test_damaged_files_are_reported_together_and_leave_no_result(glue, tmp_path):
    train, dev = glue / "RTE" / "train.tsv", glue / "RTE" / "dev.tsv"
    lines = train.read_text().splitlines(keepends=True)
    lines[6] = "5\t\tAn empty sentence before this one .\tentailment\n"
    lines[7] = "6\tA label\tof another task .\tneutral\n"
    train.write_text("".join(lines))
    dev.write_bytes(dev.read_bytes()[:-20_000])
    answer = command(*TINY, "task=rte", f"data.dir={glue}", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == "" and "Traceback" not in answer.stderr
    assert f"{train}: line 7: an empty text, expected a sentence" in answer.stderr
    assert f"{train}: line 8: label 'neutral', expected entailment or not_entailment" in answer.stderr
    assert f"{dev}: " in answer.stderr and "expected 277 (rte validation)" in answer.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_an_example_that_just_fits_is_not_cut():
    rows = Rows([("a" * 6,), ("a" * 7,), ("",)], np.zeros(3, np.int64))
    tokens = Tokens(rows, byte_tokenizer(), 8, CPU, torch.float32)
    assert tokens.lengths_S.tolist() == [8, 8, 2] and tokens.cut == 1


def test_an_empty_sentence_is_scored_like_any_other():
    trial = compose_trial("model=tiny", "method=delora")
    encoder = pretrained.load(trial.model, TASKS["qqp"])
    rows = Rows([("", "Why ?"), ("", ""), ("Why ?", "")], np.zeros(3, np.int64))
    tokens = Tokens(rows, encoder.tokenizer, 64, CPU, torch.float32)
    fleet = Fleet(encoder.model, [trial], CPU).eval()
    batch = tokens.gather(torch.arange(3)[None])
    assert fleet(**batch.inputs).logits.isfinite().all()


# --- Encoders; those of checkpoints are in test_pretrained.py


def test_a_model_without_a_classification_head_is_refused():
    trial = compose_trial("model.source=folder", "model.shape=null", "method.targets=[q]")
    config = transformers.T5Config(vocab_size=261, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=2)
    with pytest.raises(UserError, match="no classification head: no linear layer under classifier"):
        Fleet(transformers.T5ForSequenceClassification(config), [trial], CPU)


# --- Commands: each ends at once, says what is wrong in a line or a short list, and leaves nothing behind

RUN = "model=tiny data=synthetic data.rows.train=64 data.rows.validation=40 logger=none device=cpu batch_size=16"
GLUE = "model=tiny logger=none device=cpu task=rte"
SOURCE = "model=roberta_base model.shape=null data=synthetic logger=none"
PACKAGE = "model=minilm data=synthetic logger=none model.package"
SEARCH = f"{RUN} -m hydra/sweeper=search name=s"
WRONG = {
    # keys
    f"{RUN} tsak=mrpc": "tsak: no such key; did you mean task?",
    f"{RUN} alpha=8": "alpha: no such key; did you mean method.alpha, of method=dora,lora,loraplus,pissa,rslora?",
    f"{RUN} method.alpha=8": "method=delora has no such key; it belongs to method=dora,lora,loraplus,pissa,rslora",
    f"{RUN} größe=3": "größe=3: no such key",
    f"{RUN} rte": "rte: expected KEY=VALUE",
    f"{RUN} ~lr": "~lr: no key can be left out",
    f"{RUN} method@other=lora": "method@other: no group can be put elsewhere",
    f"{RUN} method=loro": "did you mean lora?",
    f"{RUN} task=null": "task=null: expected one of cola, mnli",
    f"{RUN} experiment=table4/mprc": "did you mean table4/mrpc?",
    # values
    f"{RUN} lr=abc": "lr=abc: expected a number",
    f"{RUN} lr=": "lr=: expected a number",
    f"{RUN} lr=1,": "lr=1,: a value is missing beside a comma",
    f"{RUN} lr=nan epochs=0 seed=1.5": "3 faults in the config",
    f"{RUN} epochs=1e20": "epochs=1e+20: expected a whole number",
    f"{RUN} lr='${{nothing}}'": "Interpolation key 'nothing' not found",
    f"{RUN} name=../up": "name=../up: expected up to 100 letters",
    f"{RUN} name=结果": "name=结果: expected up to 100 letters",
    f"{RUN} name={{a:1}}": "name={a:1}: expected text\n",
    f"{RUN} method.targets=[query": "method.targets=[query: cannot be read as KEY=VALUE",
    f"{RUN} method.targets=[1]": "error: method.targets=1: expected text",
    f"{RUN} method.rank=null lr=-1": "method.rank=null: expected a value",
    f"{RUN} method=ether method.side=null": "method.side=null: expected a value",
    f"{RUN} method=lora lr_factor_on=lambda": "method=lora has no λ with a rate of its own",
    f"{RUN} device=mps": "device=mps cannot be used here",
    f"{RUN} device=cuda:99": "device=cuda:99 cannot be used here",
    f"{RUN} batch_size=65": "batch_size=65: there are only 64 training rows",
    f"{RUN} data.rows.validation=1": "data.rows.validation=1: cannot be split in two",
    # classes of methods
    f"{RUN} method._target_=nosuch.module.Class": "nosuch.module cannot be imported: ModuleNotFoundError",
    f"{RUN} method._target_=delora.methods.lora.Nothing": "delora.methods.lora has no class Nothing",
    f"{RUN} method._target_=delora.methods.lora.lora": "has no class lora; did you mean LoRA?",
    f"{RUN} method._target_=delora.methods.lora": "delora.methods has no class lora",
    f"{RUN} method._target_=collections.OrderedDict": "expected a class derived from delora.methods.base.LinearMethod",
    f"{RUN} method._target_=delora.methods.base.per_trial": "delora.methods.base has no class per_trial",
    f"{RUN} method._target_=builtins.dict": "expected a class derived from delora.methods.base.LinearMethod",
    f"{RUN} method._target_=.LoRA": "expected a class with its module",
    f"{RUN} method._target_=asyncio.windows_events.X": "asyncio.windows_events cannot be imported: ImportError: win32",
    f"{RUN} method._target_=delora.methods.base.LinearMethod": "an abstract class: it lacks delta and forward",
    f"{RUN} method._target_=delora.methods.lora.LoRA": "method.alpha: is missing; LoRA cannot do without",
    # sweeps
    f"{RUN} seed=1,2": "seed=1,2: several values need -m",
    f"{RUN} -m seed=range(1,0)": "seed=range(1,0): holds no value",
    f"{RUN} -m lr=range(0.1,0.5,0)": "lr=range(0.1,0.5,0): holds no value",
    f"{RUN} -m lr=range(0,inf)": "trials, a sweep has at most",
    f"{RUN} -m seed=glob(*)": "seed=glob(*): holds no value",
    f"{RUN} -m lr=interval(0.1,1)": "error: lr=interval(0.1,1): an interval needs hydra/sweeper=search",
    f"{RUN} -m plan=true,false": "plan=true,false: has one value for all trials",
    f"{RUN} -m on_error=stop,continue": "on_error=stop,continue: has one value for all trials",
    f"{RUN} -m logger=none,wandb": "logger=none,wandb: has one value for all trials",
    f"{RUN} -m logger.mode=online,offline": "logger.mode=online,offline: has one value for all trials",
    f"{SEARCH} lr=interval(0.2,0.1)": "error: lr=interval(0.2,0.1): the lower bound comes first\n",
    f"{SEARCH} lr=interval(0.1,0.1) seed=1,2": "lr=interval(0.1,0.1): nothing to search for: it has one value",
    f"{SEARCH} lr=interval(0.1,2) lrr=interval(0.1,2)": "lrr: no such key; did you mean lr?",
    f"{SEARCH} method.alpha=interval(1,2)": "method=delora has no such key; it belongs to",
    f"{SEARCH} epochs=interval(1,5)": "epochs=1.0: expected a whole number",
    f"{SEARCH} lr=interval(0.1,2) search.seeds=[7,8,7]": "search.seeds=[7,8,7]: 7 twice: it would count as two seeds",
    f"{SEARCH} lr=interval(0.1,2) search.trials=0": "search.trials=0: must be at least 1",
    f"{SEARCH} lr=interval(0.1,2) search.batch=1,2": "search.batch=1,2: has one value for all trials",
    f"{SEARCH} epochs=3": "error: hydra/sweeper=search: nothing to search for; write, as an example, lr=interval(",
    f"{SEARCH} lr=interval(0.1,2) name=null": "error: hydra/sweeper=search keeps its history in the sweep's folder",
    # Hydra's words and flags
    f"{RUN} hydra/launcher=null": "hydra/launcher=null: expected the name of an option",
    f"{RUN} hydra/launcher=slurm": "Could not find 'hydra/launcher/slurm'",
    f"{RUN} hydra/launcher=basic,fleet -m": "hydra/launcher=basic,fleet: Hydra's own keys have one value",
    f"{RUN} hydra/sweeper=null -m seed=1,2": "hydra/sweeper=null: expected the name of an option",
    f"{RUN} hydra.launcher._target_=x.Y": "hydra.launcher._target_=x.Y: is chosen by name",
    f"{RUN} hydra.job.chdir=true": "hydra.job.chdir=true: runs stay in the folder of the command",
    f"{RUN} hydra.mode=both": "hydra.mode=both: Invalid value 'both', expected one of [RUN, MULTIRUN]",
    f"{RUN} hydra.searchpath=[nosuch]": "hydra.searchpath=[nosuch]: no such folder: nosuch",
    f"{RUN} --experimental-rerun x.pickle": "--experimental-rerun: runs are not pickled",
    f"{RUN} --shell-completion x": "Expecting one subcommand",
    f"{RUN} --cfg job --package nosuch": "package 'nosuch' not found",
    f"{RUN} --package nosuch": "--package needs --cfg job",
    f"{RUN} --lr=1": "--lr=1: no such flag",
    f"{RUN} --run --multirun": "only one of --run, --multirun",
    # files of configs
    f"{RUN} --config-dir nosuch": "--config-dir nosuch: no such folder",
    f"{RUN} --config-dir HERE/syntax method=mine": "mine.yaml, line 2: expected ',' or ']', but got ':'",
    f"{RUN} --config-dir HERE/list method=mine": "Cannot merge DictConfig with ListConfig",
    f"{RUN} --config-dir HERE/latin method=mine": "mine.yaml: 'utf-8' codec can't decode byte",
    f"{RUN} --config-dir HERE/unknown method=mine": "In 'method/mine': Could not load 'method/nosuch'",
    f"{RUN} --config-dir HERE/loop method=mine": "method=mine: its files refer to themselves",
    f"{RUN} --config-dir HERE/lacking method=mine": "method.betas: is missing",
    f"{RUN} --config-dir HERE/option method=mine": "method.mine=3: LoRA has no such option",
    f"{RUN} --config-dir HERE/nul experiment=mine": r"output_dir=a\x00b: a path holds no NUL character",
    f"{RUN} --config-dir HERE/escape experiment=mine": r"task.name=\x1b[31mred: expected up to",
    # folders of data, encoders and results
    f"{GLUE} data.dir=HERE/nosuch": "there is no folder",
    f"{GLUE} data.dir=HERE/glue": "RTE",
    f"{GLUE} data.dir=~nosuchuser": "data.dir=~nosuchuser: there is no home folder of that user",
    f"{SOURCE} model.source=./nosuch": "there is no folder nosuch",
    f"{SOURCE} model.source=nosuch/nosuch": "nosuch/nosuch is not in the Hugging Face cache",
    f"{SOURCE} model.source=HERE/glue": "glue lacks config.json",
    f"{SOURCE} model.source=HERE/glue/RTE/train.tsv": "there is no folder",
    f"{SOURCE} model.source=~nosuchuser": "model.source=~nosuchuser: there is no home folder of that user",
    f"{PACKAGE}=os": "the Python package os is not installed",
    f"{PACKAGE}=nosuch.part": "the Python package nosuch.part is not installed",
    f"{RUN} output_dir=": "output_dir=: expected text",
    f"{RUN} output_dir=~nosuchuser/x": "output_dir=~nosuchuser/x: there is no home folder of that user",
    f"{RUN} output_dir=HERE/glue/RTE/train.tsv": "train.tsv is no folder",
    f"{RUN} -m seed=1,2 output_dir=/dev/null/x": "/dev/null is no folder",
    f"{RUN} output_dir={'x' * 300}": "File name too long",
}
REPORTS = {
    "": "the following arguments are required: FOLDER",
    "nosuch": "nosuch",
    "HERE/glue": "glue",
    "HERE/glue --only everything": "invalid choice: 'everything'",
    "HERE/glue --factor high": "invalid float value: 'high'",
    "HERE/glue --range 4 1": "the lower one first",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """Folders of configs and data that cannot be used."""
    folder = tmp_path_factory.mktemp("here")
    texts = {
        "syntax/method/mine.yaml": "name: [mine\nx: {",
        "list/method/mine.yaml": "- a\n- b\n",
        "latin/method/mine.yaml": "name: größe\n",
        "unknown/method/mine.yaml": "defaults:\n  - nosuch\n",
        "loop/method/mine.yaml": "defaults:\n  - mine\n",
        "lacking/method/mine.yaml": "name: mine\n",
        "option/method/mine.yaml": "defaults:\n  - lora\n  - _self_\nmine: 3\n",
        "nul/experiment/mine.yaml": '# @package _global_\noutput_dir: "a\\0b"\n',
        "escape/experiment/mine.yaml": '# @package _global_\ntask:\n  name: "\\e[31mred"\n',
        "glue/RTE/train.tsv": "index\tsentence1\n",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="latin-1")
    return folder


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [(program, *row) for program, rows in (("run", WRONG), ("report", REPORTS)) for row in rows.items()],
    ids=lambda value: value.removeprefix(RUN),
)
def test_a_wrong_command_is_one_clear_error_and_leaves_nothing(here, tmp_path, program, words, message):
    cwd, files = tmp_path / "cwd", sorted(here.rglob("*"))
    cwd.mkdir()
    words = [word.replace("HERE", str(here)) for word in words.split()]
    answer = forked.command(f"delora-{program}", *words, cwd=cwd, folder=tmp_path)
    assert answer.status == 2 and answer.output == "" and "Traceback" not in answer.errors, answer
    assert message in answer.errors
    assert len(answer.errors.splitlines()) <= 16 and max(map(len, answer.errors.splitlines())) < 500, answer.errors
    assert not list(cwd.iterdir()) and sorted(here.rglob("*")) == files


# --- Disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_run_and_with_more_space_the_same_command_finishes(small_disk, tmp_path):
    words = [*SMALL, "epochs=8", "log_every=1", f"output_dir={small_disk}"]
    (small_disk / "filler").write_bytes(b"x" * 44_000)
    full = command(*words, cwd=tmp_path)
    assert full.returncode == 1 and full.stdout == "" and "Traceback" not in full.stderr
    assert "No space left on device" in full.stderr.splitlines()[-1]
    assert "run the same command again" in full.stderr.splitlines()[-1]
    assert not list(small_disk.rglob("result.json")) and not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    stored = storage.read(small_disk / "x")
    assert stored.result["status"] == "done" and len(list(stored.steps())) == 32


def test_an_output_folder_removed_during_a_run_ends_it(tmp_path):
    folder, pipe = tmp_path / "outputs" / "x", subprocess.PIPE
    words = line(*SMALL, "epochs=3000", "log_every=1")
    with subprocess.Popen(words, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        while not ((metrics := folder / "metrics.jsonl").exists() and metrics.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        folder.rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "" and "Traceback" not in errors
    assert "removed while the trial ran" in errors.splitlines()[-1]
    assert not folder.exists()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    answer = command(*SMALL, "output_dir=file/deeper", cwd=tmp_path)
    assert answer.returncode in (1, 2) and "file/deeper" in answer.stderr and "Traceback" not in answer.stderr
