"""Tables of the statistics, as Markdown, LaTeX (booktabs) and CSV. Scores are printed in percent."""

import csv
import io
import itertools
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from delora import storage, winner
from delora.config import show
from delora.report import budget, statistics
from delora.report.budget import Budget
from delora.report.statistics import Curve, Estimate, Panel, Robustness
from delora.report.trials import TEST_ROWS, Collection, Trial, label_order, looks
from delora.search import History
from delora.tasks import TASKS
from delora.terminal import counted, printable

MISSING = "—"
PAGE_ROWS = 40  # of a LaTeX table
SOME = 4  # of many that are named
NOTES = 12  # reasons why trials are left out, and half of all notes, that are told
COMMAND = "command"  # a column that papers have no room for
AXES = {"trials": "configs", "hours": "hours", "epochs": "trial-epochs"}
BOLD = "Bold: the highest, whether or not a difference is shown."
METRICS = {
    "accuracy": "accuracy",
    "matthews": "Matthews correlation",
    "pearson_spearman": "mean of Pearson and Spearman",
}
SPLITS = {
    "paper": "test half of the public validation set, split by the run's seed",
    "standard": "the public validation set, which also chose the checkpoint",
    TEST_ROWS: "the data's own test rows; validation chose the checkpoint",
}


@dataclass(frozen=True)
class Cell:
    """What is printed, and the same as numbers: one CSV column for each entry, named by column and key.

    Attributes:
        best: printed in bold, as the highest among others.
    """

    text: str
    values: Mapping[str, float] = field(default_factory=dict)
    best: bool = False

    @property
    def sort_key(self) -> float | str:
        """The number, else the text."""
        return self.values.get("", self.text)


EMPTY = Cell(MISSING)


@dataclass
class Table:
    """A table.

    Attributes:
        title: its caption, one sentence.
        notes: how its numbers were made.
        rules: rows above which a line goes.
        aside: its numbers cannot be compared with the trials': reports link to it and do not print it.
    """

    name: str
    title: str
    notes: str
    columns: list[str]
    rows: list[list[Cell]]
    rules: list[int] = field(default_factory=list)
    aside: bool = False


def all_tables(panels: Sequence[Panel]) -> list[Table]:
    """Every table of a report but `answers`: scores and robustness of each group of panels, then details."""
    kinds = (_scores, _ladder, _robustness, _budgets, _crossings, _medians, _comparisons)
    full = [panel for panel in panels if not panel.stopped]
    made = [table(group) for table in kinds for group in _groups(full if table is _robustness else panels)]
    others = [group for group in _groups(panels) if not is_comparable(group)]
    tasks = [task for task in statistics.published()["rows"][0]["scores"] if task in {p.task for p in panels}]
    if others and tasks:
        made.insert(len(_groups(panels)), _published(tasks, sorted({group[0].model for group in others})))
    return [table for table in made if table.rows]


def answers(panels: Sequence[Panel]) -> list[Table]:
    """Which method and which rate to take, of each group of panels: what stands first in a report."""
    return [table for group in _groups(panels) if (table := _answer(group)).rows]


def of_search(search: History) -> Table:
    """What a search has tried, the best first."""
    keys = list(dict.fromkeys(key for one in search.tried for key in one.params))
    several = len(search.seeds) > 1
    rows = []
    for one in sorted(search.tried, key=lambda one: (one.score is None, -(one.score or 0.0), one.number)):
        by_seed = ", ".join(MISSING if score is None else f"{100 * score:.1f}" for score in one.scores)
        rows.append(
            [
                Cell(str(one.number), {"": one.number}),
                *(_written(one.params.get(key, MISSING)) for key in keys),
                EMPTY if one.score is None else Cell(f"{100 * one.score:.2f}", {"": 100 * one.score}),
                *([Cell(by_seed)] if several else []),
                Cell(one.status),
            ]
        )
    shares = ", ".join(f"{key} {share:.2f}" for key, share in search.importance.items())
    best = search.best
    notes = (
        f"{counted(len(search.tried), 'config')}, {search.counts()}, in the order of {search.metric} on validation, in "
        f"percent{f', the mean over seeds {_listed(search.seeds)}' if several else ''}; config: when it was asked for. "
        f"{f'Importance of the keys for the best tenth of scores (PED-ANOVA): {shares}. ' if shares else ''}"
        f"{f'Trained by: {search.trained_by(best)}' if best else 'No config has a score.'}"
    )
    columns = ["config", *keys, f"{search.metric}", *(["by seed"] if several else []), "status"]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"search-{search.root.resolve().name}")
    title = printable(f"Search of {search.root.resolve().name}: {search.task}")
    return Table(name, title, printable(notes), columns, rows)


def _written(text: str) -> Cell:
    """A value as it is written on the command line; a number to four digits."""
    try:
        return Cell(f"{float(text):.4g}", {"": float(text)})
    except ValueError:
        return Cell(printable(text))


