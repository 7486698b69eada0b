"""The search for the best config, `hydra/sweeper=search`: Optuna's TPE, in batches that train together.

    <sweep>/.search/journal.log     its history, Optuna's journal of a study: the space, configs asked, scores told

A config is asked for once. What is told is the mean over its seeds of the headline score on validation; of a config of
which a seed diverged, or which the halving of its batch has stopped, that it is pruned, of which one failed that it
failed, and no score. A search that was killed goes on with the configs that it had asked for, and asks for those that
an undisturbed one would have asked for. Imports neither torch nor, before there is a space, Optuna.
"""

import contextlib
import functools
import itertools
import json
import math
import shlex
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from delora import storage
from delora.cli import LOWEST, STOPPED
from delora.config import NOT_THE_TRIAL, Trial, show
from delora.errors import UserError
from delora.terminal import counted, printable

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

FOLDER, JOURNAL = ".search", "journal.log"
STUDY = "search"
ATTEMPTS = 100  # at a config that was not tried yet, before one of a finite space is taken in order
NEEDED = 'hydra/sweeper=search needs Optuna: pip install "delora[search]"'
Status = Literal["done", "diverged", "stopped", "failed", "asked"]


# --- The space, as the command's words give it


@dataclass(frozen=True)
class Dimension:
    """A key and its values: `options`, as they are written, or numbers from low to high.

    Attributes:
        step: between two of the numbers; None: all between low and high.
        whole: whether they are whole numbers.
        log: whether they are drawn on a log scale.
    """

    key: str
    options: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    whole: bool = False
    log: bool = False

    @property
    def size(self) -> float:
        """How many values it has."""
        if self.options:
            return len(self.options)
        if self.step is None:
            return 1 if self.low == self.high else math.inf
        return round((self.high - self.low) / self.step) + 1

    def values(self) -> list[Any]:
        """Of a dimension of finite size, all of them."""
        if self.options:
            return list(self.options)
        of = [self.low + i * (self.step or 0) for i in range(int(self.size))]
        return [int(value) for value in of] if self.whole else of

    def distribution(self) -> "BaseDistribution":
        from optuna import distributions as known

        if self.options:
            return known.CategoricalDistribution(self.options)
        if self.whole:
            return known.IntDistribution(int(self.low), int(self.high), self.log, int(self.step or 1))
        return known.FloatDistribution(self.low, self.high, self.log, self.step)


def dimension(override: Override) -> Dimension:
    """The dimension that a word with several values is.

    Raises:
        UserError: it is none, for people, without the word itself.
    """
    key, sweep = override.key_or_group, override.value()
    if fault := _not_to_search(key):
        raise UserError(fault)
    assert isinstance(sweep, ChoiceSweep | RangeSweep | IntervalSweep)
    if wrong := sorted(sweep.tags - {"log"}):
        raise UserError(f"a search knows no tag {', '.join(wrong)}, only log")
    made = _numbers(key, sweep) if isinstance(sweep, RangeSweep | IntervalSweep) else _options(override)
    if made.size == 1:
        raise UserError(f"nothing to search for: it has one value; write {key}={show(made.values()[0])}")
    if sweep.tags and (made.options or (made.step not in (None, 1.0))):
        raise UserError("only an interval, or whole numbers one apart, have a log scale")
    if made.log and made.low <= 0:
        raise UserError("on a log scale the lower bound is above 0")
    return made


def _not_to_search(key: str) -> str | None:
    if key == "seed":
        return "a seed is nothing to search for; search.seeds=[42,43] trains each config with both and takes the mean"
    if key.split(".")[0] in ("task", "data", "protocol"):
        return "scores on several tasks, data or protocols cannot be compared: search one at a time"
    return None


def _options(override: Override) -> Dimension:
    try:
        options = dict.fromkeys(override.sweep_string_iterator())
    except (HydraException, ValueError):
        options = {}
    if not options:
        raise UserError("holds no value")
    shuffled = getattr(override.value(), "shuffle", False)  # another order the next time
    return Dimension(override.key_or_group, tuple(sorted(options) if shuffled else options))


