"""One HTML file with curves, tables and every trial; it needs neither network nor other files."""

import html
import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from delora import storage
from delora.report import budget, curves, statistics
from delora.report.budget import Budget
from delora.report.statistics import Panel
from delora.report.tables import EMPTY, Cell, Table, is_text, number, some
from delora.report.trials import Trial
from delora.search import History
from delora.terminal import printable

EVALUATIONS = 60  # of a trial, drawn over training: more would not be told apart


def write(
    path: Path,
    panels: Sequence[Panel],
    tables: Sequence[Table],
    notes: Sequence[str],
    layer: str | None = None,
    factor: float | None = None,
    searches: Sequence[History] = (),
) -> Path:
    """Writes the page; returns its path.

    Args:
        layer, factor, searches: as `curves.draw` takes them.
    """
    trials = [trial for panel in panels for trial in panel.trials]
    folder = path.parent.resolve()
    logs = [(trial.folder / storage.LOG).is_file() for trial in trials]
    links = [quote(os.fsencode(os.path.relpath(trial.folder.resolve(), folder))) for trial in trials]
    facts = [_facts(trial) for trial in trials]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    shared = {key: facts[0][key] for key in keys if all(key in fact and fact[key] == facts[0][key] for fact in facts)}
    own = [key for key in keys if key not in shared]
    budgets = [budget.budgets(panel) for panel in panels]
    labels = [one.label for of_panel in budgets for one in of_panel]
    look = curves.styles([*(curve.label for panel in panels for curve in panel.curves), *labels])
    look |= curves.OF_SEARCHES if searches else {}
    data = {
        "references": {
            name: " ".join(str(1.5 * d) for d in dash) for name, dash in curves.reference_styles(panels).items()
        },
        "styles": {label: [s.color, s.marker, " ".join(str(1.5 * d) for d in s.dash)] for label, s in look.items()},
        "views": [
            *_views(panels, {id(trial): i for i, trial in enumerate(trials)}, layer, factor),
            *_budget_views(panels, budgets),
            *_search_views(searches),
        ],
        "links": links,
        "logs": logs,
        "shared": shared,
        "keys": own,
        "trials": [[fact.get(key) for key in own] for fact in facts],
    }
    parts = {
        "LINES": html.escape(curves.on_lines(panels)),
        "TITLE": html.escape(_title(panels)),
        "NOTES": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
        "ANSWERS": "".join(_table(table) for table in tables if table.name.startswith("answer")),
        "TABLES": "".join(_table(table) for table in tables if not table.name.startswith("answer")),
        "TRIALS": _table(_trials(trials), links),
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    head, *rest = page.split("<!--FILL ")  # in one pass: what is filled in may look like a place to fill
    filled = head + "".join(parts[name] + text for name, _, text in (piece.partition("-->") for piece in rest))
    storage.replace(path, filled.encode())
    return path


def _facts(trial: Trial) -> dict[str, Any]:
    """Everything about a trial by dotted key, as JSON has it: a number that is not finite is text."""
    flat = storage.flatten({**trial.result, "label": trial.label})
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in flat.items()}


def _title(panels: Sequence[Panel]) -> str:
    """The tasks of each encoder, and whether their data were generated."""
    tasks: dict[str, dict[str, None]] = {}
    for panel in panels:
        where = f"{panel.model}, {panel.data} data" if panel.synthetic else panel.model
        tasks.setdefault(where, {})[panel.facts.folder] = None
    return some([f"{', '.join(names)}: {where}" for where, names in tasks.items()], "; ")


# --- Curves: each view draws a chart for each panel, with a series for each method