def _groups(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels that stand in one table: of one encoder, protocol and kind of data."""
    groups = defaultdict(list)
    for panel in panels:
        groups[panel.model, panel.protocol, panel.data].append(panel)
    return list(groups.values())


def _table(kind: str, group: Sequence[Panel], title: str, notes: str, columns: list[str], **content: Any) -> Table:
    panel = group[0]
    parts = (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in (panel.model, panel.protocol, panel.data))
    name = "-".join((kind, *parts))
    where = f"{panel.model}, {panel.protocol} protocol" + (f", {panel.data} data" if panel.data != "glue" else "")
    return Table(name, f"{title}: {where}", notes, columns, **content)


def _mark_best(rows: Sequence[list[Cell]], columns: Iterable[int]) -> None:
    """Marks the highest cell of each column, and what is printed like it, unless all are."""
    for column in columns:
        printed = {i: float(f"{row[column].values['']:.1f}") for i, row in enumerate(rows) if row[column].values}
        for i, value in printed.items():
            if value == max(printed.values()) > min(printed.values()):
                rows[i][column] = replace(rows[i][column], best=True)


def _labels(group: Iterable[Panel]) -> list[str]:
    return sorted({curve.label for panel in group for curve in panel.curves}, key=label_order)


def _curves(group: Iterable[Panel], label: str) -> dict[str, Curve]:
    """The method's curve of each task that it has."""
    return {panel.task: curve for panel in group for curve in panel.curves if curve.label == label}


# --- Which to take


def _answer(group: Sequence[Panel]) -> Table:
    """The best config of each method, the best first, with what speaks for it and what it cost."""
    rows: list[list[Cell]] = []
    rules: list[int] = []
    for panel in group:
        rules.append(len(rows))
        by_method: dict[str, list[Trial]] = defaultdict(list)
        for trial in (trial for curve in panel.curves for trial in curve.trials.values()):
            by_method[trial.method].append(trial)
        best = {method: _best_of(trials) for method, trials in by_method.items()}
        ranked = sorted((one for one in best.values() if one), key=lambda one: -one.mean)
        methods = {id(one): by_method[method] for method, one in best.items()}
        rows += [_answer_row(panel, one, methods[id(one)]) for one in ranked]
        _mark_best(rows[rules[-1] :], [4, *([5] if panel.split == "test" else [])])
    tested = group[0].split == "test"
    notes = (
        f"Of each method the config with the highest mean on validation over its n seeds, the highest of all first; "
        f"configs with fewer seeds do not compete, those of which a seed diverged stand behind. "
        f"{'Validation, which chose, flatters. ' if tested else ''}Score on {group[0].split}, in percent, "
        f"with its 95 % bootstrap interval over {statistics.FEWEST} seeds or more. Split: {_split(group[0])}. "
        f"Rate may be: between which rates the mean score stays within 1 point, ≤ and ≥ where the grid ends first. "
        f"Tuned by: the method's configs and trials, and what they took of {_devices(group)}; trials that stand for "
        f"the same training count once. The command trains the config's best seed; seed=N another one. {BOLD}"
    )
    columns = ["task", "method", "lr", "n", "validation", *(["test"] if tested else []), "rate may be"]
    columns += ["configs", "trials", "hours", "trial-epochs", COMMAND]
    rules = sorted({*rules[1:]} - {0, len(rows)})
    return _table("answer", group, "Which method and which rate", notes, columns, rows=rows, rules=rules)


def _best_of(trials: Iterable[Trial]) -> winner.Best | None:
    return next(iter(winner.choose(storage.StoredTrial(trial.folder, trial.result) for trial in trials)), None)


def _answer_row(panel: Panel, best: winner.Best, tuned: Sequence[Trial]) -> list[Cell]:
    """The row of one method's best config.

    Args:
        tuned: all trials of the method.
    """
    ((curve, at),) = ((c, f) for c in panel.curves for (f, _), t in c.trials.items() if t.folder == best.folder)
    rate, n = float(curve.rates_F[at]), len(best.seeds)
    low, high = statistics.tolerated_rates(curve, at)
    trained = [trial for trial in tuned if "trained_as" not in trial.result]
    configs, hours = len({(t.label, t.factor) for t in tuned}), sum(t.seconds for t in trained) / 3600
    score = statistics.pooled([statistics.known(curve.score_FS[at])], lambda values: values.mean(-1))
    return [
        Cell(panel.facts.folder),
        Cell(curve.label),
        Cell(number(rate), {"": rate, "factor": float(curve.factors_F[at])}),
        Cell(f"{n}" + (f" ({best.diverged} more diverged)" if best.diverged else ""), {"": n}),
        interval(Estimate(best.mean)),
        *([interval(score)] if panel.split == "test" else []),
        EMPTY
        if len(curve.factors_F) < 2
        else Cell(
            f"{'≤ ' if low.at_least else ''}{number(low.value)} to {'≥ ' if high.at_least else ''}{number(high.value)}",
            {"low": low.value, "high": high.value},
        ),
        Cell(str(configs), {"": configs}),
        Cell(str(len(tuned)), {"": len(tuned)}),
        Cell(_hours(hours), {"": hours}),
        Cell(number(sum(t.epochs for t in trained)), {"": sum(t.epochs for t in trained)}),
        Cell(printable(f"delora-run --again {shlex.quote(str(best.folder))}")),
    ]


def _hours(hours: float) -> str:
    return f"{hours:.3g}" if hours >= 0.01 else f"{hours:.1g}"


def _devices(panels: Iterable[Panel]) -> str:
    """The devices whose hours are counted: "one device (cpu)"."""
    return f"one device ({_listed(t.result['made_by']['device'] for panel in panels for t in panel.trials)})"


# --- Scores: the form of the paper's Table 4 and 8


def is_comparable(group: Sequence[Panel]) -> bool:
    """Whether published rows may stand beside ours: real data, and the encoder is the published checkpoint itself."""
    known = statistics.published()["encoder_sources"]
    sources = {trial.result["made_by"]["weights"]["source"] for panel in group for trial in panel.trials}
    return not group[0].synthetic and sources <= {*known}


def _scores(group: Sequence[Panel]) -> Table:
    """Ours; and where they may be compared, the differences from the published rows, and these."""
    rows = [_our_row(group, label) for label in _labels(group)]
    _mark_best(rows, range(3, len(rows[0])))
    rules, notes, title = [], _score_notes(group), "Scores"
    if is_comparable(group):
        differences = [row for label in _labels(group) if (row := _difference_row(group, label))]
        rules = [len(rows), len(rows) + len(differences)]
        rows += differences + _published_rows([panel.task for panel in group], " (published)")
        notes += f" {_versus_published(group)}"
    columns = _score_columns([panel.facts.folder for panel in group])
    return _table("scores", group, title, notes, columns, rows=rows, rules=sorted({*rules} - {len(rows)}))


def _score_columns(tasks: Sequence[str]) -> list[str]:
    return ["method", "parameters", "n", *tasks, *(["average"] if len(tasks) > 1 else [])]


def _our_row(group: Sequence[Panel], label: str) -> list[Cell]:
    curves = _curves(group, label)
    usual = max(len(statistics.known(curve.best_scores_S)) for curve in curves.values())
    cells = [_score_cell(curves[panel.task], usual) if panel.task in curves else EMPTY for panel in group]
    counts = sorted({t.result["parameters"]["adapter"] for c in curves.values() for t in c.trials.values()})
    parameters = "–".join(map(millions, dict.fromkeys((counts[0], counts[-1]))))
    return [Cell(label), Cell(parameters, {"": counts[0]}), Cell(str(usual), {"": usual}), *cells, *_average(cells)]


def _score_cell(curve: Curve, usual: int) -> Cell:
    scores, best = statistics.known(curve.best_scores_S), curve.best
    n, mean, std = len(scores), 100 * float(scores.mean()), 100 * statistics.std(scores)
    lost = int(curve.scoreless_FS[best].sum())
    text = _signed(mean, ".1f") + (f" ± {std:.2f}" if n > 1 else "")
    text += f" (n={n})" if n != usual else ""
    text += f" ({lost} without a score)" if lost else ""
    at = {"factor": float(curve.factors_F[best]), "lr": float(curve.rates_F[best])}
    return Cell(text, {"": mean, "std": std, "n": n, "without a score": lost, **at})


def _ladder(group: Sequence[Panel]) -> Table:
    """The rungs that the trials stand on: what each adds, its score and its worst drop on each task."""
    rungs = {look.title: look.rung for look in looks().values() if look.rung}
    rows = []
    for label in (label for label in _labels(group) if label.split(" (")[0] in rungs):
        rung, curves = rungs[label.split(" (")[0]], _curves(group, label)
        usual = max(len(statistics.known(curve.best_scores_S)) for curve in curves.values())
        cells = []
        for panel in group:
            there = curves.get(panel.task)
            cells.append(_score_cell(there, usual) if there else EMPTY)
            drop = statistics.robustness(there, panel.span, panel.floor).drop if there else None
            cells.append(interval(drop) if drop else EMPTY)
        rows.append([Cell(label), Cell(rung["of"]), Cell(rung["adds"]), Cell(str(usual), {"": usual}), *cells])
    _mark_best(rows, range(4, 4 + 2 * len(group), 2))
    notes = (
        f"ΔW by the DeLoRA paper's Tables 1 and 2, and what it has that its neighbour on the ladder lacks: rungs 1 to "
        f"3 go up from LoRA, 7 to 4 from ETHER+ on one side. Rung 6 has λ/2 as in the paper's Eq. 10. Scores and worst "
        f"drops, in percent on {group[0].split}, as in the tables of scores and robustness. {BOLD}"
    )
    tasks = [name for panel in group for name in (panel.facts.folder, f"{panel.facts.folder} worst drop")]
    return _table("ladder", group, "The ladder", notes, ["rung", "ΔW", "adds", "n", *tasks], rows=rows)


def _average(cells: Sequence[Cell], form: str = ".1f") -> list[Cell]:
    """A cell with the mean of several tasks' means; empty where a task is missing."""
    if len(cells) == 1:
        return []
    if any(cell is EMPTY for cell in cells):
        return [EMPTY]
    mean = float(np.mean([cell.values[""] for cell in cells]))
    return [Cell(_signed(mean, form), {"": mean})]


def _difference_row(group: Sequence[Panel], label: str) -> list[Cell] | None:
    """Ours minus published, if the method with these options has a published row."""
    curves, facts = _curves(group, label), statistics.published()
    method = next(iter(curves.values())).trials_at(0)[0].config["method"]
    for row in facts["rows"]:
        if "match" in row and all(method.get(key) == value for key, value in row["match"].items()):
            break
    else:
        return None
    cells = []
    for panel in group:
        score = row["scores"].get(panel.task)
        if panel.task not in curves or score is None:
            cells.append(EMPTY)
            continue
        ours, spread = statistics.known(curves[panel.task].best_scores_S), score[1] / 100 if len(score) > 1 else None
        cells.append(interval(statistics.unpaired(ours, score[0] / 100, spread, len(facts["seeds"])), form="+.1f"))
    return [Cell(f"{label} − published"), Cell(""), Cell(""), *cells, *_average(cells, "+.1f")]


def _published_rows(tasks: Sequence[str], suffix: str = "") -> list[list[Cell]]:
    facts, rows = statistics.published(), []
    for row in facts["rows"]:
        scores = [row["scores"].get(task) for task in tasks]
        cells = [
            EMPTY if not score
            else Cell(f"{score[0]:.1f} ± {score[1]:.2f}", {"": score[0], "std": score[1]}) if len(score) > 1
            else Cell(f"{score[0]:.1f}", {"": score[0]})
            for score in scores
        ]  # fmt: skip
        n = len(facts["seeds"]) if any(score and len(score) > 1 for score in scores) else None
        count = Cell(str(n), {"": n}) if n else EMPTY
        rows.append([Cell(row["name"] + suffix), Cell(row["parameters"]), count, *cells, *_average(cells)])
    return rows


def _published(tasks: list[str], models: Sequence[str]) -> Table:
    facts = statistics.published()
    own = [row["name"] for row in facts["rows"] if row["source"].startswith("run by")]
    notes = (
        f"Published numbers for {facts['encoder']}, from {facts['source']}. Measured with another encoder or on other "
        f"data than trials of this report ({', '.join(models)}): not comparable with those. Metric: {facts['metric']}. "
        f"Protocol: {facts['said']}. {', '.join(own)} was run by the paper's authors, the other rows are quoted there."
    )
    columns = _score_columns([TASKS[task].folder for task in tasks])
    title = f"Published, {facts['encoder']}: another encoder or other data"
    return Table("published", title, notes, columns, _published_rows(tasks), aside=True)


def _split(panel: Panel) -> str:
    told = SPLITS.get(panel.protocol, panel.protocol)
    if panel.trials[0].config["data"]["name"] == "files":
        told = told.replace("public ", "")
    return told if panel.protocol == TEST_ROWS else f"{told} (protocol={panel.protocol})"


def _score_notes(group: Sequence[Panel]) -> str:
    trials = [trial for panel in group for trial in panel.trials]
    metrics = {panel.facts.folder: METRICS.get(panel.facts.headline, panel.facts.headline) for panel in group}
    inits = {trial.config["method"]["init"] for trial in trials if "init" in trial.config["method"]}
    heads = sorted({trial.result["parameters"]["head"] for trial in trials})
    data = f"{group[0].data}, not GLUE's" if group[0].synthetic else group[0].data.replace("glue", "GLUE", 1)
    text = (
        f"Encoder {group[0].model}; data {data}. "
        f"Split: {_split(group[0])}. "
        f"Metric, in percent: {_by_task(metrics)}; of the checkpoint that is best on validation, at the learning rate "
        f"with {_selection(group)}. Mean ± sample standard deviation over n seeds "
        f"({_listed(trial.seed for trial in trials)}). "
        f"Epochs {_setting(group, 'epochs')}; maximum length {_setting(group, 'max_length')}; "
        f"precision {_setting(group, 'precision')}; init {_listed(inits) if inits else 'each method’s own'}. "
        f"Parameters: of the adapter; the head's {_listed(heads)} come on top. {BOLD}"
    )
    if any(curve.scoreless_FS[curve.best].any() for panel in group for curve in panel.curves):
        text += (
            f" Trials without a score, because they diverged or it is not defined, count as guessing: {_floors(group)}."
        )
    return text


def _versus_published(group: Sequence[Panel]) -> str:
    facts, trials = statistics.published(), [trial for panel in group for trial in panel.trials]
    differing = {
        "the split": group[0].protocol != facts["protocol"],
        "the seeds": {trial.seed for trial in trials} != {*facts["seeds"]},
        "the maximum length": not {trial.config["max_length"] for trial in trials} <= {*facts["max_length"]},
        "how the rate is chosen": group[0].select != facts["select"]
        and any(len(curve.factors_F) > 1 for panel in group for curve in panel.curves),
        "the epochs": any(
            trial.config["epochs"] != row["epochs"].get(trial.task)
            for row in facts["rows"]
            for trial in trials
            if "epochs" in row and trial.config["method"]["name"] == row["match"]["name"]
        ),
    }
    return (
        f"Published: {facts['source']}; {facts['said']}. Known to differ here: "
        f"{', '.join(what for what, differs in differing.items() if differs) or 'nothing'}. Differences carry Welch's "
        f"95 % interval from both standard deviations."
    )


def _setting(group: Sequence[Panel], key: str) -> str:
    return _by_task({p.facts.folder: _listed(trial.config[key] for trial in p.trials) for p in group})


def _floors(group: Sequence[Panel]) -> str:
    return ", ".join(f"{panel.facts.folder} {100 * panel.floor:.1f}" for panel in group)


def _by_task(values: Mapping[str, str]) -> str:
    """One value for all tasks, or each task's."""
    if len({*values.values()}) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({task})" for task, value in values.items())


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted({*values})))