def _numbers(key: str, sweep: RangeSweep | IntervalSweep) -> Dimension:
    start, log = sweep.start, "log" in sweep.tags
    end = sweep.end if isinstance(sweep, IntervalSweep) else sweep.stop
    if start is None or end is None or not (math.isfinite(start) and math.isfinite(end)):
        raise UserError("expected two finite numbers")
    if isinstance(sweep, IntervalSweep):
        if start > end:
            raise UserError("the lower bound comes first")
        whole = isinstance(start, int)
        return Dimension(key, low=float(start), high=float(end), step=1.0 if whole else None, whole=whole, log=log)
    step = Decimal(str(sweep.step))
    count = math.ceil((Decimal(str(end)) - Decimal(str(start))) / step) if step else 0
    if count < 1:
        raise UserError("holds no value")
    ends = sorted([float(start), float(Decimal(str(start)) + (count - 1) * step)])
    whole = all(isinstance(part, int) for part in (start, end, sweep.step))
    return Dimension(key, low=ends[0], high=ends[1], step=float(abs(step)), whole=whole, log=log)


# --- The journal


class _Journal:
    """The lines of a study, in a folder that is held; Optuna's `BaseJournalBackend`, in the form of its own files.

    Optuna's own would follow a link, and after a kill read a torn line and the next one as one.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, folder: storage.Folder | None):
        self.path, self.folder = path, folder
        self.lines: list[dict[str, Any]] = []
        try:
            data = storage.content(path, storage.LOG_LIMIT)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(_damaged(path, error.strerror or str(error))) from None
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                _ = entry["op_code"] + 0, entry["worker_id"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(_damaged(path, f"line {number} is not Optuna's")) from None
            self.lines.append(entry)
        if folder and len(whole) < len(data):  # a kill tore the last line
            folder.cut(path.name, len(whole))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        yield from self.lines[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self.folder is None:
            raise RuntimeError(f"{self.path} is only read")
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        try:
            self.folder.append(self.path.name, "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise storage.ResultsError(storage.explain(self.path, error)) from error
        self.lines += map(json.loads, lines)


def _damaged(path: Path, why: str) -> str:
    aside = f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.damaged')}"
    return f"{path}: damaged: {why}. Without it the search begins anew, trained trials stay: {aside}"


def _study(journal: _Journal) -> "optuna.Study":
    """The study of a journal, begun where there is none."""
    optuna = _optuna()
    begun = bool(journal.lines)
    try:
        store = optuna.storages.JournalStorage(journal)
        study = optuna.load_study if begun else functools.partial(optuna.create_study, direction="maximize")
        made = study(study_name=STUDY, storage=store)
        _ = made.trials, made.user_attrs
        return made
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever Optuna stumbles over in lines that are not its own
        raise UserError(_damaged(journal.path, f"{type(error).__name__}: {error}")) from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(NEEDED) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", module="optuna")  # that trials are few
    return optuna


# --- The search


@dataclass
class Search:
    """One search: what it looks through, what was asked and told.

    Args:
        words: the command's words with one value.
        space: what is searched, by key.
        compose: makes the trial of words.
        launch: trains jobs, each the words of a trial, and returns their scores as `delora.cli.train` does.
    """

    words: Sequence[str]
    space: Mapping[str, Dimension]
    compose: Callable[[list[str]], Trial]
    launch: Callable[[list[list[str]]], list[float | None]]
    study: "optuna.Study" = field(init=False)

    def run(self) -> None:
        """Asks for what is missing, trains it and tells its scores; prints the best.

        Raises:
            UserError: there is nothing to search, or the folder holds another search, or a damaged one.
        """
        if not self.space:
            raise UserError("hydra/sweeper=search: nothing to search for; write, as an example, lr=interval(1e-4,1e-1)")
        _optuna()
        first = {key: of.options[0] if of.options else _number(of, of.low) for key, of in self.space.items()}
        trial = self.compose([*self.words, *self._chosen(first)])
        settings = trial.search
        if settings is None or (name := trial.sweep or trial.name) is None:
            raise UserError("hydra/sweeper=search keeps its history in the sweep's folder: say which, name=NAME")
        self.root, self.task = trial.root / name, trial.task.name
        self.seeds, self.batch = settings.seeds or (trial.seed,), settings.batch
        self.most = int(min(settings.trials, math.prod(of.size for of in self.space.values())))
        self.distributions = {key: of.distribution() for key, of in self.space.items()}
        if trial.plan:
            return self._plan()
        journal = self.root / FOLDER / JOURNAL
        new = [path for path in (journal.parent, *journal.parent.parents) if not path.exists()]
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(storage.Folder(journal.parent, trial.root))
                storage.lock(held, folder, self.root)
            except OSError as error:
                raise storage.ResultsError(storage.explain(journal.parent, error)) from error
            self.study = _study(_Journal(journal, folder))
            try:
                self._same_space(trial)
                self._ask_again()
                while batch := self._next_batch():
                    self._train(batch)
            except UserError:
                if new and not any(asked.state.is_finished() for asked in self.study.trials):
                    storage.forget(folder, new)
                raise
        report = f"delora-report {shlex.quote(str(self.root))}"
        print(printable(f"{history(self.root)}\nresults in {self.root}; curves, tables and a page: {report}"))

    def _chosen(self, values: Mapping[str, Any]) -> list[str]:
        return [f"{key}={value}" for key, value in values.items()]

    def _same_space(self, trial: Trial) -> None:
        """Begins the study with what it is of, or compares it. Raises UserError where it is another one."""
        fixed = storage.flatten(trial.resolved())
        others = (*NOT_THE_TRIAL, *self.space, "seed")
        words = (word.lstrip("+").partition("=") for word in self.words)
        below = {key: value for key, _, value in words if storage.is_of(key, self.space)}  # of a group that is searched
        about = {
            "space": {key: _told(of) for key, of in self.space.items()},
            "fixed": {key: value for key, value in fixed.items() if not storage.is_of(key, others)} | below,
            "seeds": list(self.seeds),
        }
        known = self.study.user_attrs.get("about")
        if known is None:
            self.study.set_user_attr("command", [_by_source(word) for word in self.words if not _is_about_search(word)])
            self.study.set_user_attr("task", self.task)
            self.study.set_user_attr("about", about)  # the last: with it the study has begun
        elif differing := storage.differences(known, json.loads(json.dumps(about))):
            lines = "\n".join(differing)
            raise UserError(f"{self.root} holds a search of another space:\n{lines}\nname=... begins another one.")

    def _ask_again(self) -> None:
        """Asks again for what failed in an earlier command."""
        for trial in latest(self.study.trials).values():
            if trial.state.name == "FAIL":
                self.study.enqueue_trial(trial.params, user_attrs={"batch": trial.user_attrs["batch"]})

    def _next_batch(self) -> "list[optuna.trial.FrozenTrial]":
        """What is to be trained next: what was asked for and has no score yet, and of a batch that is not full more."""
        while any(trial.state.name == "WAITING" for trial in self.study.trials):
            self.study.ask(self.distributions)
        known = latest(self.study.trials)
        number = max((trial.user_attrs["batch"] for trial in known.values()), default=0)
        running = any(trial.state.name == "RUNNING" for trial in known.values())
        of_batch = sum(trial.user_attrs["batch"] == number for trial in known.values())
        told = any(trial.state.is_finished() and trial.user_attrs["batch"] == number for trial in known.values())
        if not running and known:
            number, of_batch, told = number + 1, 0, False
        if not told:
            for params in self._suggest(min(self.batch - of_batch, self.most - len(known))):
                self.study.enqueue_trial(params, user_attrs={"batch": number})
                self.study.ask(self.distributions)
        return [trial for trial in self.study.trials if trial.state.name == "RUNNING"]

    def _suggest(self, count: int) -> Iterator[dict[str, Any]]:
        """Configs that were not asked for yet, by TPE with a seed for each, whatever was interrupted before."""
        optuna = _optuna()
        beside = optuna.create_study(direction="maximize")  # in memory, where asking costs nothing
        beside.add_trials(trial for trial in self.study.trials if trial.state.name != "WAITING")
        known = {_key(trial.params) for trial in beside.trials}
        for _ in range(count):
            for attempt in range(ATTEMPTS):
                seed = len(known) * ATTEMPTS + attempt
                beside.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
                asked = beside.ask(self.distributions)
                if _key(asked.params) not in known:
                    break
                beside.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                finite = [of.values() for of in self.space.values()]
                every = (dict(zip(self.space, values, strict=True)) for values in itertools.product(*finite))
                params = next(params for params in every if _key(params) not in known)
                beside.enqueue_trial(params)
                asked = beside.ask(self.distributions)
            known.add(_key(asked.params))
            yield dict(asked.params)

    def _jobs(self, params: Mapping[str, Any]) -> list[list[str]]:
        """The words of a config's trials, one a seed."""
        over = f"search.over=[{','.join(self.space)}]"
        chosen = self._chosen({key: _number(self.space[key], value) for key, value in params.items()})
        return [[*self.words, *chosen, f"seed={seed}", over] for seed in self.seeds]

    def _train(self, batch: "Sequence[optuna.trial.FrozenTrial]") -> None:
        optuna, n = _optuna(), len(self.seeds)
        scores = self.launch([job for trial in batch for job in self._jobs(trial.params)])
        pruned, failed = optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL
        states = {"diverged": pruned, "stopped": pruned, "failed": failed}
        for i, trial in enumerate(batch):
            status, score, told = outcome(scores[i * n : (i + 1) * n])
            asked = optuna.trial.Trial(self.study, trial._trial_id)
            asked.set_user_attr("status", status)
            asked.set_user_attr("scores", told)
            if score is None:
                self.study.tell(trial.number, state=states[status])
            else:
                self.study.tell(trial.number, score)

    def _plan(self) -> None:
        optuna = _optuna()
        journal = _Journal(self.root / FOLDER / JOURNAL, None)
        known = latest(_study(journal).trials) if journal.lines else {}
        self.study = optuna.create_study(direction="maximize")
        self.study.add_trials([trial for trial in known.values() if trial.state.name != "WAITING"])
        count = min(self.batch, self.most - len(known))
        print(f"a search of {counted(self.most, 'config')} in batches of {self.batch}, {len(known)} asked for")
        if count > 0:
            self.launch([job for params in self._suggest(count) for job in self._jobs(params)])


