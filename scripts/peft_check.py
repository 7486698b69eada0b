"""PEFT's own LoRA and DeLoRA, trained by the Hugging Face Trainer on MRPC, against delora's: docs/study/peft.csv.

The same command again trains only what is missing; with --method and --seed several processes can share the work.
Both use the same rows of the paper's protocol, the same rates, seeds and schedule, and report the test score of the
checkpoint that is best on validation. Initial values, data order and dropout are each program's own.
"""

import argparse
import csv
import itertools
import statistics
import sys
import tempfile
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
from delora.tasks import TASKS

SEEDS, FACTORS, EPOCHS = (42, 43, 44), (0.25, 1.0, 4.0), 5
RATES = {"lora": 6e-4, "delora": 6e-4}  # of factor 1; PEFT's DeLoRA starts from zero and gives λ the common rate
TASK = TASKS["mrpc"]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "study"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with GLUE's TSV files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--method", choices=RATES, help="only this one")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="only this one")
    parser.add_argument("--output", type=Path, default=Path("outputs/peft"), help="folder for a file a trial")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    methods = [options.method] if options.method else RATES
    seeds = [options.seed] if options.seed else SEEDS
    for method, seed in itertools.product(methods, seeds):
        ours(options, method, seed)
        for factor in FACTORS:
            if not place(options, "PEFT", method, seed, factor).exists():
                theirs(options, method, seed, factor)
    table(options.output)


def trial(options: argparse.Namespace, method: str, seed: int, factor: float) -> Trial:
    words = ["task=mrpc", "model=minilm", f"method={method}", f"seed={seed}", f"epochs={EPOCHS}", "logger=none"]
    words += [f"lr={RATES[method] * factor}", f"data.dir={options.data}", f"device={options.device}"]
    words += [f"precision={options.precision}", f"output_dir={options.output}", "log_every=50"]
    if method == "delora":
        words += ["method.init=zero", f"method.lambda_lr={RATES[method] * factor}"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return Trial.from_config(compose("config", words))


def ours(options: argparse.Namespace, method: str, seed: int) -> None:
    """Three rates as one fleet."""
    from delora import sweep

    trials = [trial(options, method, seed, factor) for factor in FACTORS]
    for factor, result in zip(FACTORS, sweep.run(trials), strict=True):
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


def table(folder: Path) -> None:
    """Prints mean and standard deviation over the seeds of both, and writes all scores to docs/study/peft.csv."""
    lines = [next(csv.reader([path.read_text()])) for path in sorted(folder.glob("*-*.csv"))]
    text = "program,method,factor,seed,accuracy\n" + "".join(",".join(line) + "\n" for line in lines)
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "peft.csv").write_text(text)
    print("| method | learning rate | PEFT + Trainer | delora | difference |\n|---|---:|---:|---:|---:|")
    for method, factor in itertools.product(RATES, FACTORS):
        scores = {
            program: [100 * float(s) for p, m, f, _, s in lines if (p, m, float(f)) == (program, method, factor)]
            for program in ("PEFT", "delora")
        }
        if min(map(len, scores.values())) > 1:
            cells = [f"{statistics.mean(s):.1f} ± {statistics.stdev(s):.2f}" for s in scores.values()]
            difference = statistics.mean(scores["delora"]) - statistics.mean(scores["PEFT"])
            rate = RATES[method] * factor
            print(f"| {method} | {rate:g} | {' | '.join(cells)} | {difference:+.1f} |".replace("-", "−"))


if __name__ == "__main__":
    sys.exit(main())
