"""Time and memory of a training step: K trials of delora, PEFT in a bare loop, PEFT with the Hugging Face Trainer.

All train the same method on the same batches in the same order, dropout on, in turns within one process, so that
the machine's mood is the same for all. PEFT pads each batch to its longest example, its loops are measured plain and,
on a GPU, compiled. Two floors, which are the frozen encoder's forward and the backward through its activations: as
transformers computes padded batches, and as delora computes packed ones. Turns are taken, each row after the other,
while the minutes last.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
import transformers
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import nn

from delora import attention, encoders, overrides, pretrained, run, storage
from delora import data as rows_of
from delora.cli import conf_folder
from delora.config import Trial
from delora.data import Rows
from delora.data.batches import Tokens, epoch_order
from delora.errors import UserError
from delora.model import Fleet
from delora.tasks import TASKS
from delora.train import Data, State, Step, Totals, predict, train

SEEDS = 4  # of a fleet, whose trials else differ in their rates: a sweep of factors and seeds
WARMUP = 3  # steps that are not counted; on a GPU more
PROFILED = 3  # steps
BYTES_IN_MAXRSS = 1 if sys.platform == "darwin" else 1024
H100_BF16 = 989e12  # multiplications and additions a second of its matrix units, dense (the vendor's data sheet)
ALONE = ("packed floor", "floor", "peft", "trainer", "peft compiled", "trainer compiled", "full trainer")  # one trial
WITHOUT = ("packing", "pruning", "compiling", "graphs", "kernel")
# What is aimed at, by device: a figure of `ratios`, what it means, whether more of it is better, and how much.
GOALS = {
    "cpu": [
        ("trainer", "a trial's speed over PEFT with the Trainer's", True, 2.5),
        ("floor", "a trial's step over the frozen encoder's, packed", False, 1.15),
        ("full", "full finetuning, a trial's speed over the Trainer's", True, 3),
    ],
    "cuda": [
        ("trainer epoch", "trials an hour over PEFT with the Trainer", True, 50),
        ("peft epoch", "trials an hour over PEFT in a bare loop", True, 20),
        ("matrix limit", "share of the bf16 matrix limit, real tokens only", True, 0.5),
        ("tokens", "tokens computed for each real one", False, 1.05),
        ("eight", "a step of 8 trials over one of 1", False, 1.1),
        ("full", "full finetuning, a trial's speed over the Trainer's", True, 3),
        ("floor", "the slowest method's step over the frozen encoder's, packed", False, 1.15),
        ("start", "seconds of compiling, warming up and recording", False, 45),
        ("cached start", "the same with a cache", False, 15),
    ],
}
# Kinds of work, by the names of torch's operations on a CPU and of kernels on a GPU; the first that matches.
WORK = {
    "attention kernel": r"attend|backward_kernel",
    "matrix products": r"mm$|gemm|cutlass|nvjet|wgmma|splitk",
    "softmax, norms, GELU": r"softmax|layer_norm|gelu",
    "hashing for dropout": r"shift|bitwise|xor|::lt$",
    "moving": r"copy|index|gather|scatter|Memcpy|Memset|cat$|_to_copy|fill",
    "fused by the compiler": r"triton",
    "other arithmetic": r"aten::|elementwise|reduce|foreach|multi_tensor|cub|norm",
}
# What the config.json of a family's published checkpoint says beside its shape.
PUBLISHED: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 128},
    "electra": {"embedding_size": 768},
    "deberta": {
        "relative_attention": True,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {"classifier_pooling": "mean"},
}
LABELS = {
    "floor": "frozen encoder, padded",
    "packed floor": "frozen encoder, packed",
    "peft": "PEFT, bare loop",
    "peft compiled": "PEFT, bare loop, compiled",
    "trainer": "PEFT, Trainer",
    "trainer compiled": "PEFT, Trainer, compiled",
    "full trainer": "full finetuning, Trainer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="GLUE's TSV files; without it, synthetic data")
    parser.add_argument("--task", default="mrpc", help="an option of the group task, one of GLUE")
    parser.add_argument("--model", default="minilm", help="an option of the group model")
    parser.add_argument("--models", nargs="+", help="compares these encoders, with random weights in their shapes")
    parser.add_argument("--random", action="store_true", help="random weights in its shape, MiniLM's tokenizer")
    parser.add_argument("--method", default="lora", choices=("lora", "delora"), help="those that PEFT has too")
    parser.add_argument("--methods", nargs="*", default=[], help="more methods, measured with the largest fleet")
    parser.add_argument("--without", nargs="*", default=[], choices=WITHOUT, help="the largest fleet, each left out")
    parser.add_argument("--profile", action="store_true", help="where the time of the largest fleet's steps goes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 8], help="sizes of fleets")
    parser.add_argument("--rows", nargs="+", default=ALONE[:-1], choices=ALONE, help="what to measure beside delora")
    parser.add_argument("--steps", type=int, help="of each turn, counted after warming up (default: 6, on a GPU 50)")
    parser.add_argument("--turns", type=int, default=5, help="at most")
    parser.add_argument("--minutes", type=float, default=6, help="after which nothing but delora's own sizes is begun")
    parser.add_argument("--command", nargs="+", metavar="METHOD", help="a whole command of these methods, that alone")
    parser.add_argument("--epochs", type=int, default=10, help="of --command")
    parser.add_argument("--tokens", nargs="+", metavar="TASK", help="tokens computed for each real one, that alone")
    parser.add_argument("--tokenize", type=int, metavar="ROWS", help="so many pairs as long as MNLI's, and that alone")
    parser.add_argument("--predict", type=int, metavar="TEXTS", help="speed beside transformers' pipeline, that alone")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one measurement in a process of its own: peak, start
    options = parser.parse_args()
    if options.alone:
        what, size = options.alone.split(":")
        alone: dict[str, Callable[..., Any]] = {"peak": peak_bytes, "start": start_seconds, "tokenize": tokenize}
        print(json.dumps(alone[what](options, int(size))))
        return
    if options.command:
        report_command(options)
        return
    if options.tokens:
        report_tokens(options)
        return
    if options.tokenize:
        report_tokenizing(options)
        return
    if options.predict:
        report_predicting(options)
        return
    if options.models:
        compare_models(options)
        return
    for method in (options.method, *options.methods):
        overrides.check(words(options, 42, method), conf_folder(), multirun=False)
    bench = Benchmark(options)
    figures = bench.measure()
    if bench.compiles:
        figures["peak_bytes"] = {str(size): peak for size, peak in bench.peaks.items()}
        bench.keep(figures)
        with tempfile.TemporaryDirectory() as folder:  # an empty cache, then the same again
            caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
            figures["start_seconds"] = [apart(f"start:{max(options.trials)}", caches) for _ in range(2)]
    else:
        figures["peak_bytes"] = {str(size): apart(f"peak:{size}") for size in sorted({1, max(options.trials)})}
    figures["achieved"] = achieved(figures, bench)
    bench.keep(figures)
    if options.profile:
        figures["profile_seconds"] = bench.profile()
        bench.keep(figures)
    report(figures, bench)


def compare_models(options: argparse.Namespace) -> None:
    """The largest fleet's step with each encoder, over the first one's, and PEFT's bare loop beside it."""
    size, first = max(options.trials), 0.0
    table = Table(
        "", "ms a step", "over the first", "PEFT, ms a trial", "compiled", "times PEFT", box=None, pad_edge=False
    )
    for name in options.models:
        options.model, options.random = name, True
        bench = Benchmark(options)
        ours = bench.delora(size)
        theirs = [bench.peft_bare()]
        if bench.compiles and "peft compiled" in options.rows:
            with contextlib.suppress(Exception):  # torch's compiler does not take every encoder of transformers
                theirs.append(bench.peft_bare(compiled=True))
        first = first or ours
        compiled = f"{1e3 * theirs[1]:.1f}" if len(theirs) > 1 else "-"
        row = [f"{1e3 * ours:.1f}", f"{ours / first:.2f}", f"{1e3 * theirs[0]:.1f}", compiled]
        table.add_row(name, *row, f"{min(theirs) * size / ours:.1f}")
        print(f"{name}: {', '.join(row)}", file=sys.stderr, flush=True)
        torch.compiler.reset()
    about = f"{size} trials, {options.method}, {options.task}, batch {options.batch_size}, {options.precision}"
    print(f"{about}, random weights")
    Console(width=110).print(table)


