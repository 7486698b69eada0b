"""One fleet of trials from config to results: config → data → model + method → train → results."""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
import transformers

from delora import data as rows_of
from delora import encoders, pretrained, storage, tasks, winner
from delora.again import check_source
from delora.attention import kernels
from delora.config import ModelConfig, Trial
from delora.console import Console
from delora.data import Dataset, Rows
from delora.data.batches import Tokens
from delora.data.splits import paper_split
from delora.errors import UserError
from delora.export import peft_folder
from delora.interrupts import Stop
from delora.methods.base import Method
from delora.metrics import guessing
from delora.missing import is_peft, missing_encoder, start_of, start_sha256
from delora.model import DTYPES, Fleet, check_unknown
from delora.predict import text_sha256
from delora.recording import begin_tracking, summary_of, track
from delora.storage import Extent, Result, ResultsError, TrialFolder
from delora.tasks import Task
from delora.tracking import Tracker, Tracking
from delora.train import Data, Outcome, Score, State, Totals, train

if TYPE_CHECKING:
    from delora.worker import Inputs

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def run_fleet(
    trials: Sequence[Trial],
    folders: Sequence[TrialFolder | None],
    state: Path,
    console: Console,
    tracking: Tracking,
    check: Callable[[], None] = lambda: None,
    inputs: "Inputs | None" = None,
    until: int | None = None,
    stop_there: bool = False,
) -> tuple[dict[int, Result], dict[int, ResultsError]]:
    """Trains trials together, going on from the state on disk if there is one, and writes their folders.

    Args:
        trials: configs of the same `company`.
        folders: their opened folders; None for a trial whose results are not to be written.
        state: the file of the fleet's state, safetensors; deleted when all is written.
        check: called before anything is written; raises where the fleet is no longer this process's.
        inputs: the hashes that data and weights have to have.
        until, stop_there: as `until` and `stop` of `train`; a fleet that pauses has no results, and keeps its state.

    Returns:
        Results by index, and why a trial has none: its folder could not be written.

    Raises:
        UserError: data, weights, a folder or the disk are not as they must be.
        Interrupted: a signal came; the state is saved.
    """
    started, config = time.perf_counter(), trials[0]
    task, device = config.task.facts, choose_device(config.device)
    if device.type == "cpu":
        keep_memory()
    console.doing("reading data")
    dataset, tensors, encoder = prepare(config)
    console.doing("loading the encoder")
    fleet = Fleet(as_loaded(encoder.model), trials, device, encoder.lacking)
    start = begin(fleet, encoder) if config.method.start else None
    compiled = choose_speed(fleet, config.compile)
    made_by = storage.provenance(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=config.precision,
        determinism={
            "threads": torch.get_num_threads(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "packed": fleet.packs,
            "compiled": compiled,
            "recorded": fleet.recorded,
        },
        data={
            "source": dataset.source,
            "sha256": dataset.sha256,
            "published": dataset.published,
            "guessing": guessing(task, dataset.splits["validation"].labels),
        },
        weights=encoder.origin,
        start=start,
    )
    origin = {"data": dataset.sha256, "weights": encoder.sha256, "precision": config.precision}
    if inputs:
        inputs.refuse_others(origin)
    origin |= {"start": start["sha256"]} if start else {}
    with Stop() as stop:
        recorder = Recorder(trials, folders, console, tracking, check)
        checkpoint = StateFile(state, trials, origin, config.fleet.checkpoint_seconds, stop, recorder.sync, started)
        if not recorder.begin(checkpoint.logs):
            checkpoint.delete()
            recorder.begin(None)
        data = for_trials(dataset.task, tensors, trials)
        console.begin(trials, task.headline, -(-len(data.train) // config.batch_size) * (until or config.epochs))
        outcomes, totals = train(fleet, data, recorder, checkpoint, until, stop_there)
        if any(outcome.status == "running" for outcome in outcomes):
            return {}, recorder.errors
        found = {}
        sha256 = {split: row_sha256(rows) for split, rows in dataset.splits.items() if split != "train"}
        for k, outcome in enumerate(outcomes):
            name_rows(outcome.predictions, k, data, sha256)
            if recorder.folders[k] is not None:
                seconds = totals.total_seconds + time.perf_counter() - started
                result = _result(trials[k], outcome, totals, fleet, made_by, seconds)
                if recorder.finish(k, outcome, result):
                    found[k] = result
        checkpoint.delete()
    return found, recorder.errors


def begin(fleet: Fleet, encoder: pretrained.Pretrained) -> storage.Origin:
    """Has the trials begin with what `method.start` names; where that is from.

    Raises:
        UserError: as `delora.missing.start_of`, or it was trained on other weights.
    """
    trial = fleet.trials[0]
    if is_peft(Path(str(trial.method.start)).expanduser()):
        return peft_folder.begin(fleet, peft_folder.start_of(trial))
    stored = start_of(trial)
    made_with = stored.result["made_by"]["weights"]["sha256"]
    if made_with != encoder.sha256:
        told = f"its adapter was trained on weights with sha256 {made_with}, these have {encoder.sha256}"
        raise UserError(f"method.start={trial.method.start}: {told}")
    before = tasks.of(stored.result["config"]["task"])
    fleet.begin_with(stored.tensors(storage.ADAPTER, "pt"), head=before.labels == trial.task.facts.labels)
    return {"source": stored.result["id"], "sha256": start_sha256(stored)}


@functools.cache
def keep_memory() -> None:
    """Has glibc keep freed blocks; it gives large ones back at once, and takes them anew page by page, zeroed.

    On the CPU that takes half of the time of a fleet's step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(name: str) -> torch.device:
    """The device of that name; auto takes the first accelerator there is, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"device={name} cannot be used here: {why}") from None
    return torch.device(name)


def choose_speed(fleet: Fleet, wish: bool | str) -> bool:
    """Has the layers compiled where that is wished for and can be; says where a slower path is taken."""
    if not fleet.known:
        known = ", ".join(encoders.families())
        logger.warning("examples are padded, not packed, and nothing is compiled: the encoder is none of %s", known)
        return False
    if fleet.alone:
        return False
    if wish == "auto":
        wish = fleet.device.type == "cuda"
        if wish and kernels is None:
            logger.warning("nothing is compiled: that needs Triton and a C compiler")
            return False
    if wish:
        fleet.compile_layers()
    return bool(wish)


def prepare(config: Trial) -> tuple[Dataset, dict[str, Tokens], pretrained.Pretrained]:
    """The rows of a trial's task, as tokens on its device, and the encoder; the fleets of a sweep share them.

    Raises:
        UserError: rows are missing or damaged; the batch is larger than the training rows.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    task, device, dtype = config.task.facts, config.device, DTYPES[config.precision]
    dataset, tokens, encoder = _prepare(
        task, config.data, config.model, config.max_length, config.batch_size, device, dtype
    )
    known = encoders.of(encoder.model.config.to_dict()) is not None
    if not known and (config.model, config.method.target) not in _tried:
        _try_out(config, dataset, encoder)
        _tried.add((config.model, config.method.target))
    return dataset, tokens, encoder


_tried: set[tuple[ModelConfig, str]] = set()  # encoders of unknown families, with the methods that they train with


def _try_out(config: Trial, dataset: Dataset, encoder: pretrained.Pretrained) -> None:
    rows = dataset.splits["train"]
    few = Rows(rows.texts[:4], rows.labels[:4])
    tokens = Tokens(few, encoder.tokenizer, 32, torch.device("cpu"), torch.float32)
    check_unknown(lambda: (as_loaded(encoder.model), encoder.lacking), tokens, config)


def as_loaded(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model once more, for a fleet to change in place; the weights, which stay frozen, share their memory."""
    frozen = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, frozen)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1)
