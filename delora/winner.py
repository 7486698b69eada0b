"""The trials below a folder as a table, and the one of them to take. Imports no torch, and pandas for the table alone.

Which trial is taken: of each task the config with the highest mean score on validation over its seeds, and of its seeds
the one with the highest. Only configs with the most seeds compete, since a mean over fewer is more of luck, and one of
which a seed diverged stands behind those of which none did. Trials that failed say nothing of their config.
"""

import json
import logging
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora import storage
from delora.config import NOT_THE_TRIAL, expected, look_up
from delora.errors import UserError
from delora.storage import Found, Result, StoredTrial
from delora.terminal import printable

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The trial to take.

    Attributes:
        trial: that trial.
        seeds: the trials of its config that are done, one a seed, it among them, in the order of the seeds.
        diverged: how many seeds of its config diverged.
        metric: what was compared, on validation.
    """

    trial: StoredTrial
    seeds: tuple[StoredTrial, ...]
    diverged: int
    metric: str

    @property
    def folder(self) -> Path:
        """For `delora.load`."""
        return self.trial.folder

    @property
    def result(self) -> Result:
        return self.trial.result

    @property
    def score(self) -> float:
        """The trial's on validation, a fraction."""
        return _score(self.trial, self.metric) or 0.0

    @property
    def mean(self) -> float:
        """Of its config on validation, over the seeds."""
        return statistics.fmean(_score(trial, self.metric) or 0.0 for trial in self.seeds)

    def __str__(self) -> str:
        """In words: the trial, and the commands that make it again and load it."""
        config, checkpoint = self.result["config"], self.result["best"]
        test = (checkpoint["test"] if checkpoint else None) or {}
        told = [f"{self.metric} {self.score:.4f} on validation"]
        told += [f"{self.mean:.4f} in the mean of {len(self.seeds)} seeds"] if len(self.seeds) > 1 else []
        told += [f"{self.diverged} more diverged"] if self.diverged else []
        told += [f"{value:.4f} on test"] if (value := test.get(self.metric)) is not None else []
        again, load = shlex.quote(str(self.folder)), json.dumps(str(self.folder), ensure_ascii=False)
        lines = [
            f"best {look_up(config, 'task.name')}: {look_up(config, 'method.name')}, {', '.join(told)}",
            f"  folder      {self.folder}",
            f"  made again  delora-run --again {again}",
            f"  loaded      delora.load({load})",
        ]
        return printable("\n".join(lines))


def results(folder: str | Path) -> "pandas.DataFrame":
    """All trials below a folder, a row each, in the order of their paths.

    Columns: task, method, model, lr, lr_factor, seed, status (done, diverged, failed or unfinished), metric (the task's
    headline), validation and test (that metric at the best checkpoint, a fraction), best_epoch, epochs, parameters and
    head_parameters (numbers of trained values), seconds (of training, its share of its fleet's), data, protocol,
    precision, id, folder; then the other scores, as validation.loss and test.f1, and each other key of the configs that
    has several values, as method.rank. What a trial has not is missing.

    Raises:
        UserError: there is no such folder, or no trial in it.
    """
    import pandas

    found = _find(folder)
    rows = [_row(trial.result["config"], trial.folder, trial.result) for trial in found.trials]
    rows += [_row(storage.stored_config(path) or {}, path, None) for path in found.unfinished]
    rows.sort(key=lambda row: str(row["folder"]))
    configs: list[dict[str, Any]] = [row.pop("config") for row in rows]
    taken = {*("name", "task.name", "method.name", "model.name", "data.name", "protocol.name"), *rows[0]}
    for key in dict.fromkeys(key for config in configs for key in config):
        if key not in taken and not storage.is_of(key, NOT_THE_TRIAL) and len({str(c.get(key)) for c in configs}) > 1:
            for row, config in zip(rows, configs, strict=True):
                row[key] = config.get(key)
    return pandas.DataFrame(rows)


def best(folder: str | Path, by: str = "validation", *, task: str | None = None, method: str | None = None) -> Best:
    """The trial below a folder to take: `delora.load(delora.best(folder).folder)`.

    How it is chosen stands at the head of this module. Equal means go to the config with fewer trained values, then to
    the first by its path; equal seeds to the lowest.

    Args:
        by: "validation", the task's headline metric there, or the name of another of its metrics, as "f1".
        task: of this task alone; it must be given where there are several.
        method: of this method alone.

    Raises:
        UserError: no trial can be taken, or it is not clear of which task, protocol or data.
    """
    found = _find(folder)
    trials = [t for t in found.trials if method in (None, look_up(t.result["config"], "method.name"))]
    tasks = sorted({str(look_up(t.result["config"], "task.name")) for t in trials})
    if found.trials and not trials:
        names = {str(look_up(t.result["config"], "method.name")) for t in found.trials}
        raise UserError(printable(f"{folder}: method={method}: {expected(method, sorted(names))}"))
    if task is not None and task not in tasks:
        raise UserError(printable(f"{folder}: task={task}: {expected(task, tasks)}"))
    if task is None and len(tasks) > 1:
        raise UserError(printable(f"{folder} holds trials of several tasks, say which task: {', '.join(tasks)}"))
    trials = [t for t in trials if task in (None, look_up(t.result["config"], "task.name"))]
    chosen = choose(trials, by)
    if len(chosen) > 1:
        told = "its trials are of several protocols or data, whose scores cannot be compared; name a folder of one:"
        raise UserError(printable("\n".join([f"{folder}: {told}", *(f"  {one.folder}" for one in chosen)])))
    if not chosen:
        counts: Counter[str] = Counter(trial.result["status"] for trial in trials)
        counts |= Counter({"unfinished": len(found.unfinished), "damaged": len(found.problems)})
        raise UserError(f"{folder}: no trial is done ({', '.join(f'{n} {what}' for what, n in counts.items() if n)})")
    return chosen[0]