def outcome(scores: Sequence[float | None]) -> tuple[Status, float | None, list[float | None]]:
    """How the trials of a config ended together, the mean over its seeds if all have a score, and each one's score."""
    told = [None if score is None or score <= LOWEST else score for score in scores]
    if any(score is None for score in scores):
        return "failed", None, told
    if STOPPED in scores:
        return ("diverged" if LOWEST in scores else "stopped"), None, told
    if any(score is None for score in told):
        return "diverged", None, told
    return "done", statistics.fmean(score for score in told if score is not None), told


def latest(trials: "Iterable[optuna.trial.FrozenTrial]") -> "dict[str, optuna.trial.FrozenTrial]":
    """The last trial of each config, in the order in which the configs were first asked for."""
    found: dict[str, Any] = {}
    for trial in trials:
        found[_key(trial.params or trial.system_attrs.get("fixed_params", {}))] = trial
    return found


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _number(of: Dimension, value: Any) -> Any:
    """A value as it is written in a word."""
    return value if of.options else int(value) if of.whole else repr(float(value))


def _told(of: Dimension) -> str:
    if of.options:
        return f"choice({','.join(of.options)})"
    text = f"{_number(of, of.low)} to {_number(of, of.high)}"
    text += f" in steps of {_number(of, of.step)}" if of.step else ""
    return f"{text} (log)" if of.log else text