def _prepare(task: Task, data, model, max_length: int, batch_size: int, device: str, dtype: torch.dtype):
    with ThreadPoolExecutor(1) as aside:
        chosen = aside.submit(choose_device, device)  # a GPU takes a second to begin
        dataset, encoder = rows_of.load(task, **data.options()), pretrained.load(model, task)
        place = chosen.result()
    tokenizer = encoder.tokenizer
    tokens = {split: Tokens(rows, tokenizer, max_length, place, dtype) for split, rows in dataset.splits.items()}
    if batch_size > len(tokens["train"]):
        raise UserError(f"batch_size={batch_size}: there are only {len(tokens['train'])} training rows")
    cut, rows = sum(t.cut for t in tokens.values()), sum(map(len, tokens.values()))
    if cut:
        _warn_once(f"{task.name}: {cut} of {rows} examples are longer than max_length={max_length} tokens and were cut")
    return dataset, tokens, encoder


@functools.cache
def _warn_once(text: str) -> None:
    """Warns of what each fleet of a sweep would tell again."""
    logger.warning("%s", text)


def for_trials(task: Task, tokens: Mapping[str, Tokens], trials: Sequence[Trial]) -> Data:
    """The tokens with each trial's validation and test rows."""
    rows = len(tokens["validation"])
    data = Data(task, tokens["train"], tokens["validation"], torch.arange(rows).expand(len(trials), -1))
    data.mismatched = tokens.get("validation_mismatched")
    if (test := tokens.get("test")) is not None:
        data.test, data.test_KS = test, torch.arange(len(test)).expand(len(trials), -1)
    elif trials[0].protocol.name == "paper":
        splits = [paper_split(task, trial.seed, rows) for trial in trials]
        data.validation_KS = torch.stack([torch.as_tensor(validation) for validation, _ in splits])
        data.test_KS = torch.stack([torch.as_tensor(test) for _, test in splits])
    return data


