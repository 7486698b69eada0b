"""The only training loop: K trials over one frozen encoder, each as if it ran alone.

Losses are summed over the trials, so gradients never mix; rates, decay, clipping, losses and scores are vectors of
length K. Shapes as in `delora.methods.base` and `delora.data.batches`; C labels.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from delora.data.batches import Tokens, epoch_order
from delora.graphs import Recorded, Widths
from delora.metrics import score
from delora.model import Fleet
from delora.optim import FleetAdamW
from delora.tasks import Task

MISMATCHED = "accuracy_mm"
# Validation rows whose hidden states are compared with the frozen encoder's, and examples of all trials at once; on a
# GPU, which fewer do not keep busy, more.
COMPARED, AT_ONCE, AT_ONCE_ON_GPU = 32, 128, 512
VALIDATION = "validation"
Logits = Callable[[Tensor, Tensor, Widths], Tensor]  # of examples (K, B), a step that does not count, and their width


@dataclass
class Data:
    """What K trials train and are scored on; the indices point into `validation`, those of `test_KS` into `test` where
    that is rows of its own."""

    task: Task
    train: Tokens
    validation: Tokens
    validation_KS: Tensor
    test_KS: Tensor | None = None
    test: Tokens | None = None
    mismatched: Tokens | None = None


@dataclass
class Score:
    """One evaluation of one trial."""

    epoch: int
    step: int
    validation: dict[str, float]
    test: dict[str, float] | None = None


@dataclass
class Outcome:
    """What training found of one trial; `best` is the first epoch with the highest headline score."""

    status: str = "running"
    best: Score | None = None
    last: Score | None = None
    diverged_step: int | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Totals:
    """What a fleet's training took."""

    steps: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    real_tokens: int = 0
    computed_tokens: int = 0
    total_seconds: float = 0.0  # of processes that ended before this one


@dataclass
class State:
    """All that training changes. Its tensors have the trials first, so a trial's part of it is one row.

    `scored` is the last epoch whose evaluation is over, -1 before the first.
    """

    optimizer: FleetAdamW
    best_values: Tensor
    diverged_step_K: Tensor
    outcomes: list[Outcome]
    totals: Totals
    scored: int = -1

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (K, ...), and plain data with a list of length K, for a checkpoint."""
        tensors = self._rows()
        logits = [outcome.predictions.get(VALIDATION) for outcome in self.outcomes]
        some = next((one for one in logits if one is not None), None)
        if some is not None:
            tensors["best_logits"] = torch.stack([torch.zeros_like(some) if one is None else one for one in logits])
        outcomes = [
            {
                "status": outcome.status,
                "best": asdict(outcome.best) if outcome.best else None,
                "last": asdict(outcome.last) if outcome.last else None,
                "diverged_step": outcome.diverged_step,
            }
            for outcome in self.outcomes
        ]
        return tensors, {"scored": self.scored, "totals": asdict(self.totals), "outcomes": outcomes}

    def unpack(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Puts back what `pack` gave."""
        for name, tensor in self._rows().items():
            tensor.copy_(tensors[name])
        self.scored, self.totals = plain["scored"], Totals(**plain["totals"])
        for k, (outcome, stored) in enumerate(zip(self.outcomes, plain["outcomes"], strict=True)):
            outcome.status, outcome.diverged_step = stored["status"], stored["diverged_step"]
            outcome.best = Score(**stored["best"]) if stored["best"] else None
            outcome.last = Score(**stored["last"]) if stored["last"] else None
            if outcome.best:
                outcome.predictions[VALIDATION] = tensors["best_logits"][k].clone()

    def _rows(self) -> dict[str, Tensor]:
        optimizer = self.optimizer
        return {
            "values": optimizer.values,
            "mean": optimizer.mean,
            "square": optimizer.square,
            "alive": optimizer.alive_K,
            "best_values": self.best_values,
            "diverged_step": self.diverged_step_K,
        }