def _views(panels: Sequence[Panel], index: dict[int, int], layer: str | None, factor: float | None) -> list[dict]:
    """The views that have something to show; `index` numbers the trials by their identity."""
    made = []
    places = [(quantity, x) for quantity in ("score", "drop", "distance", "change") for x in ("factor", "rate")]
    for quantity, x in [*places, *((quantity, "step") for quantity in ("score", "distance", "change", "strength"))]:
        charts: list[dict] = [
            {
                "title": title,
                "y": curves.y_label(panel, quantity, x, layer),
                "ticks": curves.labelled(panel.factors) if x == "factor" else None,
                "references": [
                    [name, _short(100 * score)]
                    for name, score in panel.references("validation" if x == "step" else None).items()
                    if quantity == "score"
                ],
                "series": _over_training(panel, quantity, index, factor)
                if x == "step"
                else _by_rate(panel, quantity, index, x),
            }
            for title, panel in zip(curves.panel_titles(panels), panels, strict=True)
        ]
        view = {
            "name": f"{quantity.replace('strength', 'λ')} {'over training' if x == 'step' else f'by {x}'}",
            "x": curves.X_LABELS[x],
            "logX": x != "step",
            "logY": quantity != "score" and x != "step",
            "least": curves.LEAST_DROP if quantity == "drop" else None,
            "charts": charts,
        }
        if any(series["line"] for chart in charts for series in chart["series"]):
            made.append(view)
    return made


def _budget_views(panels: Sequence[Panel], budgets: Sequence[Sequence[Budget]]) -> list[dict]:
    """Against what was tuned: the expected best on validation, and what it has on test."""
    made = []
    for split, axis in itertools.product(("validation", "score"), budget.AXES):
        charts: list[dict] = [
            {
                "title": title,
                "y": curves.budget_label(panel, split),
                "ticks": None,
                "references": [],
                "series": [
                    {"label": one.label, "line": _line(one.x_M(axis), 100 * getattr(one, f"{split}_3M")),
                     "points": [], "paths": []}
                    for one in of_panel if one.drawn_by(axis)
                ],
            }
            for title, panel, of_panel in zip(curves.panel_titles(panels), panels, budgets, strict=True)
            if any(one.drawn_by(axis) for one in of_panel) and (split == "validation" or panel.split == "test")
        ]  # fmt: skip
        if charts:
            name = f"budget: {'validation' if split == 'validation' else 'test'} by {axis}"
            view = {"name": name, "x": curves.X_LABELS[axis], "logX": True, "logY": False, "least": None}
            made.append({**view, "charts": charts})
    return made


def _search_views(searches: Sequence[History]) -> list[dict]:
    """Score against the configs of each search, in their order."""
    charts = []
    for search in (search for search in searches if search.best):
        lines = {curves.BEST_SO_FAR: search.best_so_far, curves.TRIED: [one.score for one in search.tried]}
        series = [
            {"label": label, "points": [], "paths": [],
             "line": [[i, _short(100 * y), None, None] for i, y in enumerate(of, start=1) if y is not None]}
            for label, of in lines.items()
        ]  # fmt: skip
        y = f"validation {curves.METRICS.get(search.metric, search.metric)} (%)"
        charts.append({"title": printable(search.root.name), "y": y, "ticks": None, "references": [], "series": series})
    view = {"name": "search", "x": "configs of the search, in order", "logX": False, "logY": False, "least": None}
    return [{**view, "charts": charts}] if charts else []


def _by_rate(panel: Panel, quantity: str, index: dict[int, int], x: str) -> list[dict]:
    made = []
    for place, curve in enumerate(panel.curves):
        x_F, values_FS = getattr(curve, f"{x}s_F"), curves.at_rates(curve, quantity)
        line = _line(x_F, curves.line(values_FS, quantity))
        values_FS, lost_FS = curves.visible(values_FS, quantity), curves.lost(curve, quantity)
        x_FS = curves.spread(x_F, curve, place, len(panel.curves))
        points = [
            [_short(x_FS[f, s]), _short(values_FS[f, s]), index[id(trial)], int(lost_FS[f, s])]
            for (f, s), trial in curve.trials.items()
            if lost_FS[f, s] or not math.isnan(values_FS[f, s])
        ]
        made.append({"label": curve.label, "line": line, "points": points, "paths": []})
    return made


