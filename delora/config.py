"""The schema of a run's config: types, bounds, and what fits together. All values live in conf/.

Imports neither torch nor Hydra, so that a config is checked before anything heavy is loaded.
"""

import difflib
import functools
import hashlib
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from delora import checkpoint
from delora.encoders import Shape, families
from delora.encoders import of as family_of
from delora.errors import UserError
from delora.tasks import TASKS, Task
from delora.tasks import of as task_of

ROWS = ("data.train", "data.validation", "data.test")  # where one's own rows are; what they are says data.sha256
# Keys that say where and how to run, not what; two configs that differ in these alone are the same trial.
NOT_THE_TRIAL = (
    *("name", "sweep", "output_dir", "logger", "device", "compile", "log_every", "data.dir", "method.start"),
    *ROWS,
    *("fleet", "halving", "search", "on_error", "resume", "plan", "engine", "detach"),
)
# Keys that are there for `Trial.rate` and `Trial.lambda_rate`, or for values that follow from them.
RATES = ("lr", "lr_factor", "lr_factor_on", "method.base_lr", "method.weight_decay", "method.lambda_lr")
# Keys in which the trials of one fleet may differ.
PER_TRIAL = (
    *("name", "seed", "lr", "lr_factor", "lr_factor_on", "weight_decay", "warmup_ratio"),
    *("method.base_lr", "method.weight_decay", "method.dropout"),
    *("method.alpha", "method.lambda_init", "method.lambda_lr", "method.rate_ratio"),
)


LOOKS = ("title", "place", "styles", "rung")  # keys of a method's file that delora/report reads

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a config: the dotted key, its value, and what is wrong, for people."""

    key: str
    value: Any
    message: str

    def __str__(self) -> str:
        given = "" if self.value is MISSING else f"={show(self.value)}"
        return f"{self.key}{given}: {self.message}"


MISSING = object()  # the value of a key that is not there


class ConfigError(UserError):
    """A config that cannot run; `faults` holds a message for each fault."""

    def __init__(self, faults: Iterable[object]):
        self.faults = list(dict.fromkeys(str(fault) for fault in faults))
        heading = [f"{len(self.faults)} faults in the config"] if len(self.faults) > 1 else []
        super().__init__("\n  ".join([*heading, *self.faults]))


# --- The types


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError("expected up to 100 letters, digits, '-', '_' and '.', the first a letter or digit")
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError(expected(name, ("auto", "cpu", "cuda", "cuda:1", "mps")))
    return name


def _auto_or_not(value: bool | str) -> bool | str:
    if isinstance(value, str) and value != "auto":
        raise ValueError(expected(value, ("auto", "true", "false")))
    return value


def _target(path: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)+", path):
        raise ValueError("expected a class with its module, such as delora.methods.lora.LoRA")
    return path


def _path(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ValueError("there is no home folder of that user") from None
    return text


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError("expected a value; the method cannot do without")
    return value


# Upper bounds keep out what no machine has, as a value with some zeros too many.
Whole = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
RowCount = Annotated[int, Field(ge=1, le=10_000_000)]
Width = Annotated[int, Field(ge=1, le=100_000)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
MOST_WEIGHTS = 10**11  # of an encoder
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PathText = Annotated[Text, AfterValidator(_path)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
Given = Annotated[T | None, BeforeValidator(_given)]  # None alone where the key is not there


class Section(BaseModel):
    """A part of the config. Attributes that are None by default belong to some choices of the part only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class TaskConfig(Section):
    """A task: one of GLUE's by its name, or one's own, of which the rest is found out where it is not said."""

    name: FolderName
    kind: Literal["classes", "regression"] | None = None
    labels: Annotated[tuple[Text, ...], Field(strict=False, min_length=2)] | None = None
    metric: Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), Field(strict=False, min_length=1)] | None = None

    @property
    def facts(self) -> Task:
        """What is known of it."""
        return task_of(self.model_dump(exclude_unset=True))