def words(options: argparse.Namespace, seed: int, method: str | None = None, model: str | None = None) -> list[str]:
    """As delora-run takes them."""
    return [
        *(f"model={model or options.model}", f"method={method or options.method}", f"seed={seed}"),
        f"task={options.task}",
        *(f"batch_size={options.batch_size}", f"device={options.device}", f"precision={options.precision}"),
        f"data.dir={options.data}" if options.data else "data=synthetic",
    ]


def trial(options: argparse.Namespace, seed: int, method: str | None = None, model: str | None = None) -> Trial:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return Trial.from_config(compose("config", words(options, seed, method, model)))


class Enough(Exception):
    """As many steps as were asked for."""


class Clock:
    """Listens to the loop, and ends it after so many steps; `begin` is called before the first that counts."""

    def __init__(
        self, device: torch.device, steps: int, warmup: int = WARMUP, begin: Callable[[], object] = lambda: None
    ):
        self.device, self.steps, self.warmup, self.begin = device, steps, warmup, begin
        self.ticks, self.start, self.end = 0, 0.0, 0.0
        self.totals = Totals()

    def tick(self) -> None:
        """A step is over."""
        self.ticks += 1
        if self.ticks == self.warmup:
            self.begin()
            self.start = self.now()
        elif self.ticks == self.warmup + self.steps:
            self.end = self.now()
            raise Enough

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def offer(self, state: State) -> None:
        self.totals = state.totals
        if state.totals.steps > self.ticks:  # else an evaluation is over
            self.tick()

    def restore(self, state: State) -> None: ...

    def step(self, *_: Any) -> None: ...

    def evaluation(self, *_: Any) -> None: ...

    def diverged(self, *_: Any) -> None: ...

    def seconds(self) -> float:
        """Mean of a step after warming up; each turn sees the same batches."""
        return (self.end - self.start) / self.steps


