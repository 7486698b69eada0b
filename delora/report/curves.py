"""Pictures of the curves, as PNG, SVG and PDF. Matplotlib is imported only when something is drawn."""

import functools
import io
import itertools
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delora import storage
from delora.report import budget, statistics
from delora.report.statistics import Curve, Panel
from delora.report.tables import number
from delora.report.trials import label_order, looks
from delora.search import History
from delora.terminal import counted, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
DRAWN = 20  # methods of a picture: more would not be told apart
LEAST_DROP = 0.1  # points: what is less, as the best's own 0, is drawn there, for the axis is logarithmic
METRICS = {"accuracy": "accuracy", "matthews": "Matthews corr.", "pearson_spearman": "Pearson/Spearman"}
SYMBOLS = {"distance": "‖W′ − W‖", "change": "‖h′ − h‖ / ‖h‖", "strength": "λ"}
X_LABELS = {
    "factor": "learning rate, times each method's base rate",
    "rate": "learning rate",
    "step": "training step",
    "trials": "configs tried",
    "hours": "hours of one device",
    "epochs": "trial-epochs",
}
RC: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444",
    "xtick.color": "#444",
    "ytick.color": "#444",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # a name may hold dollars
    "svg.hashsalt": "delora",  # with METADATA: the same picture has the same bytes on another day
    "savefig.dpi": 200,
}
LOST: dict[str, Any] = {"marker": "x", "s": 10, "linewidths": 0.7, "zorder": 4}  # a trial without a value
METADATA: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


# --- Styles: colours of Okabe and Ito, and for grey prints a marker and a dash each


@dataclass(frozen=True)
class Style:
    """How a method is drawn; `dash` holds lengths on and off, empty for a solid line."""

    color: str
    marker: str
    dash: tuple[float, ...] = ()

    def line(self) -> dict[str, Any]:
        """Keyword arguments of a Line2D; thin markers are drawn larger."""
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": 6.5 if self.marker in "P*" else 4.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
            "linewidth": 1.5,
            "linestyle": (0, self.dash) if self.dash else "-",
        }