# --- Numbers under the curves


def _robustness(group: Sequence[Panel]) -> Table:
    numbers = [statistics.robustness(curve, panel.span, panel.floor) for panel in group for curve in panel.curves]
    family = statistics.holm([of_one.p for of_one in numbers])
    rows: list[list[Cell]] = []
    rules: list[int] = []
    for panel in group:
        rules.append(len(rows))
        for curve in panel.curves:
            rows.append(_robustness_row(panel, curve, numbers[len(rows)], family[len(rows)]))
        _mark_best(rows[rules[-1] :], [5])
    spans = {p.facts.folder: "–".join(map(number, p.span)) if p.span else "none in common" for p in group}
    notes = (
        f"Scores on {group[0].split}, in percent, of the checkpoint that is best on validation; the best rate is the "
        f"one with {_selection(group)}. Tolerated: decades of learning rate around it within 1 point of "
        f"its score; ≥ where the grid ends first. Worst drop: from the best to the lowest mean score. Being a maximum "
        f"it is above zero for flat curves too: one with this noise and no effect of the rate exceeds the drop under "
        f"“flat” in 5 % of cases. p: of the worst drop, from {statistics.SHUFFLES:,} shuffles of each seed's trials "
        f"among the rates; corrected after Holm for the {_tested(family)} drops of this table, among which one is "
        f"called shown below {_alpha()}. Sensitivity: expected shortfall from the best over log-uniform rates, in "
        f"points, floored at guessing ({_floors(group)}), after Wortsman et al. 2023. Range of factors for both: "
        f"{_by_task(spans)}. Diverged trials, and those whose metric is not defined, count as guessing. Brackets: 95 % "
        f"bootstrap intervals over {statistics.FEWEST} seeds or more{_anew(group)}. {BOLD}"
    )
    columns = ["task", "method", "trials", "diverged", "factors", "best score", "best factor", "best lr"]
    columns += ["tolerated decades", "worst drop", "flat", "p", "p (Holm)", "shown", "sensitivity"]
    return _table("robustness", group, "Robustness to the learning rate", notes, columns, rows=rows, rules=rules[1:])