def row_sha256(rows: Rows) -> torch.Tensor:
    """The bytes (S, 8) of each row's `text_sha256`."""
    digests = b"".join(bytes.fromhex(text_sha256(texts)) for texts in rows.texts)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(len(rows), -1)


def name_rows(predictions: dict[str, torch.Tensor], trial: int, data: Data, sha256: Mapping[str, torch.Tensor]) -> None:
    """Adds to a trial's logits which rows they are of: numbers in the data's split, hashes of texts, and labels.

    Args:
        sha256: of the rows of each split, as `row_sha256`.
    """
    known = {"validation": (data.validation, "validation", data.validation_KS[trial])}
    if data.test_KS is not None:
        of = (data.validation, "validation") if data.test is None else (data.test, "test")
        known["test"] = *of, data.test_KS[trial]
    if data.mismatched is not None:
        known["mismatched"] = data.mismatched, "validation_mismatched", torch.arange(len(data.mismatched))
    for name, (tokens, split, row_S) in known.items():
        if name in predictions:
            predictions[f"{name}.row"] = row_S
            predictions[f"{name}.text_sha256"] = sha256[split][row_S]
            predictions[f"{name}.label"] = tokens.labels_S.cpu()[row_S]


class StateFile:
    """A fleet's training state on disk, with how far each trial's log is: the loop's `Checkpoints`.

    Args:
        path: a safetensors file, replaced whole.
        trials: the fleet's, in its order.
        origin: what must be the same for training to go on.
        seconds: between two writes.
        sync: has the trials' logs on disk and tells how far they are.
        started: when this process began with the fleet, by `time.perf_counter`.

    Raises:
        UserError: the file was made with another `origin`.
    """

    def __init__(
        self,
        path: Path,
        trials: Sequence[Trial],
        origin: Mapping[str, Any],
        seconds: float,
        stop: Stop,
        sync: Callable[[], list[Extent | None]],
        started: float,
    ):
        self.path, self.root, self.seconds, self.stop, self.sync = path, trials[0].root, seconds, stop, sync
        self.started = started
        self.about: dict[str, Any] = {
            "trials": [trial.id for trial in trials],
            "folders": [trial.folder.name for trial in trials],
            "origin": dict(origin),
        }
        self.last = time.monotonic()
        self.stored: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        if stored := read_state(path):
            self.stored = stored
            differing = storage.differences(stored[1]["origin"], self.about["origin"])
            if stored[1]["trials"] != self.about["trials"] or differing:
                lines = "\n".join(differing)
                raise UserError(f"{path}: training began with another input:\n{lines}\nDelete it to begin anew.")

    @property
    def logs(self) -> list[Extent | None] | None:
        """How far the log of each trial is from which training goes on; None where it begins."""
        return self.stored[1]["logs"] if self.stored else None

    def restore(self, state: State) -> None:
        if self.stored:
            state.unpack(*self.stored)
            self.stored = None

    def offer(self, state: State) -> None:
        if self.stop.number is None and time.monotonic() - self.last < self.seconds:
            return
        logs = self.sync()
        try:
            self._write(state, logs)
        except ResultsError as error:
            logger.warning("no checkpoint: %s", error)
        self.last = time.monotonic()
        self.stop.check()

    def save(self, state: State) -> None:
        self._write(state, self.sync())

    def _write(self, state: State, logs: list[Extent | None]) -> None:
        tensors, plain = state.pack()
        plain["totals"]["total_seconds"] += time.perf_counter() - self.started
        write_state(self.path, self.root, tensors, {**self.about, **plain, "logs": logs})

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self.stored = None


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and plain data of a fleet's state; None where there is no whole file."""
    if not os.path.lexists(path):
        return None
    try:
        tensors, described = storage.read_tensors(path, "pt")
        if described["sha256"] != _digest(tensors, described["state"]):
            raise ValueError("it has another sha256 than when it was written")
        return tensors, json.loads(described["state"])
    except (ResultsError, KeyError, ValueError) as error:
        logger.warning("%s: not a fleet's state (%s); its trials begin anew", path, error)
        return None


