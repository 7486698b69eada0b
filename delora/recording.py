"""What wandb is told of a trial, by whoever trains it or ends it. Imports no torch."""

import json
from collections.abc import Mapping
from typing import Any, cast

from delora import storage
from delora.config import NOT_THE_TRIAL, Trial
from delora.storage import Result, TrialFolder
from delora.tracking import Tracker, Tracking


def stand_for(trained: storage.StoredTrial, trial: Trial, folder: TrialFolder, tracking: Tracking) -> Result:
    """Ends a trial, whose folder is open, as one has ended whose training was the same; wandb has both.

    Raises:
        ResultsError: a file of the trained one is damaged, or the folder cannot be written.
    """
    folder.copy(trained)
    tracker = begin_tracking(tracking, trial, folder)
    for line in trained.content(storage.METRICS).splitlines():
        track(tracker, json.loads(line))
    own = {"schema": storage.SCHEMA, "id": trial.id, "sweep": trial.sweep, "config": trial.resolved()}
    result = cast(Result, {**storage.without_hashes(trained.result), **own, "trained_as": trained.result["id"]})
    folder.finish(result)
    tracker.finish(result["status"], summary_of(result))
    return result


def begin_tracking(tracking: Tracking, trial: Trial, folder: TrialFolder) -> Tracker:
    """Begins a trial's wandb run, with the tags by which runs are found."""
    tags = [trial.task.name, trial.method.name, trial.model.name]
    return tracking.start(trial.id, trial.resolved(), folder.path, group=trial.sweep, ignore=NOT_THE_TRIAL, tags=tags)


def summary_of(result: Result) -> dict[str, Any]:
    """What a wandb run's summary holds beside its status: scores, sizes, seconds, and the versions that made them."""
    kept = ("best", "last", "parameters", "seconds", "tokens", "fleet_size", "made_by")
    return {key: value for key, value in result.items() if key in kept}


def track(tracker: Tracker | None, line: Mapping[str, Any]) -> None:
    """Passes a line of metrics.jsonl to a wandb run."""
    if tracker is None:
        return
    if line["kind"] == "step":
        tracker.log({"train": {"loss": line["loss"], "lr": line["lr"]}, "epoch": line["epoch"]}, line["step"])
    else:
        values = {"loss": line["loss"], **line["metrics"]}
        logged = {"validation": values, **{name: line.get(name, {}) for name in ("distance", "lambda", "change")}}
        tracker.log(logged, line["step"])