def _robustness_row(panel: Panel, curve: Curve, numbers: Robustness, corrected: float) -> list[Cell]:
    lowest, highest, count = float(curve.factors_F[0]), float(curve.factors_F[-1]), len(curve.factors_F)
    factor, rate = float(curve.factors_F[curve.best]), float(curve.rates_F[curve.best])
    edge = " (edge of the grid)" if curve.best_is_on_edge else ""
    diverged = sum(trial.diverged for trial in curve.trials.values())
    return [
        Cell(panel.facts.folder),
        Cell(curve.label),
        Cell(str(len(curve.trials)), {"": len(curve.trials)}),
        Cell(str(diverged), {"": diverged}),
        Cell(
            f"{number(lowest)}–{number(highest)} ({count})" if count > 1 else number(lowest),
            {"lowest": lowest, "highest": highest, "number": count},
        ),
        interval(numbers.best),
        Cell(number(factor) + edge, {"": factor, "on edge": int(curve.best_is_on_edge)}),
        Cell(number(rate), {"": rate}),
        interval(numbers.tolerated, scale=1, form=".2f"),
        interval(numbers.drop),
        interval(Estimate(numbers.flat)),
        _p(numbers.p),
        _p(corrected),
        EMPTY if math.isnan(corrected) else Cell("a drop" if corrected < 1 - statistics.LEVEL else "no drop shown"),
        interval(numbers.sensitivity, form=".2f"),
    ]


