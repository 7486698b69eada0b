"""Pictures of the curves, as PNG, SVG and PDF. Matplotlib is imported only when something is drawn."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delora.report import statistics
from delora.report.statistics import Curve, Panel
from delora.report.tables import number, task_name
from delora.report.trials import choose_layer
from delora.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
MARKS = "Lines: mean over seeds, with its 95 % bootstrap interval. Points: single trials. "
SHORT_METRICS = {"accuracy": "accuracy", "matthews": "Matthews corr.", "pearson_spearman": "Pearson/Spearman"}
RC = {
    "font.size": 8.5, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.labelsize": 8.5, "legend.fontsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#444", "axes.linewidth": 0.7,
    "xtick.color": "#444", "ytick.color": "#444", "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "xtick.minor.visible": False, "pdf.fonttype": 42, "svg.hashsalt": "delora", "savefig.dpi": 200,
}  # fmt: skip
# The same picture has the same bytes on another day.
METADATA: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


# --- Styles: colours of Okabe and Ito, and for grey prints a marker and a dash each


@dataclass(frozen=True)
class Style:
    """How a method is drawn; `dash` is a list of lengths on and off, empty for a solid line."""

    color: str
    marker: str
    dash: tuple[float, ...]

    @property
    def size(self) -> float:
        """Of the marker: thin shapes are drawn larger."""
        return 6.5 if self.marker in "PX*" else 4.5


STYLES = {
    "LoRA": Style("#0072B2", "o", ()),
    "DoRA": Style("#56B4E9", "s", (5, 1.5)),
    "DeLoRA": Style("#D55E00", "D", ()),
    "DeLoRA (zero)": Style("#E69F00", "^", (4, 1.2, 1, 1.2)),
    "ETHER": Style("#CC79A7", "v", (1.2, 1.2)),
    "ETHER+": Style("#009E73", "P", (7, 1.5)),
}
OTHERS = [
    Style(color, marker, dash)
    for color, (marker, dash) in zip(
        itertools.chain(
            ["#000000"], itertools.cycle(["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"])
        ),
        itertools.product("X<>*hp", [(3, 1.2), (1, 1), (6, 1.2, 1, 1.2, 1, 1.2), ()]),
        strict=False,
    )
]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label: the usual methods always have the same one."""
    others = itertools.cycle(OTHERS)
    return {label: STYLES.get(label) or next(others) for label in sorted(set(labels), key=statistics.label_order)}


# --- Values


def distances(curve: Curve, layer: str | None) -> np.ndarray:
    """‖W′ − W‖ at the end of training, (F, S): of one layer, or the mean over the layers. NaN for diverged trials."""
    values_FS = np.full(curve.score_FS.shape, np.nan)
    for place, trial in curve.trials.items():
        if trial.distances:
            chosen = [choose_layer(trial.distances, layer)] if layer else list(trial.distances)
            values_FS[place] = np.mean([trial.distances[name] for name in chosen])
    return values_FS


@dataclass
class History:
    """What the trials of one method and rate measured over E evaluations of S seeds; NaN where there is nothing."""

    steps_E: np.ndarray
    score_ES: np.ndarray
    distance_ES: np.ndarray
    strength_ES: np.ndarray
    ends: list[tuple[int, float]]  # step and score of the last evaluation of trials that diverged


def history(curve: Curve, factor: int, floor: float) -> History:
    """The evaluations of a curve's trials at one rate; a trial's score counts as the floor once it has diverged."""
    trials = curve.trials_at(factor)
    steps = sorted({e.step for t in trials for e in t.history})
    shape = (len(steps), len(trials))
    made = History(np.array(steps), *(np.full(shape, np.nan) for _ in range(3)), ends=[])
    index = {step: i for i, step in enumerate(steps)}
    for s, trial in enumerate(trials):
        for e in trial.history:
            i = index[e.step]
            made.score_ES[i, s], made.distance_ES[i, s], made.strength_ES[i, s] = (
                e.score,
                e.distance,
                e.strength,
            )
        if trial.diverged:
            last = trial.history[-1].step if trial.history else -1
            made.score_ES[made.steps_E > last, s] = floor
            if trial.history:
                made.ends.append((last, trial.history[-1].score))
    return made