class Checkpoints(Protocol):
    """Where the loop keeps its state between steps, so that it can go on after an interruption."""

    def restore(self, state: State) -> None: ...

    def offer(self, state: State) -> None:
        """Called after every step and evaluation; saves the state when it is time to."""

    def save(self, state: State) -> None:
        """Saves the state, by which training that pauses goes on."""


class Report(Protocol):
    """Who listens to the loop. Losses and rates are lists of length K, None for a trial that no longer runs."""

    def step(self, step: int, epoch: float, loss_K: list[float | None], lr_K: list[float]) -> None: ...

    def evaluation(self, trial: int, evaluation: dict[str, Any], best: Score | None) -> None: ...

    def diverged(self, trial: int, step: int) -> None: ...


def train(
    fleet: Fleet,
    data: Data,
    report: Report,
    checkpoints: Checkpoints | None = None,
    until: int | None = None,
    stop: bool = False,
) -> tuple[list[Outcome], Totals]:
    """Trains the fleet's trials and scores them; the fleet ends with each trial's best values.

    Args:
        until: the epoch after which it pauses, with the state saved, from where a later call goes on: trials are left
            with the status "running", and without adapter and test scores. A fleet of which no trial is alive ends.
        stop: the trials end at `until`.

    Raises:
        RuntimeError: a frozen weight changed.
    """
    config, seeds = fleet.trials[0], [trial.seed for trial in fleet.trials]
    rows = len(data.train)
    steps_per_epoch = -(-rows // config.batch_size)
    optimizer = make_optimizer(fleet, steps_per_epoch * config.epochs)
    no_step_K = torch.full((len(seeds),), -1, device=fleet.device)
    state = State(optimizer, optimizer.values.clone(), no_step_K, [Outcome() for _ in seeds], Totals())
    frozen = fleet.checksum()
    if checkpoints:
        checkpoints.restore(state)

    step = Step(fleet, data.train, state)
    plain = functools.partial(logits_of, fleet, data.validation)
    compute = Recorded(plain, fleet.device) if fleet.recorded else plain
    if state.scored < 0:
        _evaluate(fleet, data, state, report, compute)
    fleet.train()
    for epoch in range(state.scored, config.epochs if until is None else until):
        start = time.perf_counter()
        batches = epoch_order(seeds, epoch, rows).split(config.batch_size, dim=1)
        for index_KB in batches[state.totals.steps - epoch * steps_per_epoch :]:
            loss_K = step(index_KB)
            if state.totals.steps % config.log_every == 0:
                _report_step(optimizer, state.totals.steps, steps_per_epoch, loss_K, report)
            if checkpoints:
                checkpoints.offer(state)
        state.totals.train_seconds += time.perf_counter() - start
        _evaluate(fleet, data, state, report, compute)
        if checkpoints:
            checkpoints.offer(state)
        if not optimizer.alive_K.any():
            break

    pauses = checkpoints is not None and until is not None and not stop and bool(optimizer.alive_K.any())
    if not pauses:
        _score_final(fleet, data, state)
    if fleet.checksum() != frozen:
        raise RuntimeError("a frozen weight of the encoder changed during training")
    if checkpoints and pauses:
        checkpoints.save(state)
    return state.outcomes, state.totals


class Step:
    """One step of training: the gradients of a batch, and the update of the trials that are alive.

    The batch is computed in parts of examples of about the same length, so that little is padded.
    """

    def __init__(self, fleet: Fleet, tokens: Tokens, state: State):
        self.fleet, self.tokens, self.state = fleet, tokens, state
        self._run = Recorded(self._compute, fleet.device) if fleet.recorded else self._compute
        config, self._few = fleet.trials[0], list[int]()
        if fleet.recorded and fleet.packs and config.accumulation == 1:
            self._few = tokens.few_widths([t.seed for t in fleet.trials], config.epochs, config.batch_size)

    def __call__(self, index_KB: Tensor) -> Tensor:
        """Trains on the examples `index_KB` (on the CPU); the mean loss of each trial, (K,), until the next call."""
        tokens, totals = self.tokens, self.state.totals
        index_KB = index_KB.gather(1, tokens.order_by_length(index_KB))
        widths = self.widths(index_KB)
        loss_K = self._run(index_KB, torch.tensor(totals.steps), widths)
        totals.steps += 1
        totals.real_tokens += int(tokens.lengths_S[index_KB.numpy()].sum())
        totals.computed_tokens += len(index_KB) * sum(width for width, _ in widths)
        return loss_K

    def widths(self, index_KB: Tensor) -> Widths:
        """The widths of the batch's parts."""
        return tuple(self.tokens.width(part_KB, self.fleet.packs, self._few) for part_KB in self._parts(index_KB))

    def _parts(self, index_KB: Tensor) -> Sequence[Tensor]:
        size = -(-index_KB.shape[1] // self.fleet.trials[0].accumulation)
        if self.tokens.on_cpu:  # starting an operation costs nothing there
            size = min(size, examples_on_cpu(len(index_KB), self.fleet.base.config.hidden_size))
        return index_KB.split(size, dim=1)

    def _compute(self, index_KB: Tensor, step: Tensor, widths: Widths) -> Tensor:
        fleet, optimizer, examples, first = self.fleet, self.state.optimizer, index_KB.shape[1], 0
        optimizer.clear()  # a recording that failed may have left some
        loss_K = torch.zeros(len(index_KB), dtype=fleet.dtype, device=fleet.device)
        for part_KB, width in zip(self._parts(index_KB), widths, strict=True):
            batch = self.tokens.gather(part_KB, fleet.packs, width)
            fleet.keys.set(batch.layout, step, first)
            part_loss_K = example_losses(fleet.logits(batch), batch.labels_KB).sum(1) / examples
            part_loss_K.sum().backward()
            loss_K = loss_K + part_loss_K.detach()
            first += part_KB.shape[1]
        newly_dead_K = optimizer.alive_K & ~loss_K.isfinite()
        self.state.diverged_step_K.copy_(torch.where(newly_dead_K, step, self.state.diverged_step_K))
        optimizer.alive_K &= ~newly_dead_K
        optimizer.step(step)
        return loss_K


def examples_on_cpu(trials: int, width: int) -> int:
    """How many examples of each trial are computed at once on a CPU, by an encoder of that width: wide ones take as
    long for each of fewer, and half of the memory."""
    return 16 if trials == 1 and width < 512 else 8


def make_optimizer(fleet: Fleet, total_steps: int) -> FleetAdamW:
    """AdamW for the fleet's trained parameters with each trial's rates."""
    trials, dtype, device = fleet.trials, next(iter(fleet.trained().values())).dtype, fleet.device

    def vector(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return FleetAdamW(
        fleet.trained(),
        lr_K=vector([t.rate for t in trials]),
        weight_decay_K=vector([t.weight_decay for t in trials]),
        undecayed=fleet.undecayed(),
        own_lr=fleet.own_learning_rates(),
        warmup_ratio_K=vector([t.warmup_ratio for t in trials]),
        total_steps=total_steps,
        betas=trials[0].method.betas,
        clip_norm=trials[0].clip_norm,
    )


def example_losses(logits_KBC: Tensor, labels_KB: Tensor) -> Tensor:
    """Cross-entropy (classes) or squared error (scores) of each example, (K, B)."""
    if labels_KB.is_floating_point():
        return (logits_KBC[..., 0] - labels_KB).square()
    return F.cross_entropy(logits_KBC.flatten(0, 1), labels_KB.flatten(), reduction="none").view(labels_KB.shape)


def logits_of(fleet: Fleet, tokens: Tokens, index_KB: Tensor, _: Tensor, widths: Widths) -> Tensor:
    """The logits (K, B, C) of a batch."""
    return fleet.logits(tokens.gather(index_KB, fleet.packs, widths[0]))


def predict(
    fleet: Fleet,
    tokens: Tokens,
    index_KS: Tensor,
    batch_size: int,
    progress: Callable[[int], object] = lambda _: None,
    compute: Logits | None = None,
) -> Tensor:
    """Logits (K, S, C) of the examples `index_KS`, without dropout; `progress` is told the size of each batch.

    `compute` gives those of a batch, as `logits_of` does.
    """
    compute = compute or functools.partial(logits_of, fleet, tokens)
    training, no_step = fleet.training, torch.zeros((), dtype=torch.int64)
    fleet.eval()
    logits_KSC: Tensor | None = None
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # compiled for training only
        for columns_KB in tokens.order_by_length(index_KS).split(batch_size, dim=1):  # short examples first
            index_KB = index_KS.gather(1, columns_KB)
            logits_KBC = compute(index_KB, no_step, (tokens.width(index_KB, fleet.packs),))
            if logits_KSC is None:
                logits_KSC = logits_KBC.new_empty(*index_KS.shape, logits_KBC.shape[-1])
            columns_KBC = columns_KB.to(logits_KBC.device)[..., None].expand_as(logits_KBC)
            logits_KSC.scatter_(1, columns_KBC, logits_KBC)
            progress(columns_KB.shape[1])
    fleet.train(training)
    assert logits_KSC is not None
    return logits_KSC


def output_changes(fleet: Fleet, data: Data) -> dict[str, Tensor]:
    """`Fleet.output_changes` on the first of each trial's validation rows."""
    fleet.eval()
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        at_once = AT_ONCE_ON_GPU if fleet.device.type == "cuda" else AT_ONCE
        rows_KS, size = data.validation_KS[:, :COMPARED], max(1, at_once // len(fleet.trials))
        batches = data.validation.in_order(rows_KS, size, packed=False)
        changes = fleet.output_changes(batch for _, batch in batches)
    fleet.train()
    return changes


def _evaluate(fleet: Fleet, data: Data, state: State, report: Report, compute: Logits) -> None:
    """Scores the trials on validation, and keeps those that are better than before."""
    start = time.perf_counter()
    optimizer, outcomes, step, epoch = state.optimizer, state.outcomes, state.totals.steps, state.scored + 1
    _retire(state, report)
    for trial, evaluation in _scores(fleet, data, optimizer.alive_K.tolist(), epoch, step, compute).items():
        outcome = outcomes[trial]
        logits = evaluation.pop("logits")
        if not math.isfinite(evaluation["loss"]):  # the last update broke the trial
            optimizer.alive_K[trial], state.diverged_step_K[trial] = False, step
            continue
        outcome.last = Score(epoch, step, {"loss": evaluation["loss"], **evaluation["metrics"]})
        if epoch > 0 and _better(outcome.last, outcome.best, data.task.headline):
            outcome.best = replace(outcome.last, validation=dict(outcome.last.validation))
            outcome.predictions[VALIDATION] = logits
            state.best_values[trial] = optimizer.values[trial]
        report.evaluation(trial, evaluation, outcome.best)
    _retire(state, report)
    state.scored = epoch
    state.totals.evaluate_seconds += time.perf_counter() - start


def _scores(
    fleet: Fleet, data: Data, alive: list[bool], epoch: int, step: int, compute: Logits
) -> dict[int, dict[str, Any]]:
    """Loss, metrics, distances, λ, change of outputs and logits on the validation rows, by trial.

    Trials that diverged are left out.
    """
    logits_KSC = predict(fleet, data.validation, data.validation_KS, fleet.trials[0].batch_size, compute=compute)
    labels_KS = data.validation.labels_S[data.validation_KS.to(fleet.device)]
    loss_K = example_losses(logits_KSC, labels_KS).mean(1).tolist()
    distances = {name: d.tolist() for name, d in fleet.distances().items()}
    strengths = {name: s.tolist() for name, s in fleet.strengths().items()}
    changes = {name: c.tolist() for name, c in output_changes(fleet, data).items()}
    logits = {trial: logits_KSC[trial].cpu() for trial in range(len(alive)) if alive[trial]}
    labels_KS = labels_KS.cpu()
    return {
        trial: {
            "epoch": epoch,
            "step": step,
            "loss": loss_K[trial],
            "metrics": _score(data.task, logits_SC, labels_KS[trial]),
            "distance": {name: d[trial] for name, d in distances.items()},
            "lambda": {name: s[trial] for name, s in strengths.items()},
            "change": {name: c[trial] for name, c in changes.items()},
            "logits": logits_SC,
        }
        for trial, logits_SC in logits.items()
    }


def _score(task: Task, logits_SC: Tensor, labels_S: Tensor) -> dict[str, float]:
    """The task's metrics of logits and labels that are on the CPU."""
    predictions = logits_SC[:, 0] if task.labels is None else logits_SC.argmax(-1)
    return score(task, predictions.numpy(), labels_S.numpy(), logits_SC.float().numpy())


def _better(new: Score, best: Score | None, headline: str) -> bool:
    """Whether `new` beats the best so far; the first of equals stays, and a NaN beats nothing."""
    if best is None:
        return True
    old_value, new_value = best.validation[headline], new.validation[headline]
    return new_value > old_value or (math.isnan(old_value) and not math.isnan(new_value))


def _retire(state: State, report: Report) -> None:
    """Marks the trials that diverged since the last call."""
    alive_K, step_K = state.optimizer.alive_K.tolist(), state.diverged_step_K.tolist()
    for trial, outcome in enumerate(state.outcomes):
        if not alive_K[trial] and outcome.status == "running":
            outcome.status, outcome.diverged_step = "diverged", step_K[trial]
            report.diverged(trial, step_K[trial])


def _report_step(optimizer: FleetAdamW, step: int, steps_per_epoch: int, loss_K: Tensor, report: Report) -> None:
    losses = [loss if alive else None for loss, alive in zip(loss_K.tolist(), optimizer.alive_K.tolist(), strict=True)]
    report.step(step, step / steps_per_epoch, losses, optimizer.rates(step - 1).tolist())


def _score_final(fleet: Fleet, data: Data, state: State) -> None:
    """Scores the last values where MNLI asks for it, then the best ones on test, which stay in the fleet."""
    outcomes, batch_size = state.outcomes, fleet.trials[0].batch_size
    best = {k: outcome.best for k, outcome in enumerate(outcomes) if outcome.best is not None}

    def score_rows(tokens: Tokens, index_KS: Tensor, name: str) -> dict[int, dict[str, float]]:
        logits_KSC = predict(fleet, tokens, index_KS, batch_size)
        labels_KS = tokens.labels_S.cpu()[index_KS]
        for k in best:
            outcomes[k].predictions[name] = logits_KSC[k].cpu()
        return {k: _score(data.task, outcomes[k].predictions[name], labels_KS[k]) for k in best}

    def mismatched() -> dict[int, float]:
        assert data.mismatched is not None
        everything_KS = torch.arange(len(data.mismatched)).expand(len(outcomes), -1)
        return {k: s["accuracy"] for k, s in score_rows(data.mismatched, everything_KS, "mismatched").items()}

    if data.mismatched is not None and data.test_KS is None:
        for k, accuracy in mismatched().items():
            last = outcomes[k].last
            if last is not None:
                last.validation[MISMATCHED] = accuracy
    state.optimizer.values.copy_(state.best_values)
    if data.test_KS is not None:
        for k, metrics in score_rows(data.test or data.validation, data.test_KS, "test").items():
            best[k].test = metrics
    if data.mismatched is not None:
        for k, accuracy in mismatched().items():
            (best[k].test or best[k].validation)[MISMATCHED] = accuracy
    for k, outcome in enumerate(outcomes):
        if outcome.status == "running":
            outcome.status = "done" if state.scored == fleet.trials[0].epochs else "stopped"
        if outcome.best is not None:
            outcome.adapter = fleet.trial_state(k)