def _p(value: float) -> Cell:
    return EMPTY if math.isnan(value) else Cell(f"{value:.3f}" if value >= 0.001 else "<0.001", {"": value})


def _tested(p: Sequence[float]) -> int:
    return sum(not math.isnan(value) for value in p)


def _alpha() -> str:
    return f"{1 - statistics.LEVEL:.2g}"


def _selection(group: Sequence[Panel]) -> str:
    """How the best rate is chosen, as it stands behind "the rate with"."""
    if group[0].select == "first-seed":
        return "the highest validation score of the lowest seed alone, as in the paper"
    return "the highest mean validation score"


def _anew(group: Sequence[Panel]) -> str:
    return "" if group[0].select == "first-seed" else ", the rate chosen anew in each draw"


# --- What a tuning budget buys


def _budgets(group: Sequence[Panel]) -> Table:
    rows: list[list[Cell]] = []
    rules: list[int] = []
    few: list[str] = []
    for panel in group:
        rules.append(len(rows))
        for one in budget.budgets(panel):
            rows += [_budget_row(panel, one, tried - 1) for tried in budget.shown(one.configs)]
            few += [f"{one.left_out} of {one.label} on {panel.facts.folder}"] if one.left_out else []
    tested = group[0].split == "test"
    notes = (
        f"Of each method the expected score of the best config, in percent, if of its n configs so many are drawn at "
        f"random, without replacement: unbiased (Tang et al. 2020; drawn with, as Dodge et al. 2019 do, it is too "
        f"low). A config's validation score is the mean over its seeds. "
        f"{'Test: what the config that is best on validation has there. ' if tested else ''}Brackets: Student's 95 % "
        f"interval with the jackknife's standard error over configs and, from {statistics.FEWEST} seeds on, over "
        f"seeds; for up to half of the configs, beyond which it would be too narrow. It takes the configs for draws "
        f"from all that might have been tried, which those of a search that goes where scores are high are not. Hours "
        f"of {_devices(group)}, a trial's share of its fleet's, and trial-epochs: what so many configs take on the "
        f"mean. Diverged trials count as guessing."
    )
    notes += f" Left out, with fewer seeds than others: {some(few)}." if few else ""
    columns = ["task", "method", "n", "tried", "validation", *(["test"] if tested else []), "hours", "trial-epochs"]
    rules = sorted({*rules[1:]} - {0, len(rows)})
    return _table("budget", group, "What a tuning budget buys", notes, columns, rows=rows, rules=rules)