def shown_factor(curve: Curve, factor: float | None) -> int | None:
    """The index of the rate that pictures over training show: the asked one, by default the best one."""
    if factor is None:
        return curve.best
    near = np.isclose(curve.factors_F, factor, rtol=1e-3)
    return int(near.argmax()) if near.any() else None


# --- Pictures


def draw(panels: Sequence[Panel], folder: Path, layer: str | None = None, factor: float | None = None) -> list[Path]:
    """Draws every picture that the trials allow into `folder`; returns the files."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(RC):
        pictures = {}
        if any(len(c.factors_F) > 1 for p in panels for c in p.curves):
            pictures["score_by_factor"] = _by_rate(panels, "factor", "score", None)
            pictures["score_by_rate"] = _by_rate(panels, "rate", "score", None)
            if any(t.distances for p in panels for t in p.trials):
                pictures["distance_by_factor"] = _by_rate(panels, "factor", "distance", layer)
        if any(len(t.history) > 1 for p in panels for t in p.trials):
            pictures["training"] = _over_training(panels, layer, factor)
        files = []
        for name, figure in pictures.items():
            for kind in FORMATS:
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], metadata=METADATA[kind])
    return files


def panel_titles(panels: Sequence[Panel]) -> list[str]:
    """The tasks, with encoder, protocol and data where these are not the same in all panels."""
    parts = [[task_name(p.task), p.model, p.protocol, p.data] for p in panels]
    varying = [0, *(i for i in (1, 2, 3) if len({part[i] for part in parts}) > 1)]
    return [", ".join(part[i] for i in varying) for part in parts]


def _figure(rows: int, columns: int) -> tuple["Figure", np.ndarray]:
    from matplotlib.figure import Figure

    width, height = (5.6, 3.7) if rows * columns == 1 else (2.9 * columns + 0.3, 2.5 * rows + 0.9)
    figure = Figure(figsize=(max(width, 5.6), height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)  # type: ignore[union-attr]
    return figure, figure.subplots(rows, columns, squeeze=False)


def _by_rate(panels: Sequence[Panel], x: str, y: str, layer: str | None) -> "Figure":
    """Score or distance against the rate or its factor, a panel for each task."""
    columns = min(len(panels), 4 if len(panels) != 5 else 3)
    figure, axes = _figure(-(-len(panels) // columns), columns)
    look = styles(c.label for p in panels for c in p.curves)
    for axis, panel, title in itertools.zip_longest(axes.flat, panels, panel_titles(panels)):
        if panel is None:
            axis.set_visible(False)
            continue
        for place, curve in enumerate(panel.curves):
            values_FS = curve.score_FS * 100 if y == "score" else distances(curve, layer)
            x_F = curve.factors_F if x == "factor" else curve.rates_F
            side = (place + 0.5) / len(panel.curves) - 0.5
            _draw_curve(axis, curve, look[curve.label], x_F, values_FS, side)
        axis.set_title(title)
        _rate_axis(axis, panel, x)
        if y == "score":
            axis.set_ylabel(f"{panel.split} {SHORT_METRICS[TASKS[panel.task].headline]} (%)")
            _reference_lines(axis, panel)
        else:
            _log_axis(axis)
            _distance_axis(axis, layer)
        _draw_lost(axis, panel, look, x, 100 * panel.floor if y == "score" else None)
    note = MARKS + (
        "×: diverged, counted as guessing." if y == "score" else "× at the top: diverged, without a distance."
    )
    if y == "distance":
        note += " At the end of training."
    _finish(figure, look, note, "learning rate" if x == "rate" else "learning rate, times each method's base rate")
    return figure


def _draw_curve(axis: "Axes", curve: Curve, style: Style, x_F: np.ndarray, values_FS: np.ndarray, side: float) -> None:
    mean_F, low_F, high_F = statistics.band(values_FS)
    axis.fill_between(x_F, low_F, high_F, color=style.color, alpha=0.15, linewidth=0, zorder=1)
    there_FS = ~np.isnan(values_FS) & ~curve.scoreless_FS
    x_FS = x_F[:, None] * _dodge(x_F, side, values_FS.shape[1])
    axis.scatter(
        x_FS[there_FS],
        values_FS[there_FS],
        s=5,
        color=style.color,
        alpha=0.35,
        linewidths=0,
        marker=style.marker,
        zorder=2,
    )
    _draw_line(axis, x_F, mean_F, style)


def _draw_line(axis: "Axes", x: np.ndarray, y: np.ndarray, style: Style, markevery: Any = None) -> None:
    axis.plot(
        x, y, color=style.color, marker=style.marker, markersize=style.size, markeredgecolor="white",
        markeredgewidth=0.5, linewidth=1.5, linestyle=(0, style.dash) if style.dash else "-", markevery=markevery, zorder=3,
    )  # fmt: skip


def _dodge(x_F: np.ndarray, side: float, seeds: int = 1) -> np.ndarray:
    """Factors (S,) that set a method's trials apart from other methods' at the same rate; `side` is in ±0.5."""
    step = np.diff(np.log(x_F)).min() if len(x_F) > 1 else math.log(2)
    within = (np.arange(seeds) + 0.5) / seeds - 0.5
    return np.exp(step * 0.5 * (side + within / 12))


def _draw_lost(axis: "Axes", panel: Panel, look: dict[str, Style], x: str, y: float | None) -> None:
    """A cross for each trial without a score: a stack that hangs from the floor, or from the top if there is none."""
    from matplotlib.transforms import offset_copy

    transform = axis.transData if y is not None else axis.get_xaxis_transform()
    highest = max(curve.scoreless_FS.sum(1).max() for curve in panel.curves)
    low, high = axis.get_ylim()
    if y is not None:
        axis.set_ylim(min(low, y - (high - y) * 0.025 * (highest + 1)), high)
    elif highest:  # a log axis
        axis.set_ylim(low, high * (high / low) ** (0.025 * (highest + 1)))
    for place, curve in enumerate(panel.curves):
        x_F = curve.factors_F if x == "factor" else curve.rates_F
        x_F = x_F * _dodge(x_F, (place + 0.5) / len(panel.curves) - 0.5)
        for k in range(highest):
            lost_F = curve.scoreless_FS.sum(1) > k
            axis.scatter(
                x_F[lost_F], np.full(lost_F.sum(), 1 if y is None else y), marker="x", s=8, linewidths=0.8,
                color=look[curve.label].color, zorder=4, clip_on=False,
                transform=offset_copy(transform, axis.figure, y=-3.4 * (k + 0.8), units="points"),
            )  # fmt: skip


def _reference_lines(axis: "Axes", panel: Panel, side: str = "left") -> None:
    lines = [(panel.floor, "guessing", (0, (4, 3)))]
    if panel.head_only is not None:
        lines.append((panel.head_only, "head only", (0, (1, 1.5))))
    for value, name, dash in lines:
        axis.axhline(100 * value, color="#777", linewidth=0.8, linestyle=dash, zorder=0)
        axis.annotate(
            name, (0.01 if side == "left" else 0.99, 100 * value), (0, 1.5), xycoords=("axes fraction", "data"),
            textcoords="offset points", color="#666", fontsize=7, va="bottom", ha=side,
        )  # fmt: skip


def _log_axis(axis: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _rate_axis(axis: "Axes", panel: Panel, x: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if x == "rate":
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(LogLocator(numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return
    axis.set_xscale("log", base=2)
    factors = sorted({float(f) for c in panel.curves for f in c.factors_F})
    axis.xaxis.set_major_locator(FixedLocator(factors[:: -(-len(factors) // 10)]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: factor_text(value)))
    axis.axvline(1, color="#ccc", linewidth=0.7, zorder=0)


def factor_text(factor: float) -> str:
    """4, or ¼ as 1/4."""
    if factor < 1 and abs(1 / factor - round(1 / factor)) < 1e-6:
        return f"1/{round(1 / factor)}"
    return number(factor)


def _distance_axis(axis: "Axes", layer: str | None) -> None:
    axis.set_ylabel("‖W′ − W‖, " + (f"layer {layer}" if layer else "mean over layers"))


def _over_training(panels: Sequence[Panel], layer: str | None, factor: float | None) -> "Figure":
    """Score, distance and λ against the training step, a column for each panel."""
    look = styles(c.label for p in panels for c in p.curves)
    quantities = ["score", "distance", "strength"]
    values = {
        (p, place): history(curve, shown, panel.floor)
        for p, panel in enumerate(panels)
        for place, curve in enumerate(panel.curves)
        if (shown := shown_factor(curve, factor)) is not None
    }
    rows = [q for q in quantities if any(not np.isnan(getattr(h, f"{q}_ES")).all() for h in values.values())]
    figure, axes = _figure(len(rows), len(panels))
    for row, quantity in enumerate(rows):
        for column, (panel, title) in enumerate(zip(panels, panel_titles(panels), strict=True)):
            axis = axes[row, column]
            for place, curve in enumerate(panel.curves):
                if (column, place) in values:
                    _draw_history(axis, values[column, place], quantity, look[curve.label])
            if row == 0:
                axis.set_title(title)
            if quantity == "score":
                axis.set_ylabel(f"validation {SHORT_METRICS[TASKS[panel.task].headline]} (%)")
                _reference_lines(axis, panel, "right")
            elif quantity == "distance":
                _distance_axis(axis, layer)
            else:
                axis.set_ylabel("λ, " + (f"layer {layer}" if layer else "mean over layers"))
            axis.set_xlim(left=0)
    chosen = f"at {factor_text(factor)}× the base rate" if factor is not None else "at each method's best rate"
    note = (
        f"Trials {chosen}. {MARKS.replace('Points', 'Thin lines')}×: diverged; score counted as guessing from there on."
    )
    _finish(figure, look, note, "training step")
    return figure


def _draw_history(axis: "Axes", values: History, quantity: str, style: Style) -> None:
    values_ES = getattr(values, f"{quantity}_ES") * (100 if quantity == "score" else 1)
    if np.isnan(values_ES).all():
        return
    mean_E, low_E, high_E = statistics.band(values_ES)
    axis.fill_between(values.steps_E, low_E, high_E, color=style.color, alpha=0.15, linewidth=0, zorder=1)
    axis.plot(values.steps_E, values_ES, color=style.color, linewidth=0.5, alpha=0.35, zorder=2)
    _draw_line(axis, values.steps_E, mean_E, style, markevery=max(1, len(mean_E) // 8))
    if quantity == "score" and values.ends:
        steps, scores = np.array(values.ends).T
        axis.scatter(steps, 100 * scores, marker="x", s=18, linewidths=1, color=style.color, zorder=4)


def _finish(figure: "Figure", look: dict[str, Style], note: str, x_label: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=s.color, marker=s.marker, markersize=s.size + 0.5, markeredgecolor="white", markeredgewidth=0.5,
            linewidth=1.5, linestyle=(0, s.dash) if s.dash else "-", label=label,
        )
        for label, s in look.items()
    ]  # fmt: skip
    columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.35)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)
    inch = 1 / figure.get_figheight()
    figure.text(0.5, 0.24 * inch, x_label, fontsize=8.5, ha="center")
    figure.text(0.5, 0.07 * inch, note, fontsize=6.5, color="#666", ha="center")
    figure.get_layout_engine().set(rect=(0, 0.38 * inch, 1, 1 - 0.38 * inch))  # type: ignore[union-attr]
    figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
    figure.set_layout_engine("none")  # the same places in every format, found once
