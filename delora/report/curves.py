"""Pictures of the curves, as PNG, SVG and PDF. Matplotlib is imported only when something is drawn."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delora.report import statistics
from delora.report.statistics import Curve, Panel
from delora.report.tables import number, task_name
from delora.report.trials import label_order
from delora.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
LINES = "Lines: mean over seeds, with its 95 % bootstrap interval."
METRICS = {"accuracy": "accuracy", "matthews": "Matthews corr.", "pearson_spearman": "Pearson/Spearman"}
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
    "svg.hashsalt": "delora",  # with METADATA: the same picture has the same bytes on another day
    "savefig.dpi": 200,
}
LOST: dict[str, Any] = {"marker": "x", "s": 10, "linewidths": 0.7}  # a trial without a value
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
            "markersize": 6.5 if self.marker in "PX*" else 4.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
            "linewidth": 1.5,
            "linestyle": (0, self.dash) if self.dash else "-",
        }


STYLES = {
    "LoRA": Style("#0072B2", "o"),
    "DoRA": Style("#56B4E9", "s", (5, 1.5)),
    "DeLoRA": Style("#D55E00", "D"),
    "DeLoRA (zero)": Style("#E69F00", "^", (4, 1.2, 1, 1.2)),
    "ETHER": Style("#CC79A7", "v", (1.2, 1.2)),
    "ETHER+": Style("#009E73", "P", (7, 1.5)),
}
OTHERS = [
    Style(color, marker, dash)
    for dash, (color, marker) in itertools.product(
        [(3, 1.2), (1, 1), (6, 1.2, 1, 1.2, 1, 1.2)],
        zip(["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#777777"], "X<>*hpd", strict=True),
    )
]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label, in the order of methods: the usual methods always have the same one."""
    others = itertools.cycle(OTHERS)
    return {label: STYLES.get(label) or next(others) for label in sorted(set(labels), key=label_order)}


# --- Values


def distances(curve: Curve) -> np.ndarray:
    """‖W′ − W‖_F at the end of training, (F, S); NaN for diverged and missing trials, and for 0, which has no log."""
    values_FS = np.full(curve.score_FS.shape, np.nan)
    for place, trial in curve.trials.items():
        values_FS[place] = trial.distance or math.nan
    return values_FS


@dataclass
class History:
    """What the trials of one method and rate measured in E evaluations; NaN where there is nothing."""

    steps_E: np.ndarray
    score_ES: np.ndarray
    distance_ES: np.ndarray
    strength_ES: np.ndarray
    ends: list[tuple[int, float]]  # step and score of the last evaluation of trials that diverged


def history(curve: Curve, factor: int, floor: float) -> History:
    """The evaluations of a curve's trials at the rate of an index; the score counts as the floor after divergence."""
    trials = curve.trials_at(factor)
    steps = sorted({point.step for trial in trials for point in trial.history})
    values_ES = np.full((3, len(steps), len(trials)), np.nan)
    for s, trial in enumerate(trials):
        for point in trial.history:
            values_ES[:, steps.index(point.step), s] = point.score, point.distance, point.strength
        if trial.diverged:
            values_ES[0, np.array(steps) > trial.history[-1].step, s] = floor
    ends = [(trial.history[-1].step, trial.history[-1].score) for trial in trials if trial.diverged]
    return History(np.array(steps), values_ES[0], values_ES[1], values_ES[2], ends)


def shown_factor(curve: Curve, factor: float | None) -> int | None:
    """The index of the rate that pictures over training show: the asked one, by default the best one."""
    if factor is None:
        return curve.best
    near = np.isclose(curve.factors_F, factor, rtol=1e-3)
    return int(near.argmax()) if near.any() else None


# --- Pictures


def draw(panels: Sequence[Panel], folder: Path, layer: str | None = None, factor: float | None = None) -> list[Path]:
    """Draws every picture that the trials allow into `folder`, each in all FORMATS; returns the files.

    Args:
        layer: the layers whose distance and λ the trials hold, for the labels; None for all.
        factor: the factor of the trials that are drawn over training; None for each method's best.
    """
    import matplotlib

    files = []
    with matplotlib.rc_context(RC):
        for name, figure in _pictures(panels, layer, factor):
            for kind in FORMATS:
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], metadata=METADATA[kind])
    return files