def _budget_row(panel: Panel, one: Budget, m: int) -> list[Cell]:
    hours, epochs = (float(one.x_M(axis)[m]) for axis in ("hours", "epochs"))
    splits = [one.validation_3M, *([one.score_3M] if panel.split == "test" else [])]
    return [
        Cell(panel.facts.folder),
        Cell(one.label),
        Cell(str(one.configs), {"": one.configs}),
        Cell(str(m + 1), {"": m + 1}),
        *(interval(Estimate(of_3M[0, m], of_3M[1, m], of_3M[2, m])) for of_3M in splits),
        Cell(_hours(hours), {"": hours}),
        Cell(number(epochs), {"": epochs}),
    ]


def _crossings(group: Sequence[Panel]) -> Table:
    """Pairs of methods of which the one or the other is better, as the budget is."""
    splits = {"validation": "validation", **({"test": "score"} if group[0].split == "test" else {})}
    rows: list[list[Cell]] = []
    rules: list[int] = []
    pairs = 0
    for panel in group:
        rules.append(len(rows))
        of_panel = budget.budgets(panel)
        for first, second in budget.pairs(of_panel):
            led = [budget.leaders(first, second, axis, of) for of in splits.values() for axis in budget.AXES]
            pairs += 1
            if any(len(leads) > 1 for leads in led):
                cells = [_leads(leads) for leads in led]
                rows.append([Cell(panel.facts.folder), Cell(first.label), Cell(second.label), *cells])
    notes = (
        f"Where the curves of two methods in the table of budgets cross: whose expected score is higher at the lowest "
        f"budget that both have, and from which budget on whose. Listed are {len(rows)} of {counted(pairs, 'pair')}; "
        f"the curves of the others do not cross, or have no budget in common. A crossing says that the estimates "
        f"change places, not that a difference is shown."
    )
    columns = ["task", "first", "second", *(f"{split} by {AXES[axis]}" for split in splits for axis in budget.AXES)]
    rules = sorted({*rules[1:]} - {0, len(rows)})
    return _table("crossings", group, "Where tuning budgets cross", notes, columns, rows=rows, rules=rules)


def _leads(leads: Sequence[tuple[str, float]]) -> Cell:
    if not leads:
        return EMPTY
    (label, _), *rest = leads
    return Cell(", ".join([label, *(f"{other} from {number(x)}" for other, x in rest)]))


# --- Scores in more detail


def _medians(group: Sequence[Panel]) -> Table:
    """Median and interquartile mean at the best rate, for each task and over all tasks for methods that have all."""
    rows: list[list[Cell]] = []
    rules: list[int] = []
    for panel in group:
        rules.append(len(rows))
        rows += [_median_row(panel.facts.folder, c.label, [c.best_scores_S]) for c in panel.curves]
        _mark_best(rows[rules[-1] :], (3, 5, 6))
    if len(group) > 1:
        rules.append(len(rows))
        for label in _labels(group):
            curves = _curves(group, label)
            if len(curves) == len(group):
                rows.append(_median_row("all", label, [c.best_scores_S for c in curves.values()]))
        _mark_best(rows[rules[-1] :], (3, 5, 6))
    notes = (
        f"Scores on {group[0].split} at the best rate, in percent. IQM: interquartile mean, without the lowest and "
        f"highest quarter (rounded down) of the values. Brackets: 95 % bootstrap intervals over "
        f"{statistics.FEWEST} seeds or more, resampled within each task. “all” pools the tasks, for methods that have "
        f"every one. {BOLD}"
    )
    columns = ["task", "method", "n", "mean", "std", "median", "IQM"]
    title = "Median and interquartile mean"
    return _table("medians", group, title, notes, columns, rows=rows, rules=sorted({*rules[1:]} - {len(rows)}))


def _median_row(task: str, label: str, scores: Sequence[np.ndarray]) -> list[Cell]:
    samples = [statistics.known(score_S) for score_S in scores]
    together = np.concatenate(samples)
    spread = statistics.std(together) if len(samples) == 1 else math.nan  # over tasks it would mean little
    return [
        Cell(task),
        Cell(label),
        Cell(str(len(together)), {"": len(together)}),
        interval(Estimate(float(together.mean()))),
        interval(Estimate(spread), form=".2f"),
        interval(statistics.pooled(samples, statistics.median)),
        interval(statistics.pooled(samples, statistics.iqm)),
    ]


def _comparisons(group: Sequence[Panel]) -> Table:
    compared = statistics.compare(group)
    rows: list[list[Cell]] = []
    rules: list[int] = []
    for panel in group:
        rules.append(len(rows))
        for c in compared:
            if c.task != panel.task:
                continue
            more = "more sensitive" if c.what == "sensitivity" else "higher"
            shown = Cell(f"{c.higher} is {more}" if c.higher else "no difference shown")
            names = [panel.facts.folder, c.what, c.first, c.second]
            difference, n = interval(c.difference, form="+.2f"), Cell(str(c.n), {"": c.n})
            rows.append([*map(Cell, names), difference, _p(c.p), _p(c.corrected), n, shown])
    families = [f"{_tested([c.p for c in compared if c.what == w])} of {w}" for w in {c.what: None for c in compared}]
    notes = (
        f"Pairs share the seed, and with it split, data order and head. Score on {group[0].split} at each method's "
        f"best rate; sensitivity as in the table of robustness; both in points. Brackets: Student's 95 % interval of "
        f"the paired difference, for this pair alone; p of the paired t-test. All comparisons of one number in this "
        f"table are a family ({', '.join(families)}), for which p is corrected after Holm; a difference is called "
        f"shown only where the corrected p is below {_alpha()}."
    )
    if any(len(panel.curves) > statistics.ALL_PAIRS for panel in group):
        notes += (
            f" Of more than {statistics.ALL_PAIRS} methods each is compared with the one that is best on validation."
        )
    columns = ["task", "of", "first", "second", "first − second", "p", "p (Holm)", "n", "shown"]
    rules = sorted({*rules[1:]} - {0, len(rows)})
    return _table("comparisons", group, "Paired comparisons", notes, columns, rows=rows, rules=rules)