def _by_source(word: str) -> str:
    """A word as the user wrote it: an encoder that was given by its place has an option made for it."""
    key, _, option = word.partition("=")
    made = ConfigStore.instance().repo.get("model", {}).get(f"{option}.yaml") if key == "model" else None
    source = made and OmegaConf.select(made.node, "source")
    return f"model={source}" if source else word


def _is_about_search(word: str) -> bool:
    return word.startswith(("search.", "hydra", "name=", "resume=", "plan="))


# --- Its history, for people


@dataclass(frozen=True)
class Tried:
    """A config of a search.

    Attributes:
        number: of its first asking, from 1.
        params: its values as they are written, by key.
        score: the mean over its seeds of the headline score on validation, a fraction; None without one.
        scores: by seed.
    """

    number: int
    params: dict[str, str]
    status: Status
    score: float | None
    scores: list[float | None]


@dataclass(frozen=True)
class History:
    """What a search has found.

    Attributes:
        tried: its configs, in the order in which they were asked for.
        importance: of each key for scores among the best tenth, by PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255),
            shares of 1, the highest first; empty where there are fewer than four scores.
    """

    root: Path
    task: str
    metric: str
    command: list[str]
    seeds: list[int]
    tried: list[Tried]
    importance: dict[str, float]

    @property
    def best(self) -> Tried | None:
        """The first of those with the highest score."""
        scored = [one for one in self.tried if one.score is not None]
        return max(scored, key=lambda one: one.score or 0.0) if scored else None

    @property
    def best_so_far(self) -> list[float | None]:
        """The highest score among each config and those before it; None before there is one."""
        scores = [-math.inf if one.score is None else one.score for one in self.tried]
        return [None if top == -math.inf else top for top in itertools.accumulate(scores, max)]

    def trained_by(self, one: Tried) -> str:
        """The command that trains a config with all its seeds."""
        chosen = [f"{key}={value}" for key, value in one.params.items()]
        seeds = f"seed={','.join(map(str, self.seeds))}"
        words = [word for word in self.command if not word.startswith("seed=")]
        several = ["-m"] if len(self.seeds) > 1 else []
        return shlex.join(["delora-run", *several, *words, *chosen, seeds])

    def counts(self) -> str:
        """How many configs ended how."""
        of: list[str] = [one.status for one in self.tried]
        return ", ".join(f"{of.count(status)} {status}" for status in get_args(Status) if status in of)

    def __str__(self) -> str:
        each = f", {counted(len(self.seeds), 'seed')} each" if len(self.seeds) > 1 else ""
        lines = [f"search of {counted(len(self.tried), 'config')}{each}: {self.counts()}"]
        if best := self.best:
            mean = f", the mean of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
            at = f"config {best.number} of {len(self.tried)}"
            lines.append(f"best {self.task}: {self.metric} {best.score:.4f} on validation{mean}, {at}")
            lines += [f"  {key} = {value}" for key, value in best.params.items()]
            lines.append(f"  trained by  {self.trained_by(best)}")
            firsts = {top: one.number for one, top in reversed([*zip(self.tried, self.best_so_far, strict=True)])}
            tops = sorted((top, number) for top, number in firsts.items() if top is not None)
            lines.append("  best so far " + ", ".join(f"{top:.4f} (config {number})" for top, number in tops))
        if self.importance:
            lines.append("  importance  " + ", ".join(f"{key} {share:.2f}" for key, share in self.importance.items()))
        return "\n".join(lines)


