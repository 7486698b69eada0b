"""Tables of the statistics, as Markdown, LaTeX (booktabs) and CSV. Scores are printed in percent."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from delora.report import statistics
from delora.report.statistics import Curve, Estimate, Panel
from delora.report.trials import Collection, Trial
from delora.tasks import TASKS

MISSING = "—"
METRICS = {
    "accuracy": "accuracy",
    "matthews": "Matthews correlation",
    "pearson_spearman": "mean of Pearson and Spearman",
}
SPLITS = {
    "paper": "test half of GLUE's validation set, split by the run's seed",
    "standard": "GLUE's validation set, which also chose the checkpoint",
}


@dataclass(frozen=True)
class Cell:
    """What is printed, and the same as numbers: one CSV column for each entry, named by column and key."""

    text: str
    values: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def sort_key(self) -> float | str:
        """The first number, else the text."""
        return next((v for v in self.values.values() if not isinstance(v, str)), self.text)


@dataclass
class Table:
    """A table with a caption that says how its numbers were made; `rules` are rows above which a line goes."""

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    rules: list[int] = field(default_factory=list)


# --- Score tables: the form of the paper's Table 4 and 8


def score_tables(panels: Sequence[Panel]) -> list[Table]:
    """A table for each encoder, protocol and kind of data, with the published rows where the encoder is theirs.

    Otherwise the published rows follow in a table of their own that says so.
    """
    tables = []
    for group in _groups(panels):
        comparable = is_comparable(group)
        rows, rules = _our_rows(group), []
        if comparable:
            rules.append(len(rows))
            rows += _difference_rows(group)
            rules.append(len(rows))
            rows += _published_rows([p.task for p in group], " (published)")
        title = f"GLUE, {group[0].model}" + (", synthetic data" if group[0].data == "synthetic" else "")
        caption = _score_caption(group) + (f" {_versus_published(group)}" if comparable else "")
        columns = ["method", "parameters", "n", *(task_name(p.task) for p in group), "average"]
        tables.append(Table(_name("scores", group), title, caption, columns, rows, rules))
    tasks = sorted({p.task for p in panels}, key=statistics.task_order)
    tasks = [t for t in tasks if t in statistics.published()["rows"][0]["scores"]]
    if tasks and not all(is_comparable(group) for group in _groups(panels)):
        tables.append(_published_table(tasks, {p.model for p in panels}))
    return tables


def _groups(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels by encoder, protocol and kind of data, each in the order of tasks."""
    groups: dict[tuple, list[Panel]] = {}
    for panel in panels:
        groups.setdefault((panel.model, panel.protocol, panel.data), []).append(panel)
    return list(groups.values())


def _name(kind: str, group: Sequence[Panel]) -> str:
    panel = group[0]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{kind}-{panel.model}-{panel.protocol}-{panel.data}")


def task_name(task: str) -> str:
    return TASKS[task].folder


def is_comparable(group: Sequence[Panel]) -> bool:
    """Whether published rows may stand beside ours: real data, and the encoder is the published one."""
    encoder = statistics.published()["encoder"]
    models = (trial.config["model"] for panel in group for trial in panel.trials)
    same = all(encoder in (m["name"], Path(m.get("source") or "").name) for m in models)
    return same and group[0].data != "synthetic"


def _our_rows(group: Sequence[Panel]) -> list[list[Cell]]:
    rows = []
    for label in _labels(group):
        curves = {p.task: c for p in group for c in p.curves if c.label == label}
        counts = {task: len(statistics.known(c.best_scores_S)) for task, c in curves.items()}
        usual = max(counts.values())
        cells = [_score_cell(curves[p.task], usual) if p.task in curves else Cell(MISSING) for p in group]
        rows.append(
            [
                Cell(label),
                _parameters(curves.values()),
                Cell(str(usual), {"": usual}),
                *cells,
                _average(cells),
            ]
        )
    return rows


def _labels(group: Iterable[Panel]) -> list[str]:
    return sorted({c.label for p in group for c in p.curves}, key=statistics.label_order)


def _score_cell(curve: Curve, usual: int) -> Cell:
    scores = statistics.known(curve.best_scores_S)
    mean, spread, n = float(scores.mean()), statistics.std(scores), len(scores)
    lost = int(curve.scoreless_FS[curve.best].sum())
    text = f"{percent(mean)} ± {percent(spread, 2)}" if n > 1 else percent(mean)
    text += f" (n={n})" if n != usual else ""
    text += f" ({lost} diverged)" if lost else ""
    factor, rate = float(curve.factors_F[curve.best]), float(curve.rates_F[curve.best])
    return Cell(text, {"": 100 * mean, "std": 100 * spread, "n": n, "diverged": lost, "factor": factor, "lr": rate})