# --- What else a reader must know


def notes(found: Collection, panels: Sequence[Panel]) -> list[str]:
    """What was left out, and what makes numbers doubtful."""
    reasons = defaultdict(list)
    for path, reason in found.left_out:
        reasons[reason].append(str(path))
    said = [printable(f"left out: {some(paths)}: {reason}") for reason, paths in reasons.items()]
    said = said[:NOTES] + ([f"and more for {len(said) - NOTES} other reasons"] if len(said) > NOTES else [])
    origins = [(trial.facts.folder, trial.result["made_by"]["data"]) for trial in found.trials]
    unknown = {task: None for task, data in origins if data.get("published", True) is None}
    if unknown:
        named = ", ".join(unknown)
        said.append(f"{named}: rows that are as many as GLUE's; the hash of the published ones is not known")
    for panel in panels:
        where = f"{panel.facts.folder}, {panel.model}"
        if panel.stopped:
            many = f"a halving has stopped {counted(panel.stopped, 'trial')}"
            lacks = "no robustness, sensitivity or budget; best scores, and what they cost, are those of the others"
            said.append(f"{where}: {many}: {lacks}")
        said += [f"{where}: {note}" for note in _doubts([*panel.curves, *panel.heads])]
        said += [f"{where}: methods differ in {key}: {values}" for key, values in _differing(panel).items()]
    return said[: 2 * NOTES] + ([f"and {len(said) - 2 * NOTES} more notes"] if len(said) > 2 * NOTES else [])


def some(texts: Sequence[str], comma: str = ", ") -> str:
    """The first of the texts, and how many more there are."""
    more = len(texts) - SOME
    return comma.join(texts) if more <= 1 else f"{comma.join(texts[:SOME])} and {more} more"


def _doubts(curves: Sequence[Curve]) -> list[str]:
    """One for each kind, which names the methods that it is of."""
    found: dict[str, list[str]] = defaultdict(list)
    for curve in curves:
        if curve.best_is_on_edge:
            way = "lower" if curve.best == 0 else "higher"
            best = f"{number(curve.rates_F[curve.best])} (factor {number(curve.factors_F[curve.best])})"
            found[f"the best rate is the edge of its grid, try {way} rates"].append(f"{curve.label} at {best}")
        if not curve.fullest_F.all():
            few = ", ".join(map(number, curve.factors_F[~curve.fullest_F]))
            found["fewer trials than at other factors"].append(f"{curve.label} at {few}")
        undefined = sum(math.isnan(trial.score) and not trial.diverged for trial in curve.trials.values())
        if undefined:
            without = "no defined score (constant predictions), counted as guessing"
            found[without].append(f"{counted(undefined, 'trial')} of {curve.label}")
    return [f"{what}: {some(labels)}" for what, labels in found.items()]


def _differing(panel: Panel) -> dict[str, str]:
    """Settings that are no option of a method, and yet not the same for all: key, and the methods of each value."""
    methods: dict[str, Trial] = {curve.label: curve.trials_at(0)[0] for curve in panel.curves}
    keys = dict.fromkeys(key for trial in methods.values() for key in trial.settings)
    made = {}
    for key in keys:
        labels: dict[str, list[str]] = defaultdict(list)
        for label, trial in methods.items():
            labels[show(trial.settings.get(key, "unset"))].append(label)
        if len(labels) > 1 and not key.startswith("method.") and key != "weight_decay":
            few = len(methods) <= SOME  # the labels of more tell what differs
            named = [", ".join(having) if few else counted(len(having), "method") for having in labels.values()]
            each = [f"{value} ({having})" for value, having in zip(labels, named, strict=True)]
            made[key] = ", ".join(each) if len(each) <= SOME else f"{len(each)} values"
    return made


# --- Forms


def number(value: float) -> str:
    """Short: 0.25, 6e-4, 32."""
    text = f"{value:.3g}"
    if 1e-3 <= value < 1e4 and "e" not in text:
        return text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def millions(count: float) -> str:
    return f"{count / 1e6:.2g}M" if count < 1e7 else f"{count / 1e6:.0f}M"


def interval(estimate: Estimate, scale: float = 100, form: str = ".1f") -> Cell:
    """`value [low, high]`, scaled."""
    if math.isnan(estimate.value):
        return EMPTY
    value, low, high = (scale * v for v in (estimate.value, estimate.low, estimate.high))
    text = ("≥ " if estimate.at_least else "") + _signed(value, form)
    if math.isnan(low):
        return Cell(text, {"": value})
    return Cell(f"{text} [{_signed(low, form)}, {_signed(high, form)}]", {"": value, "low": low, "high": high})


