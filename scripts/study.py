"""The study in docs/study: trains it as resumable sweeps, keeps a line a trial in CSV, and draws the report from it."""

import argparse
import csv
import hashlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delora import cli, storage
from delora.config import expected, look_up
from delora.errors import UserError
from delora.report import curves, statistics, tables, trials

DESCRIPTION = """Trains the study's trials as fleets, each sweep in outputs/study/NAME, then writes docs/study:
trials.csv with a line a trial, training.csv with scores over training, and pictures and tables made from these alone.
The same command again trains only what neither outputs/study nor docs/study holds; several processes may run it at once
and share the work."""
EXAMPLES = """examples:
  scripts/study --plan data.dir=FOLDER              trials, memory and time; trains nothing
  scripts/study data.dir=FOLDER                     everything, then the report
  scripts/study --sweeps prolonged data.dir=FOLDER  one of them
  scripts/study --collect                           docs/study from the trials that are finished
  scripts/study --report                            pictures and tables from docs/study/*.csv
"""

DOCS = Path(__file__).resolve().parents[1] / "docs" / "study"
OUTPUTS = Path("outputs/study")
FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
WIDEST = (1 / 64, 1024)  # factors that a best rate on the edge of its grid is followed to
SEEDS = "seed=42,43,44,45,46"
TASKS = ("mrpc", "rte", "cola", "stsb")
METHODS = ("method=lora,dora,ether,etherplus", "method=delora method.init=residual,zero")
MRPC, PROLONGED = "experiment=study/mrpc", "experiment=study/prolonged_mrpc,study/prolonged_cola"
LAST = ("distance", "lambda", "change")  # by layer, of the last evaluation: columns beside those of the result
# The reports in docs/study: each of the sweep of its name, and of the trials of "robust" with such a config.
REPORTS: dict[str, dict[str, Any]] = {
    "mrpc": {"task.name": "mrpc"},
    "robust": {},
    "prolonged": {},
    "parts": {"task.name": "mrpc", "method.name": "delora", "method.init": "residual"},
    "magnitude": {"task.name": "mrpc", "method.name": "dora"},
    "float32": {"task.name": "mrpc", "lr_factor": 1.0},
    "sst2": {},
}