class Benchmark:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.trial = trial(options, 42)
        self.task = TASKS[options.task]
        self.device = run.choose_device(options.device)
        self.compiles = self.device.type == "cuda"
        if not self.compiles:
            run.keep_memory()
        _, self.tokens, _ = run.prepare(trial(options, 42, model="minilm" if options.random else None))
        self.tokenizer = pretrained.load(trial(options, 42, model="minilm").model, self.task).tokenizer
        if options.random:
            for tokens in self.tokens.values():
                tokens.inputs.pop("token_type_ids", None)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
        self.totals: dict[int, Totals] = {}
        self.epochs: dict[str, float] = {}  # seconds, with the scoring of `scored`
        self.steps_per_epoch = math.ceil(len(self.tokens["train"]) / options.batch_size)
        self.scored = torch.arange(len(self.tokens["validation"]) // 2)  # as many rows as with protocol=paper
        if options.steps is None:
            options.steps = min(50, self.steps_per_epoch // 2) if self.compiles else 6
        self.peaks: dict[int, int] = {}
        self.left_out: list[str] = []  # for want of time
        self.end = time.monotonic() + 60 * options.minutes

    def measure(self) -> dict[str, Any]:
        options = self.options
        every: dict[str, Callable[[], float]] = {
            "floor": self.floor,
            "packed floor": self.packed_floor,
            "peft": self.peft_bare,
            "peft compiled": lambda: self.peft_bare(compiled=True),
            "trainer": self.peft_trainer,
            "trainer compiled": lambda: self.peft_trainer(compiled=True),
            "full trainer": lambda: self.trainer("full trainer", self.encoder()),
        }
        largest = max(options.trials)
        rows = {f"fleet {k}": (lambda k=k: self.delora(k)) for k in options.trials}
        rows |= {name: every[name] for name in options.rows if "compiled" not in name}
        rows |= {name: every[name] for name in options.rows if self.compiles and "compiled" in name}
        rows |= {f"{name} {largest}": (lambda name=name: self.delora(largest, name)) for name in options.methods}
        rows |= {
            f"no {what} {largest}": (lambda what=what: self.delora(largest, without=what)) for what in options.without
        }
        seconds: dict[str, list[float]] = {}
        for turn, (name, measured) in itertools.product(range(options.turns), rows.items()):
            if time.monotonic() > self.end and f"fleet {options.trials[-1]}" in seconds:
                self.left_out = [row for row in rows if row not in seconds]
                break
            seconds.setdefault(name, []).append(measured())
            self.keep(self.figures(seconds))
            print(f"turn {turn + 1}, {name}: {1e3 * seconds[name][-1]:.1f} ms", file=sys.stderr, flush=True)
        return self.figures(seconds)

    def keep(self, figures: dict[str, Any]) -> None:
        """Writes the file that was asked for; a run that is ended early leaves what it measured."""
        if self.options.json:
            self.options.json.write_text(json.dumps(figures, indent=1) + "\n")

    def figures(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        options, tokens = self.options, self.totals.get(max(self.options.trials), Totals())
        return {
            "seconds_per_step": seconds,
            "steps": options.steps,
            "epoch_seconds": self.epochs,
            "tokens": {"real": tokens.real_tokens, "computed": tokens.computed_tokens, "steps": tokens.steps},
            "hardware": torch.cuda.get_device_name() if self.compiles else storage.cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
            "options": {k: str(v) for k, v in vars(options).items()},
        }

    def batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        order = epoch_order([self.trial.seed], 0, len(self.tokens["train"]))[0]
        while True:
            yield from self.padded("train", order)

    def padded(self, split: str, order: torch.Tensor) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for index in order.split(self.trial.batch_size):
            batch = self.tokens[split].gather(index[None], packed=False)
            yield batch.inputs, batch.labels_KB[0]

    def timed(self, step: Callable[[dict[str, torch.Tensor], torch.Tensor], None]) -> float:
        # Batches of other lengths need other blocks of a GPU's memory, which are slow to get the first time.
        clock = Clock(self.device, self.options.steps, self.options.steps if self.compiles else WARMUP)
        with contextlib.suppress(Enough):
            for inputs, labels in self.batches():
                step(inputs, labels)
                clock.tick()
        return clock.seconds()

    def encoder(self) -> transformers.PreTrainedModel:
        if not self.options.random:
            return pretrained.load(self.trial.model, self.task).model.to(self.device)  # type: ignore[return-value]
        shape = self.trial.model.known_shape
        assert shape is not None
        family = encoders.families()[shape.family]
        sizes = {key: getattr(shape, name) for name, key in family.keys.items()}
        published = {"vocab_size": 50265, "pad_token_id": 1, **PUBLISHED.get(shape.family, {})}
        config = transformers.AutoConfig.for_model(
            family.types[0], **{**sizes, **published, **pretrained.labels(self.task)}
        )
        first = family.first_position(config.to_dict())
        setattr(config, family.keys["positions"], shape.positions + first)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        return model.to(self.device)  # type: ignore[return-value]

    def peft_model(self, compiled: bool) -> nn.Module:
        """With PEFT's method; compiled layer by layer, as delora does, for any length of the batch."""
        model = self.encoder()
        family = encoders.of(model.config.to_dict()) or encoders.unknown
        # A third of a fused layer is no module of its own: PEFT takes the whole.
        fused = [name for name in family.fused if family.roles["query"].startswith(f"{name}.")]
        targets = fused or [family.roles[role] for role in ("query", "value")]
        common = {"target_modules": targets, "r": 8, "modules_to_save": list(family.head)}
        config = peft.LoraConfig(lora_alpha=8, **common)
        if self.options.method == "delora":
            config = peft.DeloraConfig(delora_lambda=4, **common)
        model = peft.get_peft_model(model, config)
        if compiled:
            for _, layer in family.find_layers(model.base_model.model):
                layer.compile(dynamic=True)
        return model

    def fleet(self, size: int, method: str | None = None, without: str | None = None) -> Fleet:
        trials = [trial(self.options, 42 + k % SEEDS, method) for k in range(size)]
        base = self.encoder()
        with left_out(base, without):
            fleet = Fleet(base, trials, self.device)
        if without in ("packing", "graphs"):  # what is not packed is not compiled either
            fleet.recorded = False
        if without != "packing":
            run.choose_speed(fleet, False if without == "compiling" else self.trial.compile)
        return fleet

    # --- What is measured; each returns the seconds of a step

    def delora(
        self,
        size: int,
        method: str | None = None,
        without: str | None = None,
        before: Callable[[Fleet], object] = lambda _: None,
    ) -> float:
        if self.compiles:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        fleet = self.fleet(size, method, without)
        before(fleet)
        clock = Clock(self.device, self.options.steps, self.warmup(fleet))
        with mock.patch.object(attention, "kernels", None) if without == "kernel" else contextlib.nullcontext():
            self.train(fleet, clock)
        if method is None and without is None:
            self.totals[size] = clock.totals
        if method is None and without is None and self.compiles:
            self.peaks[size] = torch.cuda.max_memory_allocated()
            for _ in range(2):
                start = clock.now()
                predict(fleet, self.tokens["validation"], self.scored.expand(size, -1), self.trial.batch_size)
                self.epochs[f"fleet {size}"] = self.steps_per_epoch * clock.seconds() + clock.now() - start
        return clock.seconds()

    def train(self, fleet: Fleet, clock: Clock) -> None:
        """Until the clock has what it wants; an evaluation scores one row."""
        row = torch.zeros(len(fleet.trials), 1, dtype=torch.long)
        with contextlib.suppress(Enough):
            train(fleet, Data(self.task, self.tokens["train"], self.tokens["validation"], row), clock, clock)

    def warmup(self, fleet: Fleet) -> int:
        """Steps before those that count, which are of one epoch: where steps are recorded, until all are replayed."""
        if not fleet.recorded:
            return WARMUP
        tokens, seeds, epochs = self.tokens["train"], [trial.seed for trial in fleet.trials], range(10)
        orders = (epoch_order(seeds, epoch, len(tokens)) for epoch in epochs)
        step = Step(fleet, tokens, None)  # whose batches are not computed here
        widths = [step.widths(index_KB) for order in orders for index_KB in order.split(self.trial.batch_size, 1)]
        for first in range(WARMUP, len(widths) - self.options.steps):
            in_one_epoch = 0 < first % self.steps_per_epoch < self.steps_per_epoch - self.options.steps
            twice = {width for width in set(widths[:first]) if widths[:first].count(width) > 1}
            if in_one_epoch and twice.issuperset(widths[first : first + self.options.steps]):
                return first
        raise UserError(f"--steps {self.options.steps}: in no epoch of {self.steps_per_epoch} are so many replayed")

    def packed_floor(self) -> float:
        """The largest fleet's head alone, with gradients to the first layer; the seconds of one of its trials."""

        size = max(self.options.trials)
        return self.delora(size, "head", before=lambda fleet: reach_down(fleet.base, fleet.encoder)) / size

    def floor(self) -> float:
        model = self.encoder().requires_grad_(False).train()
        reach_down(model, encoders.of(model.config.to_dict()))

        def step(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
            with self.autocast:
                loss = model(**inputs, labels=labels).loss
            loss.backward()

        return self.timed(step)

    def peft_bare(self, compiled: bool = False) -> float:
        model = self.peft_model(compiled).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.trial.rate, fused=True)

        def step(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
            with self.autocast:
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = self.timed(step)
        if self.compiles:
            for _ in range(2):
                start = time.perf_counter()
                with torch.inference_mode(), self.autocast:
                    for inputs, _ in self.padded("validation", self.scored):
                        model.eval()(**inputs).logits.cpu()
                evaluated = time.perf_counter() - start
            self.epochs["peft compiled" if compiled else "peft"] = self.steps_per_epoch * seconds + evaluated
        return seconds

    def peft_trainer(self, compiled: bool = False) -> float:
        return self.trainer("trainer compiled" if compiled else "trainer", self.peft_model(compiled))

    def trainer(self, name: str, model: nn.Module) -> float:
        """On a GPU also the seconds of a trial of one epoch, its workers' start and its evaluation included."""
        whole = self.compiles
        # On a GPU the last steps of an epoch count, when the workers are warm.
        clock = Clock(self.device, self.options.steps, self.steps_per_epoch - self.options.steps if whole else WARMUP)

        def examples(split: str, order: torch.Tensor) -> list[dict[str, Any]]:
            tokens = self.tokens[split]
            columns = {name: ids.cpu().split(tokens.lengths_S.tolist()) for name, ids in tokens.inputs.items()}
            return [
                {name: ids[i].tolist() for name, ids in columns.items()} | {"labels": tokens.labels_S[i].item()}
                for i in order
            ]

        train_rows = examples("train", epoch_order([self.trial.seed], 0, len(self.tokens["train"]))[0])

        class Ticks(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                with contextlib.suppress(Enough) if whole else contextlib.nullcontext():
                    clock.tick()

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:
                return torch.utils.data.SequentialSampler(train_rows)

        arguments = transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            per_device_train_batch_size=self.trial.batch_size,
            learning_rate=self.trial.rate,
            per_device_eval_batch_size=self.trial.batch_size,
            num_train_epochs=1,
            max_steps=-1 if whole else self.options.steps + WARMUP + 2,
            dataloader_num_workers=4 if self.compiles else 0,
            use_cpu=not self.compiles,
            bf16=self.options.precision == "bfloat16",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = transformers.DataCollatorWithPadding(self.tokenizer)
        trainer = InOrder(model, arguments, train_dataset=train_rows, data_collator=collator, callbacks=[Ticks()])
        start = clock.now()
        with contextlib.suppress(Enough):
            trainer.train()
        if whole:
            trainer.evaluate(examples("validation", self.scored))
            self.epochs[name] = clock.now() - start
        return clock.seconds()

    # --- Where the time goes

    def profile(self) -> dict[str, float]:
        """Seconds of a step of the largest fleet by kind of work, and those in which nothing is computed."""
        size = max(self.options.trials)
        kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self.compiles]
        profiler = torch.profiler.profile(activities=kinds)
        fleet = self.fleet(size)
        clock = Clock(self.device, PROFILED, self.warmup(fleet), begin=profiler.start)
        self.train(fleet, clock)
        profiler.stop()
        spent = dict.fromkeys(WORK, 0.0)
        for event in profiler.key_averages():
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            kind = next((kind for kind, pattern in WORK.items() if re.search(pattern, event.key)), None)
            if kind and on_gpu == self.compiles:
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                spent[kind] += 1e-6 * microseconds / PROFILED
        return {**{k: s for k, s in spent.items() if s}, "nothing": max(0.0, clock.seconds() - sum(spent.values()))}


def reach_down(model: transformers.PreTrainedModel, family: encoders.Encoder | None) -> None:
    """Has gradients go down to the encoder's first layer, though nothing there is trained."""
    encoder = model.base_model.get_submodule((family or encoders.unknown).output)
    encoder.register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(), *args[1:]))


@contextlib.contextmanager
def left_out(model: transformers.PreTrainedModel, what: str | None) -> Iterator[None]:
    """A fleet that is made of the model meanwhile packs no rows, or lets all tokens through the last layer."""
    changes: dict[str, dict[str, Any]] = {"pruning": {"cut": None, "after_attention": ()}}
    changes["packing"] = {**changes["pruning"], "packs": False}
    family = type(encoders.of(model.config.to_dict()))
    with contextlib.ExitStack() as patches:
        for name, value in changes.get(what or "", {}).items():
            patches.enter_context(mock.patch.object(family, name, value))
        yield


# --- In a process of its own


def apart(what: str, environment: dict[str, str] | None = None) -> Any:
    """What this script prints for --alone WHAT."""
    line = [sys.executable, __file__, *sys.argv[1:], "--alone", what]
    answer = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | (environment or {}))
    return json.loads(answer.stdout.splitlines()[-1])


def peak_bytes(options: argparse.Namespace, size: int) -> float:
    """The most memory that this process takes for a fleet's first steps."""
    options.steps = 1
    Benchmark(options).delora(size)
    return peak_of_process()


def peak_of_process() -> float:
    with contextlib.suppress(OSError):  # on Linux, where maxrss begins with that of the process that started this one
        return float(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_IN_MAXRSS


def start_seconds(options: argparse.Namespace, size: int) -> float:
    """Of compiling, warming up and recording: from a loaded fleet to the first step that counts, less those before."""
    bench = Benchmark(options)
    fleet = bench.fleet(size)
    warmup = bench.warmup(fleet)
    clock = Clock(bench.device, options.steps, warmup)
    begun = clock.now()
    bench.train(fleet, clock)
    return clock.start - begun - warmup * clock.seconds()


def tokenize(options: argparse.Namespace, rows: int) -> dict[str, float]:
    """Seconds and peak memory of so many pairs that are as long as MNLI's."""
    tokenizer = pretrained.load(trial(options, 42).model, TASKS["mnli"]).tokenizer
    pairs = Rows(pairs_like_mnli(options, rows), np.zeros(rows, np.int64))
    loaded, start, used = peak_of_process(), time.perf_counter(), time.process_time()
    tokens = Tokens(pairs, tokenizer, trial(options, 42).max_length, run.choose_device(options.device), torch.float32)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - used,
        "loaded_bytes": loaded,
        "peak_bytes": peak_of_process(),
        "tokens": int(tokens.lengths_S.sum()),
        "longest": tokens.longest,
    }


def pairs_like_mnli(options: argparse.Namespace, rows: int) -> list[tuple[str, ...]]:
    """Premises of 20 words in the mean and up to 400, hypotheses of 10, of words that are about one token each."""
    vocabulary = pretrained.load(trial(options, 42, model="minilm").model, TASKS["mnli"]).tokenizer.get_vocab()
    words = np.array(sorted(word for word in vocabulary if word.isalpha() and len(word) > 1))
    draw = np.random.default_rng(0)

    def sentences(count: int, mean: float, deviation: float) -> Iterator[str]:
        spread = math.log(1 + (deviation / mean) ** 2)
        lengths = draw.lognormal(math.log(mean) - spread / 2, spread**0.5, count).round().clip(1, 400).astype(int)
        for several in np.array_split(lengths, max(1, count // 1000)):  # their words at once take memory
            chosen = words[draw.integers(len(words), size=several.sum())]
            for end, length in zip(several.cumsum(), several, strict=True):
                yield " ".join(chosen[end - length : end]) + " ."

    return list(zip(sentences(rows, 20, 14), sentences(rows, 10, 4), strict=True))


def report_tokenizing(options: argparse.Namespace) -> None:
    """A first run and one that finds its cache, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [apart(f"tokenize:{options.tokenize}", {"XDG_CACHE_HOME": folder}) for _ in range(2)]
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")
    mean = runs[0]["tokens"] / options.tokenize
    print(f"{options.tokenize:,} pairs of {mean:.1f} tokens in the mean, {runs[0]['longest']} at most, {options.model}")
    for name, made in zip(("first run", "second run"), runs, strict=True):
        loaded = f"{made['loaded_bytes'] / 1e9:.2f} with the texts alone"
        print(
            f"{name}: {made['seconds']:.1f} s ({made['cpu_seconds']:.1f} of a core), "
            f"{made['peak_bytes'] / 1e9:.2f} GB at the peak ({loaded})"
        )


# --- A whole command


def report_command(options: argparse.Namespace) -> None:
    """A sweep of the largest fleet's trials with each method, as a user starts it, in a process of its own."""
    size = max(options.trials)
    seeds = ",".join(str(42 + i) for i in range(min(SEEDS, size)))
    factors = ",".join(f"{2.0 ** (i - size // SEEDS // 2):g}" for i in range(max(1, size // SEEDS)))
    with tempfile.TemporaryDirectory() as folder:
        common = [word for word in words(options, 42) if not word.startswith(("seed=", "method="))]
        sweep = [f"method={','.join(options.command)}", f"seed={seeds}", f"lr_factor={factors}"]
        line = [sys.executable, Path(__file__).with_name("command.py"), str(time.time()), f"{folder}/clock.json", "-m"]
        line += [*common, *sweep, f"epochs={options.epochs}", f"output_dir={folder}/outputs", "logger.mode=offline"]
        with busy_gpu(options.device) as busy:
            done = subprocess.run(line, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"the command ended with status {done.returncode}")
        made = json.loads(Path(folder, "clock.json").read_text())
    made["busy"] = statistics.fmean(busy) if busy else None
    if options.json:
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    table = Table("", "trials", "begun", "first step", "ms a step", "ended", box=None, pad_edge=False)
    for fleet in made["fleets"]:
        steps = fleet["steps"]
        first = len(steps) - len(steps) // options.epochs  # of the last epoch
        each = (steps[-1] - steps[first]) / max(1, len(steps) - 1 - first)
        whens = [f"{fleet['begun']:.1f}", f"{steps[0]:.1f} (+{steps[0] - fleet['begun']:.1f})", f"{1e3 * each:.1f}"]
        table.add_row(fleet["method"], str(fleet["trials"]), *whens, f"{fleet['ended']:.1f}")
    about = f"{options.model}, {options.task}, {options.epochs} epochs, {options.precision}"
    print(f"{about}; seconds from the command's start")
    Console(width=110).print(table)
    told = "" if made["busy"] is None else f", GPU busy {made['busy']:.0f} %"
    print(f"{made['seconds']:.1f} s in all{told}")


@contextlib.contextmanager
def busy_gpu(device: str) -> Iterator[list[float]]:
    """Gathers what share of time, in percent, a kernel ran on the GPU, by the driver's own count, in samples."""
    found: list[float] = []
    if not device.startswith("cuda"):
        yield found
        return
    number = device.partition(":")[2] or "0"
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", f"--id={number}"]
    with subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield found
        finally:
            sampler.terminate()
            found += [float(line) for line in sampler.communicate()[0].split() if line.isdigit()]


def report_tokens(options: argparse.Namespace) -> None:
    """Tokens that a GPU computes for each real one in three epochs of the largest fleet, and widths of its rows."""
    size = max(options.trials)
    table = Table("", "tokens for each real one", "widths", "steps of the rarest", box=None, pad_edge=False)
    for name in options.tokens:
        options.task = name
        _, tokens, _ = run.prepare(trial(options, 42))
        train, counts, real, seeds = tokens["train"], Counter[int](), 0, [42 + k % SEEDS for k in range(size)]
        few = train.few_widths(seeds, 10, options.batch_size)
        with mock.patch.object(Tokens, "on_cpu", False):
            for epoch in range(3):
                order_KS = epoch_order(seeds, epoch, len(train))
                for index_KB in order_KS.split(options.batch_size, dim=1):
                    counts[train.width(index_KB, few=few)[0]] += 1
                    real += int(train.lengths_S[index_KB.numpy()].sum())
        computed = size * sum(width * steps for width, steps in counts.items())
        table.add_row(name, f"{computed / real:.3f}", str(len(counts)), str(min(counts.values())))
    Console(width=110).print(table)


# --- Predicting


def report_predicting(options: argparse.Namespace) -> None:
    """Texts a second of one trial and of the same model, merged, in transformers' pipeline, in turns."""
    one = trial(options, 42)
    dataset = rows_of.load(one.task.facts, **one.data.options())
    some = itertools.islice(itertools.cycle(dataset.splits["validation"].texts), options.predict)
    pairs = [tuple(texts) for texts in some]
    encoder = pretrained.load(one.model, one.task.facts)
    fleet = Fleet(encoder.model, [one], torch.device(options.device), encoder.lacking).eval()
    fleet.tokenizer = encoder.tokenizer
    plain = fleet.merge()
    inputs = [dict(zip(("text", "text_pair"), texts, strict=False)) for texts in pairs]
    ways: dict[str, Callable[[], np.ndarray]] = {"delora": lambda: fleet.predict(pairs).probabilities}
    for size in (8, options.batch_size):
        pipe = transformers.pipeline(
            "text-classification", model=plain, tokenizer=encoder.tokenizer, device=options.device, batch_size=size
        )
        cut = {"top_k": None, "truncation": True, "max_length": one.max_length}
        ways[f"pipeline, batch {size}"] = functools.partial(pipeline_probabilities, pipe, inputs, cut, plain.config)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, np.ndarray] = {}
    for _ in range(options.turns):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            rates[name].append(options.predict / (time.perf_counter() - start))
    for name, several in rates.items():
        apart_by = np.abs(found[name] - found["delora"]).max()
        spread = f"{min(several):.1f} to {max(several):.1f}"
        print(
            f"{name}: {statistics.median(several):.1f} texts a second ({spread}), probabilities apart by {apart_by:.1e}"
        )
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1) + "\n")


def pipeline_probabilities(pipe: Any, inputs: list[dict[str, str]], options: dict[str, Any], config: Any) -> np.ndarray:
    """What a pipeline gives, with the labels in the order of their ids."""
    made = []
    for labels in pipe(inputs, **options):
        by_name = {one["label"]: one["score"] for one in labels}
        made.append([by_name[config.id2label[i]] for i in range(len(by_name))])
    return np.array(made)


# --- The tables


def achieved(figures: Mapping[str, Any], bench: Benchmark) -> dict[str, float]:
    """The figures of `GOALS`, as far as they were measured; of PEFT plain or compiled, whichever is faster."""
    options = bench.options
    medians = {name: statistics.median(several) for name, several in figures["seconds_per_step"].items()}
    largest, tokens, epochs = max(options.trials), figures["tokens"], figures["epoch_seconds"]
    each = medians[f"fleet {largest}"] / largest
    made = {"tokens": tokens["computed"] / tokens["real"]}
    trainers = [medians[name] for name in ("trainer", "trainer compiled") if name in medians]
    if trainers:
        made["trainer"] = min(trainers) / each
    if "packed floor" in medians:
        methods = [medians[f"{name} {largest}"] / largest for name in options.methods if f"{name} {largest}" in medians]
        made["floor"] = max(each, *methods) / medians["packed floor"] if methods else each / medians["packed floor"]
    if "full trainer" in medians and f"full {largest}" in medians:
        made["full"] = medians["full trainer"] / (medians[f"full {largest}"] / largest)
    if "fleet 1" in medians and "fleet 8" in medians:
        made["eight"] = medians["fleet 8"] / medians["fleet 1"]
    for name in ("trainer", "peft"):
        theirs = [epochs[row] for row in (name, f"{name} compiled") if row in epochs]
        if theirs:
            made[f"{name} epoch"] = min(theirs) * largest / epochs[f"fleet {largest}"]
    if re.search("H[12]00", figures["hardware"]):
        shape = bench.trial.model.known_shape
        assert shape is not None
        multiplied = 4 * encoders.families()[shape.family].multiplications(shape) * tokens["real"] / tokens["steps"]
        made["matrix limit"] = multiplied / medians[f"fleet {largest}"] / H100_BF16
    if "start_seconds" in figures:
        made |= dict(zip(("start", "cached start"), figures["start_seconds"], strict=True))
    return made


def report(figures: Mapping[str, Any], bench: Benchmark) -> None:
    options, seconds = bench.options, figures["seconds_per_step"]
    medians = {name: statistics.median(several) for name, several in seconds.items()}
    sizes = {name: 1 if name in ALONE else int(name.split()[-1]) for name in medians}
    columns = ("ms a step", "spread", "turns", "ms a trial", "times the Trainer", "over the floor")
    table = Table("", *columns, box=None, pad_edge=False)
    for name, median in medians.items():
        each = median / sizes[name]
        spread = f"{1e3 * min(seconds[name]):.1f} to {1e3 * max(seconds[name]):.1f}"
        faster = f"{medians['trainer'] / each:.2f}x" if "trainer" in medians else "-"
        over = f"{each / medians['packed floor']:.2f}" if "packed floor" in medians else "-"
        label = LABELS.get(name) or label_of(name, options.method)
        table.add_row(label, f"{1e3 * median:.1f}", spread, str(len(seconds[name])), f"{1e3 * each:.2f}", faster, over)
    weights = ", random weights" if options.random else ""
    about = f"{options.model}{weights}, {options.method}, {options.task} {'files' if options.data else 'synthetic'}"
    where = figures["hardware"] + ("" if bench.compiles else f", {figures['threads']} threads")
    print(f"{about}, batch {options.batch_size}, {options.precision}, {where}")
    console = Console(width=130)
    console.print(table)
    if bench.left_out:
        print(f"not reached in {options.minutes:g} minutes: {', '.join(bench.left_out)}")

    goals = Table("", "goal", "measured", "", box=None, pad_edge=False)
    for name, meaning, more, goal in GOALS[bench.device.type]:
        value = figures["achieved"].get(name)
        bound = f"at {'least' if more else 'most'} {goal:g}"
        if value is None:
            goals.add_row(meaning, bound, "-", "not measured")
            continue
        reached = value >= goal if more else value <= goal
        told = "reached" if reached else f"missed by {abs(value / goal - 1):.1%}"
        goals.add_row(meaning, bound, f"{value:.3g}", told)
    console.print(goals)

    if "profile_seconds" in figures:
        step = sum(figures["profile_seconds"].values())
        shares = sorted(figures["profile_seconds"].items(), key=lambda pair: -pair[1])
        listed = ", ".join(f"{kind} {spent / step:.0%}" for kind, spent in shares)
        print(f"a step of {max(options.trials)} trials under the profiler, {1e3 * step:.0f} ms: {listed}")
    peaks = {int(size): peak for size, peak in figures["peak_bytes"].items()}
    listed = ", ".join(f"{size}: {peak / 1e9:.2f} GB" for size, peak in peaks.items())
    low, high = min(peaks), max(peaks)
    added = f"; each added trial {(peaks[high] - peaks[low]) / (high - low) / 1e6:.0f} MB" if low < high else ""
    print(f"peak memory by trials: {listed}{added}")


def label_of(row: str, method: str) -> str:
    """Of a row of delora: "lora, 8 trials", "lora without packing, 8 trials"."""
    *words, size = row.split()
    name = {"fleet": method, "no": f"{method} without {words[-1]}"}.get(words[0], words[0])
    return f"{name}, {size} trial{'' if size == '1' else 's'}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"scripts/benchmark: error: {error}")