def _parameters(curves: Iterable[Curve]) -> Cell:
    counts = sorted({t.result["parameters"]["adapter"] for c in curves for t in c.trials.values()})
    text = millions(counts[0]) if len(counts) == 1 else f"{millions(counts[0])}–{millions(counts[-1])}"
    return Cell(text, {"": counts[0]})


def _average(cells: Sequence[Cell]) -> Cell:
    """The mean of the tasks' means; none where a task is missing."""
    if any(cell.text == MISSING for cell in cells):
        return Cell(MISSING)
    mean = float(np.mean([cell.sort_key for cell in cells]))
    return Cell(f"{mean:.1f}", {"": mean})


def _difference_rows(group: Sequence[Panel]) -> list[list[Cell]]:
    """Ours minus published, for the methods that have a published row."""
    rows = []
    seeds = len(statistics.published()["seeds"])
    for label in _labels(group):
        curves = {p.task: c for p in group for c in p.curves if c.label == label}
        row = _published_row(next(iter(curves.values())))
        if row is None:
            continue
        cells = []
        for panel in group:
            theirs = row["scores"].get(panel.task)
            if panel.task not in curves or theirs is None:
                cells.append(Cell(MISSING))
                continue
            mean, spread = theirs[0] / 100, theirs[1] / 100 if len(theirs) > 1 else None
            ours = statistics.known(curves[panel.task].best_scores_S)
            cells.append(estimate_cell(statistics.unpaired(ours, mean, spread, seeds), signed=True))
        rows.append([Cell(f"{label} − published"), Cell(""), Cell(""), *cells, _signed(_average(cells))])
    return rows


def _published_row(curve: Curve) -> dict[str, Any] | None:
    """The published row of a curve's method, if its options are the published ones."""
    method = next(iter(curve.trials.values())).config["method"]
    for row in statistics.published()["rows"]:
        if "match" in row and all(method.get(key) == value for key, value in row["match"].items()):
            return row
    return None


def _signed(cell: Cell) -> Cell:
    value = cell.values.get("")
    return cell if value is None else Cell(f"{value:+.1f}", cell.values)


def _published_rows(tasks: Sequence[str], suffix: str) -> list[list[Cell]]:
    rows = []
    for row in statistics.published()["rows"]:
        cells = []
        for task in tasks:
            score = row["scores"].get(task)
            if score is None:
                cells.append(Cell(MISSING))
            else:
                text = f"{score[0]:.1f}" + (f" ± {score[1]:.2f}" if len(score) > 1 else "")
                cells.append(Cell(text, {"": score[0]} | ({"std": score[1]} if len(score) > 1 else {})))
        n = len(statistics.published()["seeds"]) if any(len(s) > 1 for s in row["scores"].values()) else None
        count = Cell(str(n), {"": n}) if n else Cell(MISSING)
        rows.append([Cell(row["name"] + suffix), Cell(row["parameters"]), count, *cells, _average(cells)])
    return rows


def _published_table(tasks: list[str], models: set[str]) -> Table:
    facts = statistics.published()
    own = [row["name"] for row in facts["rows"] if "match" in row and row["source"].startswith("run by")]
    caption = (
        f"Published numbers for {facts['encoder']}, from {facts['source']}. Measured with another encoder or on other data "
        f"than the trials of this report ({', '.join(sorted(models))}): not comparable with them. {facts['metric']}. "
        f"{facts['said']}. {', '.join(own)} was run by the paper's authors, the other rows are quoted there. The average "
        f"is over the tasks shown."
    )
    columns = ["method", "parameters", "n", *map(task_name, tasks), "average"]
    return Table(
        "published", f"Published, {facts['encoder']}: another encoder or other data", caption, columns,
        _published_rows(tasks, ""),
    )  # fmt: skip


