"""Trials as reports see them: what `delora.storage` finds, each with its place, label and learning rate."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from delora import storage, tasks
from delora.cli import conf_folder
from delora.config import NOT_THE_TRIAL, look_up, show
from delora.encoders import matches
from delora.errors import UserError
from delora.tasks import Task
from delora.terminal import printable

FACTOR_ON = {"adapter": "factor on BA", "lambda": "factor on λ"}
# Settings that place a trial in the report, by dotted key or group; all others tell variants of a method apart.
TEST_ROWS = "own test rows"  # stands for the protocol of data that have them
PLACE = ("task", "model", "protocol", "data.name", "seed", "lr", "lr_factor", "lr_factor_on")
IN_LABEL = ("method.name", "method._target_", "method.init", "method.train_magnitude")
PRINTED = {"epochs": int, "max_length": int, "precision": str, "method.name": str}  # beside what places a trial


@dataclass(frozen=True)
class Look:
    """How reports show a method: what its file in conf/method says beside its options.

    Attributes:
        place: of its rows among those of others.
        styles: how it and its variants are drawn, "" is the method itself; see `delora.report.curves.known_styles`.
        rung: of a method on the ladder of the DeLoRA paper's Tables 1 and 2, ΔW and what it adds to its neighbour.
    """

    title: str
    place: int
    styles: Mapping[str, str]
    rung: Mapping[str, str] | None


@functools.cache
def looks() -> dict[str, Look]:
    """How the methods of conf/method are shown, by their names."""
    found = {}
    for path in sorted((conf_folder() / "method").rglob("*.yaml")):
        method = yaml.safe_load(path.read_bytes())
        found[method["name"]] = Look(method["title"], method["place"], method.get("styles") or {}, method.get("rung"))
    return found


def title(method: str) -> str:
    """What a method is called, by its name."""
    return looks()[method].title if method in looks() else method


@dataclass(frozen=True)
class Point:
    """One evaluation. NaN is what was not measured.

    Attributes:
        distance, strength: ‖W′ − W‖_F and λ, means over the chosen layers.
        change: ‖h′ − h‖ / ‖h‖ of hidden states on the validation rows, the mean over the encoder's chosen layers.
    """

    step: int
    score: float
    distance: float
    strength: float
    change: float


@dataclass
class Trial:
    """One trial that is done or diverged.

    Attributes:
        result: its texts as `printable` has them: names, tables and pages show nothing raw.
        task, model, protocol, data: what trials must share to be drawn in one panel. Encoders and data that are not
            the same to the byte have different names.
        method: what its tuning is counted under, as "DeLoRA (zero)".
        label: the method with what tells it from its neighbours, "DeLoRA (zero, rank 8)".
        factor: how many times the method's base rate it was trained at, lr / method.base_lr × lr_factor.
        rate: the learning rate that the factor acts on: λ's own, where it acts on λ alone.
        score: the headline metric of the best checkpoint, a fraction: on test under protocol=paper and where the data
            have test rows, else on validation. NaN for a trial that diverged or whose metric is not defined.
        validation: the headline metric on validation of the same checkpoint.
    """

    folder: Path
    result: storage.Result
    history: list[Point]
    task: str
    model: str
    protocol: str
    data: str
    method: str
    label: str
    seed: int
    rate: float
    factor: float
    diverged: bool
    score: float
    validation: float
    settings: dict[str, Any] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.result["config"]

    @property
    def facts(self) -> Task:
        return tasks.of(self.config["task"])

    @property
    def synthetic(self) -> bool:
        """Whether its data were generated."""
        return self.config["data"]["name"] == "synthetic"

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.task, self.model, self.protocol, self.data

    @property
    def seconds(self) -> float:
        """Of its device: its share of what its fleet took."""
        return storage.share_of_seconds(self.result)

    @property
    def epochs(self) -> float:
        """Over the training rows, until it ended or diverged."""
        done = self.result["diverged_step"] if self.diverged else None
        return self.result["epochs"] * (1.0 if done is None else done / max(1, self.result["steps"]))

    @property
    def last_step(self) -> int:
        """Of its last evaluation; -1 if it diverged before the first."""
        return self.history[-1].step if self.history else -1

    @property
    def distance(self) -> float:
        """At the end of training; NaN for a trial that diverged."""
        return math.nan if self.diverged else self.history[-1].distance

    @property
    def change(self) -> float:
        """Of hidden states at the end of training; NaN for a trial that diverged."""
        return math.nan if self.diverged else self.history[-1].change


@dataclass
class Collection:
    """The trials of a report, those that a halving has stopped, and what is left out of it with the reason."""

    trials: list[Trial] = field(default_factory=list)
    stopped: list[Trial] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)


def read(folders: Sequence[Path], layer: str | None = None) -> Collection:
    """Reads the trials below folders.

    Args:
        layer: the end of the names of the layers whose distance, λ and change are taken; None for all layers.

    Raises:
        UserError: a folder does not exist, none holds a trial, or no layer is named so.
    """
    made = Collection()
    stored: dict[Path, storage.StoredTrial] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. delora-run writes results to outputs/<name>")
        found = storage.find(folder)
        stored |= {trial.folder.resolve(): trial for trial in found.trials}
        made.left_out += [*found.problems, *((path, "not finished") for path in found.unfinished)]
    names: set[str] = set()
    for trial in stored.values():
        try:
            if trial.result["status"] == "failed":
                raise ValueError("failed")
            evaluations = list(trial.evaluations())
            made.trials.append(_trial(trial, evaluations, layer))
            last = evaluations[-1:]
            names |= {name for line in last for name in (*line["distance"], *line.get("change", ()))}
        except storage.ResultsError as error:
            made.left_out.append((trial.folder, str(error)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            made.left_out.append((trial.folder, reason))
    if not made.trials:
        reasons = [f"\n  {path}: {reason}" for path, reason in made.left_out[:10]]
        raise UserError(f"no finished trial in {', '.join(map(str, folders))}{''.join(reasons)}")
    if layer and not any(matches(layer, name) for name in names):
        raise UserError(f"--layer {layer}: no layer is named so. The layers: {', '.join(sorted(names))}")
    _tell_apart(made.trials, "weights", "model")
    for task in {trial.task for trial in made.trials}:
        _tell_apart([trial for trial in made.trials if trial.task == task], "data", "data")
    _name(made.trials)
    made.stopped = [trial for trial in made.trials if trial.result["status"] == "stopped"]
    made.trials = [trial for trial in made.trials if trial.result["status"] != "stopped"]
    if not made.trials:
        raise UserError(f"{', '.join(map(str, folders))}: a halving has stopped all {len(made.stopped)} trials")
    _leave_out_repeats(made)
    return made


def _trial(stored: storage.StoredTrial, evaluations: Sequence[storage.Evaluation], layer: str | None) -> Trial:
    """Raises ValueError, KeyError, TypeError or AttributeError for a config that is not of delora-run."""
    result: storage.Result = _printable(stored.result)
    config = result["config"]
    task, headline, protocol = _get(config, "task.name", str), result["headline"], _get(config, "protocol.name", str)
    if config["data"].get("test"):  # whatever the protocol, these rows are what is reported
        protocol = TEST_ROWS
    if headline != _headline(config):
        raise ValueError(f"task {task!r} scored by {headline!r} is not known")
    for key, kind in PRINTED.items():
        _get(config, key, kind)
    if not evaluations and result["status"] == "done":
        raise ValueError("metrics.jsonl holds no evaluation")
    validation = score = math.nan
    if result["status"] == "done" and result["best"]:
        validation = score = _number(result["best"]["validation"][headline])
        if protocol != "standard":
            if not result["best"]["test"]:
                raise ValueError("there is no test score")
            score = _number(result["best"]["test"][headline])
    factor, on = config.get("lr_factor", 1.0), config.get("lr_factor_on", "all")
    base = config["method"].get("lambda_lr") if on == "lambda" else None
    return Trial(
        folder=stored.folder,
        result=result,
        history=[
            Point(
                int(evaluation["step"]),
                _number(evaluation["metrics"].get(headline)),
                _over_layers(evaluation["distance"], layer),
                _over_layers(evaluation["lambda"], layer),
                _over_layers(evaluation.get("change", {}), layer),
            )
            for evaluation in evaluations
        ],
        task=task,
        model=_get(config, "model.name", str),
        protocol=protocol,
        data=_get(config, "data.name", str),
        method=(label := _label(config, on)),
        label=label,
        seed=_get(config, "seed", int),
        rate=_round((base or config["lr"]) * factor),
        factor=_round(config["lr"] / config["method"]["base_lr"] * factor),
        diverged=result["status"] == "diverged",
        score=score,
        validation=validation,
        settings={
            key: value
            for key, value in storage.flatten(config).items()
            if not storage.is_of(key, (*PLACE, *NOT_THE_TRIAL))
        },
    )


def _headline(config: Mapping[str, Any]) -> str | None:
    """The metric that a config's task is scored by; None where it says no task."""
    try:
        return tasks.of(config["task"]).headline
    except (LookupError, TypeError):
        return None


