"""Trials as reports see them: read from result folders, or from the CSV that an earlier report wrote of them."""

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delora.errors import UserError
from delora.tasks import TASKS

SCHEMA = 1
NAMES = {"lora": "LoRA", "dora": "DoRA", "delora": "DeLoRA", "ether": "ETHER", "etherplus": "ETHER+"}
PARTS = {"adapter": "factor on BA", "lambda": "factor on λ"}
# Keys that say where and how a trial ran, or that are axes of the report; all others tell trials apart.
NOT_SETTINGS = (
    "seed",
    "lr",
    "lr_factor",
    "factor_on",
    "name",
    "output_dir",
    "device",
    "log_every",
    "on_error",
)
NOT_SETTINGS_GROUPS = ("task.", "model.", "data.dir", "logger.", "fleet.", "hydra.")
OF_THE_METHOD = ("method.", "weight_decay")  # expected to differ between methods
EVALUATION_COLUMNS = ("folder", "epoch", "step", "score", "distance", "lambda")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a trial; distance and λ are means over the layers, or of the chosen layer.

    All numbers are NaN where the trial has none.
    """

    epoch: int
    step: int
    score: float
    distance: float
    strength: float


@dataclass
class Trial:
    """One finished trial.

    Attributes:
        folder: where it lies, as found.
        label: the method with what tells it from its neighbours, "DeLoRA (zero)"; see `name_methods`.
        rate, factor: the learning rate, and how many times the method's base rate that is.
        score: the headline metric, a fraction: on test under protocol=paper, else on validation, of the best
            checkpoint. NaN for a trial that diverged or whose metric is not defined.
        validation: the headline metric on validation of the same checkpoint.
        distances: ‖W′ − W‖ of each layer at the end of training; empty for a trial that diverged.
    """

    folder: str
    result: dict[str, Any]
    history: list[Evaluation]
    distances: dict[str, float]
    task: str
    model: str
    protocol: str
    data: str
    label: str
    seed: int
    rate: float
    factor: float
    diverged: bool
    score: float
    validation: float
    settings: dict[str, str] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.result["config"]

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What trials must share to be drawn in one panel: task, encoder, protocol, kind of data."""
        return self.task, self.model, self.protocol, self.data


@dataclass
class Collection:
    """What was found: the trials, and what is not among them, folder by folder, with the reason."""

    trials: list[Trial] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)


def read(sources: Iterable[Path], layer: str | None = None) -> Collection:
    """Reads the trials below folders, or of CSV files written by `write_csv`.

    Args:
        layer: the layer whose distance and λ the histories hold, a part of its name; None for the mean of all.

    Raises:
        UserError: a source does not exist, holds no trial, or no layer or several layers fit `layer`.
    """
    found = Collection()
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such folder. Trials lie where delora-run wrote them: outputs/<name>.")
        if source.is_dir():
            _read_folders(source, layer, found)
        else:
            _read_csv(source, layer, found)
    if not found.trials:
        reasons = "".join(f"\n  {folder}: {reason}" for folder, reason in found.left_out[:10])
        waiting = f"\n{len(found.unfinished)} unfinished, {len(found.failed)} failed" if found.unfinished else ""
        names = ", ".join(str(source) for source in sources)
        raise UserError(f"no finished trial in {names}{reasons}{waiting}")
    name_methods(found.trials)
    _leave_out_repeats(found)
    return found


def _read_folders(root: Path, layer: str | None, found: Collection) -> None:
    for folder in _trial_folders(root):
        path = folder / "result.json"
        if not path.exists():
            found.unfinished.append(str(folder))
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if _failed(result):
                found.failed.append(str(folder))
                continue
            evaluations = list(_evaluations(folder / "metrics.jsonl"))
            found.trials.append(_from_evaluations(str(folder), result, evaluations, layer))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            found.left_out.append((str(folder), _reason(error)))


