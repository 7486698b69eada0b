"""Time and memory of a training step: K trials of delora, PEFT in a bare loop, PEFT with the Hugging Face Trainer.

All train the same method on the same batches in the same order, dropout on, in turns within one process, so that
the machine's mood is the same for all. The floor is the frozen encoder's forward and the backward through its
activations, which no method can go below.
"""

import argparse
import contextlib
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import nn

from delora import pretrained, run
from delora.cli import conf_folder
from delora.config import Trial
from delora.data.batches import epoch_order
from delora.model import Fleet
from delora.tasks import TASKS
from delora.train import Data, train

WARMUP = 3  # steps that are not counted
BYTES_IN_MAXRSS = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="GLUE's TSV files; without it, synthetic data")
    parser.add_argument("--model", default="minilm", help="minilm, or another of conf/model (random weights if tiny)")
    parser.add_argument("--method", default="lora", choices=("lora", "delora"), help="those that PEFT has too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 8], help="sizes of fleets")
    parser.add_argument("--steps", type=int, default=20, help="of each turn, counted after warming up")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)  # used by this script itself
    options = parser.parse_args()
    if options.peak_of is not None:
        print(peak_bytes(options))
        return
    bench = Benchmark(options)
    figures = bench.measure()
    figures["memory"] = memory(options)
    report(figures, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def trial(options: argparse.Namespace, seed: int) -> Trial:
    words = [f"model={options.model}", f"method={options.method}", f"seed={seed}", "task=mrpc"]
    words += [f"batch_size={options.batch_size}", f"device={options.device}", f"precision={options.precision}"]
    words += [f"data.dir={options.data}"] if options.data else ["data=synthetic"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return Trial.from_config(compose("config", words))


class Enough(Exception):
    """As many steps as were asked for."""


class Clock:
    """Listens to the loop, and ends it after so many steps."""

    def __init__(self, device: torch.device, steps: int):
        self.device, self.steps = device, steps
        self.ticks, self.start, self.end = 0, 0.0, 0.0

    def tick(self) -> None:
        """A step is over."""
        self.ticks += 1
        if self.ticks == WARMUP:
            self.start = self.now()
        elif self.ticks == WARMUP + self.steps:
            self.end = self.now()
            raise Enough

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def offer(self, state: Any) -> None:
        self.tick()

    def restore(self, state: Any) -> None: ...

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
        self.task = TASKS["mrpc"]
        self.device = run.choose_device(options.device)
        _, self.tokens = run.prepare(self.trial)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bfloat16")

    def measure(self) -> dict[str, Any]:
        steps, turns = self.options.steps, self.options.turns
        rows = {"floor": self.floor, "peft": self.peft_bare, "trainer": self.peft_trainer}
        rows |= {f"delora {k}": (lambda k=k: self.delora(k)) for k in self.options.trials}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(turns):
            for name, measured in rows.items():
                seconds[name].append(measured())
        return {
            "seconds_per_step": seconds,
            "steps": steps,
            "hardware": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
            "options": {k: str(v) for k, v in vars(self.options).items()},
        }

    def batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        order = epoch_order([self.trial.seed], 0, len(self.tokens["train"]))[0]
        for _ in range(math.ceil((self.options.steps + WARMUP + 1) * self.trial.batch_size / len(order))):
            for index in order.split(self.trial.batch_size):
                batch = self.tokens["train"].gather(index[None], packed=False)
                yield batch.inputs, batch.labels_KB[0]

    def timed(self, step: Callable[[dict[str, torch.Tensor], torch.Tensor], None]) -> float:
        clock = Clock(self.device, self.options.steps)
        with contextlib.suppress(Enough):
            for inputs, labels in self.batches():
                step(inputs, labels)
                clock.tick()
        return clock.seconds()

    def encoder(self) -> nn.Module:
        return pretrained.load(self.trial.model, self.task).model.to(self.device)

    def peft_model(self) -> nn.Module:
        common = {"target_modules": ["query", "value"], "r": 8, "modules_to_save": ["classifier"]}
        config = peft.LoraConfig(lora_alpha=8, **common)
        if self.options.method == "delora":
            config = peft.DeloraConfig(delora_lambda=4, **common)
        return peft.get_peft_model(self.encoder(), config)

    # --- What is measured; each returns the seconds of a step

    def delora(self, size: int) -> float:
        trials = [trial(self.options, 42 + k) for k in range(size)]
        loaded = pretrained.load(self.trial.model, self.task)
        fleet = Fleet(loaded.model, trials, self.device)
        clock = Clock(self.device, self.options.steps)
        none = torch.zeros(size, 1, dtype=torch.long)  # one row to score, at the start
        data = Data(self.task, self.tokens["train"], self.tokens["validation"], none)
        with contextlib.suppress(Enough):
            train(fleet, data, clock, clock)
        return clock.seconds()

    def floor(self) -> float:
        model = self.encoder().requires_grad_(False).train()
        embeddings = model.base_model.embeddings
        handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

        def step(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
            with self.autocast:
                loss = model(**inputs, labels=labels).loss
            loss.backward()

        seconds = self.timed(step)
        handle.remove()
        return seconds

    def peft_bare(self) -> float:
        model = self.peft_model().train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.trial.rate)

        def step(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
            with self.autocast:
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return self.timed(step)

    def peft_trainer(self) -> float:
        tokens, clock = self.tokens["train"], Clock(self.device, self.options.steps)
        tokenizer = pretrained.load(self.trial.model, self.task).tokenizer
        order = epoch_order([self.trial.seed], 0, len(tokens))[0]
        examples = [
            {name: matrix[i, : tokens.lengths_S[i]].tolist() for name, matrix in tokens.inputs.items()}
            | {"labels": int(tokens.labels_S[i])}
            for i in order
        ]

        class Ticks(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:
                return torch.utils.data.SequentialSampler(examples)

        cuda = self.device.type == "cuda"
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            per_device_train_batch_size=self.trial.batch_size,
            learning_rate=self.trial.rate,
            max_steps=self.options.steps + WARMUP + 2,
            dataloader_num_workers=4 if cuda else 0,
            use_cpu=not cuda,
            bf16=self.options.precision == "bfloat16",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = InOrder(
            self.peft_model(), arguments, train_dataset=examples, data_collator=collator, callbacks=[Ticks()]
        )
        with contextlib.suppress(Enough):
            trainer.train()
        return clock.seconds()


def peak_bytes(options: argparse.Namespace) -> int:
    """The most memory that a fleet's first steps take: of the device, or of this process."""
    options.steps = 4
    bench = Benchmark(options)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench.delora(options.peak_of)
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_IN_MAXRSS


def memory(options: argparse.Namespace) -> dict[str, int]:
    """Peak bytes by size of the fleet, each in a process of its own."""
    peaks = {}
    for size in sorted({1, 2, 4, *options.trials}):
        line = [sys.executable, __file__, *sys.argv[1:], "--peak-of", str(size)]
        answer = subprocess.run(line, capture_output=True, text=True, check=True)
        peaks[str(size)] = int(answer.stdout.split()[-1])
    return peaks


def report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    seconds = figures["seconds_per_step"]
    medians = {name: statistics.median(several) for name, several in seconds.items()}
    sizes = {name: int(name.split()[1]) if name.startswith("delora") else 1 for name in medians}
    labels = {"floor": "frozen encoder alone", "peft": "PEFT, bare loop", "trainer": "PEFT, Hugging Face Trainer"}
    table = Table("", "ms a step", "spread", "ms a trial", "times the Trainer", box=None, pad_edge=False)
    for name, median in medians.items():
        each = median / sizes[name]
        spread = f"{1e3 * min(seconds[name]):.0f} to {1e3 * max(seconds[name]):.0f}"
        faster = f"{medians['trainer'] / each:.2f}x"
        label = labels.get(name) or f"delora, {sizes[name]} trial{'s' if sizes[name] > 1 else ''}"
        table.add_row(label, f"{1e3 * median:.0f}", spread, f"{1e3 * each:.1f}", faster)
    about = f"{options.model}, {options.method}, MRPC {'files' if options.data else 'synthetic'}"
    print(f"{about}, batch {options.batch_size}, {options.precision}, {options.device}, {figures['threads']} threads")
    Console(width=100).print(table)
    peaks = {int(size): peak for size, peak in figures["memory"].items()}
    each = (peaks[max(peaks)] - peaks[1]) / (max(peaks) - 1)
    listed = ", ".join(f"{size}: {peak / 1e9:.2f} GB" for size, peak in peaks.items())
    print(f"peak memory by trials: {listed}; each added trial {each / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