def _signed(value: float, form: str) -> str:
    """The number with a true minus sign, which zero never has."""
    text = format(value, form)
    return format(0.0, form) if float(text) == 0 else text.replace("-", "−")


def is_text(table: Table, column: int) -> bool:
    return not any(row[column].values for row in table.rows)


def markdown(table: Table) -> str:
    """A pipe table below its title, above its notes; its columns are aligned for reading as plain text."""
    lines = [
        table.columns,
        *([_bold(cell, cell.text.replace("|", "\\|"), "**{}**") for cell in row] for row in table.rows),
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    aligns = [str.ljust if is_text(table, i) else str.rjust for i in range(len(widths))]
    rules = [
        ":" + "-" * (width - 1) if align is str.ljust else "-" * (width - 1) + ":"
        for width, align in zip(widths, aligns, strict=True)
    ]
    padded = [[align(text, width) for text, width, align in zip(line, widths, aligns, strict=True)] for line in lines]
    body = "".join(f"| {' | '.join(line)} |\n" for line in [padded[0], rules, *padded[1:]])
    return f"### {table.title}\n\n{body}\n{table.notes}\n"


def _bold(cell: Cell, text: str, form: str) -> str:
    return form.format(text) if cell.best else text


def latex(table: Table) -> str:
    """Table environments, the notes below the first: one, or for many rows several that each fit a page."""
    if COMMAND in table.columns:
        at = table.columns.index(COMMAND)
        rows = [[*row[:at], *row[at + 1 :]] for row in table.rows]
        table = replace(table, columns=[c for c in table.columns if c != COMMAND], rows=rows)
    parts = [[0, 0]]  # the first row of each part, and the one behind its last
    for start, end in itertools.pairwise([0, *table.rules, len(table.rows)]):
        if parts[-1][1] and end - parts[-1][0] > PAGE_ROWS:
            parts.append([start, end])
        parts[-1][1] = end
    return "\n".join(_latex_part(table, start, end) for start, end in parts)


def _latex_part(table: Table, start: int, end: int) -> str:
    align = "".join("l" if is_text(table, i) else "r" for i in range(len(table.columns)))
    lines = [
        r"% needs \usepackage{booktabs} and \usepackage{graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(table.title)}{' (continued)' if start else ''}.}}",
        *([] if start else [rf"\label{{tab:{table.name}}}"]),
        r"\medskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(map(_tex, table.columns)) + r" \\",
        r"\midrule",
    ]
    for i, row in enumerate(table.rows[start:end], start):
        lines += [r"\midrule"] if i in table.rules and i > start else []
        lines.append(" & ".join(_bold(cell, _tex(cell.text), r"\textbf{{{}}}") for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if not start:
        lines += [r"\par\medskip", rf"\parbox{{\linewidth}}{{\footnotesize {_tex(table.notes)}}}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≥": r"$\geq$", "−": "$-$", "λ": r"$\lambda$",
    "—": "---", "–": "--", "“": "``", "”": "''", "’": "'", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}", "‖": r"$\Vert$", "′": r"$'$", "×": r"$\times$", "·": r"$\cdot$", "Δ": r"$\Delta$",
    "Ξ": r"$\Xi$", "Φ": r"$\Phi$", "ᵀ": r"$^{T}$", "ᵢ": r"$_{i}$", "Θ": r"$\Theta$",
    "Σ": r"$\Sigma$", "≤": r"$\leq$",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text with LaTeX's special characters escaped; brackets would be an argument of the `\\` before them."""
    return "".join(TEX.get(character, character) for character in text)


def to_csv(table: Table) -> str:
    """Numbers in full, a column for each of a cell's values; the first line, a `#` comment, holds title and notes."""
    keys = [list(dict.fromkeys(k for row in table.rows for k in row[i].values)) for i in range(len(table.columns))]
    lines = io.StringIO()
    lines.write(f"# {table.title}. {table.notes}\n")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([f"{c} {k}".strip() for c, ks in zip(table.columns, keys, strict=True) for k in ks or [""]])
    for row in table.rows:
        writer.writerow([value for cell, ks in zip(row, keys, strict=True) for value in _csv_values(cell, ks)])
    return lines.getvalue()


def _csv_values(cell: Cell, keys: Sequence[str]) -> list[str]:
    if not cell.values:  # text, also in a column of numbers, as "0.3M"
        return [cell.text.replace(MISSING, ""), *[""] * (len(keys) - 1)]
    return [f"{cell.values[k]:.10g}" if not math.isnan(cell.values.get(k, math.nan)) else "" for k in keys]


FORMS: dict[str, tuple[str, Callable[[Table], str]]] = {
    "markdown": ("md", markdown),
    "latex": ("tex", latex),
    "csv": ("csv", to_csv),
}


def write(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Writes tables.md and tables.tex with all tables but those aside, and a CSV for each; returns the files."""
    printed = [table for table in tables if not table.aside]
    texts = {f"tables.{suffix}": "\n".join(map(form, printed)) for suffix, form in (FORMS["markdown"], FORMS["latex"])}
    texts["tables.md"] += "".join(f"\n[{t.title}]({t.name}.csv)\n" for t in tables if t.aside)
    for table in tables:
        again = sum(other.name == table.name for other in tables[: tables.index(table)])  # of another's, spelled alike
        texts[f"{table.name}{f'-{again + 1}' if again else ''}.csv"] = to_csv(table)
    for name, text in texts.items():
        storage.replace(folder / name, text.encode())
    return [folder / name for name in texts]