def history(root: Path) -> History | None:
    """The search in a sweep's folder; None where there is none.

    Raises:
        UserError: it is damaged, or Optuna is not installed.
    """
    path = root / FOLDER / JOURNAL
    if not path.exists():
        return None
    journal = _Journal(path, None)
    if not journal.lines:
        return None
    study = _study(journal)
    try:
        task, command, about = (study.user_attrs[key] for key in ("task", "command", "about"))
        tried = [
            Tried(
                number,
                dict(_by_source(f"{key}={show(value)}").split("=", 1) for key, value in trial.params.items()),
                trial.user_attrs.get("status", "failed") if trial.state.is_finished() else "asked",
                trial.value if trial.state.name == "COMPLETE" else None,
                trial.user_attrs.get("scores", []),
            )
            for number, trial in enumerate(latest(study.trials).values(), start=1)
        ]
        return History(root, task, _metric(root), command, about["seeds"], tried, _importance(study))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(_damaged(path, f"{type(error).__name__}: {error}")) from error


def below(folders: Iterable[Path]) -> tuple[list[History], list[str]]:
    """The searches of folders and of those in them, and why others cannot be read."""
    roots = [path.parent.parent for folder in folders for path in _journals(folder)]
    found, problems = [], []
    for root in dict.fromkeys(root.resolve() for root in roots):
        try:
            if search := history(root):
                found.append(search)
        except UserError as error:
            problems.append(printable(str(error)))
    return found, problems


def _journals(folder: Path) -> list[Path]:
    return [*folder.glob(f"{FOLDER}/{JOURNAL}"), *sorted(folder.glob(f"*/{FOLDER}/{JOURNAL}"))]


def _metric(root: Path) -> str:
    """The headline metric of a trial of the sweep that has ended."""
    for path in root.glob(f"*/{storage.RESULT}"):
        with contextlib.suppress(storage.ResultsError):
            return str(storage.read(path.parent).result["headline"])
    return "score"


def _importance(study: "optuna.Study") -> dict[str, float]:
    optuna = _optuna()
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return shares if sum(shares.values()) > 0 else {}