def _score_caption(group: Sequence[Panel]) -> str:
    trials = [t for p in group for t in p.trials]
    metrics = {task_name(p.task): METRICS[TASKS[p.task].headline] for p in group}
    floors = ", ".join(f"{task_name(p.task)} {percent(p.floor)}" for p in group)
    heads = sorted({t.result["parameters"]["head"] for t in trials})
    inits = {t.config["method"]["init"] for t in trials if "init" in t.config["method"]}
    parts = [
        f"Encoder {group[0].model}, {'synthetic' if group[0].data == 'synthetic' else 'GLUE'} data. "
        f"Split: {SPLITS.get(group[0].protocol, group[0].protocol)} (protocol={group[0].protocol}). "
        f"Metric, in percent: {_by_task(metrics)}; of the checkpoint that is best on validation, at the learning rate "
        f"with the highest mean validation score. Mean ± sample standard deviation over n seeds "
        f"({_numbers(t.seed for t in trials)}). "
        f"Epochs {_by_task(_values(group, 'epochs'))}; maximum length {_by_task(_values(group, 'max_length'))}; "
        f"precision {_by_task(_values(group, 'precision'))}; "
        f"init {', '.join(sorted(inits)) if inits else 'each method’s own'}. "
        f"Parameters: of the adapter; the head's {_numbers(heads, '{:,}')} come on top."
    ]
    if any(c.scoreless_FS[c.best].any() for p in group for c in p.curves):
        parts.append(f"Diverged trials count as guessing: {floors}.")
    return " ".join(parts)


def _versus_published(group: Sequence[Panel]) -> str:
    facts = statistics.published()
    trials = [t for p in group for t in p.trials]
    differs = []
    if group[0].protocol != facts["protocol"]:
        differs.append("the split")
    if {t.seed for t in trials} != set(facts["seeds"]):
        differs.append("the seeds")
    if not {t.config["max_length"] for t in trials} <= set(facts["max_length"]):
        differs.append("the maximum length")
    return (
        f"Published: {facts['source']}; {facts['said']}. Known to differ here: {', '.join(differs) or 'nothing'}. "
        f"Differences carry Welch's 95 % interval from both standard deviations; the average is over the tasks shown."
    )


def _values(group: Sequence[Panel], key: str) -> dict[str, str]:
    return {task_name(p.task): _numbers((t.config[key] for t in p.trials), " and ") for p in group}