def _pictures(panels: Sequence[Panel], layer: str | None, factor: float | None) -> "Iterator[tuple[str, Figure]]":
    of_layer = f"-{layer.replace('*', 'x')}" if layer else ""
    if any(len(curve.factors_F) > 1 for panel in panels for curve in panel.curves):
        yield "score_by_factor", _by_rate(panels, "factor")
        yield "score_by_rate", _by_rate(panels, "rate")
        if not all(math.isnan(trial.distance) for panel in panels for trial in panel.trials):
            yield f"distance_by_factor{of_layer}", _distance_by_factor(panels, layer)
    if any(len(trial.history) > 1 for panel in panels for trial in panel.trials):
        yield f"training{of_layer}", _over_training(panels, layer, factor)


def panel_titles(panels: Sequence[Panel]) -> list[str]:
    """The tasks, with encoder, protocol and data where these are not the same in all panels."""
    parts = [[task_name(p.task), p.model, p.protocol, p.data] for p in panels]
    varying = [0, *(i for i in (1, 2, 3) if len({part[i] for part in parts}) > 1)]
    return [", ".join(part[i] for i in varying) for part in parts]


def _by_rate(panels: Sequence[Panel], x: str) -> "Figure":
    """Score against the rate or its factor, a panel for each task."""
    figure, axes, look = _figure(panels)
    for axis, panel in zip(axes, panels, strict=True):
        for place, curve in enumerate(panel.curves):
            x_F = curve.factors_F if x == "factor" else curve.rates_F
            x_FS, score_FS = _spread(x_F, curve, place, panel), curve.score_FS * 100
            _draw_curve(axis, look[curve.label], x_F, score_FS, x_FS, ~curve.scoreless_FS)
            lost_FS = curve.scoreless_FS
            axis.scatter(x_FS[lost_FS], score_FS[lost_FS], color=look[curve.label].color, zorder=4, **LOST)
        _rate_axis(axis, panel, x)
        axis.set_ylabel(f"{panel.split} {METRICS[TASKS[panel.task].headline]} (%)")
        _reference_lines(axis, panel)
    x_label = "learning rate" if x == "rate" else "learning rate, times each method's base rate"
    note = f"{LINES} Points: single trials. ×: diverged or no defined score, counted as guessing."
    return _finish(figure, look, x_label, note)


def _distance_by_factor(panels: Sequence[Panel], layer: str | None) -> "Figure":
    figure, axes, look = _figure(panels)
    for axis, panel in zip(axes, panels, strict=True):
        for place, curve in enumerate(panel.curves):
            x_FS = _spread(curve.factors_F, curve, place, panel)
            values_FS = distances(curve)
            _draw_curve(axis, look[curve.label], curve.factors_F, values_FS, x_FS, ~np.isnan(values_FS))
            lost_FS = np.zeros_like(curve.scoreless_FS)
            for at, trial in curve.trials.items():
                lost_FS[at] = trial.diverged
            top, color = axis.get_xaxis_transform(), look[curve.label].color
            axis.scatter(x_FS[lost_FS], np.ones(lost_FS.sum()), color=color, transform=top, clip_on=False, **LOST)
        _rate_axis(axis, panel, "factor")
        _log_distance_axis(axis)
        axis.set_ylabel(_over(layer, "‖W′ − W‖"))
    note = f"At the end of training. {LINES} Points: single trials. × at the top: diverged, without a distance."
    return _finish(figure, look, "learning rate, times each method's base rate", note)


def _over_training(panels: Sequence[Panel], layer: str | None, factor: float | None) -> "Figure":
    """Score, distance and λ against the training step, a column for each panel."""
    histories = [
        [(c, history(c, at, p.floor)) for c in p.curves if (at := shown_factor(c, factor)) is not None] for p in panels
    ]
    quantities = ("score_ES", "distance_ES", "strength_ES")
    rows = [q for q in quantities if any(not np.isnan(getattr(h, q)).all() for hs in histories for _, h in hs)]
    figure, axes, look = _figure(panels, len(rows))
    for axis, (quantity, (panel, shown)) in zip(
        axes, itertools.product(rows, zip(panels, histories, strict=True)), strict=True
    ):
        for curve, values in shown:
            _draw_history(axis, values, quantity, look[curve.label])
        if quantity == "score_ES":
            axis.set_ylabel(f"validation {METRICS[TASKS[panel.task].headline]} (%)")
            _reference_lines(axis, panel)
        else:
            axis.set_ylabel(_over(layer, "λ" if quantity == "strength_ES" else "‖W′ − W‖"))
        axis.set_xlim(left=0)
    chosen = f"at {factor_text(factor)} times the base rate" if factor is not None else "at each method's best rate"
    note = f"Trials {chosen}. {LINES} Thin: single trials. ×: diverged; score counted as guessing from there on."
    return _finish(figure, look, "training step", note)