def _printable(value: Any) -> Any:
    """The value with every text in it as `printable` has it."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _get(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value by its dotted key."""
    value = look_up(config, key)
    if not isinstance(value, kind):
        raise ValueError(f"config has {key}={show(value)}")
    return value


def _number(value: float | None) -> float:
    """A number of a result; NaN for one that is not finite, for which delora-run writes null."""
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _round(rate: float) -> float:
    """To six digits: the same factor is the same number, however it was computed."""
    if not 0 < rate < math.inf:
        raise ValueError(f"{rate} is not a learning rate")
    return float(f"{rate:.6g}")


def _over_layers(values: Mapping[str, float | None], layer: str | None) -> float:
    chosen = values.values() if layer is None else [v for name, v in values.items() if matches(layer, name)]
    return sum(map(_number, chosen)) / len(chosen) if chosen else math.nan


# --- Names


def _tell_apart(trials: Sequence[Trial], origin: Literal["weights", "data"], name: Literal["model", "data"]) -> None:
    """Gives the same name to the same encoder or data and different names to different ones.

    What they are is told by the hash of their content; where there is none, as of an encoder with random weights, by
    source and config. Of several with one name each is called after its source, else its hash, else its config.
    """
    same: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        made_of = trial.result["made_by"][origin]
        same[made_of["sha256"] or show([made_of["source"], trial.config[name]])].append(trial)
    named: dict[str, list[list[Trial]]] = defaultdict(list)
    for group in same.values():
        named[getattr(group[0], name)].append(group)
    for shared_name, groups in named.items():
        firsts = [group[0] for group in groups]
        for group, more in zip(groups, _what_differs(firsts, origin, name), strict=True):
            for trial in group:
                setattr(trial, name, f"{shared_name} ({more})" if len(groups) > 1 else shared_name)


