"""The study in docs/study: its pictures and tables follow from its CSV files, whose trials are not trained again."""

import csv
import itertools
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import conf_folder, load_script

from delora import storage
from delora.config import NOT_THE_TRIAL, Trial
from delora.errors import UserError
from delora.report import curves, statistics, tables
from delora.report.curves import known_styles
from delora.report.statistics import Estimate, Panel, Robustness
from delora.tasks import TASKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "study"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("study")


def test_pictures_and_tables_are_made_of_the_csv_files(study, tmp_path):
    for name in ("trials.csv", "training.csv"):
        (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    study.report(tmp_path)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    texts = [name for name in made if name.suffix != ".png"]  # a picture's bytes follow the fonts' library
    committed = {path.relative_to(DOCS) for folder in study.REPORTS for path in (DOCS / folder).glob("*")}
    assert made.keys() - {Path("trials.csv"), Path("training.csv")} == committed
    assert [name for name in texts if made[name].read_bytes() != (DOCS / name).read_bytes()] == []


def test_the_pages_tables_are_those_of_the_csv_files():
    text = (DOCS / "robust" / "robustness-minilm-paper-glue.csv").read_text(encoding="utf-8")
    cells = defaultdict(dict)
    for line in csv.DictReader(text.splitlines()[1:]):
        drop, low, high = (float(line[f"worst drop{end}"]) for end in ("", " low", " high"))
        bold = "**" if line["shown"] == "a drop" else ""
        cell = f"{bold}{drop:.1f}{bold} [{low:.1f}, {high:.1f}]"
        cells[line["method"]][line["task"]] = f"{float(line['best score']):.1f}", cell
    front, page = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, DOCS))
    assert len(cells) == 6
    for method, by_task in cells.items():
        scores, drops = zip(*(by_task[task] for task in ("MRPC", "CoLA", "RTE", "STS-B")), strict=True)
        assert f"\n| {' | '.join((method, *scores, *drops))} |\n" in front
        assert f"\n  | {' | '.join((method, *drops))} |\n" in page


# --- The page's words, each against the CSV files