def _figure(panels: Sequence[Panel], rows: int = 1) -> tuple["Figure", list["Axes"], dict[str, Style]]:
    """A figure with titled axes by rows: a column for each panel, or if `rows` is 1 up to four columns."""
    from matplotlib.figure import Figure

    columns = len(panels) if rows > 1 else min(len(panels), 4)
    lines = max(rows, -(-len(panels) // columns))
    single = columns * lines == 1
    size = (5.6, 3.7) if single else (max(5.6, 2.9 * columns + 0.3), 2.5 * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(rows * len(panels))]
    for axis, title in zip(axes, panel_titles(panels), strict=False):
        axis.set_title(title)
    return figure, axes, styles(curve.label for panel in panels for curve in panel.curves)


def _spread(x_F: np.ndarray, curve: Curve, place: int, panel: Panel) -> np.ndarray:
    """Where trials are drawn, (F, S): a little apart by method and seed."""
    step = np.diff(np.log(x_F)).min() if len(x_F) > 1 else math.log(2)
    share_S = (np.arange(len(curve.seeds)) + 0.5) / len(curve.seeds)
    return x_F[:, None] * np.exp(step * 0.55 * ((place + share_S) / len(panel.curves) - 0.5))


def _draw_curve(
    axis: "Axes", style: Style, x_F: np.ndarray, values_FS: np.ndarray, x_FS: np.ndarray, shown_FS: np.ndarray
) -> None:
    mean_F, low_F, high_F = statistics.band(values_FS)
    axis.fill_between(x_F, low_F, high_F, color=style.color, alpha=0.15, linewidth=0, zorder=1)
    points: dict[str, Any] = {"s": 6, "color": style.color, "marker": style.marker, "alpha": 0.35, "linewidths": 0}
    axis.scatter(x_FS[shown_FS], values_FS[shown_FS], **points, zorder=2)
    axis.plot(x_F, mean_F, **style.line(), zorder=3)


def _draw_history(axis: "Axes", values: History, quantity: str, style: Style) -> None:
    values_ES = getattr(values, quantity) * (100 if quantity == "score_ES" else 1)
    if np.isnan(values_ES).all():
        return
    mean_E, low_E, high_E = statistics.band(values_ES)
    axis.fill_between(values.steps_E, low_E, high_E, color=style.color, alpha=0.15, linewidth=0, zorder=1)
    axis.plot(values.steps_E, values_ES, color=style.color, linewidth=0.5, alpha=0.35, zorder=2)
    axis.plot(values.steps_E, mean_E, **style.line(), markevery=max(1, len(mean_E) // 8), zorder=3)
    if quantity == "score_ES" and values.ends:
        steps, scores = np.array(values.ends).T
        axis.scatter(steps, 100 * scores, color=style.color, zorder=4, **LOST)


def _reference_lines(axis: "Axes", panel: Panel) -> None:
    for value, name, dash in ((panel.floor, "guessing", (4, 3)), (panel.head_only, "head only", (1, 1.5))):
        if value is not None:
            axis.axhline(100 * value, color="#777", linewidth=0.8, linestyle=(0, dash), zorder=0)
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axis.annotate(name, (0.01, 100 * value), (0, 1.5), **place, color="#666", fontsize=7, va="bottom")


def _rate_axis(axis: "Axes", panel: Panel, x: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    if x == "rate":
        axis.xaxis.set_major_locator(LogLocator(numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return
    factors = sorted({float(factor) for curve in panel.curves for factor in curve.factors_F})
    axis.xaxis.set_major_locator(FixedLocator(factors[:: -(-len(factors) // 10)]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: factor_text(value)))
    axis.axvline(1, color="#ccc", linewidth=0.7, zorder=0)


def _log_distance_axis(axis: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def factor_text(factor: float) -> str:
    """4, or ¼ as 1/4."""
    if factor < 1 and abs(1 / factor - round(1 / factor)) < 1e-4:
        return f"1/{round(1 / factor)}"
    return number(factor)


def _over(layer: str | None, quantity: str) -> str:
    return f"{quantity}, {layer if layer else 'mean over layers'}"


def _finish(figure: "Figure", look: dict[str, Style], x_label: str, note: str) -> "Figure":
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style.line()) for label, style in look.items()]
    columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.35)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)
    lines = textwrap.wrap(note, int(20 * figure.get_figwidth()))
    figure.supxlabel(x_label + "\n" * len(lines), fontsize=8.5)  # keeps room for the note
    figure.text(0.5, 0.005, "\n".join(lines), fontsize=6.5, color="#666", ha="center", va="bottom")
    return figure
