"""PEFT's own LoRA and DeLoRA, trained by the Hugging Face Trainer on MRPC, against delora's: docs/study/peft.csv.

The same command again trains only what is missing there; with --method and --seed several processes can share the work.
Both use the same rows of the paper's protocol, the same rates, seeds and schedule, and report the test score of the
checkpoint that is best on validation. Initial values, data order and dropout are each program's own.
"""

import argparse
import csv
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import peft
import transformers
from hydra import compose, initialize_config_dir

from delora import data, pretrained
from delora import run as runner
from delora.cli import conf_folder
from delora.config import Trial
from delora.data.splits import paper_split
from delora.errors import UserError
from delora.report import statistics, tables
from delora.report.trials import title
from delora.tasks import TASKS

SEEDS, FACTORS, EPOCHS = (42, 43, 44), (0.25, 1.0, 4.0), 5
RATES = {"lora": 6e-4, "delora": 6e-4}  # of factor 1; PEFT's DeLoRA starts from zero and gives λ the common rate
TASK = TASKS["mrpc"]
CSV = Path(__file__).resolve().parents[1] / "docs" / "study" / "peft.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with GLUE's TSV files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--method", choices=RATES, help="only this one")
    parser.add_argument("--seed", type=int, help=f"only this one; default: each of {SEEDS}")
    parser.add_argument("--factor", type=float, choices=FACTORS, help="only this one")
    parser.add_argument("--output", type=Path, default=Path("outputs/peft"), help="folder for a file a trial")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if CSV.exists():  # trained elsewhere: not again
        for line in csv.DictReader(CSV.read_text().splitlines()):
            factor, seed = float(line["factor"]), int(line["seed"])
            keep(options, line["program"], line["method"], seed, factor, float(line["accuracy"]))
    methods = [options.method] if options.method else RATES
    seeds = SEEDS if options.seed is None else [options.seed]
    factors = [options.factor] if options.factor else FACTORS
    for method, seed in itertools.product(methods, seeds):
        if missing := [factor for factor in factors if not place(options, "delora", method, seed, factor).exists()]:
            ours(options, method, seed, missing)
        for factor in factors:
            if not place(options, "PEFT", method, seed, factor).exists():
                theirs(options, method, seed, factor)
    lines = [path.read_text() for path in sorted(options.output.glob("*-*.csv"))]
    CSV.parent.mkdir(parents=True, exist_ok=True)
    CSV.write_text("program,method,factor,seed,accuracy\n" + "".join(lines))
    print(*table(CSV), sep="\n")


def trial(options: argparse.Namespace, method: str, seed: int, factor: float) -> Trial:
    words = ["task=mrpc", "model=minilm", f"method={method}", f"seed={seed}", f"epochs={EPOCHS}", "logger=none"]
    words += [f"lr={RATES[method] * factor}", f"data.dir={options.data}", f"device={options.device}"]
    words += [f"precision={options.precision}", f"output_dir={options.output}", "log_every=50"]
    if method == "delora":
        words += ["method.init=zero", f"method.lambda_lr={RATES[method] * factor}"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return Trial.from_config(compose("config", words))


def ours(options: argparse.Namespace, method: str, seed: int, factors: Sequence[float]) -> None:
    """All rates as one fleet."""
    from delora import sweep

    trials = [trial(options, method, seed, factor) for factor in factors]
    for factor, result in zip(factors, sweep.run(trials), strict=True):
        score = result["best"]["test"]["accuracy"] if result and result["best"] else float("nan")
        keep(options, "delora", method, seed, factor, score)


def theirs(options: argparse.Namespace, method: str, seed: int, factor: float) -> None:
    config = trial(options, method, seed, factor)
    transformers.set_seed(seed)
    loaded = pretrained.load(config.model, TASK)
    rows = data.load(TASK, **config.data.options()).splits
    common = {"target_modules": ["query", "value"], "r": 8, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    if method == "lora":
        settings: peft.PeftConfig = peft.LoraConfig(lora_alpha=config.method.alpha, **common)
    else:
        settings = peft.DeloraConfig(delora_lambda=config.method.lambda_init, **common)
    model = peft.get_peft_model(loaded.model, settings)

    def examples(split: str, chosen: np.ndarray | None = None) -> list[dict]:
        texts = rows[split].texts
        encoded = loaded.tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=config.max_length)
        every = range(len(texts)) if chosen is None else chosen.tolist()
        fields = ("input_ids", "token_type_ids", "attention_mask")
        return [{**{f: encoded[f][i] for f in fields}, "labels": int(rows[split].labels[i])} for i in every]

    validation, test = paper_split(TASK, seed, len(rows["validation"].texts))

    def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    device = runner.choose_device(options.device)
    steps = -(-len(rows["train"].texts) // config.batch_size) * EPOCHS
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            seed=seed,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=config.rate,
            weight_decay=config.weight_decay,
            warmup_steps=round(config.warmup_ratio * steps),
            max_grad_norm=0.0,  # no clipping
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            bf16=options.precision == "bfloat16",
            use_cpu=device.type == "cpu",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=examples("train"),
            eval_dataset=examples("validation", validation),
            data_collator=transformers.DataCollatorWithPadding(loaded.tokenizer),
            compute_metrics=accuracy,
        )
        trainer.train()
        score = trainer.evaluate(examples("validation", test))["eval_accuracy"]
    keep(options, "PEFT", method, seed, factor, score)


def place(options: argparse.Namespace, program: str, method: str, seed: int, factor: float) -> Path:
    return options.output / f"{program}-{method}-{factor:g}-{seed}.csv"


def keep(options: argparse.Namespace, program: str, method: str, seed: int, factor: float, score: float) -> None:
    place(options, program, method, seed, factor).write_text(f"{program},{method},{factor:g},{seed},{score!r}\n")


def table(path: Path) -> Iterator[str]:
    """Lines in Markdown: means over the seeds of both, and the mean difference by seed with its 95 % interval."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    yield "| method | learning rate | seeds | PEFT + Trainer | delora | difference |"
    yield "|---|---:|---:|---:|---:|---:|"
    for method, factor in itertools.product(RATES, FACTORS):
        by_program: dict[str, dict[str, float]] = {"PEFT": {}, "delora": {}}
        for line in lines:
            if line["method"] == method and float(line["factor"]) == factor:
                by_program[line["program"]][line["seed"]] = 100 * float(line["accuracy"])
        theirs, ours = by_program.values()
        seeds = sorted(theirs.keys() & ours.keys())
        if len(seeds) < 2:
            continue
        pairs = np.array([[ours[seed], theirs[seed]] for seed in seeds])
        mean, spread = pairs.mean(0), pairs.std(0, ddof=1)
        cells = [f"{mean[i]:.1f} ± {spread[i]:.2f}" for i in (1, 0)]
        cells.append(tables.interval(statistics.paired(*pairs.T)[0], scale=1, form="+.1f").text)
        yield f"| {title(method)} | {RATES[method] * factor:g} | {len(seeds)} | {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"scripts/peft_check.py: error: {error}")