def write_state(path: Path, root: Path, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
    """Writes what `read_state` reads. Raises ResultsError where that fails.

    Args:
        root: of `storage.Folder`.
    """
    on_cpu, text = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, json.dumps(plain)
    data = safetensors.torch.save(on_cpu, {"state": text, "sha256": _digest(on_cpu, text)})
    storage.replace(path, data, root)


def _digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """A hash of names, types, shapes and values, and of the text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Recorder:
    """Passes what the loop reports to each trial's folder, its wandb run and the console.

    A trial whose folder cannot be written is left out from then on; if none is left the error is raised.
    Nothing is written before `begin`.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        folders: Sequence[TrialFolder | None],
        console: Console,
        tracking: Tracking,
        check: Callable[[], None] = lambda: None,
    ):
        self.trials, self.folders, self.console, self.tracking = trials, list(folders), console, tracking
        self.check = check
        self.start = time.perf_counter()
        self.trackers: list[Tracker | None] = [None] * len(trials)
        self.errors: dict[int, ResultsError] = {}

    def begin(self, logs: list[Extent | None] | None) -> bool:
        """Begins the trials, or goes on where their logs were when a checkpoint was made.

        A trial whose log is not what the checkpoint says it was is left out, to begin anew in another fleet.

        Returns:
            Whether any trial is left; else nothing was changed.
        """
        going = [
            folder if folder and (not logs or folder.holds(logs[k])) else None for k, folder in enumerate(self.folders)
        ]
        for folder in self.folders:
            if folder and folder not in going:
                logger.warning(
                    "%s is not as the last checkpoint left it; the trial begins anew", folder.path / storage.METRICS
                )
        if not any(going):
            return False
        self.folders = going
        for k, (trial, folder) in enumerate(zip(self.trials, going, strict=True)):
            if folder is not None:
                self.trackers[k] = begin_tracking(self.tracking, trial, folder)
                self._write(k, functools.partial(self._begin, k, logs[k] if logs else None))
        return True

    def _begin(self, trial: int, log: Extent | None, folder: TrialFolder) -> None:
        if log is None:
            folder.restart()
            return
        for line in folder.rewind(log):
            track(self.trackers[trial], line)

    def sync(self) -> list[Extent | None]:
        """Has all that was recorded on disk; how far each trial's log is, None for one that is not recorded."""
        extents: list[Extent | None] = [None] * len(self.trials)

        def sync(trial: int, folder: TrialFolder) -> None:
            extents[trial] = folder.sync()

        for trial in range(len(self.trials)):
            self._write(trial, functools.partial(sync, trial))
        return extents

    def step(self, step: int, epoch: float, loss_K: list[float | None], lr_K: list[float]) -> None:
        seconds = time.perf_counter() - self.start
        for k, (loss, lr) in enumerate(zip(loss_K, lr_K, strict=True)):
            if loss is not None:
                line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "seconds": seconds}
                self._record(k, {"kind": "step", **line})
        self.console.step(step, loss_K)

    def evaluation(self, trial: int, evaluation: dict[str, Any], best: Score | None) -> None:
        self._record(trial, {"kind": "evaluation", **evaluation})
        self.console.evaluation(trial, evaluation, best)

    def diverged(self, trial: int, step: int) -> None:
        if folder := self.folders[trial]:
            folder.log(f"diverged in step {step}: the loss is not finite")
        self.console.diverged(trial, step)

    def finish(self, trial: int, outcome: Outcome, result: Result) -> bool:
        """Writes the trial's tensors and result; whether that went well."""
        described = {"id": result["id"]}

        def write(folder: TrialFolder) -> None:
            if outcome.best is not None:
                described["epoch"] = str(outcome.best.epoch)
                folder.save_tensors(storage.ADAPTER, outcome.adapter, described)
                folder.save_tensors(storage.PREDICTIONS, outcome.predictions, described)
            folder.finish(result)

        if not self._write(trial, write):
            return False
        if tracker := self.trackers[trial]:
            tracker.finish(outcome.status, summary_of(result))
        return True

    def _record(self, trial: int, line: Mapping[str, Any]) -> None:
        if self._write(trial, lambda folder: folder.record(line)):
            track(self.trackers[trial], line)

    def _write(self, trial: int, write: Callable[[TrialFolder], object]) -> bool:
        folder = self.folders[trial]
        if folder is None:
            return False
        self.check()
        try:
            write(folder)
            return True
        except ResultsError as error:
            self.folders[trial], self.errors[trial] = None, error
            self.console.failed(self.trials[trial], str(error))
            if not any(self.folders):
                raise
            return False


