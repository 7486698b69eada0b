"""Pictures of the curves, as PNG, SVG and PDF. Matplotlib is imported only when something is drawn."""

import functools
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delora import results
from delora.report import statistics
from delora.report.statistics import Curve, Panel
from delora.report.tables import number
from delora.report.trials import label_order, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
LINES = "Lines: mean over seeds, with its 95 % bootstrap interval."
METRICS = {"accuracy": "accuracy", "matthews": "Matthews corr.", "pearson_spearman": "Pearson/Spearman"}
SYMBOLS = {"distance": "‖W′ − W‖", "change": "‖h′ − h‖ / ‖h‖", "strength": "λ"}
X_LABELS = {
    "factor": "learning rate, times each method's base rate",
    "rate": "learning rate",
    "step": "training step",
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
        zip(["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#777777"], "<>*hpdo", strict=True),
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


# --- Values: of a quantity, which is "score" (in percent), "distance", "change" (of hidden states) or "strength" (λ)


def at_rates(curve: Curve, quantity: str) -> np.ndarray:
    """Score, or distance or change at the end of training, (F, S); NaN where there is none, and for 0, which has no
    log."""
    if quantity == "score":
        return 100 * curve.score_FS
    values_FS = np.full(curve.score_FS.shape, np.nan)
    for place, trial in curve.trials.items():
        values_FS[place] = getattr(trial, quantity) or math.nan
    return values_FS


def lost(curve: Curve, quantity: str) -> np.ndarray:
    """Which trials are drawn as lost, (F, S): those without a score, or that diverged before the end."""
    return curve.scoreless_FS if quantity == "score" else curve.diverged_FS


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
) -> list[Path]:
    """Draws every picture that the trials allow into `folder`, each in all formats; returns the files.

    Args:
        layer: the layers whose distance, λ and change the trials hold, for the labels; None for all.
        factor: the factor of the trials that are drawn over training; None for each method's best.
    """
    import matplotlib

    files = []
    with matplotlib.rc_context(RC):
        for name, figure in _pictures(panels, layer, factor):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # the layout is found once for all formats
            for kind in formats:
                files.append(folder / f"{name}.{kind}")
                drawn = io.BytesIO()
                figure.savefig(drawn, format=kind, metadata=METADATA[kind])
                results.replace(files[-1], drawn.getvalue())
    return files


def _pictures(panels: Sequence[Panel], layer: str | None, factor: float | None) -> "Iterator[tuple[str, Figure]]":
    of_layer = "-" + re.sub(r"[^\w.-]", "x", layer) if layer else ""
    if any(len(curve.factors_F) > 1 for panel in panels for curve in panel.curves):
        yield "score_by_factor", _by_rate(panels, "factor", "score")
        yield "score_by_rate", _by_rate(panels, "rate", "score")
        for quantity in ("distance", "change"):
            if any(getattr(trial, quantity) > 0 for panel in panels for trial in panel.trials):
                yield f"{quantity}_by_factor{of_layer}", _by_rate(panels, "factor", quantity, layer)
    if any(len(trial.history) > 1 for panel in panels for trial in panel.trials):
        yield f"training{of_layer}", _over_training(panels, layer, factor)


def panel_titles(panels: Sequence[Panel]) -> list[str]:
    """The tasks, with encoder, protocol and data where these are not the same in all panels."""
    parts = [[p.facts.folder, p.model, p.protocol, p.data] for p in panels]
    varying = [0, *(i for i in (1, 2, 3) if len({part[i] for part in parts}) > 1)]
    return [", ".join(part[i] for i in varying) for part in parts]


def y_label(panel: Panel, quantity: str, x: str, layer: str | None) -> str:
    if quantity == "score":
        split = "validation" if x == "step" else panel.split
        return f"{split} {METRICS.get(panel.facts.headline, panel.facts.headline)} (%)"
    return f"{SYMBOLS[quantity]}, {layer or 'mean over layers'}"


