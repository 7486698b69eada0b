"""What result.json and metrics.jsonl hold, and how two configs compare."""

import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NotRequired, cast

from typing_extensions import TypedDict

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = 2
WITHOUT_HASHES = 1  # the schema of results whose files have no stored hash
CONFIG, METRICS, RESULT, LOG = "config.yaml", "metrics.jsonl", "result.json", "log.txt"
ADAPTER, PREDICTIONS = "adapter.safetensors", "predictions.safetensors"

Scores = dict[str, float | None]


class Checkpoint(TypedDict):
    """Scores at one evaluation; `test` only for the best one under protocol=paper."""

    epoch: int
    step: int
    validation: Scores
    test: Scores | None


class Parameters(TypedDict):
    """Numbers of values: trained in the adapter, trained in the head, frozen in the encoder."""

    adapter: int
    head: int
    encoder: int


class Seconds(TypedDict):
    total: float
    train: float
    evaluate: float


class Tokens(TypedDict):
    """Tokens trained on: of the texts, and with padding."""

    real: int
    computed: int


class Origin(TypedDict):
    """Where data or weights are from. `revision` is the hub's commit, of weights that are from there."""

    source: str
    sha256: str | None
    revision: NotRequired[str | None]


class DataOrigin(Origin):
    """`published`: whether the rows are GLUE's published ones, null where that is not known.

    `guessing`: what always guessing the same scores on the validation rows by the headline metric, a fraction. Both are
    absent in old results.
    """

    published: NotRequired[bool | None]
    guessing: NotRequired[float]


class MadeBy(TypedDict):
    """What made a result, as `provenance` tells. `commit` ends with -dirty for an edited checkout."""

    delora: str | None
    commit: str | None
    python: str
    torch: str | None
    transformers: str | None
    device: str
    cpu: str
    precision: str
    data: DataOrigin
    weights: Origin
    start: NotRequired[Origin]


class Result(TypedDict):
    """result.json. `best` and `last` are null where nothing was scored before the trial broke off.

    `files` holds the sha256 of each file beside it that the trial ended with, `sha256` that of all the rest of it.
    `stopped_epoch` is the rung of the halving that a stopped trial ended at, after its last evaluation.
    `trained_as` is the id of the trial of the sweep whose training was the same, and whose files these are.
    """

    schema: int
    id: str
    sweep: str | None
    status: Literal["done", "diverged", "stopped", "failed"]
    config: dict[str, Any]
    headline: str
    best: Checkpoint | None
    last: Checkpoint | None
    diverged_step: int | None
    epochs: int
    steps: int
    parameters: Parameters
    seconds: Seconds
    tokens: Tokens
    fleet_size: int
    made_by: MadeBy
    stopped_epoch: NotRequired[int]
    trained_as: NotRequired[str]
    files: NotRequired[dict[str, str]]
    sha256: NotRequired[str]


def share_of_seconds(result: Result) -> float:
    """What a trial took of its device: its share of its fleet's seconds."""
    return result["seconds"]["total"] / result["fleet_size"]


class Extent(TypedDict):
    """How far metrics.jsonl is: its size in bytes, and their sha256."""

    size: int
    sha256: str


class Step(TypedDict):
    kind: Literal["step"]
    step: int
    epoch: float
    loss: float | None
    lr: float
    seconds: float


Evaluation = TypedDict(
    "Evaluation",
    {
        "kind": Literal["evaluation"],
        "step": int,
        "epoch": int,
        "loss": float | None,
        "metrics": Scores,
        "distance": dict[str, float | None],
        "lambda": dict[str, float | None],
        "change": NotRequired[dict[str, float | None]],
    },
)
Evaluation.__doc__ = """Scores on validation, ‖W′ − W‖_F and λ by adapted layer; epoch 0 is before training.

`change` is ‖h′ − h‖ / ‖h‖ by layer of the encoder, for its hidden states h′ and the frozen encoder's h on some of the
validation rows; absent in old results.
"""


@functools.cache
def _schema() -> "TypeAdapter[Result]":
    from pydantic import TypeAdapter

    return TypeAdapter(Result)


def checked(value: Any) -> Result:
    """The value as a Result. Raises ValueError that says what is wrong with it."""
    from pydantic import ValidationError

    if not isinstance(value, dict) or "schema" not in value:
        raise ValueError("not a result of delora-run")
    if value["schema"] not in (WITHOUT_HASHES, SCHEMA):
        raise ValueError(f"schema {value['schema']!r}, this version reads {SCHEMA}")
    try:
        result = _schema().validate_python(value, strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ValueError("; ".join(faults)) from None
    if result["schema"] == SCHEMA and not ("files" in result and result.get("sha256") == digest(value)):
        raise ValueError("damaged: its content has another sha256 than when it was written")
    if result["status"] in ("done", "stopped") and not (result["best"] and result["last"]):
        raise ValueError(f"status is {result['status']}, but there is no best or last score")
    if (result["status"] == "stopped") != ("stopped_epoch" in result):
        raise ValueError(f"status is {result['status']}, stopped_epoch is {result.get('stopped_epoch')}")
    if (result["status"] == "diverged") != (result["diverged_step"] is not None):
        raise ValueError(f"status is {result['status']}, diverged_step is {result['diverged_step']}")
    for place in ("best", "last"):
        checkpoint = result[place]  # type: ignore[literal-required]
        if checkpoint and result["headline"] not in checkpoint["validation"]:
            raise ValueError(f"{place}.validation lacks the headline metric {result['headline']}")
    return cast(Result, value)


def has_ended(result: Result, config: Mapping[str, Any]) -> bool:
    """Whether a trial with such a result is over for a command with that config of it.

    One that failed is not, nor one that a halving has stopped where the command has another one, or none.
    """
    if result["status"] == "stopped":
        return bool(result["config"].get("halving") == config.get("halving"))
    return result["status"] != "failed"


def digest(result: Mapping[str, Any]) -> str:
    """The sha256 of a result's content but `sha256`, whatever the order of its keys."""
    content = {key: value for key, value in result.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def without_hashes(result: Result) -> Result:
    """The result as one that vouches neither for its own content nor for files beside it, to be changed or moved."""
    kept = {key: value for key, value in result.items() if key not in ("files", "sha256")}
    return cast(Result, {**kept, "schema": WITHOUT_HASHES})


def plain(value: Any) -> Any:
    """The value as JSON has it: scalars of numpy and torch as numbers, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{value!r} of {type(value)} has no place in a result")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Lines "  key: old → new" of the dotted keys in which two configs differ."""
    old, new = flatten(old), flatten(new)
    keys = [key for key in {**old, **new} if not is_of(key, ignore)]
    pairs = [(key, old.get(key, "(absent)"), new.get(key, "(absent)")) for key in keys]
    return [f"  {key}: {before} → {after}" for key, before, after in pairs if before != after]


def is_of(key: str, groups: Iterable[str]) -> bool:
    """Whether a dotted key is one of the groups, or in one."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