def _result(
    trial: Trial, outcome: Outcome, totals: Totals, fleet: Fleet, made_by: storage.MadeBy, seconds: float
) -> Result:
    result = {
        "schema": storage.SCHEMA,
        "id": trial.id,
        "sweep": trial.sweep,
        "status": outcome.status,
        "config": trial.resolved(),
        "headline": trial.task.facts.headline,
        "best": dataclasses.asdict(outcome.best) if outcome.best else None,
        "last": dataclasses.asdict(outcome.last) if outcome.last else None,
        "diverged_step": outcome.diverged_step,
        "epochs": trial.epochs,
        "steps": totals.steps,
        "parameters": fleet.count(),
        "seconds": {"total": seconds, "train": totals.train_seconds, "evaluate": totals.evaluate_seconds},
        "tokens": {"real": totals.real_tokens, "computed": totals.computed_tokens},
        "fleet_size": len(fleet.trials),
        "made_by": made_by,
    }
    if outcome.status == "stopped" and outcome.last:
        result["stopped_epoch"] = outcome.last.epoch
    return cast(Result, result)  # checked when it is written


def load(
    folder: str | Path,
    methods: Sequence[type[Method]] = (),
    device: str = "cpu",
    base: str | Path | None = None,
) -> Fleet:
    """The model of a finished trial, in evaluation mode: `load(folder).predict(texts)` gives labels and probabilities,
    `load(folder)(**inputs).logits` logits of inputs (B, T).

    Its `tokenizer` is the encoder's; `merge()` gives a plain transformers model, `save()` writes one, or an adapter of
    PEFT's. The folder may be a stranger's: no code is run that it names, but that of delora and of `methods`. It may
    also hold an adapter that PEFT saved, see `delora.export.peft_folder.load`.

    Args:
        methods: classes outside of `delora.methods` that the trial may have been trained with.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the first accelerator there is.
        base: of an adapter that PEFT saved, its encoder: a folder, an id on the hub, or an option of `model=`.

    Raises:
        UserError: the folder holds no finished trial, its files are not those it ended with, it names a method or a
            package that is not known, or the encoder is not the one it was trained on.
    """
    place = choose_device(device)
    if is_peft(Path(folder)):
        return peft_folder.load(Path(folder), base).to(place)
    if base is not None:
        raise UserError(f"{folder}: holds no adapter of PEFT's, which base={base} would be for")
    stored = winner.trial_in(folder)
    trial = Trial.from_config(stored.result["config"])
    task, target = trial.task.facts, trial.method.target
    known = [f"{method.__module__}.{method.__qualname__}" for method in methods]
    way = f"delora.load({str(folder)!r}, methods=[{target.rpartition('.')[2]}])"
    check_source(folder, target, trial.model.packages, known, way)
    if lack := missing_encoder(trial.model):
        raise UserError(f"missing on this machine:\n{lack}")
    encoder = pretrained.load(trial.model, task)
    made_with = stored.result["made_by"]["weights"]["sha256"]
    if encoder.sha256 != made_with:
        raise UserError(f"{folder}: trained on weights with sha256 {made_with}, this machine has {encoder.sha256}")
    fleet = Fleet(encoder.model, [trial], place, encoder.lacking)
    fleet.load_trial_state(0, stored.tensors(storage.ADAPTER, "pt"))
    fleet.tokenizer, fleet.origin, fleet.stored = encoder.tokenizer, encoder.origin, stored
    return fleet.eval()