def _by_rate(panels: Sequence[Panel], x: str, quantity: str, layer: str | None = None) -> "Figure":
    """Score, distance or change against the rate or its factor, a panel for each task."""
    figure, axes, look = _figure(panels)
    references = reference_styles(panels) if quantity == "score" else {}
    for axis, panel in zip(axes, panels, strict=True):
        for place, curve in enumerate(panel.curves):
            x_F, values_FS = getattr(curve, f"{x}s_F"), at_rates(curve, quantity)
            style, x_FS = look[curve.label], spread(x_F, curve, place, len(panel.curves))
            _draw_band(axis, style, x_F, values_FS)
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
        elif any(getattr(trial, quantity) > 0 for trial in panel.trials):
            _log_distance_axis(axis)
    crosses = "×: diverged or no defined score, counted as guessing."
    if quantity != "score":
        crosses = f"× at the top: diverged, without a {quantity}. At the end of training."
    if quantity == "change":
        crosses += " h: hidden states behind the encoder's layers, on validation rows; h′: after training."
    elif quantity == "distance" and (without := _without_distance(panels)):
        crosses += f" Without W′: {', '.join(without)}."
    return _finish(figure, look, references, X_LABELS[x], f"{LINES} Points: single trials. {crosses}")


def _without_distance(panels: Sequence[Panel]) -> list[str]:
    """The methods whose trials have ended, and have no ΔW."""
    ended = [(c.label, t.distance) for p in panels for c in p.curves for t in c.trials.values() if not t.diverged]
    measured = {label for label, distance in ended if not math.isnan(distance)}
    return sorted({label for label, _ in ended} - measured, key=label_order)


def _over_training(panels: Sequence[Panel], layer: str | None, factor: float | None) -> "Figure":
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
            _draw_band(axis, style, steps_E, values_ES, markevery=max(1, len(steps_E) // 8))
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
    note = f"Trials {chosen}. {LINES} Thin: single trials. ×: diverged; score counted as guessing from there on."
    return _finish(figure, look, references, X_LABELS["step"], note)


def _figure(panels: Sequence[Panel], rows: int = 1) -> tuple["Figure", list["Axes"], dict[str, Style]]:
    """A figure with titled axes by rows: a column for each panel, or if `rows` is 1 up to four even columns."""
    from matplotlib.figure import Figure

    lines = rows if rows > 1 else -(-len(panels) // 4)
    columns = len(panels) if rows > 1 else -(-len(panels) // lines)
    single = columns * lines == 1
    size = (5.6, 3.7) if single else (max(5.6, 2.9 * columns + 0.3), 2.5 * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(rows * len(panels))]
    for axis, title in zip(axes, panel_titles(panels), strict=False):
        axis.set_title(title)
    return figure, axes, styles(curve.label for panel in panels for curve in panel.curves)


def _draw_band(axis: "Axes", style: Style, x_F: np.ndarray, values_FS: np.ndarray, **line: Any) -> None:
    """Mean and interval over the seeds."""
    mean_F, low_F, high_F = statistics.band(values_FS)
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


def _log_distance_axis(axis: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


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

    handles = [Line2D([], [], label=label, **style.line()) for label, style in look.items()]
    handles += [Line2D([], [], label=name, **_reference(dash)) for name, dash in references.items()]
    widest = 0.75 + 0.065 * max(map(len, [*look, *references]))  # inches, at the font size of RC
    rows = -(-len(handles) // max(1, int(figure.get_figwidth() / widest)))
    columns = -(-len(handles) // rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)
    lines = textwrap.wrap(note, int(20 * figure.get_figwidth()))
    figure.supxlabel(x_label + "\n" * len(lines), fontsize=8.5)  # keeps room for the note
    figure.text(0.5, 0.005, "\n".join(lines), fontsize=6.5, color="#666", ha="center", va="bottom")
    return figure