def _trial_folders(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if "result.json" in files or "config.yaml" in files:
            yield Path(folder)


def _evaluations(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if '"evaluation"' in line:  # most lines are training steps
                yield json.loads(line)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    if isinstance(error, KeyError):
        return f"not a result of delora-run: {error.args[0]!r} is missing"
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}"
    return f"not a result of delora-run: {error}"


def _failed(result: Mapping[str, Any]) -> bool:
    if result["schema"] != SCHEMA:
        raise ValueError(f"schema {result['schema']!r} instead of {SCHEMA}")
    return result["status"] == "failed"


def _from_evaluations(
    folder: str, result: dict[str, Any], evaluations: list[dict[str, Any]], layer: str | None
) -> Trial:
    headline = result["headline"]
    by_step = {e["step"]: e for e in evaluations}  # a trial that went on from a checkpoint may have one twice
    history = [
        Evaluation(
            epoch=e["epoch"],
            step=e["step"],
            score=_number(e["metrics"][headline]),
            distance=_over_layers(e.get("distance", {}), layer),
            strength=_over_layers(e.get("lambda", {}), layer),
        )
        for _, e in sorted(by_step.items())
    ]
    if not history:
        raise ValueError("metrics.jsonl holds no evaluation")
    last = by_step[history[-1].step].get("distance", {})
    return _trial(folder, result, history, {name: _number(value) for name, value in last.items()})


def _trial(folder: str, result: dict[str, Any], history: list[Evaluation], distances: dict[str, float]) -> Trial:
    config, headline = result["config"], result["headline"]
    task = config["task"]["name"]
    if task not in TASKS or headline != TASKS[task].headline:
        raise ValueError(f"task {task!r} scored by {headline!r} is not known")
    if result["status"] not in ("done", "diverged"):
        raise ValueError(f"status {result['status']!r} is not known")
    diverged, protocol = result["status"] == "diverged", config["protocol"]["name"]
    validation = score = math.nan
    if not diverged:
        validation = _number(result["best"]["validation"][headline])
        score = _number(result["best"]["test"][headline]) if protocol == "paper" else validation
    rate = _number(config["lr"]) * _number(config.get("lr_factor", 1))
    return Trial(
        folder=folder,
        result=result,
        history=history,
        distances={} if diverged else distances,
        task=task,
        model=config["model"]["name"],
        protocol=protocol,
        data=config["data"]["name"],
        label=_label(config),
        seed=int(config["seed"]),
        rate=_round(rate),
        factor=_round(rate / _number(config["method"]["base_lr"])),
        diverged=diverged,
        score=score,
        validation=validation,
        settings=_settings(config),
    )


def _number(value: Any) -> float:
    """A number of a result file; null stands for one that is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _round(value: float) -> float:
    """To six digits: the same factor is the same number, however it was computed."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} is not a learning rate")
    return float(f"{value:.6g}")


def _over_layers(values: Mapping[str, Any], layer: str | None) -> float:
    if not values:
        return math.nan
    if layer is None:
        return sum(map(_number, values.values())) / len(values)
    return _number(values[choose_layer(values, layer)])


def choose_layer(names: Iterable[str], layer: str) -> str:
    """The one layer that `layer` is a part of, or that it names in full.

    Raises:
        UserError: none or several fit.
    """
    names = list(names)
    fitting = [layer] if layer in names else [name for name in names if layer in name]
    if len(fitting) != 1:
        raise UserError(
            f"--layer {layer}: {len(fitting)} adapted layers have this in their name, expected one. "
            f"The layers are:\n  " + "\n  ".join(fitting or names)
        )
    return fitting[0]


# --- Names


def _label(config: Mapping[str, Any]) -> str:
    """The method's name with its variant, as DeLoRA (zero)."""
    method = config["method"]
    variant = [method["init"]] if method.get("init", "residual") != "residual" else []
    if method.get("train_magnitude") is False:
        variant.append("fixed magnitude")
    if config.get("factor_on") in PARTS:
        variant.append(PARTS[config["factor_on"]])
    return with_variant(NAMES.get(method["name"], method["name"]), variant)