def _what_differs(firsts: Sequence[Trial], origin: Literal["weights", "data"], name: str) -> list[str]:
    """For each trial a text that tells its encoder or data from the others'."""
    made_of = [trial.result["made_by"][origin] for trial in firsts]
    configs = [storage.flatten(trial.config[name]) for trial in firsts]
    keys = [key for key in dict.fromkeys(itertools.chain(*configs)) if len({show(c.get(key)) for c in configs}) > 1]
    ways: list[Callable[[int], str]] = [
        lambda i: Path(made_of[i]["source"]).name,
        lambda i: made_of[i]["source"],
        lambda i: (made_of[i]["sha256"] or "")[:8],
        lambda i: ", ".join(f"{key.rpartition('.')[2]} {show(configs[i].get(key, 'unset'))}" for key in keys),
    ]
    texts = [[way(i) for i in range(len(firsts))] for way in ways]
    return next((said for said in texts if all(said) and len({*said}) == len(said)), texts[-1])


def _label(config: Mapping[str, Any], factor_on: str) -> str:
    """The method's name with its variant, as DeLoRA (zero)."""
    method = config["method"]
    variant = [method["init"]] if method.get("init", "residual") != "residual" else []
    if method.get("train_magnitude") is False:
        variant.append("fixed magnitude")
    if factor_on in FACTOR_ON:
        variant.append(FACTOR_ON[factor_on])
    return _with(title(method["name"]), variant)


def _with(label: str, variant: Iterable[str]) -> str:
    """Adds to what a label's brackets hold."""
    if not (text := ", ".join(variant)):
        return label
    return f"{label[:-1]}, {text})" if label.endswith(")") else f"{label} ({text})"


def label_order(label: str) -> tuple[float, str]:
    """Sorts the methods as conf/method places them, each followed by its variants, then the rest by name."""
    places = {look.title: look.place for look in looks().values()}
    return (places.get(label.split(" (")[0], math.inf), label)


def _name(trials: Iterable[Trial]) -> None:
    """Completes the labels, so that trials of one label in one panel differ in rate and seed alone.

    Where some trials of a method have an `lr_factor`, those of another `lr` are another variant: what the factor acts
    on besides, as the rate of λ, follows the one and not the other.
    """
    groups = defaultdict(list)
    for trial in trials:
        groups[trial.place, trial.label].append(trial)
    for (_, label), group in groups.items():
        by_factor = any(trial.config.get("lr_factor", 1) != 1 for trial in group)
        settings = [trial.settings | ({"lr": trial.config["lr"]} if by_factor else {}) for trial in group]
        keys = sorted(key for key in set(itertools.chain(*settings)) if key not in IN_LABEL)
        differing = [key for key in keys if len({show(values.get(key, "unset")) for values in settings}) > 1]
        for trial, values in zip(group, settings, strict=True):
            said = [f"{key.rpartition('.')[2].replace('_', ' ')} {show(values.get(key, 'unset'))}" for key in differing]
            trial.label = _with(label, dict.fromkeys(said))


def _leave_out_repeats(made: Collection) -> None:
    """Keeps one trial of each label, rate and seed: the same trial twice would count as two seeds."""
    kept: dict[tuple, Trial] = {}
    for trial in made.trials:
        first = kept.setdefault((trial.place, trial.label, trial.factor, trial.seed), trial)
        if first is not trial:
            made.left_out.append((trial.folder, f"the same trial is in {first.folder.parent}"))
    made.trials = list(kept.values())