class MethodConfig(Section):
    """A method with its options. The options named here are checked; a method may have others.

    How reports show the method is no part of a trial, and left out.

    Attributes:
        start: the folder of a finished trial whose adapter, and where labels agree head, this one begins with; or that
            of an adapter which PEFT saved.
        start_sha256: of the adapter there.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    target: Annotated[str, AfterValidator(_target), Field(alias="_target_")]
    name: FolderName
    base_lr: Positive
    weight_decay: NotNegative
    betas: Annotated[tuple[Share, Share], Field(strict=False)]
    targets: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    dropout: Share
    start: PathText | None = None
    start_sha256: SHA256 | None = None

    rank: Given[Width] = None
    alpha: Given[Positive] = None
    train_magnitude: Given[bool] = None
    lambda_init: Given[Positive] = None
    lambda_lr: Given[NotNegative] = None
    init: Given[Literal["residual", "zero"]] = None
    scaling: Given[Literal["column", "frobenius", "none"]] = None
    side: Given[Literal["in", "out", "both"]] = None
    blocks: Given[Width] = None
    block_size: Given[Width] = None
    bottleneck: Given[Width] = None
    neumann_terms: Annotated[int, Field(ge=3, le=100)] | None = None
    symmetric: Given[bool] = None
    rate_ratio: Given[Positive] = None
    d_initial: Given[Positive] = None
    projection_rank: Given[Width] = None
    projection_seed: Given[Seed] = None

    @model_validator(mode="before")
    @classmethod
    def _without_looks(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: v for k, v in values.items() if k not in LOOKS and not (k == "start" and v is None)}

    def options(self) -> dict[str, Any]:
        """The method's own options: what its class is built with."""
        common = {"target", "name", "base_lr", "weight_decay", "betas", "targets", "dropout", "start", "start_sha256"}
        return self.model_dump(exclude=common, exclude_unset=True)


def name_of(source: str) -> str:
    """What an encoder is called by its folder or its id on the hub: the last part, as a folder may be named."""
    last = os.path.basename(os.path.abspath(os.path.expanduser(source)))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-")[:90] or "encoder"


def task_name(place: str | None) -> str:
    """What a task of one's own is called by the place of its rows: the file's name, or where that says nothing the
    folder's."""
    if not place:
        return "own"
    path = Path(place)
    stem = path.name.partition(".")[0]
    says_nothing = path.suffix and stem.lower() in ("train", "training", "data")
    found = name_of(str(path.absolute().parent) if says_nothing else stem if path.suffix else place)
    return f"{found}-own" if found in TASKS else found


class ModelConfig(Section):
    """An encoder: from `source`, a folder or an id on the hub, from installed packages, or with `random` weights.

    A name that is not given follows from the source.
    """

    name: FolderName
    source: PathText | None = None
    revision: Text | None = None
    package: Text | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = None
    random: bool | None = None
    sha256: SHA256 | None = None
    shape: Shape | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or any(values.get(key) for key in ("name", "package", "random")):
            return values
        return {**values, "name": name_of(str(values.get("source")))}

    @property
    def packages(self) -> tuple[str, ...]:
        """The names of the packages that hold it."""
        return (self.package,) if isinstance(self.package, str) else self.package or ()

    @property
    def described(self) -> dict[str, Any] | None:
        """What its config.json says, where that is on this machine. Raises UserError as `checkpoint.config`."""
        return checkpoint.config(self.source, self.revision, self.packages)

    @property
    def known_shape(self) -> Shape | None:
        """The shape that its config.json says where that is on this machine, else the one that is given."""
        return self.shape_by(self.described)

    def shape_by(self, described: dict[str, Any] | None) -> Shape | None:
        """The shape that such a config.json says; without one, the shape that is given."""
        if described is None:
            return self.shape
        family = family_of(described)
        return family.shape(described) if family else None


class Rows(Section):
    """Numbers of rows."""

    train: RowCount
    validation: RowCount


class DataConfig(Section):
    name: Literal["glue", "synthetic", "files"]
    dir: PathText | None = None
    seed: Seed | None = None
    rows: Rows | None = None
    train: PathText | None = None
    validation: PathText | None = None
    test: PathText | None = None
    text: Annotated[tuple[Text, ...], BeforeValidator(_one_or_more), Field(strict=False, max_length=2)] | None = None
    label: Text | None = None
    share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    sha256: SHA256 | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `delora.data.load`."""
        options = self.model_dump(exclude={"name", "sha256"}, exclude_unset=True)
        return {"source": {"glue": "auto"}.get(self.name, self.name), **options}


class ProtocolConfig(Section):
    name: Literal["paper", "standard"]


class LoggerConfig(Section):
    name: Literal["wandb", "none"]
    mode: Literal["auto", "online", "offline", "disabled"]
    project: Text


class FleetConfig(Section):
    size: Whole | None
    checkpoint_seconds: NotNegative


class EngineConfig(Section):
    """Who runs fleets, with its options. The options named here are checked; an engine may have others."""

    model_config = ConfigDict(extra="allow")

    target: Annotated[str, AfterValidator(_target), Field(alias="_target_")]
    name: FolderName
    workers: Whole | None = None
    per_gpu: Annotated[int, Field(ge=1, le=100)] = 1
    gpu_memory: Positive | None = None

    minutes: Given[Whole] = None
    timeouts: Given[Annotated[int, Field(ge=0, le=10_000)]] = None
    notice: Given[Whole] = None
    partition: Text | None = None
    gres: Text | None = None
    cpus: Whole | None = None
    mem: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    setup: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    sbatch: dict[str, Any] | None = None
    address: Given[Text] = None
    gpus: Given[NotNegative] = None
    retries: Given[Annotated[int, Field(ge=0, le=10_000)]] = None

    def own(self) -> dict[str, Any]:
        """The engine's own options."""
        return self.model_dump(exclude={"target", "name", "workers", "per_gpu", "gpu_memory"}, exclude_unset=True)


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise ValueError(f"{', '.join(map(str, twice))} twice: it would count as two seeds")
    return seeds