def _over_training(panel: Panel, quantity: str, index: dict[int, int], factor: float | None) -> list[dict]:
    made = []
    for curve in panel.curves:
        if (at := curves.shown_factor(curve, factor)) is None:
            continue
        steps_E, values_ES = curves.over_training(curve, at, quantity, panel.floor)
        some = np.unique(np.linspace(0, len(steps_E) - 1, min(EVALUATIONS, len(steps_E))).astype(int))
        steps, values = steps_E[some], values_ES[some]
        paths = [
            [index[id(trial)], [[int(step), _short(value)] for step, value in zip(steps, values[:, s], strict=True)]]
            for s, trial in enumerate(curve.trials_at(at))
        ]
        line = _line(steps, statistics.band(values))
        made.append({"label": curve.label, "line": line, "points": [], "paths": paths if line else []})
    return made


def _line(x_F: np.ndarray, band_3F: np.ndarray) -> list[list[float | None]]:
    """x, mean and interval's ends of each rate or step that has a value."""
    return [[_short(v) for v in (x, *ends)] for x, ends in zip(x_F, band_3F.T, strict=True) if not math.isnan(ends[0])]


def _short(value: float) -> float | None:
    """To five digits, None for NaN."""
    return None if math.isnan(value) else float(f"{value:.5g}")


# --- Tables


def _table(table: Table, links: Sequence[str] | None = None) -> str:
    """A table as HTML; with links, its rows are trials, and the last cell links to their folders."""
    numeric = [not is_text(table, i) for i in range(len(table.columns))]
    heads = "".join(
        f"<th{' class=r' if right else ''}><button>{html.escape(column)}</button></th>"
        for column, right in zip(table.columns, numeric, strict=True)
    )
    rows = []
    for place, row in enumerate(table.rows):
        cells = "".join(_td(cell, right) for cell, right in zip(row, numeric, strict=True))
        if links:
            cells += f'<td><a href="{html.escape(links[place])}/">folder</a></td>'
        rows.append(f"<tr data-t={place}>{cells}</tr>" if links else f"<tr>{cells}</tr>")
    title = html.escape(table.title)
    opening, closing = f"<section><h3>{title}</h3>", "</section>\n"
    if table.aside:
        opening, closing = f"<details><summary>{title}</summary>", "</details>\n"
    return (
        f'{opening}<div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p>{html.escape(table.notes)}</p>{closing}"
    )


def _td(cell: Cell, right: bool) -> str:
    key = cell.values.get("")
    value = f" data-v={key:.6g}" if key is not None and f"{key:.6g}" != cell.text else ""
    text = html.escape(cell.text)
    return f"<td{' class=r' if right else ''}{value}>{f'<b>{text}</b>' if cell.best else text}</td>"


def _trials(trials: Iterable[Trial]) -> Table:
    columns = ["task", "encoder", "method", "factor", "lr", "seed", "status", "score", "validation", "epoch",
               curves.SYMBOLS["distance"], curves.SYMBOLS["change"], "seconds"]  # fmt: skip
    rows = []
    for trial in trials:
        best = trial.result["best"]
        rows.append(
            [
                Cell(trial.facts.folder),
                Cell(trial.model),
                Cell(trial.label),
                Cell(number(trial.factor), {"": trial.factor}),
                Cell(number(trial.rate), {"": trial.rate}),
                Cell(str(trial.seed), {"": trial.seed}),
                Cell(trial.result["status"]),
                _value(100 * trial.score, ".2f"),
                _value(100 * trial.validation, ".2f"),
                _value(best["epoch"] if best else math.nan, "d" if best else ""),
                _value(trial.distance, ".3g"),
                _value(trial.change, ".3g"),
                _value(trial.result["seconds"]["total"], ".0f"),
            ]
        )
    notes = "A click on a row shows the trial's config and provenance."
    return Table("trials", "Trials", notes, columns, rows)


def _value(value: float, form: str) -> Cell:
    return EMPTY if math.isnan(value) else Cell(format(value, form), {"": value})
