"""One fleet of trials from config to results: config → data → model + method → train → results."""

import contextlib
import dataclasses
import logging
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from delora import data as rows_of
from delora import pretrained, results
from delora.config import NOT_THE_TRIAL, Trial
from delora.console import Console
from delora.data import Dataset
from delora.data.batches import Tokens
from delora.data.splits import paper_split
from delora.errors import UserError
from delora.model import ATTENTION, Fleet
from delora.results import Result, TrialFolder
from delora.tasks import TASKS
from delora.tracking import Tracker, Tracking
from delora.train import Data, Outcome, Score, Totals, train


def run(trials: Sequence[Trial]) -> list[Result]:
    """Trains the trials that are not finished yet together, writes their folders, and returns all results.

    Args:
        trials: configs that may share a fleet.

    Raises:
        UserError: data, weights, a folder or the disk are not as they must be.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.ExitStack() as open_folders:
        folders = [open_folders.enter_context(_open(trial)) for trial in trials]
        todo = [k for k, folder in enumerate(folders) if folder.finished is None]
        if todo:
            _run_fleet([trials[k] for k in todo], [folders[k] for k in todo])
        return [folder.finished for folder in folders if folder.finished is not None]


def _open(trial: Trial) -> TrialFolder:
    folder = results.open_trial(trial.folder, trial.resolved(), ignore=NOT_THE_TRIAL)
    if folder.left_over:
        folder.restart()
    return folder


def _run_fleet(trials: Sequence[Trial], folders: Sequence[TrialFolder]) -> None:
    started, config = time.perf_counter(), trials[0]
    task, device = TASKS[config.task.name], choose_device(config.device)
    _require_all(config)
    dataset = rows_of.load(task, **config.data.options())
    encoder = pretrained.load(config.model, task)
    encoder.model.set_attn_implementation(ATTENTION)
    fleet = Fleet(encoder.model, trials, device)
    tensors = tokenise(dataset, fleet, encoder, trials)
    made_by = results.provenance(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=config.precision,
        determinism={"threads": torch.get_num_threads(), "tf32": torch.backends.cuda.matmul.allow_tf32},
        data={"source": dataset.source, "sha256": dataset.sha256},
        weights={"source": encoder.source, "sha256": encoder.sha256},
    )
    with Tracking(config.logger.mode, config.logger.project) as tracking:
        trackers = [
            tracking.start(trial.id, trial.resolved(), folder.path, ignore=NOT_THE_TRIAL)
            for trial, folder in zip(trials, folders, strict=True)
        ]
        with Console(trials, task.headline, _total_steps(tensors, config)) as console:
            recorder = Recorder(folders, trackers, console)
            try:
                outcomes, totals = train(fleet, tensors, recorder)
            except Exception:
                for folder in folders:
                    folder.log(traceback.format_exc())
                raise
        for trial, folder, tracker, outcome in zip(trials, folders, trackers, outcomes, strict=True):
            result = _result(trial, outcome, totals, fleet, made_by, time.perf_counter() - started)
            if outcome.best is not None:
                described = {"id": trial.id, "epoch": str(outcome.best.epoch)}
                folder.save_tensors(results.ADAPTER, outcome.adapter, described)
                folder.save_tensors(results.PREDICTIONS, outcome.predictions, described)
            folder.finish(result)
            tracker.finish(outcome.status, {"best": result["best"], "last": result["last"]})


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
        raise UserError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _require_all(config: Trial) -> None:
    """One error for all that is missing, before anything is read."""
    task = TASKS[config.task.name]
    where = {key: value for key, value in config.data.options().items() if key in ("source", "dir")}
    lacks = [rows_of.missing(task, **where), pretrained.missing(config.model)]
    if found := [text for text in lacks if text]:
        raise UserError("missing on this machine:\n" + "\n".join(found))


def tokenise(dataset: Dataset, fleet: Fleet, encoder: pretrained.Pretrained, trials: Sequence[Trial]) -> Data:
    """The dataset on the fleet's device, with each trial's validation and test rows.

    Raises:
        UserError: the batch is larger than the training rows.
    """
    config, task = trials[0], dataset.task
    tokens = {
        name: Tokens(rows, encoder.tokenizer, config.max_length, fleet.device, fleet.dtype)
        for name, rows in dataset.splits.items()
    }
    if config.batch_size > len(tokens["train"]):
        raise UserError(f"batch_size={config.batch_size}: there are only {len(tokens['train'])} training rows")
    cut = sum(t.cut for t in tokens.values())
    if cut:
        logging.getLogger(__name__).info("%d examples fill max_length=%d and may be cut", cut, config.max_length)
    rows = len(tokens["validation"])
    data = Data(task, tokens["train"], tokens["validation"], torch.arange(rows).expand(len(trials), -1))
    data.mismatched = tokens.get("validation_mismatched")
    if config.protocol.name == "paper":
        splits = [paper_split(task, trial.seed, rows) for trial in trials]
        data.validation_KS = torch.stack([torch.as_tensor(validation) for validation, _ in splits])
        data.test_KS = torch.stack([torch.as_tensor(test) for _, test in splits])
    return data


def _total_steps(data: Data, config: Trial) -> int:
    return -(-len(data.train) // config.batch_size) * config.epochs


class Recorder:
    """Passes what the loop reports to each trial's folder, its wandb run and the console."""

    def __init__(self, folders: Sequence[TrialFolder], trackers: Sequence[Tracker], console: Console):
        self.folders, self.trackers, self.console = folders, trackers, console
        self.start = time.perf_counter()

    def step(self, step: int, epoch: float, loss_K: list[float | None], lr_K: list[float]) -> None:
        seconds = time.perf_counter() - self.start
        for folder, tracker, loss, lr in zip(self.folders, self.trackers, loss_K, lr_K, strict=True):
            if loss is not None:
                line = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "seconds": seconds}
                folder.record({"kind": "step", **line})
                tracker.log({"train": {"loss": loss, "lr": lr}, "epoch": epoch}, step)
        self.console.step(step, epoch, loss_K)

    def evaluation(self, trial: int, evaluation: dict[str, Any], best: Score | None) -> None:
        self.folders[trial].record({"kind": "evaluation", **evaluation})
        values = {"loss": evaluation["loss"], **evaluation["metrics"]}
        logged = {"validation": values, "distance": evaluation["distance"], "lambda": evaluation["lambda"]}
        self.trackers[trial].log(logged, evaluation["step"])
        self.console.evaluation(trial, evaluation, best)

    def diverged(self, trial: int, step: int) -> None:
        self.folders[trial].log(f"diverged in step {step}: the loss is not finite")
        self.console.diverged(trial, step)