def main() -> int:
    """Runs the command; returns its exit status."""
    sweeps = planned()
    parser = argparse.ArgumentParser(
        "scripts/study",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweeps", default=",".join(sweeps), help="default: %(default)s")
    parser.add_argument("--plan", action="store_true", help="say how many trials, how long, how much memory")
    parser.add_argument("--collect", action="store_true", help="train nothing, write docs/study from outputs/study")
    parser.add_argument("--report", action="store_true", help="train nothing, redraw the report from the CSV files")
    parser.add_argument("--output", type=Path, default=DOCS, help="instead of docs/study")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as delora-run takes them, for every sweep")
    options = parser.parse_intermixed_args()
    for name in options.sweeps.split(","):
        if name not in sweeps:
            parser.error(f"--sweeps {name}: {expected(name, sweeps)}")
    if not (options.collect or options.report):
        if (options.output / "trials.csv").exists():  # trained elsewhere: not again
            for name, result, evaluations in restore(options.output):
                write_trial(OUTPUTS / name / result["id"], result, evaluations)
        for name in options.sweeps.split(","):
            status = train(name, sweeps[name], options)
            if status not in (0, cli.FAILED):
                return status
        if options.plan:
            return 0
    if not options.report:
        collect(options.output)
    report(options.output)
    return 0


# --- What is trained


def planned() -> dict[str, list[str]]:
    """The words of the commands of each sweep."""
    tasks = "experiment=" + ",".join(f"study/{task}" for task in TASKS)
    factors = "lr_factor=" + ",".join(f"{factor:g}" for factor in FACTORS)
    few = "seed=42,43,44"
    return {
        "robust": [
            *(f"{tasks} {method} {factors} {SEEDS}" for method in METHODS),
            f"{tasks} method=head lr_factor=0.25,1,4,16 {SEEDS}",
        ],
        "prolonged": [f"{PROLONGED} {method} {few}" for method in METHODS],
        "parts": [f"{MRPC} method=delora lr_factor_on=adapter,lambda {factors} {SEEDS}"],
        "magnitude": [f"{MRPC} method=dora method.train_magnitude=false {factors} {SEEDS}"],
        "float32": [f"{MRPC} {method} lr_factor=1 precision=float32 {SEEDS}" for method in METHODS],
        "sst2": [f"experiment=study/sst2 {method} lr_factor=0.25,1,4,16 {few}" for method in METHODS],
    }


def train(name: str, commands: Sequence[str], options: argparse.Namespace) -> int:
    """Runs a sweep's commands, and for "robust" each of those beyond the edges once; returns the last exit status."""
    ran: list[str] = []
    status = 0
    while commands:
        for words in commands:
            status = run(name, words, options)
            if status not in (0, cli.FAILED):
                return status
        ran += commands
        wider = beyond_the_edges() if name == "robust" else []
        commands = [words for words in wider if words not in ran]
    return status


def run(name: str, words: str, options: argparse.Namespace) -> int:
    plan = ["plan=true"] if options.plan else []
    sys.argv = ["delora-run", "-m", *words.split(), f"name={name}", f"output_dir={OUTPUTS}", *plan, *options.words]
    print("\n" + " ".join(sys.argv), flush=True)
    return cli.main()


def beyond_the_edges() -> list[str]:
    """Commands with two more octaves where a method's best rate is the edge of its grid."""
    found = []
    for panel in statistics.panels(trials.read([OUTPUTS / "robust"]).trials):
        for curve in panel.curves:
            end = float(curve.factors_F[curve.best])
            step = 0.5 if curve.best == 0 else 2.0
            more = [f for f in (end * step, end * step**2) if WIDEST[0] <= f <= WIDEST[1]]
            if curve.best_is_on_edge and more:
                method = curve.trials_at(0)[0].config["method"]
                init = f" method.init={method['init']}" if "init" in method else ""
                factors = ",".join(f"{factor:g}" for factor in more)
                words = f"experiment=study/{panel.task} method={method['name']}{init} lr_factor={factors} {SEEDS}"
                found.append(words)
    return found


# --- From folders to CSV and back


def collect(output: Path) -> None:
    """Writes trials.csv, and training.csv with every evaluation."""
    lines, histories = [], []
    for sweep in planned():
        for stored in storage.find(OUTPUTS / sweep).trials:
            evaluations, result = list(stored.evaluations()), portable(stored.result)
            final = evaluations[-1] if evaluations else {}
            last = storage.flatten({kind: final[kind] for kind in LAST if final.get(kind)})
            lines.append({"sweep_folder": sweep, "sha256": digest(result), **storage.flatten(result), **last})
            histories += [history_line(sweep, result, evaluation) for evaluation in evaluations]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "trials.csv", lines)
    write_csv(output / "training.csv", histories)


def portable(result: storage.Result) -> dict[str, Any]:
    """A result whose data lie relative to this folder: an absolute path is of one machine alone."""
    result = storage.without_hashes(result)  # which are those of the files beside it
    config = result["config"]
    folder = config["data"].get("dir")
    data = {**config["data"], "dir": os.path.relpath(folder)} if folder else config["data"]
    return {**result, "config": {**config, "data": data}}


def history_line(sweep: str, result: Mapping[str, Any], evaluation: Any) -> dict[str, Any]:
    """Distance, λ and change are means over the layers."""
    means = {kind: mean(evaluation.get(kind, {}).values()) for kind in LAST}
    place = {key: evaluation[key] for key in ("epoch", "step", "loss")}
    return {
        "sweep_folder": sweep,
        "id": result["id"],
        **place,
        "score": evaluation["metrics"][result["headline"]],
        **means,
    }


