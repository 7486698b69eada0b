"""Result folders with invented numbers, in the form that training writes, for the tests of reports."""

import functools
import hashlib
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
SEEDS = (42, 43, 44, 45, 46)
DELORA = {"rank": 8, "lambda_init": 4.0, "lambda_lr": 1e-2}
# base rate, options; then for `sweep` the factor where the score is best, and decades for which it keeps it
METHODS: dict[str, tuple[float, dict[str, Any], float, float]] = {
    "lora": (6e-4, {"rank": 8, "alpha": 8.0}, 1, 0.4),
    "dora": (6e-4, {"rank": 8, "alpha": 8.0, "train_magnitude": True}, 1, 0.5),
    "delora": (6e-3, {**DELORA, "init": "residual"}, 2, 1.5),
    "delora-zero": (6e-3, {**DELORA, "init": "zero"}, 2, 1.2),
    "etherplus": (6e-3, {"side": "both", "blocks": 4}, 2, 1.3),
}
# headline, and for `sweep` the best score and that of guessing
TASKS = {
    "mrpc": ("accuracy", 0.88, 0.68),
    "rte": ("accuracy", 0.76, 0.53),
    "cola": ("matthews", 0.6, 0.0),
    "stsb": ("pearson_spearman", 0.9, 0.0),
    "sst2": ("accuracy", 0.94, 0.51),
}
LAYERS = [f"encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value")]


def config(task="mrpc", method="lora", factor=1.0, seed=42, protocol="paper", **changes: Any) -> dict[str, Any]:
    """A resolved config; `changes` replace values of the top level."""
    base_lr, options, *_ = METHODS[method]
    fixed = {"weight_decay": 0.01, "betas": [0.9, 0.999], "targets": ["query", "value"], "dropout": 0.1}
    return {
        "lr": base_lr * factor,
        "seed": seed,
        "epochs": 10,
        "batch_size": 32,
        "accumulation": 1,
        "max_length": 256,
        "weight_decay": 0.01,
        "warmup_ratio": 0.06,
        "clip_norm": None,
        "device": "auto",
        "precision": "float32",
        "log_every": 10,
        "name": None,
        "output_dir": "outputs",
        "task": {"name": task},
        "method": {"_target_": "fake", "name": method.split("-")[0], "base_lr": base_lr, **fixed, **options},
        "model": {"name": "minilm", "package": "fake"},
        "data": {"name": "glue", "dir": None},
        "protocol": {"name": protocol},
        "logger": {"name": "none", "mode": "disabled", "project": "fake"},
        **changes,
    }


def write(
    folder: Path,
    score: float | None,
    validation: float | None = None,
    status: str = "done",
    distance: float = 1.0,
    evaluations: int = 3,
    **settings: Any,
) -> Path:
    """Writes a trial's folder.

    Args:
        score: the headline metric on test, a fraction; None is one that is not finite.
        validation: on validation; the same unless given.
        distance: ‖W′ − W‖ at the end of training, of each layer times its index plus 1.
        settings: of `config`.

    The hashes of weights and data follow from the config's model and data, the hash of data also from the task.
    """
    made = config(**settings)
    task, method = made["task"]["name"], made["method"]["name"]
    headline, _, floor = TASKS[task]
    validation = score if validation is None else validation
    split = {"loss": 0.4, headline: validation}
    test = {headline: score} if made["protocol"]["name"] == "paper" else None
    epoch = max(0, evaluations - 1)
    best = {"epoch": epoch, "step": 115 * epoch, "validation": split, "test": test}
    unscored = status == "failed" or not evaluations
    model = made["model"]
    origins = {
        "weights": {"source": model.get("source") or model.get("package") or "random", "sha256": sha256(model)},
        "data": {"source": "files", "sha256": sha256([task, made["data"]])},
    }
    result = {
        "schema": 1,
        "id": folder.name,
        "sweep": "fake",
        "status": status,
        "config": made,
        "headline": headline,
        "best": None if unscored else best,
        "last": None if unscored else best | {"test": None},
        "diverged_step": 230 if status == "diverged" else None,
        "epochs": made["epochs"],
        "steps": 115 * made["epochs"],
        "parameters": {"adapter": 73728, "head": 770, "encoder": 22713216},
        "seconds": {"total": 61.0, "train": 50.0, "evaluate": 11.0},
        "tokens": {"real": 10**6, "computed": 2 * 10**6},
        "fleet_size": 8,
        "made_by": {
            "delora": "0.1.0",
            "commit": "f" * 40,
            "python": "3.11",
            "torch": "2.13",
            "transformers": "5.23",
            "device": "cpu",
            "cpu": "a fake one",
            "precision": "float32",
            **origins,
        },
    }
    lines = [
        {"kind": "step", "step": 10 * i, "epoch": i / 11.5, "loss": 0.6, "lr": 1e-4, "seconds": 0.3 * i}
        for i in range(1, 90)
    ]
    for epoch in range(evaluations):
        grown = epoch / max(1, evaluations - 1)
        line = {
            "kind": "evaluation",
            "step": 115 * epoch,
            "epoch": epoch,
            "loss": 0.7 - 0.3 * grown,
            "metrics": {headline: floor + ((validation or 0.0) - floor) * grown},
            "distance": {name: (i + 1) * distance * grown for i, name in enumerate(LAYERS)},
            "lambda": {name: 4 + grown for name in LAYERS} if method == "delora" else {},
            "change": {f"layer.{i}": (i + 1) * distance * grown / 10 for i in range(2)},
        }
        lines.append(line)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(made))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def change(folder: Path, **changes: Any) -> None:
    """Changes values of a written result by dotted key, with two underscores for each dot."""
    path = folder / "result.json"
    result = json.loads(path.read_text())
    for key, value in changes.items():
        *parts, name = key.split("__")
        functools.reduce(dict.__getitem__, parts, result)[name] = value
    path.write_text(json.dumps(result))


def sweep(root: Path, tasks=("mrpc",), methods=tuple(METHODS), factors=FACTORS, seeds=SEEDS, **settings: Any) -> Path:
    """A sweep in which rates above what a method tolerates lose score, and diverge in the end."""
    for task, method, factor, seed in itertools.product(tasks, methods, factors, seeds):
        name = f"{task}-{method}-{factor:g}-{seed}"
        draw = random.Random(name)
        _, best, floor = TASKS[task]
        _, _, best_at, decades = METHODS[method]
        over = max(0.0, abs(math.log10(factor / best_at)) - decades / 2)
        drop = (0.2 if factor < best_at else 1.0) * over**1.3 * (best - floor)
        score = max(best - drop + draw.gauss(0, 0.012), floor)
        diverged = factor > best_at and over > 0.55 and draw.random() < over
        write(
            root / name,
            round(score, 4),
            round(score + 0.004, 4),
            status="diverged" if diverged else "done",
            distance=factor ** (0.9 if method in ("lora", "dora") else 0.25),
            evaluations=3 if diverged else 11,
            **{"task": task, "method": method, "factor": factor, "seed": seed, **settings},
        )
    return root