OTHERS = [
    Style(color, marker, dash)
    for dash, (color, marker) in itertools.product(
        [(3, 1.2), (1, 1), (6, 1.2, 1, 1.2, 1, 1.2)],
        zip(["#56B4E9", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#777777"], "<>*hpdo", strict=True),
    )
]


@functools.cache
def known_styles() -> dict[str, Style]:
    """The styles of conf/method by label: a colour, a marker, and the lengths of a dash on and off."""
    found = {}
    for look in looks().values():
        for variant, text in look.styles.items():
            color, marker, *dash = text.split()
            label = f"{look.title} ({variant})" if variant else look.title
            found[label] = Style(color, marker, tuple(map(float, dash)))
    return found


def reference_styles(panels: Iterable[Panel]) -> dict[str, tuple[float, ...]]:
    """The dash of each reference, in grey."""
    names = dict.fromkeys(name for panel in panels for name in panel.references())
    return dict(zip(names, itertools.cycle([(4, 3), (1, 1.5), (8, 2, 1, 2)]), strict=False))


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label, in the order of methods: the usual methods always have the same one."""
    others = itertools.cycle(OTHERS)
    return {label: known_styles().get(label) or next(others) for label in sorted(set(labels), key=label_order)}


# --- Values: of a quantity: "score" (percent), "drop" (points), "distance", "change" (of hidden states), "strength" (λ)


def at_rates(curve: Curve, quantity: str) -> np.ndarray:
    """Score, its drop from the mean at the curve's best rate, or distance or change at the end of training, (F, S).

    NaN where there is none, and for a distance or change of 0, which has no log.
    """
    if quantity == "score":
        return 100 * curve.score_FS
    if quantity == "drop":
        drop_FS = 100 * (np.nanmean(curve.best_scores_S) - curve.score_FS)
        return drop_FS if len(curve.factors_F) > 1 else np.full_like(drop_FS, np.nan)
    values_FS = np.full(curve.score_FS.shape, np.nan)
    for place, trial in curve.trials.items():
        values_FS[place] = getattr(trial, quantity) or math.nan
    return values_FS


def lost(curve: Curve, quantity: str) -> np.ndarray:
    """Which trials are drawn as lost, (F, S): those without a score, or that diverged before the end."""
    return curve.scoreless_FS if quantity in ("score", "drop") else curve.diverged_FS


def visible(values: np.ndarray, quantity: str) -> np.ndarray:
    """Where values are drawn: a drop not below the axis."""
    return np.maximum(values, LEAST_DROP) if quantity == "drop" else values


def line(values_FS: np.ndarray, quantity: str) -> np.ndarray:
    """Mean over the seeds and interval's ends at each rate, (3, F); a drop's interval is the score's, drawn there."""
    band_3F = visible(statistics.band(values_FS), quantity)
    if quantity == "drop":
        band_3F[1:] = np.nan
    return band_3F


def spread(x_F: np.ndarray, curve: Curve, place: int, curves: int) -> np.ndarray:
    """Where trials are drawn, (F, S): a little apart by seed, and by the place of their curve among all curves."""
    step = min([math.log(2), *np.diff(np.log(x_F))])
    share_S = (np.arange(len(curve.seeds)) + 0.5) / len(curve.seeds)
    return x_F[:, None] * np.exp(step * 0.55 * ((place + share_S) / curves - 0.5))


def over_training(curve: Curve, factor: int, quantity: str, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """What the trials at the rate of an index measured in E evaluations; a score is the floor's after divergence.

    Returns:
        Steps (E,) and values (E, S of these trials), NaN where there is none.
    """
    trials = curve.trials_at(factor)
    steps = sorted({point.step for trial in trials for point in trial.history})
    values_ES = np.full((len(steps), len(trials)), np.nan)
    for s, trial in enumerate(trials):
        for point in trial.history:
            values_ES[steps.index(point.step), s] = getattr(point, quantity)
        if trial.diverged and quantity == "score":
            values_ES[np.array(steps) > trial.last_step, s] = floor
    return np.array(steps), values_ES * (100 if quantity == "score" else 1)


def shown_factor(curve: Curve, factor: float | None) -> int | None:
    """The index of the rate that pictures over training show: the asked one, by default the best one."""
    if factor is None:
        return curve.best
    near = np.isclose(curve.factors_F, factor, rtol=1e-3)
    return int(near.argmax()) if near.any() else None


# --- Pictures


def draw(
    panels: Sequence[Panel],
    folder: Path,
    layer: str | None = None,
    factor: float | None = None,
    formats: Iterable[str] = FORMATS,
    searches: Sequence[History] = (),
) -> list[Path]:
    """Draws every picture that the trials allow into `folder`, each in all formats; returns the files.

    Args:
        layer: the layers whose distance, λ and change the trials hold, for the labels; None for all.
        factor: the factor of the trials that are drawn over training; None for each method's best.
        searches: whose histories are drawn too.
    """
    import matplotlib

    files = []
    with matplotlib.rc_context(RC):
        for name, figure in itertools.chain(_pictures(panels, layer, factor), _of_searches(searches)):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # the layout is found once for all formats
            for kind in formats:
                files.append(folder / f"{name}.{kind}")
                drawn = io.BytesIO()
                figure.savefig(drawn, format=kind, metadata=METADATA[kind])
                storage.replace(files[-1], drawn.getvalue())
    return files


def _pictures(panels: Sequence[Panel], layer: str | None, factor: float | None) -> "Iterator[tuple[str, Figure]]":
    whole = panels
    panels, left_out = drawn(panels)
    of_layer = "-" + re.sub(r"[^\w.-]", "x", layer) if layer else ""
    full = [panel for panel in panels if not panel.stopped]
    if any(len(curve.factors_F) > 1 for panel in full for curve in panel.curves):
        yield "score_by_factor", _by_rate(full, "factor", ("score", "drop"), left_out=left_out)
        yield "score_by_rate", _by_rate(full, "rate", ("score", "drop"), left_out=left_out)
        for quantity in ("distance", "change"):
            if any(getattr(trial, quantity) > 0 for panel in full for trial in panel.trials):
                yield f"{quantity}_by_factor{of_layer}", _by_rate(full, "factor", (quantity,), layer, left_out)
    if any(len(trial.history) > 1 for panel in panels for trial in panel.trials):
        yield f"training{of_layer}", _over_training(panels, layer, factor, left_out)
    yield from ((f"budget_by_{axis}", figure) for axis in budget.AXES if (figure := _by_budget(whole, axis)))


def drawn(panels: Sequence[Panel]) -> tuple[list[Panel], str]:
    """The panels with the methods that a picture has room for, and a sentence on those that are left out."""
    ranks: dict[str, int] = {}  # the best that a method has in any panel, on validation
    for panel in panels:
        scores = {curve.label: np.nanmean(curve.validation_FS[curve.best]) for curve in panel.curves}
        for rank, label in enumerate(sorted(scores, key=lambda label: -scores[label])):
            ranks[label] = min(rank, ranks.get(label, rank))
    if len(ranks) <= DRAWN:
        return list(panels), ""
    kept = {*sorted(ranks, key=lambda label: (ranks[label], label_order(label)))[:DRAWN]}
    few = [replace(panel, curves=[curve for curve in panel.curves if curve.label in kept]) for panel in panels]
    said = f" Drawn are the {DRAWN} of {len(ranks)} methods that are best on validation; the tables hold all."
    return [panel for panel in few if panel.curves], said


def panel_titles(panels: Sequence[Panel]) -> list[str]:
    """Task and encoder, generated data, and protocol and data where these are not the same in all panels."""
    several_protocols, several_data = (len({getattr(p, part) for p in panels}) > 1 for part in ("protocol", "data"))
    return [
        ", ".join(
            [
                panel.facts.folder,
                panel.model,
                *([panel.protocol] if several_protocols else []),
                *([f"{panel.data} data"] if panel.synthetic or several_data else []),
            ]
        )
        for panel in panels
    ]


def on_lines(panels: Iterable[Panel]) -> str:
    """What the lines are, with the number of seeds."""
    n = sorted({len(curve.seeds) for panel in panels for curve in panel.curves})
    seeds = counted(n[-1], "seed") if len(n) == 1 else f"{n[0]} to {counted(n[-1], 'seed')}"
    if n[-1] < statistics.FEWEST:
        return f"Lines: mean over {seeds}, too few for an interval."
    from_there_on = f", from {statistics.FEWEST} seeds on" if n[0] < statistics.FEWEST else ""
    return f"Lines: mean over {seeds}, with its 95 % bootstrap interval{from_there_on}."


def y_label(panel: Panel, quantity: str, x: str, layer: str | None) -> str:
    if quantity == "drop":
        return "drop from the best (points)"
    if quantity == "score":
        split = "validation" if x == "step" else panel.split
        return f"{split} {METRICS.get(panel.facts.headline, panel.facts.headline)} (%)"
    return f"{SYMBOLS[quantity]}, {layer or 'mean over layers'}"


def _by_rate(
    panels: Sequence[Panel], x: str, quantities: Sequence[str], layer: str | None = None, left_out: str = ""
) -> "Figure":
    """Quantities against the rate or its factor: a row for each, in it an axis for each panel."""
    figure, axes, look = _figure(panels, len(quantities))
    references = reference_styles(panels) if "score" in quantities else {}
    for axis, (quantity, panel) in zip(axes, itertools.product(quantities, panels), strict=True):
        for place, curve in enumerate(panel.curves):
            x_F, values_FS = getattr(curve, f"{x}s_F"), at_rates(curve, quantity)
            style, x_FS = look[curve.label], spread(x_F, curve, place, len(panel.curves))
            _draw_band(axis, style, x_F, line(values_FS, quantity))
            if quantity == "drop":
                continue  # the trials are those of the scores above
            lost_FS = lost(curve, quantity)
            points: dict[str, Any] = {"s": 6, "marker": style.marker, "alpha": 0.35, "linewidths": 0, "zorder": 2}
            shown_FS = ~lost_FS & ~np.isnan(values_FS)
            axis.scatter(x_FS[shown_FS], values_FS[shown_FS], color=style.color, **points)
            if quantity == "score":
                axis.scatter(x_FS[lost_FS], values_FS[lost_FS], color=style.color, **LOST)
            else:
                top: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
                axis.scatter(x_FS[lost_FS], np.ones(lost_FS.sum()), color=style.color, **LOST, **top)
        _rate_axis(axis, panel, x)
        axis.set_ylabel(y_label(panel, quantity, x, layer))
        if quantity == "score":
            _reference_lines(axis, panel.references(), references)
        elif quantity == "drop" or any(getattr(trial, quantity) > 0 for trial in panel.trials):
            _log_axis(axis, LEAST_DROP if quantity == "drop" else None)
    note = "×: diverged or no defined score, counted as guessing."
    if "drop" in quantities:
        note += " Drop: of the mean, from that at the method's best rate."
    if "score" not in quantities:
        note = f"× at the top: diverged, without a {quantities[0]}. At the end of training."
    if "change" in quantities:
        note += " h: hidden states behind the encoder's layers, on validation rows; h′: after training."
    elif "distance" in quantities and (without := _without_distance(panels)):
        note += f" Without W′: {', '.join(without)}."
    note = f"{on_lines(panels)} Points: single trials. {note}{left_out}"
    return _finish(figure, look, references, X_LABELS[x], note)


def _without_distance(panels: Sequence[Panel]) -> list[str]:
    """The methods whose trials have ended, and have no ΔW."""
    ended = [(c.label, t.distance) for p in panels for c in p.curves for t in c.trials.values() if not t.diverged]
    measured = {label for label, distance in ended if not math.isnan(distance)}
    return sorted({label for label, _ in ended} - measured, key=label_order)


def _over_training(panels: Sequence[Panel], layer: str | None, factor: float | None, left_out: str = "") -> "Figure":
    """Score, distance, change and λ against the training step, a column for each panel."""
    drawn = {
        (quantity, p): [
            (curve, at, *over_training(curve, at, quantity, panel.floor))
            for curve in panel.curves
            if (at := shown_factor(curve, factor)) is not None
        ]
        for quantity in ("score", "distance", "change", "strength")
        for p, panel in enumerate(panels)
    }
    measured = {quantity for (quantity, _), shown in drawn.items() for *_, v_ES in shown if not np.isnan(v_ES).all()}
    drawn = {place: shown for place, shown in drawn.items() if place[0] in measured}
    figure, axes, look = _figure(panels, len(measured))
    references = reference_styles(panels) if "score" in measured else {}
    for axis, ((quantity, p), shown) in zip(axes, drawn.items(), strict=True):
        for curve, at, steps_E, values_ES in shown:
            style = look[curve.label]
            if np.isnan(values_ES).all():
                continue
            _draw_band(axis, style, steps_E, statistics.band(values_ES), markevery=max(1, len(steps_E) // 8))
            axis.plot(steps_E, values_ES, color=style.color, linewidth=0.5, alpha=0.35, zorder=2)
            ends = [trial.history[-1] for trial in curve.trials_at(at) if trial.diverged and trial.history]
            if quantity == "score":
                scores = [100 * end.score for end in ends]
                axis.scatter([end.step for end in ends], scores, color=style.color, **LOST)
        axis.set_ylabel(y_label(panels[p], quantity, "step", layer))
        if quantity == "score":
            _reference_lines(axis, panels[p].references("validation"), references)
        axis.set_xlim(left=0)
    chosen = f"at {factor_text(factor)} times the base rate" if factor is not None else "at each method's best rate"
    note = f"Trials {chosen}. {on_lines(panels)} Thin: single trials. ×: diverged; from there on it counts as guessing."
    return _finish(figure, look, references, X_LABELS["step"], note + left_out)


def _by_budget(panels: Sequence[Panel], axis: str) -> "Figure | None":
    """Expected best on validation, and what it has on test, against the budget; None where nothing was tuned."""
    of_panels = {id(panel): [b for b in budget.budgets(panel) if b.drawn_by(axis)] for panel in panels}
    panels = [panel for panel in panels if of_panels[id(panel)]]
    if not panels:
        return None
    best: dict[str, float] = defaultdict(float)
    for one in itertools.chain(*of_panels.values()):
        best[one.label] = max(best[one.label], one.validation_3M[0, -1])
    kept = sorted(best, key=lambda label: -best[label])[:DRAWN]
    splits = ["validation", *(["score"] if any(panel.split == "test" for panel in panels) else [])]
    figure, axes, _ = _figure(panels, len(splits))
    look = styles(kept)
    for at, (split, panel) in zip(axes, itertools.product(splits, panels), strict=True):
        shown = [one for one in of_panels[id(panel)] if one.label in kept]
        for one in shown:
            x_M, every = one.x_M(axis), max(1, one.configs // 8)
            _draw_band(at, look[one.label], x_M, 100 * getattr(one, f"{split}_3M"), markevery=every)
        means = np.concatenate([100 * getattr(one, f"{split}_3M")[0] for one in shown])
        room = 0.2 * max(float(np.ptp(means)), 1)
        at.set_ylim(means.min() - room, means.max() + room)  # of the bands of few configs that is a part
        _budget_axis(at, [float(x) for one in shown for x in one.x_M(axis)], axis)
        at.set_ylabel(budget_label(panel, split))
    note = (
        f"Expected best of so many configs, drawn at random from those that were tried; a config's validation score is "
        f"the mean over its seeds. Bands: 95 % intervals, for up to half of a method's configs."
        f"{f' Drawn are the {DRAWN} of {len(best)} methods that are best.' if len(best) > DRAWN else ''}"
    )
    devices = ", ".join(sorted({t.result["made_by"]["device"] for panel in panels for t in panel.trials}))
    return _finish(figure, look, {}, f"{X_LABELS[axis]}{f' ({devices})' if axis == 'hours' else ''}", note)


def budget_label(panel: Panel, split: str) -> str:
    """Of the expected best: "validation", or what the same config has on the panel's split."""
    part = "best validation" if split == "validation" else f"its {panel.split}"
    return f"{part} {METRICS.get(panel.facts.headline, panel.facts.headline)} (%)"


def _budget_axis(axis: "Axes", values: Sequence[float], kind: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    if kind == "trials":
        axis.xaxis.set_major_locator(FixedLocator(budget.shown(int(max(values)))))
    else:
        subs = (1, 2, 5) if max(values) / min(values) < 100 else (1,)
        axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


BEST_SO_FAR, TRIED = "best so far", "config"
OF_SEARCHES = {BEST_SO_FAR: Style("#0072B2", "s"), TRIED: Style("#777777", "o", (1, 3))}


def _of_searches(searches: Sequence[History]) -> "Iterator[tuple[str, Figure]]":
    """Score against the configs of each search, in the order in which they were asked for."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    searches = [search for search in searches if search.best]
    if not searches:
        return
    figure = Figure(figsize=(5.6, 2.6 * len(searches) + 1.1), layout="constrained")
    for i, search in enumerate(searches):
        axis = figure.add_subplot(len(searches), 1, i + 1)
        axis.set_title(printable(f"{search.root.name}, {search.task}"))
        x = np.arange(1, len(search.tried) + 1)
        scores = np.array([math.nan if one.score is None else 100 * one.score for one in search.tried])
        top = np.array([math.nan if best is None else 100 * best for best in search.best_so_far])
        axis.plot(x, top, color=OF_SEARCHES[BEST_SO_FAR].color, linewidth=1.5, drawstyle="steps-post", zorder=3)
        axis.scatter(x, scores, s=14, color=OF_SEARCHES[TRIED].color, linewidths=0, zorder=4)
        lost = np.array([one.status in ("diverged", "stopped", "failed") for one in search.tried])
        axis.scatter(x[lost], np.zeros(lost.sum()), color="#444", transform=axis.get_xaxis_transform(), **LOST)
        axis.set_ylabel(f"validation {METRICS.get(search.metric, search.metric)} (%)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    note = (
        "Each config's mean over its seeds. × at the bottom: diverged, stopped or failed."
        if any(len(search.seeds) > 1 for search in searches)
        else "× at the bottom: diverged, stopped or failed."
    )
    shares = [f"{key} {share:.2f}" for search in searches for key, share in search.importance.items()]
    note += f" Importance of the keys: {', '.join(shares)}." if shares and len(searches) == 1 else ""
    yield "search", _finish(figure, OF_SEARCHES, {}, "configs of the search, in order", note)


def _figure(panels: Sequence[Panel], rows: int = 1) -> tuple["Figure", list["Axes"], dict[str, Style]]:
    """A figure with axes row by row, those of the first titled; panels stand in up to four columns, rows below them."""
    from matplotlib.figure import Figure

    lines = -(-len(panels) // 4)
    columns = -(-len(panels) // lines)
    single = columns * lines * rows == 1
    size = (5.6, 3.7) if single else (max(5.6, 2.9 * columns + 0.3), 2.5 * lines * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    places = [divmod(p, columns) for p in range(len(panels))]
    axes = [
        figure.add_subplot(lines * rows, columns, (line * rows + row) * columns + column + 1)
        for row in range(rows)
        for line, column in places
    ]
    for axis, title in zip(axes, panel_titles(panels), strict=False):
        axis.set_title(textwrap.fill(title, int(11 * size[0] / columns)))
    return figure, axes, styles(curve.label for panel in panels for curve in panel.curves)


def _draw_band(axis: "Axes", style: Style, x_F: np.ndarray, band_3F: np.ndarray, **line: Any) -> None:
    """Mean and interval over the seeds, as `statistics.band` has them."""
    mean_F, low_F, high_F = band_3F
    axis.fill_between(x_F, low_F, high_F, color=style.color, alpha=0.15, linewidth=0, zorder=1)
    axis.plot(x_F, mean_F, **style.line(), **line, zorder=3)


def _reference_lines(axis: "Axes", scores: dict[str, float], dashes: dict[str, tuple[float, ...]]) -> None:
    for name, value in scores.items():
        axis.axhline(100 * value, **_reference(dashes[name]), zorder=0)


def _reference(dash: tuple[float, ...]) -> dict[str, Any]:
    return {"color": "#777", "linewidth": 0.9, "linestyle": (0, dash)}


def _rate_axis(axis: "Axes", panel: Panel, x: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    if x == "rate":
        axis.xaxis.set_major_locator(LogLocator(numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return
    axis.xaxis.set_major_locator(FixedLocator(labelled(panel.factors)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: factor_text(value)))
    axis.axvline(1, color="#ccc", linewidth=0.7, zorder=0)


def _log_axis(axis: "Axes", least: float | None = None) -> None:
    """A logarithmic y-axis; `least` stands for all that is less."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    if least:
        axis.set_ylim(bottom=0.8 * least, top=max(axis.get_ylim()[1], 20 * least))
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    least_text = {number(least): f"≤ {number(least)}"} if least else {}
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: least_text.get(number(value), number(value))))


def labelled(factors: Sequence[float]) -> list[float]:
    """The ascending factors that an axis has room to label: at most ten, evenly apart, among them the one nearest 1."""
    every = -(-len(factors) // 10)
    nearest = min(range(len(factors)), key=lambda i: abs(math.log(factors[i])))
    return list(factors[nearest % every :: every])


def factor_text(factor: float) -> str:
    """4, or ¼ as 1/4."""
    if factor < 1 and abs(1 / factor - round(1 / factor)) < 1e-4:
        return f"1/{round(1 / factor)}"
    return number(factor)


def _finish(
    figure: "Figure", look: dict[str, Style], references: dict[str, tuple[float, ...]], x_label: str, note: str
) -> "Figure":
    from matplotlib.lines import Line2D

    longest = int((figure.get_figwidth() - 0.75) / 0.065)  # letters, at the font size of RC

    def cut(label: str) -> str:
        return label if len(label) <= longest else f"{label[: longest - 1]}…"

    handles = [Line2D([], [], label=cut(label), **style.line()) for label, style in look.items()]
    handles += [Line2D([], [], label=cut(name), **_reference(dash)) for name, dash in references.items()]
    widest = 0.75 + 0.065 * min(longest, max(map(len, [*look, *references])))  # inches
    rows = -(-len(handles) // max(1, int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, rows - 2))
    columns = -(-len(handles) // rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)
    lines = textwrap.wrap(note, int(20 * figure.get_figwidth()))
    figure.supxlabel(x_label + "\n" * len(lines), fontsize=8.5)  # keeps room for the note
    figure.text(0.5, 0.005, "\n".join(lines), fontsize=6.5, color="#666", ha="center", va="bottom")
    return figure