def _by_task(values: Mapping[str, str]) -> str:
    """One value for all tasks, or each task's."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({task})" for task, value in values.items())


def _numbers(values: Iterable[Any], form: str = "{}") -> str:
    separator = form if form == " and " else ", "
    form = "{}" if form == " and " else form
    return separator.join(form.format(v) for v in sorted(set(values)))


# --- Numbers under the curves


def robustness_tables(panels: Sequence[Panel]) -> list[Table]:
    """Best score, tolerated range, worst drop and sensitivity of each method, a table for each encoder."""
    columns = ["task", "method", "trials", "diverged", "factors", "best score", "best factor", "best lr",
               "tolerated decades", "worst drop", "sensitivity"]  # fmt: skip
    tables = []
    for group in _groups(panels):
        rows, rules = [], []
        for panel in group:
            rules.append(len(rows))
            rows += [_robustness_row(panel, curve) for curve in panel.curves]
        title = f"Robustness to the learning rate, {group[0].model}"
        caption = _robustness_caption(group)
        tables.append(Table(_name("robustness", group), title, caption, columns, rows, rules[1:]))
    return tables


def _robustness_row(panel: Panel, curve: Curve) -> list[Cell]:
    factors, best = curve.factors_F, curve.best
    edge = {True: " (edge of the grid)", False: ""}[curve.best_is_on_edge]
    grid = number(factors[0]) if len(factors) == 1 else f"{number(factors[0])}–{number(factors[-1])} ({len(factors)})"
    lost = int(curve.scoreless_FS.sum())
    return [
        Cell(task_name(panel.task)),
        Cell(curve.label),
        Cell(str(len(curve.trials)), {"": len(curve.trials)}),
        Cell(str(lost), {"": lost}),
        Cell(grid, {"lowest": float(factors[0]), "highest": float(factors[-1]), "number": len(factors)}),
        estimate_cell(statistics.best_score(curve)),
        Cell(number(factors[best]) + edge, {"": float(factors[best]), "on edge": int(curve.best_is_on_edge)}),
        Cell(number(curve.rates_F[best]), {"": float(curve.rates_F[best])}),
        estimate_cell(statistics.tolerated_range(curve), scale=1, digits=2),
        estimate_cell(statistics.worst_drop(curve, panel.common)),
        estimate_cell(statistics.sensitivity(curve, panel.common, panel.floor), digits=2),
    ]


def _robustness_caption(group: Sequence[Panel]) -> str:
    spans = {
        task_name(p.task): f"{number(p.common[0])} to {number(p.common[1])}" if p.common else "none in common"
        for p in group
    }
    floors = ", ".join(f"{task_name(p.task)} {percent(p.floor)}" for p in group)
    return (
        f"Scores on {group[0].split}, in percent, of the checkpoint that is best on validation; the best rate is the one "
        f"with the highest mean validation score. Tolerated: decades of learning rate around it within 1 point of its "
        f"score; ≥ where the grid ends first. Worst drop: from the best to the lowest mean score. Sensitivity: expected "
        f"shortfall from the best over log-uniform rates, in points, floored at guessing ({floors}), after Wortsman et "
        f"al. 2023. Range of factors for both: {_by_task(spans)}. Diverged trials, and those whose metric is not "
        f"defined, count as guessing. Brackets: 95 % bootstrap intervals over seeds, the rate chosen anew in each draw."
    )


# --- Cells in more detail


def aggregate_tables(panels: Sequence[Panel]) -> list[Table]:
    """Median and interquartile mean at the best rate, for each task and over all tasks that a method has."""
    columns = ["task", "method", "n", "mean", "std", "median", "IQM"]
    tables = []
    for group in _groups(panels):
        rows, rules = [], []
        for panel in group:
            rules.append(len(rows))
            rows += [_aggregate_row(task_name(panel.task), c.label, [c.best_scores_S]) for c in panel.curves]
        if len(group) > 1:
            rules.append(len(rows))
            for label in _labels(group):
                scores = [c.best_scores_S for p in group for c in p.curves if c.label == label]
                if len(scores) == len(group):
                    rows.append(_aggregate_row("all", label, scores))
        caption = (
            f"Scores on {group[0].split} at the best rate, in percent. IQM: interquartile mean, without the lowest and "
            f"highest quarter (rounded down) of the values. Brackets: 95 % bootstrap intervals, seeds resampled within "
            f"each task. “all” pools the tasks, for methods that have every one."
        )
        title = f"Median and interquartile mean, {group[0].model}"
        tables.append(Table(_name("medians", group), title, caption, columns, rows, rules[1:]))
    return tables


def _aggregate_row(task: str, label: str, scores: Sequence[np.ndarray]) -> list[Cell]:
    values = [statistics.known(s) for s in scores]
    together = np.concatenate(values)
    spread = statistics.std(together) if len(values) == 1 else math.nan  # over tasks it would mean little
    return [
        Cell(task),
        Cell(label),
        Cell(str(len(together)), {"": len(together)}),
        estimate_cell(Estimate(float(together.mean()))),
        estimate_cell(Estimate(spread), digits=2),
        estimate_cell(statistics.resampled(values, lambda v_BN: np.median(v_BN, -1))),
        estimate_cell(statistics.resampled(values, statistics.iqm)),
    ]


def comparison_tables(panels: Sequence[Panel]) -> list[Table]:
    """Paired comparisons of methods by seed."""
    columns = ["task", "of", "first", "second", "first − second", "p", "n", "shown"]
    tables = []
    for group in _groups(panels):
        rows: list[list[Cell]] = []
        rules = []
        for panel in group:
            rules.append(len(rows))
            for c in statistics.compare(panel):
                higher = f"{c.higher} is higher" if c.higher else "no difference shown"
                p = Cell(MISSING) if math.isnan(c.p) else Cell(f"{c.p:.3f}" if c.p >= 0.001 else "<0.001", {"": c.p})
                difference = estimate_cell(c.difference, signed=True, digits=2)
                names = [Cell(task_name(panel.task)), Cell(c.what), Cell(c.first), Cell(c.second)]
                rows.append([*names, difference, p, Cell(str(c.n), {"": c.n}), Cell(higher)])
        caption = (
            f"Pairs share the seed, and with it split, data order and head. Score on {group[0].split} at each method's best "
            f"rate; sensitivity as in the table of robustness, where higher means less robust; both in points. Brackets: "
            f"Student's 95 % interval of the paired difference, p of the paired t-test. A method is called higher only "
            f"where the interval excludes zero. {len(rows)} comparisons, not corrected for their number."
        )
        if rows:
            title = f"Paired comparisons, {group[0].model}"
            tables.append(Table(_name("comparisons", group), title, caption, columns, rows, rules[1:]))
    return tables


# --- What else a reader must know


def notes(found: Collection, panels: Sequence[Panel]) -> list[str]:
    """What was left out, and what makes numbers doubtful."""
    said = [f"left out: {folder}: {reason}" for folder, reason in found.left_out]
    if found.failed:
        said.append(f"{len(found.failed)} failed trials are left out: {_some(found.failed)}")
    if found.unfinished:
        said.append(f"{len(found.unfinished)} trials are not finished: {_some(found.unfinished)}")
    for panel in panels:
        where = f"{task_name(panel.task)}, {panel.model}"
        for curve in panel.curves:
            if curve.best_is_on_edge:
                way = "lower" if curve.best == 0 else "higher"
                rate, factor = number(curve.rates_F[curve.best]), number(curve.factors_F[curve.best])
                said.append(
                    f"{where}: the best rate of {curve.label}, {rate} (factor {factor}), is the edge of its grid: "
                    f"try {way} rates"
                )
            if (curve.n_F != curve.n_F.max()).any():
                few = ", ".join(number(f) for f in curve.factors_F[curve.n_F != curve.n_F.max()])
                said.append(f"{where}: {curve.label} has fewer trials at factor {few} than elsewhere")
            undefined = sum(math.isnan(t.score) and not t.diverged for t in curve.trials.values())
            if undefined:
                said.append(
                    f"{where}: {undefined} trials of {curve.label} have no defined score (constant predictions)"
                )
        for what in ("data", "weights"):
            if len({_hash(trial, what) for trial in panel.trials}) > 1:
                said.append(f"{where}: not all trials had the same {what} (their hashes differ)")
    return said


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hash(trial: Trial, what: str) -> str | None:
    return (trial.result.get("made_by", {}).get(what) or {}).get("sha256")


# --- Forms


def percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def number(value: float) -> str:
    """Short: 0.25, 6e-3, 32."""
    text = f"{value:.3g}"
    if 1e-3 <= value < 1e4 and "e" not in text:
        return text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def millions(count: float) -> str:
    return f"{count / 1e6:.2g}M" if count < 1e7 else f"{count / 1e6:.0f}M"


def estimate_cell(estimate: Estimate, scale: float = 100, digits: int = 1, signed: bool = False) -> Cell:
    """`value [low, high]`, scaled."""
    if math.isnan(estimate.value):
        return Cell(MISSING)
    value, low, high = (scale * v for v in (estimate.value, estimate.low, estimate.high))
    form = f"{'+' if signed else ''}.{digits}f"
    text = ("≥ " if estimate.at_least else "") + _no_negative_zero(value, form)
    values: dict[str, float | int | str] = {"": value}
    if not math.isnan(low):
        text += f" [{_no_negative_zero(low, form)}, {_no_negative_zero(high, form)}]"
        values |= {"low": low, "high": high}
    return Cell(text.replace("-", "−"), values)


def _no_negative_zero(value: float, form: str) -> str:
    text = format(value, form)
    return text.replace("-", "+" if "+" in form else "") if float(text) == 0 else text


def markdown(table: Table) -> str:
    """A pipe table below its title, above its caption."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(t.replace("|", "\\|") for t in texts) + " |\n"

    align = [":--" if _is_text(table, i) else "--:" for i in range(len(table.columns))]
    rows = "".join(line(cell.text for cell in row) for row in table.rows)
    return f"### {table.title}\n\n{line(table.columns)}{line(align)}{rows}\n{table.caption}\n"