def _one_rung(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class HalvingConfig(Section):
    """After which epochs (`rungs`) what share of a sweep's configs trains on, see delora/halving.py."""

    rungs: Annotated[tuple[Epochs, ...], BeforeValidator(_one_rung), Field(strict=False, min_length=1)] | None
    keep: Annotated[Number, Field(gt=0, lt=1)]
    by: Literal["method", "none"]


class SearchConfig(Section):
    """What `hydra/sweeper=search` does; `over` are the keys that it varies, which it says itself."""

    trials: Annotated[Whole, Field(le=100_000)]
    batch: Whole
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1), AfterValidator(_each_once)] | None
    over: Annotated[tuple[Text, ...], Field(strict=False)] = ()


class Trial(Section):
    """The config of one trial, checked and frozen. conf/config.yaml says what each key means."""

    lr: Positive
    lr_factor: Positive
    lr_factor_on: Literal["all", "adapter", "lambda"]
    seed: Seed
    epochs: Epochs
    batch_size: RowCount
    accumulation: RowCount
    max_length: Annotated[int, Field(ge=8, le=100_000)]
    weight_decay: NotNegative
    warmup_ratio: Share
    clip_norm: Positive | None
    device: Annotated[str, AfterValidator(_device)]
    precision: Literal["float32", "bfloat16", "float64"]
    compile: Annotated[bool | str, AfterValidator(_auto_or_not)]
    log_every: Whole
    name: FolderName | None
    sweep: FolderName | None
    output_dir: PathText
    plan: bool
    resume: Literal["auto", "force"]
    on_error: Literal["continue", "stop", "retry"]
    fleet: FleetConfig
    halving: HalvingConfig | None = None  # stored configs of earlier versions have none
    search: SearchConfig | None = None  # stored configs of earlier versions have none
    task: TaskConfig
    method: MethodConfig
    model: ModelConfig
    data: DataConfig
    protocol: ProtocolConfig
    logger: LoggerConfig
    engine: EngineConfig | None = None  # results of earlier versions have none
    detach: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        task, data = look_up(values, "task"), look_up(values, "data")
        if not isinstance(task, Mapping) or not isinstance(data, Mapping) or task.get("name") is not None:
            return values
        return {**values, "task": {**task, "name": task_name(str(data.get("train") or ""))}}

    @classmethod
    def from_config(cls, config: DictConfig | Mapping[str, Any]) -> Self:
        """The trial of a composed or a stored config.

        Raises:
            ConfigError: with all faults together.
        """
        trial, faults = cls.check(config)
        if trial is None:
            raise ConfigError(faults)
        return trial

    @classmethod
    def check(cls, config: DictConfig | Mapping[str, Any]) -> tuple[Self | None, list[Fault]]:
        """The trial of a config, or None and all that is wrong with it."""
        plain, faults = _resolve(config) if isinstance(config, DictConfig) else (dict(config), [])
        trial = None
        try:
            trial = cls.model_validate(plain)
        except ValidationError as error:
            known = {fault.key for fault in faults}
            told = [details for details in error.errors(include_url=False) if not _is_echo(details)]
            found = [_fault(details, plain) for details in told]
            faults += [fault for fault in found if fault.key not in known]
        faults += _misfits(_Valid(plain, faults))
        return (None, _without_echoes(faults, config)) if faults else (trial, [])

    def changed(self, values: Mapping[str, Any]) -> Self:
        """The trial with valid values for some dotted keys, which are not checked again."""
        top = {key: value for key, value in values.items() if "." not in key}
        parts: dict[str, dict[str, Any]] = {}
        for key in values.keys() - top.keys():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = values[key]
        sections = {part: getattr(self, part).model_copy(update=own) for part, own in parts.items()}
        return self.model_copy(update={**top, **sections})

    def resolved(self) -> dict[str, Any]:
        """All values as plain data, for config.yaml and result.json; `from_config` reads it back."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @property
    def facts(self) -> Task:
        """What is known of its task, and of one's own the columns of its rows."""
        return replace(self.task.facts, text=self.data.text) if self.data.text else self.task.facts

    @property
    def rate(self) -> float:
        """The highest learning rate of adapter and head."""
        return self.lr * (self.lr_factor if self.lr_factor_on != "lambda" else 1)

    @property
    def lambda_rate(self) -> float | None:
        """The highest learning rate of λ; None for a method without it."""
        if self.method.lambda_lr is None:
            return None
        return self.method.lambda_lr * (self.lr_factor if self.lr_factor_on != "adapter" else 1)

    @property
    def factor(self) -> float:
        """How many times the method's base rate this trial takes, as in the paper's Fig. 2."""
        return self.lr / self.method.base_lr * self.lr_factor

    def model_copy(self, **options: Any) -> Self:
        """As pydantic's, without what was computed from the values."""
        copied = super().model_copy(**options)
        for name in ("id", "training", "setting", "company"):
            copied.__dict__.pop(name, None)
        return copied

    @functools.cached_property
    def id(self) -> str:
        """What tells the trial from others, safe in a shell: mrpc-delora-lr0.001-seed42-1a2b3c4d."""
        digest = _digest(self._without(NOT_THE_TRIAL))[:8]
        rate = f"{self.rate:g}".replace("+", "")
        return f"{self.task.name}-{self.method.name}-lr{rate}-seed{self.seed}-{digest}"

    @property
    def folder(self) -> Path:
        """Where the trial writes: `name`, or the id, in the sweep's folder or in `output_dir`."""
        return self.root / (self.sweep or "") / (self.name or self.id)

    @property
    def root(self) -> Path:
        """The folder of all results: below it nothing is written through a link."""
        return Path(self.output_dir).expanduser()

    @functools.cached_property
    def training(self) -> str:
        """What the trial computes: trials with the same are one training under several names.

        Factor 1 on all rates, on the adapter's and on λ's is the same, as is twice the rate and twice the factor.
        """
        config = self._without((*NOT_THE_TRIAL, *RATES))
        return _digest({**config, "rates": [self.rate, self.lambda_rate]})

    @functools.cached_property
    def setting(self) -> str:
        """What the trials of one config have in common, that differ in the seed alone."""
        return self.changed({"seed": 0}).training

    @functools.cached_property
    def company(self) -> str:
        """What trials have in common that may share a fleet."""
        return _digest(self._without(PER_TRIAL))

    def _without(self, keys: Iterable[str]) -> dict[str, Any]:
        config = self.resolved()
        for key in keys:
            part, _, last = key.rpartition(".")
            (config[part] if part else config).pop(last, None)
        return config


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


