"""Result folders with invented numbers, in the form that training writes, for the tests of reports."""

import itertools
import json
import random
from pathlib import Path

FACTORS = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
SEEDS = [42, 43, 44, 45, 46]
HEADLINES = {"cola": "matthews", "stsb": "pearson_spearman"}
# name: base rate, options, factor where the score is best, decades that it keeps it, distance at the base rate
METHODS = {
    "lora": (6e-4, {"rank": 8, "alpha": 8}, 1, 0.4, 1.2),
    "dora": (6e-4, {"rank": 8, "alpha": 8, "train_magnitude": True}, 1, 0.5, 1.4),
    "delora": (6e-3, {"rank": 8, "lambda_init": 4.0, "lambda_lr": 1e-2, "init": "residual"}, 2, 1.5, 2.0),
    "delora-zero": (6e-3, {"rank": 8, "lambda_init": 4.0, "lambda_lr": 1e-2, "init": "zero"}, 2, 1.2, 2.2),
    "ether": (6e-3, {"side": "in", "blocks": 4}, 4, 0.9, 2.8),
    "etherplus": (6e-3, {"side": "both", "blocks": 4}, 2, 1.3, 1.7),
}
BEST = {
    "mrpc": 0.88,
    "rte": 0.76,
    "cola": 0.6,
    "stsb": 0.9,
    "sst2": 0.94,
    "mnli": 0.87,
    "qnli": 0.92,
    "qqp": 0.9,
}
FLOOR = {
    "mrpc": 0.68,
    "rte": 0.53,
    "cola": 0.0,
    "stsb": 0.0,
    "sst2": 0.51,
    "mnli": 0.35,
    "qnli": 0.5,
    "qqp": 0.63,
}
LAYERS = [f"encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value")]


def config(task="mrpc", method="lora", factor=1.0, seed=42, protocol="paper", model="minilm", **changes) -> dict:
    """A resolved config; `changes` replace values of the top level."""
    base_lr, options, *_ = METHODS[method]
    made = {
        "task": {"name": task},
        "method": {
            "_target_": f"delora.methods.{method}", "name": method.split("-")[0], "base_lr": base_lr, "weight_decay": 0.01,
            "betas": [0.9, 0.999], "targets": ["query", "value"], "dropout": 0.1, **options,
        },
        "model": {"name": model, "package": None, "source": None, "random": None},
        "data": {"name": "glue", "dir": None},
        "protocol": {"name": protocol},
        "logger": {"name": "wandb", "mode": "disabled", "project": "fake"},
        "lr": base_lr * factor, "seed": seed, "epochs": 10, "batch_size": 32, "accumulation": 1, "max_length": 256,
        "weight_decay": 0.01, "warmup_ratio": 0.06, "clip_norm": None, "device": "auto", "precision": "float32",
        "log_every": 10, "name": "fake", "output_dir": "outputs",
    }  # fmt: skip
    return made | changes


def result(config: dict, score: float | None, validation: float | None, status: str = "done") -> dict:
    """A result.json of the config; a score of None is one that is not finite."""
    headline = HEADLINES.get(config["task"]["name"], "accuracy")
    epoch = max(1, config["epochs"] - 2)
    test = {headline: score} if config["protocol"]["name"] == "paper" else None
    at = {
        "epoch": epoch,
        "step": epoch * 115,
        "validation": {"loss": 0.4, headline: validation},
        "test": test,
    }
    return {
        "schema": 1, "id": f"fake-{abs(hash(json.dumps(config))) % 10**8}", "sweep": "fake", "status": status,
        "config": config, "headline": headline,
        "best": None if status == "failed" else at, "last": None if status == "failed" else at | {"test": None},
        "diverged_step": 230 if status == "diverged" else None, "epochs": config["epochs"], "steps": 115 * config["epochs"],
        "parameters": {"adapter": 73728, "head": 770, "encoder": 22713216},
        "seconds": {"total": 61.0, "train": 50.0, "evaluate": 11.0}, "tokens": {"real": 10**6, "computed": 2 * 10**6},
        "fleet_size": 8,
        "made_by": {
            "delora": "0.1.0", "commit": "f" * 40, "python": "3.11", "torch": "2.13", "transformers": "5.23", "device": "cpu",
            "cpu": "a fake one", "precision": "float32", "data": {"source": "files", "sha256": "d" * 64},
            "weights": {"source": "package", "sha256": "e" * 64},
        },
    }  # fmt: skip


def evaluations(config: dict, final: float, distance: float, upto: int, layers=LAYERS) -> list[dict]:
    headline = HEADLINES.get(config["task"]["name"], "accuracy")
    floor = FLOOR[config["task"]["name"]]
    lines = []
    for epoch in range(upto + 1):
        grown = 1 - 0.45**epoch
        score = floor + (final - floor) * grown
        lines.append({
            "kind": "evaluation", "step": 115 * epoch, "epoch": epoch, "loss": 0.7 - 0.3 * grown,
            "metrics": {headline: score},
            "distance": {name: distance * grown * (1 + 0.05 * i) for i, name in enumerate(layers)},
            "lambda": {name: 4 + grown for name in layers} if config["method"]["name"] == "delora" else {},
        })  # fmt: skip
    return lines


def write(folder: Path, result: dict, lines: list[dict]) -> Path:
    """Writes one trial's folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(result["config"]))
    steps = [
        {"kind": "step", "step": 10 * i, "epoch": i / 11.5, "loss": 0.6, "lr": 1e-4, "seconds": 0.3 * i}
        for i in range(1, 90)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + lines))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def trial(folder: Path, score: float | None, validation: float | None = None, status="done", **settings) -> Path:
    """One trial with a given score; validation is the same unless given."""
    made = config(**settings)
    validation = score if validation is None else validation
    lines = evaluations(made, final=score or 0.0, distance=1.0, upto=2)
    return write(folder, result(made, score, validation, status), lines)


def sweep(root: Path, tasks=("mrpc",), methods=tuple(METHODS), factors=FACTORS, seeds=SEEDS, **settings) -> Path:
    """A sweep in which rates above what a method tolerates lose score, and diverge in the end."""
    for number, (task, method, factor, seed) in enumerate(itertools.product(tasks, methods, factors, seeds)):
        made = config(task=task, method=method, factor=factor, seed=seed, **settings)
        noise = random.Random(f"{task} {seed}").gauss(0, 0.012) + random.Random(f"{number} {seed}").gauss(0, 0.008)
        _, _, best_at, decades, distance = METHODS[method]
        octaves = abs(_log2(factor) - _log2(best_at))
        over = max(0.0, octaves * 0.301 - decades / 2)
        below = factor < best_at
        score = BEST[task] - (0.05 if below else 0.25) * over**1.3 * (BEST[task] - FLOOR[task]) * 4 + noise
        diverged = not below and over > 0.55 and random.Random(f"d{number}").random() < over
        score = max(score, FLOOR[task])
        grown = distance * factor ** (0.9 if method in ("lora", "dora") else 0.25)
        lines = evaluations(made, score, grown, upto=2 if diverged else made["epochs"])
        status = "diverged" if diverged else "done"
        folder = root / f"{task}-{method}-{factor:g}-{seed}"
        write(folder, result(made, round(score, 4), round(score + 0.004, 4), status), lines)
    return root


def _log2(value: float) -> float:
    import math

    return math.log2(value)