def mean(values: Iterable[float | None]) -> float | None:
    """To six digits; None where there is no value."""
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.6g}") if known else None


def digest(result: Mapping[str, Any]) -> str:
    """The hash of a result, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def restore(source: Path) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Sweep, result and evaluations of each trial in trials.csv and training.csv.

    Distance, λ and change are by layer in the last evaluation, before it as means.

    Raises:
        UserError: a line of trials.csv was changed: it has another hash than the result that it came from.
    """
    histories = defaultdict(list)
    for line in read_csv(source / "training.csv"):
        means = {kind: {"mean": line[kind]} if line.get(kind) is not None else {} for kind in LAST}
        histories[line.pop("sweep_folder"), line.pop("id")].append({**line, **means})
    for number, line in enumerate(read_csv(source / "trials.csv"), start=2):
        sweep, sha256 = line.pop("sweep_folder"), line.pop("sha256")
        result = nested((key, value) for key, value in line.items() if key.partition(".")[0] not in LAST)
        if digest(result) != sha256:
            raise UserError(f"{source / 'trials.csv'}, line {number}: not the result that it came from")
        evaluations = histories[sweep, result["id"]]
        for kind in LAST:
            layers = {key.removeprefix(f"{kind}."): value for key, value in line.items() if key.startswith(f"{kind}.")}
            if layers:
                evaluations[-1][kind] = layers
        yield sweep, result, evaluations


def nested(flat: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What `storage.flatten` made flat."""
    made: dict[str, Any] = {}
    for key, value in flat:
        *parts, name = key.split(".")
        place = made
        for part in parts:
            place = place.setdefault(part, {})
        place[name] = value
    return made


def belongs(sweep: str, config: Mapping[str, Any], report_name: str) -> bool:
    wanted = REPORTS[report_name]
    fits = bool(wanted) and all(look_up(config, key) == value for key, value in wanted.items())
    return sweep == report_name or (sweep == "robust" and fits)


def write_trial(folder: Path, result: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> None:
    """A trial's folder, as far as reports and sweeps that go on read it; one that exists stays as it is."""
    if folder.exists():
        return
    lines = [{**e, "kind": "evaluation", "metrics": {result["headline"]: e["score"]}} for e in evaluations]
    folder.mkdir(parents=True)
    (folder / storage.CONFIG).write_text(json.dumps(result["config"]))
    (folder / storage.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / storage.RESULT).write_text(json.dumps(result))


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Numbers as JSON has them, text as it is where it cannot be taken for one; what a line lacks is empty."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in line.items()} for line in lines)


def cell(value: Any) -> str:
    plain = isinstance(value, str) and value and parsed(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def parsed(text: str) -> Any:
    """What `cell` wrote."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            yield {key: parsed(text) for key, text in line.items() if text}


# --- The report


def report(folder: Path) -> None:
    """Draws pictures and tables of each report into folder/REPORT, from the CSV files in `folder`."""
    with tempfile.TemporaryDirectory() as root:
        for name, panels in panels_of(folder, Path(root)).items():
            (folder / name).mkdir(exist_ok=True)
            written = curves.draw(panels, folder / name, formats=("png", "svg"))
            written += tables.write(tables.all_tables(panels), folder / name)
            print(*written, sep="\n")


def panels_of(source: Path, root: Path) -> dict[str, list[statistics.Panel]]:
    """What each report shows, from the CSV files in `source`; the trials' folders are written to root/REPORT."""
    for sweep, result, evaluations in restore(source):
        for name in REPORTS:
            if belongs(sweep, result["config"], name):
                write_trial(root / name / result["id"], result, evaluations)
    drawn = [name for name in REPORTS if (root / name).is_dir()]
    return {name: statistics.panels(trials.read([root / name]).trials) for name in drawn}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"scripts/study: error: {error}")