def _result(
    trial: Trial, outcome: Outcome, totals: Totals, fleet: Fleet, made_by: results.MadeBy, seconds: float
) -> Result:
    result = {
        "schema": results.SCHEMA,
        "id": trial.id,
        "sweep": None,
        "status": outcome.status,
        "config": trial.resolved(),
        "headline": TASKS[trial.task.name].headline,
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
    return cast(Result, result)  # checked when it is written


def load(folder: str | Path) -> Fleet:
    """The model of a finished trial, in evaluation mode: `load(folder)(**inputs).logits`, inputs (B, T).

    Its `tokenizer` is the encoder's; `merge()` gives a plain transformers model.

    Raises:
        UserError: the folder holds no finished trial, or the encoder is not the one it was trained on.
    """
    stored = results.read(folder)
    trial = Trial.from_config(stored.result["config"])
    task = TASKS[trial.task.name]
    if lack := pretrained.missing(trial.model):
        raise UserError(f"missing on this machine:\n{lack}")
    encoder = pretrained.load(trial.model, task)
    made_with = stored.result["made_by"]["weights"]["sha256"]
    if encoder.sha256 != made_with:
        raise UserError(f"{folder}: trained on weights with sha256 {made_with}, this machine has {encoder.sha256}")
    encoder.model.set_attn_implementation(ATTENTION)
    fleet = Fleet(encoder.model, [trial], torch.device("cpu"))
    state, _ = results.read_tensors(Path(folder) / results.ADAPTER, "pt")
    fleet.load_trial_state(0, state)
    fleet.tokenizer = encoder.tokenizer
    return fleet.eval()
