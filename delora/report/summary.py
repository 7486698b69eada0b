"""What wandb's summary run of a sweep shows: the report's curves, tables and pictures, from results on disk."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from delora import search
from delora.report import budget, curves, statistics, tables, trials
from delora.report.statistics import Panel

X = "log2 of the factor on the base rate"  # wandb's line series have no logarithmic axis


def make(sweep: Path, pictures: Path) -> dict[str, Any]:
    """Plain data for `delora.tracking.Tracker.show`.

    Args:
        pictures: a folder to draw into.

    Raises:
        UserError: what `trials.read` raises.
    """
    found, searches = trials.read([sweep]), search.below([sweep])[0]
    panels = statistics.panels(found.trials, stopped=found.stopped)
    made = [*tables.answers(panels), *map(tables.of_search, searches), *tables.all_tables(panels)]
    drawn = curves.draw(panels, pictures, formats=["png"], searches=searches)
    return {
        "charts": list(_charts(panels)),
        "tables": {
            table.title: [table.columns, *([cell.text for cell in row] for row in table.rows)]
            for table in made
            if not table.aside
        },
        "pictures": {path.stem: str(path) for path in drawn},
    }


def _charts(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    """Means over the seeds by factor: a chart for each panel and quantity, a line for each method and reference."""
    for title, panel in zip(curves.panel_titles(panels), panels, strict=True):
        for quantity in ("score", "distance", "change"):
            lines = {}
            for curve in panel.curves:
                mean_F = statistics.band(curves.at_rates(curve, quantity))[0]
                there = ~np.isnan(mean_F)
                if len(curve.factors_F) > 1 and there.any():
                    lines[curve.label] = [np.log2(curve.factors_F[there]).tolist(), mean_F[there].tolist()]
            if not lines:
                continue
            if quantity == "score":
                ends = [min(min(x) for x, _ in lines.values()), max(max(x) for x, _ in lines.values())]
                lines |= {name: [ends, [100 * value] * 2] for name, value in panel.references().items()}
            y = curves.y_label(panel, quantity, "factor", None)
            yield {"name": f"{quantity} by factor, {title}", "title": f"{title}: {y}", "x": X, "lines": lines}
        splits = ["validation", *(["score"] if panel.split == "test" else [])]
        for split, axis in itertools.product(splits, budget.AXES if (tuned := budget.budgets(panel)) else ()):
            lines = {
                one.label: [one.x_M(axis).tolist(), (100 * getattr(one, f"{split}_3M")[0]).tolist()]
                for one in tuned
                if one.drawn_by(axis)
            }
            if not lines:
                continue
            name = f"budget by {axis}, {split.replace('score', 'test')}, {title}"
            y = curves.budget_label(panel, split)
            yield {"name": name, "title": f"{title}: {y}", "x": curves.X_LABELS[axis], "lines": lines}