# --- What does not fit together


class _Valid:
    """The values of a config that have no fault of their own, by dotted key; None for the others."""

    def __init__(self, config: Mapping[str, Any], faults: Sequence[Fault]):
        self._config, self._bad = config, [fault.key for fault in faults]

    def __call__(self, key: str) -> Any:
        if any(key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.") for bad in self._bad):
            return None
        return look_up(self._config, key)


def _misfits(value: _Valid) -> list[Fault]:
    faults = _task_misfits(value)
    accumulation, batch_size = value("accumulation"), value("batch_size")
    if accumulation and batch_size and accumulation > batch_size:
        message = f"a batch of {batch_size} cannot be cut into {accumulation} parts"
        faults.append(Fault("accumulation", accumulation, message))
    faults += _halving_misfits(value)
    if value("lr_factor_on") == "lambda" and value("method") is not None and value("method.lambda_lr") is None:
        message = f"method={value('method.name')} has no λ with a rate of its own"
        faults.append(Fault("lr_factor_on", "lambda", message))
    if value("protocol.name") == "paper" and value("data.rows.validation") == 1:
        faults.append(Fault("data.rows.validation", 1, "cannot be split in two; protocol=standard needs no split"))
    origins = [value(f"model.{key}") for key in ("source", "package", "random")]
    if value("model") is not None and sum(map(bool, origins)) != 1:
        faults.append(Fault("model", MISSING, "expected one of source, package and random"))
        return faults
    if value("model.random") and not value("model.shape"):
        return [*faults, Fault("model.shape", None, "a random model needs a shape")]
    if value("model") is None:
        return faults
    model = ModelConfig.model_validate(value("model"))
    try:
        described = model.described
        shape = model.shape_by(described)
    except UserError as error:
        return [*faults, Fault("model", model.name, str(error))]
    if shape and shape.family not in families():
        return [*faults, Fault("model.shape.family", shape.family, expected(shape.family, families()))]
    positions = shape.positions if shape else (described or {}).get("max_position_embeddings")
    if (max_length := value("max_length")) and positions and max_length > positions:
        message = f"above {positions}, the longest input of model={model.name}"
        faults.append(Fault("max_length", max_length, message))
    return faults + (_shape_misfits(value, shape, f"model={model.name}") if shape else [])


def _halving_misfits(value: _Valid) -> list[Fault]:
    rungs, epochs = value("halving.rungs") or (), value("epochs")
    rungs = (rungs,) if isinstance(rungs, int) else tuple(rungs)
    if list(rungs) != sorted(set(rungs)):
        return [Fault("halving.rungs", rungs, "expected epochs that rise, such as [1,3]")]
    if rungs and epochs and rungs[-1] >= epochs:
        return [Fault("halving.rungs", rungs, f"each below epochs={epochs}, which is the last rung")]
    if rungs and value("detach"):
        return [Fault("detach", True, "halving needs the command to stay: it decides between rungs who trains on")]
    return []


def _task_misfits(value: _Valid) -> list[Fault]:
    """What of the task does not fit the data."""
    name, own, faults = value("task.name"), value("data.name") == "files", []
    if value("task") is not None and value("data.name") and (name in TASKS) == own:
        if own:
            faults.append(Fault("data", "files", f"one's own rows are a task of one's own: task=own, not task={name}"))
        elif name and "kind" not in value("task"):
            faults.append(Fault("task.name", name, expected(name, TASKS)))
        else:
            told = f"data={value('data.name')} has GLUE's tasks; one's own rows: data=files data.train=FILE"
            faults.append(Fault("task", name or "own", told))
    if own and value("data.train") is None and value("data") is not None and not value("data").get("train"):
        faults.append(Fault("data.train", MISSING, "which rows to train on? A file, a folder or hub:ORG/NAME"))
    if value("task.kind") == "regression" and value("task.labels"):
        faults.append(Fault("task.labels", value("task.labels"), "a regression has none"))
    return faults


def _shape_misfits(value: _Valid, shape: Shape, model: str) -> list[Fault]:
    """What of the method does not fit an encoder of this shape."""
    faults = []
    if shape.width % shape.heads:
        faults.append(Fault("model.shape.heads", shape.heads, f"does not divide the width {shape.width}"))
    encoder = families()[shape.family]
    linears = encoder.linears(shape)
    if (weights := sum(i * o for i, o in linears.values())) > MOST_WEIGHTS:
        faults.append(Fault("model.shape", MISSING, f"{weights:.2g} weights, at most {MOST_WEIGHTS:.0g}"))
    places = linears | dict.fromkeys(encoder.hidden_places(encoder.layer_names(shape)), (shape.width, shape.width))
    adapted: dict[str, tuple[int, int]] = {}
    for pattern in value("method.targets") or ():
        matched = {name: places[name] for name in encoder.matching(pattern, places)}
        adapted |= matched
        if not matched:
            ends = [*dict.fromkeys([*encoder.roles, *encoder.places, *encoder.roles.values(), *encoder.others])]
            known = (*ends, *{end.rpartition(".")[2] for end in ends})
            hint = did_you_mean(pattern, known) or f"; it has {', '.join(ends)}"
            faults.append(Fault("method.targets", pattern, f"matches no layer or place of {model}{hint}"))
    smallest = min((min(widths) for widths in adapted.values()), default=None)
    if (rank := value("method.rank")) and smallest and rank > smallest:
        faults.append(Fault("method.rank", rank, f"above {smallest}, the width of a target layer of {model}"))
    turned = {"in": (0,), "out": (1,), "both": (0, 1)}
    for key, sides in (("method.blocks", turned.get(value("method.side"), ())), ("method.block_size", turned["in"])):
        widths = sorted({pair[i] for pair in adapted.values() for i in sides if value(key) and pair[i] % value(key)})
        if widths:
            message = f"does not divide {' and '.join(map(str, widths))}, the width of target layers of {model}"
            faults.append(Fault(key, value(key), message))
    return faults


# --- Faults for people


def _resolve(config: DictConfig) -> tuple[dict[str, Any], list[Fault]]:
    """The config as plain data, with each interpolation that cannot be resolved as a fault."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    faults = []
    for path, inside in list(_unresolved(plain)):
        name = path[-1]
        try:
            value = functools.reduce(operator.getitem, path, config)
            inside[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            faults.append(Fault(".".join(map(str, path)), inside[name], str(error).splitlines()[0]))
    return plain, faults


def _unresolved(plain: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Where OmegaConf has more to say than what is written: the keys of each such value, and the dict it is in.

    They are few. For all values, OmegaConf takes ten times as long as everything else that a trial is checked for.
    """
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _unresolved(value, (*above, name))
        elif isinstance(value, str | list) and re.search(r"\$\{|\?\?\?", str(value)):
            yield (*above, name), plain


def _without_echoes(faults: list[Fault], config: DictConfig | Mapping[str, Any]) -> list[Fault]:
    """Leaves out faults of values copied from another key (lr: ${method.base_lr}) that is itself at fault."""
    if not isinstance(config, DictConfig):
        return faults

    def is_copy(fault: Fault) -> bool:
        part, _, last = fault.key.rpartition(".")
        node = OmegaConf.select(config, part) if part else config
        return isinstance(node, DictConfig) and last in node and OmegaConf.is_interpolation(node, last)

    own = [fault for fault in faults if not is_copy(fault)]
    told = {(repr(fault.value), fault.message) for fault in own}
    return [fault for fault in faults if fault in own or (repr(fault.value), fault.message) not in told]


def _is_echo(details: ErrorDetails) -> bool:
    """Whether a list is called too short for want of elements that are at fault themselves."""
    return details["type"] == "too_short" and len(details["input"]) > 0


def _fault(details: ErrorDetails, config: Mapping[str, Any]) -> Fault:
    """pydantic's report in our words."""
    context, kind = details.get("ctx", {}), details["type"]
    path = [part for part in details["loc"] if not isinstance(part, int)]
    key = ".".join(map(str, path))
    value = MISSING if kind == "missing" else look_up(config, key)
    if len(path) < len(details["loc"]):  # an element of a list
        value = details["input"]
        if kind == "missing":
            return Fault(key, value, "the list is too short")
    if kind == "literal_error":
        return Fault(key, value, expected(value, re.findall(r"'([^']*)'", context["expected"])))
    if kind == "extra_forbidden":
        return Fault(key, MISSING, "no such key")
    if kind == "value_error":
        return Fault(key, value, str(context["error"]))
    bound = next((f"{context[name]:.10g}" for name in ("gt", "ge", "lt", "le") if name in context), "")
    messages = {
        "missing": "is missing",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "float_type": "expected a number",
        "finite_number": "expected a finite number",
        "bool_type": "expected true or false",
        "string_type": "expected text" + (_quotes(key, value) if isinstance(value, bool | int | float) else ""),
        "string_too_short": "expected text",
        "string_unicode": "is not UTF-8",
        "string_pattern_mismatch": "expected 64 hexadecimal digits",
        "tuple_type": "expected a list, such as [query,value]",
        "too_short": "expected a list that is not empty",
        "too_long": "the list is too long",
        "greater_than": f"must be above {bound}",
        "greater_than_equal": f"must be at least {bound}",
        "less_than": f"must be below {bound}",
        "less_than_equal": f"must be at most {bound}",
        "model_type": "expected a group of keys",
    }
    return Fault(key, value, messages.get(kind, details["msg"]))


def _quotes(key: str, value: Any) -> str:
    return f"; a number needs two kinds of quotes: '{key}=\"{show(value)}\"'"


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or None."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{show(v)}" for key, v in value.items()) + "}"
    return str(value)


def expected(value: Any, known: Iterable[str]) -> str:
    """ "expected one of ..." with the nearest of the known names; of many in folders the folders alone."""
    names = list(known)
    told = names if len(names) <= 20 else list(dict.fromkeys(re.sub("/.*", "/…", name) for name in names))
    return f"expected one of {', '.join(told)}{did_you_mean(value, names)}"


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest of the known names, or nothing."""
    near = nearest(str(word), known)
    return f"; did you mean {near}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a word, large and small letters alike, if any is like it."""
    names = {name.lower(): name for name in known}
    return next((names[near] for near in difflib.get_close_matches(word.lower(), names, n=1)), None)