def choose(trials: Iterable[StoredTrial], by: str = "validation") -> list[Best]:
    """The trial to take of each task, protocol and data, in the order of the trials.

    Raises:
        UserError: a trial that is done has no metric `by`.
    """
    places: dict[tuple, dict[str, list[StoredTrial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.result["status"] != "failed":
            config, data = trial.result["config"], trial.result["made_by"]["data"]
            of = json.dumps([look_up(config, "data"), data["source"]]) if data["sha256"] is None else data["sha256"]
            place = look_up(config, "task.name"), look_up(config, "protocol.name"), of
            places[place][_identity(trial)].append(trial)
    made = []
    for configs in places.values():
        contenders = [one for several in configs.values() if (one := _contender(several, by))]
        if contenders:
            made.append(max(contenders, key=_rank))  # the first of equals
    return made


def trial_in(folder: str | Path) -> StoredTrial:
    """The trial in a folder that has ended.

    Raises:
        UserError: there is none; of a sweep's folder the message says which trial may be meant.
    """
    folder = Path(folder)
    if (folder / storage.RESULT).exists() or not folder.is_dir():
        return storage.read(folder)
    trials = storage.find(folder).trials
    if not trials:
        return storage.read(folder)
    told = f"{folder} is no trial's folder, but holds {len(trials)} of them."
    raise UserError("\n".join([printable(told), *map(str, choose(trials))]))


def _find(folder: str | Path) -> Found:
    """Raises UserError where there is no trial; tells of damaged ones."""
    if not Path(folder).is_dir():
        raise UserError(printable(f"{folder}: no such folder. delora-run writes results to outputs/<name>"))
    found = storage.find(folder)
    for path, reason in found.problems:
        logger.warning("%s", printable(f"{path}: {reason}; left out"))
    if not found.trials and not found.unfinished:
        raise UserError(printable(f"{folder}: holds no trial that can be read"))
    return found


def _row(config: Mapping[str, Any], folder: Path, result: Result | None) -> dict[str, Any]:
    row = {key: look_up(config, f"{key}.name") for key in ("task", "method", "model")}
    row |= {"lr": config.get("lr"), "lr_factor": config.get("lr_factor", 1.0), "seed": config.get("seed")}
    checkpoint = result["best"] if result else None
    scores: dict[str, Mapping[str, Any]] = {"validation": {}, "test": {}}
    if checkpoint:
        scores = {"validation": checkpoint["validation"], "test": checkpoint["test"] or {}}
    metric = result["headline"] if result else None
    row |= {"status": result["status"] if result else "unfinished", "metric": metric}
    row |= {part: of.get(metric or "") for part, of in scores.items()}
    row |= {"best_epoch": checkpoint and checkpoint["epoch"], "epochs": config.get("epochs")}
    row |= {"parameters": result and result["parameters"]["adapter"]}
    row |= {"head_parameters": result and result["parameters"]["head"]}
    row |= {"seconds": result and storage.share_of_seconds(result)}
    row |= {"data": look_up(config, "data.name"), "protocol": look_up(config, "protocol.name")}
    row |= {"precision": config.get("precision"), "id": result["id"] if result else folder.name, "folder": str(folder)}
    row |= {f"{part}.{name}": value for part, of in scores.items() for name, value in of.items() if name != metric}
    return {**row, "config": storage.flatten(config)}


def _score(trial: StoredTrial, metric: str) -> float | None:
    """The trial's on validation; None where it has none, or one that is not finite."""
    checkpoint = trial.result["best"]
    return checkpoint["validation"].get(metric) if checkpoint and trial.result["status"] == "done" else None


def _contender(several: Sequence[StoredTrial], by: str) -> Best | None:
    """What would be taken of the trials of one config."""
    by_seed: dict[str, StoredTrial] = {}
    for trial in several:
        by_seed.setdefault(str(trial.result["config"].get("seed")).rjust(12), trial)  # sorts as the number does
    headline = several[0].result["headline"]
    metric = headline if by == "validation" else by
    for trial in by_seed.values():
        known = [name for name in (trial.result["best"] or {"validation": ()})["validation"] if name != "loss"]
        if trial.result["status"] == "done" and metric not in known:
            raise UserError(printable(f"{trial.folder}: by={by}: {expected(by, ['validation', *known])}"))
    done = [trial for _, trial in sorted(by_seed.items()) if _score(trial, metric) is not None]
    if not done:
        return None
    top = max(done, key=lambda trial: _score(trial, metric) or 0.0)  # the lowest seed of equals
    return Best(top, tuple(done), len(by_seed) - len(done), metric)


def _rank(one: Best) -> tuple[Any, ...]:
    return len(one.seeds) + one.diverged, -one.diverged, one.mean, -one.result["parameters"]["adapter"]


def _identity(trial: StoredTrial) -> str:
    """What the trials of one config have in common: all but the seed, and the encoder's weights."""
    config = storage.flatten(trial.result["config"])
    kept = {key: value for key, value in config.items() if not storage.is_of(key, (*NOT_THE_TRIAL, "seed"))}
    return json.dumps([kept, trial.result["made_by"]["weights"]["sha256"]], sort_keys=True)