def latex(table: Table) -> str:
    """A table environment for the packages booktabs and graphicx."""
    align = "".join("l" if _is_text(table, i) else "r" for i in range(len(table.columns)))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(table.title + '. ' + table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(map(tex, table.columns)) + r" \\",
        r"\midrule",
    ]
    for i, row in enumerate(table.rows):
        if i in table.rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(tex(cell.text) for cell in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≥": r"$\geq$", "−": "$-$", "λ": r"$\lambda$",
    "—": "---", "–": "--", "“": "``", "”": "''", "’": "'", "…": r"\ldots{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(TEX.get(character, character) for character in text)


def to_csv(table: Table) -> str:
    """Numbers in full, a column for each of a cell's values; `#` lines hold title and caption."""
    keys = [list(dict.fromkeys(k for row in table.rows for k in row[i].values)) for i in range(len(table.columns))]
    header = [f"{c} {k}".strip() for c, ks in zip(table.columns, keys, strict=True) for k in ks or [""]]
    lines = io.StringIO()
    lines.write(f"# {table.title}. {table.caption}\n")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        writer.writerow([value for cell, ks in zip(row, keys, strict=True) for value in _csv_values(cell, ks)])
    return lines.getvalue()


def _csv_values(cell: Cell, keys: Sequence[str]) -> list[str | float | int]:
    if not keys:
        return [cell.text]
    if not cell.values and cell.text not in ("", MISSING):  # text in a column of numbers, as "0.3M"
        return [cell.text, *[""] * (len(keys) - 1)]
    return [f"{v:.6g}" if isinstance(v := cell.values.get(key, ""), float) else v for key in keys]


def _is_text(table: Table, column: int) -> bool:
    return not any(row[column].values for row in table.rows)


FORMS: dict[str, tuple[str, Callable[[Table], str]]] = {
    "markdown": ("md", markdown),
    "latex": ("tex", latex),
    "csv": ("csv", to_csv),
}