NORMALISED = ("DeLoRA", "DeLoRA (zero)", "ETHER", "ETHER+")


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join((DOCS / "README.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def found(study, tmp_path_factory) -> dict[str, dict[str, Panel]]:
    """The panel of each report and task."""
    drawn = study.panels_of(DOCS, tmp_path_factory.mktemp("study"))
    return {name: {panel.task: panel for panel in panels} for name, panels in drawn.items()}


@pytest.fixture(scope="module")
def compared(found) -> dict[str, list[statistics.Comparison]]:
    return {name: statistics.compare(panels.values()) for name, panels in found.items()}


def of(panel: Panel, label: str) -> statistics.Curve:
    return next(curve for curve in panel.curves if curve.label == label)


def mean(curve: statistics.Curve, factor: float) -> float:
    """The mean test score at a factor, in percent."""
    return 100 * float(curve.score_FS[list(curve.factors_F).index(factor)].mean())


def distance_growth(panel: Panel, label: str) -> float:
    distance_F = curves.at_rates(of(panel, label), "distance").mean(1)
    factors = list(of(panel, label).factors_F)
    return distance_F[factors.index(32)] / distance_F[factors.index(0.25)]


def drops(panels: Iterable[Panel], select="pooled") -> dict[tuple[str, str], tuple[Robustness, float]]:
    """Each curve's numbers, and the corrected p of its worst drop."""
    made = {}
    for panel in panels:
        chosen = statistics.panels(panel.trials, panel.span, select)[0]
        made |= {(panel.task, c.label): statistics.robustness(c, panel.span, panel.floor) for c in chosen.curves}
    corrected = statistics.holm([numbers.p for numbers in made.values()])
    return {key: (numbers, p) for (key, numbers), p in zip(made.items(), corrected, strict=True)}


def pair(compared: list[statistics.Comparison], task: str, what: str, first: str, second: str) -> statistics.Comparison:
    """The comparison of first − second, whichever of them comes first in the table."""
    for c in compared:
        if (c.task, c.what) == (task, what) and {c.first, c.second} == {first, second}:
            e, sign = c.difference, 1 if c.first == first else -1
            low, high = sorted((sign * e.low, sign * e.high))
            return statistics.Comparison(
                task, what, first, second, Estimate(sign * e.value, low, high), c.p, c.n, c.corrected
            )
    raise KeyError((task, what, first, second))


def text(difference: Estimate, form: str = ".1f") -> str:
    return tables.interval(difference, form=form).text


def test_what_the_page_says_of_the_files(study, page):
    results = [result for _, result, _ in study.restore(DOCS)]
    dirty = sum(result["made_by"]["commit"].endswith("-dirty") for result in results)
    assert f"{dirty:,} of the {len(results):,} results name a commit with changes" in page
    starts = {r["config"]["method"]["lambda_init"] for r in results if r["config"]["method"]["name"] == "delora"}
    assert starts == {4.0} and "λ starts at 4 on every task" in page
    assert not any(r["seconds"]["train"] + r["seconds"]["evaluate"] > r["seconds"]["total"] for r in results)
    assert "None of the trials was resumed by a version that trains on without dropout" in page


def test_what_the_page_says_of_drops(page, found):
    robust = found["robust"]
    end = {
        task: [mean(of(robust[task], label), factor) for label in ("LoRA", "DoRA") for factor in (16, 32)]
        for task in robust
    }
    assert "score within a point of guessing on MRPC (68.4 %) and CoLA (0)" in page
    assert all(abs(score - 100 * robust[task].floor) < 1 for task in ("mrpc", "cola") for score in end[task])
    assert f"{100 * robust['mrpc'].floor:.1f}" == "68.4" and f"{100 * robust['rte'].floor:.1f}" == "52.7"
    low, high = (f"{score:.1f}".replace("-", "−") for score in (min(end["stsb"]), max(end["stsb"])))
    assert f"between {low} and {high} on STS-B (0) and below guessing on RTE, with no trial diverging" in page
    assert max(end["rte"]) < 100 * robust["rte"].floor
    assert not any(curve.diverged_FS.any() for panel in robust.values() for curve in panel.curves)
    shown = {
        select: {key for key, (_, p) in drops(robust.values(), select).items() if p < 0.05}
        for select in statistics.SELECTS
    }
    assert shown["pooled"] == {(task, label) for task in robust for label in ("LoRA", "DoRA")}
    assert "LoRA and DoRA break at high rates on all four tasks; no drop of DeLoRA, ETHER or ETHER+ is shown" in page
    assert len(drops(robust.values())) == 24 and "Holm for the 24 drops" in page
    assert shown["pooled"] - shown["first-seed"] == {("rte", "DoRA")}
    assert shown["first-seed"] - shown["pooled"] == {("stsb", "DeLoRA")}
    first = drops(robust.values(), "first-seed")["stsb", "DeLoRA"][0].drop.value
    assert f"but DoRA's on RTE, and one more: DeLoRA's {100 * first:.1f} points on STS-B" in page
    lowest = [
        (panel.task, label, trial.score <= panel.floor)
        for panel in robust.values()
        for label in NORMALISED
        for trial in of(panel, label).trials.values()
    ]
    never = [(task, label) for task, label, guesses in lowest if guesses and task != "rte"]
    assert never == [("cola", "DeLoRA (zero)")] * 2 and "Two of the 40 trials of DeLoRA (zero) on CoLA never" in page


def test_what_the_page_says_of_sensitivity(page, found, compared):
    numbers = [c for c in compared["robust"] if c.what == "sensitivity"]
    assert len(numbers) == 60 and "corrected for 60 comparisons" in page
    pairs = [
        pair(numbers, task, "sensitivity", high, low)
        for task in ("mrpc", "cola", "stsb") for high in ("LoRA", "DoRA") for low in NORMALISED
    ]  # fmt: skip
    shown = {(c.task, c.first, c.second) for c in pairs if c.higher == c.first}
    assert shown == {(c.task, c.first, c.second) for c in pairs if c.task == "stsb"}
    others = [c for c in pairs if (c.task, c.first, c.second) not in shown]
    assert sum(c.difference.low > 0 for c in others) == 14 and len(others) == 16
    assert "Of the 16 such pairs on MRPC and CoLA 14 have an interval above zero" in page
    against = {task: pair(numbers, task, "sensitivity", "LoRA", "DeLoRA") for task in ("stsb", "mrpc", "cola")}
    values = {task: f"{100 * c.difference.value:.1f}" for task, c in against.items()}
    ends = {task: text(c.difference).partition(" ")[2] for task, c in against.items()}
    p = [f"{c.corrected:.3f}" for c in against.values()]
    assert (
        f"LoRA's is higher by {values['stsb']} points on STS-B {ends['stsb']}, {values['mrpc']} on MRPC {ends['mrpc']} "
        f"and {values['cola']} on CoLA {ends['cola']}; corrected p {p[0]}, {p[1]} and {p[2]}"
    ) in page
    numbers = compared["parts"]
    largest = pair(numbers, "mrpc", "sensitivity", "DeLoRA (factor on BA)", "DeLoRA (factor on λ)")
    said = text(largest.difference, ".2f").replace(" [", " points [", 1)
    assert f"the largest is {said} between BA and λ, corrected p {largest.corrected:.3f}" in page
    numbers = [c for c in numbers if c.what == "sensitivity"]
    assert not any(c.higher for c in numbers)
    assert max(abs(c.difference.value) for c in numbers) == abs(largest.difference.value)


def test_what_the_page_says_of_best_rates(page, found, compared):
    numbers = [c for c in compared["robust"] if c.what == "score at the best rate"]
    apart = {(c.task, c.first, c.second) for c in numbers if c.difference.low > 0 or c.difference.high < 0}
    assert len(numbers) == 60 and len(apart) == 9 and not any(c.higher for c in numbers)
    lowest = min(c.corrected for c in numbers)
    said = f"Of 60 pairs nine have an interval that excludes zero, none after the correction (lowest p {lowest:.3f})"
    assert said in page
    below = {  # the first of each pair has the lower score
        ("cola", "ETHER", "DoRA"), ("cola", "ETHER", "DeLoRA (zero)"), ("mrpc", "ETHER+", "DeLoRA"),
        *(("stsb", "ETHER", label) for label in ("DeLoRA", "DeLoRA (zero)")),
        *(("rte", low, label) for low in ("DoRA", "ETHER+") for label in ("DeLoRA", "DeLoRA (zero)")),
    }  # fmt: skip
    assert {(task, *sorted(labels)) for task, *labels in apart} == {(task, *sorted(labels)) for task, *labels in below}
    assert all(pair(numbers, task, "score at the best rate", *labels).difference.value < 0 for task, *labels in below)


def test_what_the_page_says_of_distances(page, found):
    growth = {label: [distance_growth(panel, label) for panel in found["robust"].values()] for label in known_styles()}
    ends = [f"{min(g):.0f} to {max(g):.0f}-fold" for g in (growth["LoRA"], growth["DoRA"])]
    delora = growth["DeLoRA"] + growth["DeLoRA (zero)"]
    ends.append(f"{min(delora):.1f} to {max(delora):.1f}-fold")
    said = f"of LoRA grows {ends[0]}, of DoRA {ends[1]}, of the two DeLoRA {ends[2]}, of ETHER and ETHER+ by less than"
    assert said in page
    assert max(growth["ETHER"] + growth["ETHER+"]) < 1.2


def test_what_the_page_says_of_other_sweeps(page, found, compared):
    fixed = drops(found["magnitude"].values())["mrpc", "DoRA (fixed magnitude)"]
    said = text(fixed[0].drop).replace(" [", " points [")
    assert f"its worst drop is {said}, shown" in page and fixed[1] < 0.05
    panel = found["sst2"]["sst2"]
    lora, corrected = drops([panel])["sst2", "LoRA"]
    four, sixteen = (mean(of(panel, "LoRA"), factor) for factor in (4, 16))
    assert (
        f"from {four:.1f} % at 4 times its rate to {sixteen:.1f} at 16 times, two of three seeds to guessing or below "
        f"(p {lora.p:.3f}, corrected for three drops {corrected:.3f})"
    ) in page
    assert (of(panel, "LoRA").score_FS[-1] <= panel.floor).sum() == 2 and corrected > 0.05
    delora = [mean(of(panel, label), f) for label in ("DeLoRA", "DeLoRA (zero)") for f in of(panel, label).factors_F]
    assert f"the two DeLoRA stay between {min(delora):.1f} and {max(delora):.1f}" in page
    residual, zero = (
        pair(compared["sst2"], "sst2", "sensitivity", "LoRA", label) for label in ("DeLoRA", "DeLoRA (zero)")
    )
    said = text(residual.difference).replace(" [", " points [")
    assert f"({said}, corrected p {residual.corrected:.3f})" in page and residual.corrected > 0.05
    assert f"against DeLoRA (zero) it includes zero ({text(zero.difference)})" in page


def test_what_the_page_says_of_prolonged_training(page, found, compared):
    panels = found["prolonged"]
    distances = {
        (task, c.label): np.mean([trial.distance for trial in c.trials.values()])
        for task, panel in panels.items() for c in panel.curves
    }  # fmt: skip
    lora, dora = ([distances[task, label] for task in ("mrpc", "cola")] for label in ("LoRA", "DoRA"))
    others = [value for (_, label), value in distances.items() if label in NORMALISED]
    assert (
        f"LoRA's distance reaches {lora[0]:.0f} on MRPC and {lora[1]:.0f} on CoLA, DoRA's {dora[0]:.0f} and "
        f"{dora[1]:.0f}; those of the other four end between {min(others):.1f} and {max(others):.1f}"
    ) in page
    strengths = {
        (task, label): np.mean([t.history[-1].strength for t in of(panels[task], label).trials.values()])
        for task in panels for label in ("DeLoRA", "DeLoRA (zero)")
    }  # fmt: skip
    mrpc, cola = ({f"{v:.1f}": 0 for (task, _), v in strengths.items() if task == t} for t in ("mrpc", "cola"))
    assert f"λ grows from 4 to {' or '.join(mrpc)} on MRPC and to {' or '.join(sorted(cola))} on CoLA" in page
    gains = {}
    for task, panel in panels.items():
        for c in panel.curves:
            short = of(found["robust"][task], c.label)
            at, seeds = list(short.factors_F).index(4), [short.seeds.index(seed) for seed in c.seeds]
            gains[task, c.label] = statistics.paired(c.score_FS[0], short.score_FS[at, seeds])[0]
    assert all(e.low < 0 < e.high or math.isnan(e.low) for e in gains.values())
    most = max(abs(e.value) for (task, _), e in gains.items() if task == "mrpc")
    assert f"within {100 * most:.1f} points on MRPC" in page
    low, high = (f((e.value, label, e) for (task, label), e in gains.items() if task == "cola") for f in (min, max))
    assert (low[1], high[1]) == ("DoRA", "LoRA")
    ends = [text(e).partition(" ")[2] for e in (low[2], high[2])]
    assert f"from −{-100 * low[0]:.1f} (DoRA {ends[0]}) to +{100 * high[0]:.1f} (LoRA {ends[1]})" in page
    numbers = [c for c in compared["prolonged"] if c.what == "score at the best rate"]
    apart = {(c.task, c.first, c.second) for c in numbers if c.difference.low > 0 or c.difference.high < 0}
    assert len(numbers) == 30 and not any(c.higher for c in numbers)
    assert apart == {("cola", "DoRA", "DeLoRA"), ("cola", "DeLoRA (zero)", "ETHER")}
    best = pair(numbers, "cola", "score at the best rate", "DeLoRA", "DoRA").difference
    assert f"both on CoLA: DeLoRA is above DoRA ({text(best)}), DeLoRA (zero) above ETHER" in page


def test_what_the_page_says_of_rte(page, found, compared):
    panel = found["robust"]["rte"]
    drop, corrected = drops(found["robust"].values())["rte", "DeLoRA"]
    said = f"DeLoRA's of {100 * drop.drop.value:.1f} points is not (p {drop.p:.3f}, corrected {corrected:.3f})"
    assert said in page and corrected > 0.05
    pairs = {
        (high, low): pair(compared["robust"], "rte", "sensitivity", high, low).difference
        for high in ("LoRA", "DoRA") for low in NORMALISED
    }  # fmt: skip
    assert f"LoRA is not above DeLoRA ({text(pairs['LoRA', 'DeLoRA'])})" in page
    assert {names for names, e in pairs.items() if e.low > 0} == {("LoRA", "ETHER+"), ("DoRA", "ETHER+")}
    assert "of its eight pairs two have an interval above zero, those against ETHER+" in page
    delora, zero = of(panel, "DeLoRA"), of(panel, "DeLoRA (zero)")
    assert delora.factors_F[delora.best] == 0.25
    said = f"lower at 1/8 and 1/16 ({mean(delora, 1 / 8):.1f} and {mean(delora, 1 / 16):.1f} %)"
    assert said in page and max(mean(delora, f) for f in (1 / 8, 1 / 16)) < mean(delora, 0.25)
    kept = [round(mean(zero, f)) for f in (1 / 16, 1 / 8, 1 / 4)]
    assert f"keeps its {min(kept)} to {max(kept)} % down to 1/16" in page
    best = max(100 * curve.best_scores_S.mean() for curve in panel.curves)
    rows = TASKS["rte"].rows["validation"] - TASKS["rte"].rows["validation"] // 2
    assert f"the best mean is {best:.1f} % where guessing has 52.7 %, on {rows} test rows" in page
    assert f"test sets of {rows} to {TASKS['stsb'].rows['validation'] // 2} rows" in page


def test_what_the_page_says_of_time(page, found):
    """Of epochs: how the plateau on STS-B is left, and whether training was long enough."""
    panel = found["robust"]["stsb"]
    left = {
        (label, trial.factor, trial.seed): next((e for e, p in enumerate(trial.history) if p.score >= 0.5), None)
        for label in known_styles() for trial in of(panel, label).trials.values()
    }  # fmt: skip
    stuck = {
        key[1:] for key, epoch in left.items() if key[0] in ("LoRA", "DoRA") and key[1] in (1, 2) and epoch is None
    }
    assert stuck == {(1, 44), (2, 44)}
    scores = [of(panel, label).trials[at, 2].score for label in ("LoRA", "DoRA") for at in (2, 3)]
    assert [of(panel, "LoRA").seeds[2], *of(panel, "LoRA").factors_F[2:4]] == [44, 1, 2]
    assert f"scores {min(scores):.2f} to {max(scores):.2f}" in page
    assert all(left[label, factor, 44] for label in ("LoRA", "DoRA") for factor in (0.5, 4))
    epochs = [e for (label, f, _), e in left.items() if label in ("LoRA", "DoRA") and f <= 4 and e]
    assert f"varies with the seed from {min(epochs)} to {max(epochs)}." in page
    assert {epoch for (label, *_), epoch in left.items() if label in NORMALISED} <= {1, 2}
    moves, rising = defaultdict(dict), set()
    for task, of_task in found["robust"].items():
        for label in known_styles():
            curve = of(of_task, label)
            score_ES = np.array([[p.score for p in trial.history[-4:]] for trial in curve.trials_at(curve.best)]).T
            mean_E = 100 * score_ES.mean(1)
            moves[task][label] = np.ptp(mean_E)
            if (np.diff(mean_E) > 0).all():
                rising.add((task, label))
    for task, label in itertools.product(found["robust"], ("LoRA", "DoRA")):
        low = of(found["robust"][task], label)
        ends = [[p.score for p in t.history[-6:]] for t in low.trials_at(list(low.factors_F).index(0.25))]
        assert (np.diff(np.mean(ends, 0)[[0, -1]]) > 0.035) == (task != "rte")
    most = {task: f"{max(by_label.values()):.1f}" for task, by_label in moves.items()}
    others = max(value for label, value in moves["cola"].items() if label != "DeLoRA (zero)")
    assert (
        f"at most {most['mrpc']} points on MRPC, {most['rte']} on RTE, {most['stsb']} on STS-B and "
        f"{most['cola']} on CoLA (DeLoRA (zero); the others {others:.1f})"
    ) in page
    assert rising == {("stsb", "LoRA"), ("stsb", "DoRA"), ("cola", "LoRA")}
    by = [f"{moves[task][label]:.1f}" for task, label in (("stsb", "LoRA"), ("stsb", "DoRA"), ("cola", "LoRA"))]
    assert f"LoRA and DoRA on STS-B (by {by[0]} and {by[1]}) and LoRA on CoLA ({by[2]})" in page


def test_what_the_page_says_of_float32(page, compared):
    for label in known_styles():
        names = [
            f"{label[:-1]}, precision {p})" if label.endswith(")") else f"{label} (precision {p})"
            for p in ("bfloat16", "float32")
        ]
        c = pair(compared["float32"], "mrpc", "score at the best rate", *names)
        assert f"{label} {text(c.difference, '+.1f')}" in page


def test_the_comparison_with_peft_is_that_of_its_csv_file():
    script = load_script("peft_check")
    assert "\n".join(script.table(script.CSV)) in (DOCS / "README.md").read_text(encoding="utf-8")


def test_a_changed_line_is_refused(study, tmp_path):
    (tmp_path / "training.csv").write_bytes((DOCS / "training.csv").read_bytes())
    text = (DOCS / "trials.csv").read_text(encoding="utf-8")
    place = next(csv.DictReader([*text.splitlines()[:2]]))["best.validation.loss"]
    (tmp_path / "trials.csv").write_text(text.replace(place, "0.99", 1), encoding="utf-8")
    with pytest.raises(UserError, match="line 2: not the result"):
        list(study.restore(tmp_path))


def test_a_trial_in_the_csv_files_is_finished(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sweep, result, evaluations in itertools.islice(study.restore(DOCS), 0, 400, 40):
        study.write_trial(study.OUTPUTS / sweep / result["id"], result, evaluations)
        trial = Trial.from_config(result["config"])
        assert trial.folder == study.OUTPUTS / sweep / result["id"]
        assert storage.finished(trial.folder, trial.resolved(), NOT_THE_TRIAL) == result


def test_every_config_of_the_study_is_planned(study):
    words = " ".join(itertools.chain(*study.planned().values()))
    for path in (conf_folder() / "experiment" / "study").glob("*.yaml"):
        assert f"study/{path.stem}" in words


def test_a_plan_is_of_every_sweep(tmp_path):
    words = ["--plan", "--sweeps", "parts,magnitude", "--output", "none", "data=synthetic", "model=tiny"]
    command = [sys.executable, ROOT / "scripts" / "study.py", *words]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "80 trials: 0 done, 75 to run" in answer.stdout and "40 trials: 0 done, 40 to run" in answer.stdout
    assert "5 the same training under another name" in answer.stdout  # factor 1 on both
    assert not any(tmp_path.iterdir())


def test_no_line_holds_a_folder_of_one_machine(study, tmp_path, monkeypatch):
    assert all(not Path(result["config"]["data"]["dir"] or ".").is_absolute() for _, result, _ in study.restore(DOCS))
    monkeypatch.chdir(tmp_path)
    result = {"schema": 1, "config": {"seed": 42, "data": {"name": "glue", "dir": str(tmp_path / "glue")}}}
    assert study.portable(result) == {"schema": 1, "config": {"seed": 42, "data": {"name": "glue", "dir": "glue"}}}