def with_variant(label: str, variant: Iterable[str]) -> str:
    """Adds to what a label's brackets hold."""
    if not (variant := list(variant)):
        return label
    opened = f"{label[:-1]}, " if label.endswith(")") else f"{label} ("
    return opened + ", ".join(variant) + ")"


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The values that tell trials of one panel and seed apart, by dotted key."""
    return {
        key: str(value)
        for key, value in flatten(config).items()
        if key not in NOT_SETTINGS and not key.startswith(NOT_SETTINGS_GROUPS)
    }


def name_methods(trials: Iterable[Trial]) -> None:
    """Adds to the labels what else differs, so that trials of one label in one panel differ in rate and seed alone.

    Options of the method are compared among the trials of the method, everything else across the panel: two methods
    trained for different numbers of epochs both say so.
    """
    panels, methods = defaultdict(list), defaultdict(list)
    for trial in trials:
        panels[trial.place].append(trial)
        methods[trial.place, trial.label].append(trial)
    shared = {place: _differing(group, of_the_method=False) for place, group in panels.items()}
    own = {key: _differing(group, of_the_method=True) for key, group in methods.items()}
    for (place, label), group in methods.items():
        for trial in group:
            said = [_say(key, trial.settings.get(key, "unset")) for key in own[place, label] + shared[place]]
            trial.label = with_variant(label, dict.fromkeys(said))


def _differing(trials: list[Trial], of_the_method: bool) -> list[str]:
    values = defaultdict(set)
    for trial in trials:
        for key, value in trial.settings.items():
            if key.startswith(OF_THE_METHOD) == of_the_method:
                values[key].add(value)
    missing = {key for trial in trials for key in values.keys() - trial.settings.keys()}
    named = ("method.init", "method.train_magnitude")  # in the label already
    return sorted(key for key in values if (len(values[key]) > 1 or key in missing) and key not in named)


def _say(key: str, value: str) -> str:
    return f"{key.split('.')[-1].replace('_', ' ')} {value if len(value) < 30 else value[:29] + '…'}"


def _leave_out_repeats(found: Collection) -> None:
    """Keeps one trial of each method, rate and seed: the same trial twice would count as two seeds."""
    kept: dict[tuple, Trial] = {}
    for trial in found.trials:
        key = (trial.place, trial.label, trial.factor, trial.seed)
        if key in kept:
            found.left_out.append((trial.folder, f"the same config as {kept[key].folder}"))
        else:
            kept[key] = trial
    found.trials = list(kept.values())


# --- The CSV of trials: a line each, result.json's values by dotted key


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def write_csv(trials: list[Trial], folder: Path) -> list[Path]:
    """Writes trials.csv and evaluations.csv, from which `read` gives the same trials; returns their paths."""
    derived = [
        {"folder": t.folder, "method": t.label, "factor": t.factor, "rate": t.rate, "score": _cell(t.score)}
        for t in trials
    ]
    results = [{key: _cell(value) for key, value in flatten(t.result).items()} for t in trials]
    distances = [{f"distance/{name}": f"{value:.6g}" for name, value in t.distances.items()} for t in trials]
    rows = [d | r | w for d, r, w in zip(derived, results, distances, strict=True)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    evaluations = [
        (t.folder, e.epoch, e.step, *(_cell(_short(v)) for v in (e.score, e.distance, e.strength)))
        for t in trials
        for e in t.history
    ]
    paths = [folder / "trials.csv", folder / "evaluations.csv"]
    with paths[0].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with paths[1].open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([EVALUATION_COLUMNS, *evaluations])
    return paths


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _cell(value: Any) -> str:
    """A value of result.json as text that `_value` gives back; most strings stay as they are."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    plain = isinstance(value, str) and value and _value(value) is value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_csv(path: Path, layer: str | None, found: Collection) -> None:
    histories = _read_evaluations(path.with_name("evaluations.csv"), layer)
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            folder = row.get("folder") or f"{path}, line {number}"
            try:
                result = _unflatten(row)
                distances = {k.removeprefix("distance/"): float(v) for k, v in row.items() if _is_distance(k, v)}
                if layer is not None and distances:
                    choose_layer(distances, layer)
                _failed(result)
                found.trials.append(_trial(folder, result, histories.get(folder, []), distances))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found.left_out.append((folder, _reason(error)))


def _is_distance(key: str, value: str) -> bool:
    return key.startswith("distance/") and bool(value)


def _read_evaluations(path: Path, layer: str | None) -> dict[str, list[Evaluation]]:
    """The histories by folder. They hold means over the layers, so none where one layer is asked for."""
    histories: dict[str, list[Evaluation]] = defaultdict(list)
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                score, distance, strength = (float(row[k] or "nan") for k in ("score", "distance", "lambda"))
                if layer is not None:
                    distance = strength = math.nan
                evaluation = Evaluation(int(row["epoch"]), int(row["step"]), score, distance, strength)
                histories[row["folder"]].append(evaluation)
    return histories


def _unflatten(row: Mapping[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, text in row.items():
        if text == "" or key.startswith("distance/") or key in ("folder", "method", "factor", "rate", "score"):
            continue
        *groups, name = key.split(".")
        place = result
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = _value(text)
    return result
