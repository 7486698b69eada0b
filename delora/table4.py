"""The command `delora-table4`: rows of the paper's Table 4, each task and seed trained in fleets, and their table."""

import argparse
import itertools
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from delora import cli, storage, terminal
from delora.cli import conf_folder
from delora.config import expected
from delora.errors import UserError
from delora.report import statistics, tables, trials
from delora.report.cli import main as report
from delora.report.statistics import Panel
from delora.report.tables import Cell, Table

DESCRIPTION = """Trains the methods of the paper's Table 4 on its tasks, with seeds 42 to 46, and prints the table.
DeLoRA and RED take their published hyperparameters (experiment=table4/TASK, red/TASK). The others, whose are not
published, take batch size and epochs of DeLoRA's and the rate that is best on the validation half with seed 42, among
those of conf/experiment/tuned/rates.yaml. Results go to outputs/table4/MODEL, the report to report/ in there.
The same command again trains only what is missing."""
EXAMPLES = """examples:
  delora-table4 --plan                                       trials, memory and time; trains nothing
  delora-table4 --methods all --tasks mrpc,rte --model minilm data.dir=FOLDER
  delora-table4 --tasks rte seed=42 epochs=1 name=short     any words of delora-run
"""
PUBLISHED = {"delora": "table4", "red": "red"}  # rows with published hyperparameters, and their experiments


def main() -> int:
    """Runs the command; returns its exit status."""
    terminal.prepare()
    try:
        return _run()
    except UserError as error:
        print(f"delora-table4: error: {terminal.printable(str(error))}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return cli.INTERRUPTED


def _run() -> int:
    published = statistics.published()
    tasks = list(published["rows"][0]["scores"])
    methods = [row["match"]["name"] for row in published["rows"]]
    parser = argparse.ArgumentParser(
        "delora-table4",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", default=",".join(tasks), help="default: %(default)s")
    parser.add_argument("--methods", default="delora", help=f"all, or of {','.join(methods)}; default: %(default)s")
    parser.add_argument("--model", default="roberta_base", help="the encoder; default: %(default)s")
    parser.add_argument("--plan", action="store_true", help="say how many trials, how long, how much memory")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as delora-run takes them")
    options = parser.parse_intermixed_args()

    chosen = options.tasks.split(",")
    rows = methods if options.methods == "all" else options.methods.split(",")
    for flag, given, known in (("--tasks", chosen, tasks), ("--methods", rows, methods)):
        for one in given:
            if one not in known:
                parser.error(f"{flag} {one}: {expected(one, known)}")
    for word in options.words:
        if "=" not in word:
            parser.error(f"{word}: expected KEY=VALUE, as delora-run takes it")
    given = dict(word.lstrip("+").split("=", 1) for word in options.words)
    words = {
        "seed": ",".join(map(str, published["seeds"])),
        "model": options.model,
        "output_dir": "outputs/table4",
        "name": given.get("model", options.model).replace(",", "-"),
        **({"plan": "true"} if options.plan else {}),
    }
    words |= given
    factors = words.pop("lr_factor", rates())
    folder = Path(words["output_dir"], words["name"])

    for method in (row for row in rows if row in PUBLISHED):
        if status := delora_run(experiments(PUBLISHED[method], chosen), words):
            return status
    tuned = [row for row in rows if row not in PUBLISHED]
    if tuned:
        first, *others = words["seed"].split(",")
        words |= {"method": ",".join(tuned)}
        if status := delora_run(experiments("tuned", chosen), {**words, "seed": first, "lr_factor": factors}):
            return status
        if options.plan and others:
            count = len(others) * len(tuned) * len(chosen)
            print(
                f"and {count} with the {'seed' if len(others) == 1 else 'seeds'} {', '.join(others)}, at the best rates"
            )
        best = best_factors(folder, tuned, chosen) if others and not options.plan else {}
        for (method, factor), its_tasks in best.items():
            choice = {"method": method, "seed": ",".join(others), "lr_factor": f"{factor:g}"}
            if status := delora_run(experiments("tuned", its_tasks), {**words, **choice}):
                return status
    if options.plan:
        return 0
    status = report([str(folder), "--select", "first-seed"])
    return status or hyperparameters(folder, rows)


def experiments(kind: str, tasks: Iterable[str]) -> str:
    return ",".join(f"{kind}/{task}" for task in tasks)


def rates() -> str:
    """The factors on a method's base rate among which its rate is chosen, as delora-run takes them."""
    return OmegaConf.load(conf_folder() / "experiment" / "tuned" / "rates.yaml").hydra.sweeper.params.lr_factor


def delora_run(experiment: str, words: Mapping[str, str]) -> int:
    """Runs delora-run in a process of its own; its exit status where nothing can follow, else 0."""
    given = [f"{key}={value}" for key, value in {"experiment": experiment, **words}.items()]
    status = subprocess.run([sys.executable, "-m", "delora.cli", "-m", *given], check=False).returncode
    return 0 if status == cli.FAILED else status


def best_factors(folder: Path, methods: Iterable[str], tasks: Iterable[str]) -> dict[tuple[str, float], list[str]]:
    """The tasks on which a method's lowest seed scores best on validation at a factor; the lowest of equal factors."""
    best: dict[tuple[str, float], list[str]] = {}
    found = [trial for trial in trials.read([folder]).trials if not math.isnan(trial.validation)]
    for method, task in itertools.product(methods, tasks):
        mine = [t for t in found if (t.config["method"]["name"], t.task) == (method, task)]
        if not mine:
            print(f"{task} {method}: no rate has a score, so that none is chosen", file=sys.stderr)
            continue
        lowest = min(t.seed for t in mine)
        chosen = min((t for t in mine if t.seed == lowest), key=lambda t: (-t.validation, t.factor))
        best.setdefault((method, chosen.config["lr_factor"]), []).append(task)
    return best


def hyperparameters(folder: Path, methods: Sequence[str]) -> int:
    """Prints, and writes beside the other tables, which hyperparameters were published and which are chosen here."""
    panels = statistics.panels(trials.read([folder]).trials, None, "first-seed")
    made = Table(
        "hyperparameters",
        "Hyperparameters",
        "Published: by the method's authors for the task. Else the rate is the best on the validation half with the "
        f"lowest seed, among {rates()} times the method's base rate; epochs and batch size are DeLoRA's.",
        ["method", "task", "rate", "epochs", "batch size", "hyperparameters"],
        [row for panel in panels for row in _rows(panel, methods)],
    )
    text = tables.FORMS["markdown"][1](made)
    print(text, end="")
    storage.replace(folder / "report" / "hyperparameters.md", text.encode())
    return 0


def _rows(panel: Panel, methods: Sequence[str]) -> Iterable[list[Cell]]:
    for curve in panel.curves:
        trial = curve.trials_at(curve.best)[0]
        name = trial.config["method"]["name"]
        if name in methods:
            edge = ", at an end of the grid" if curve.best_is_on_edge else ""
            source = "published" if name in PUBLISHED else f"rate chosen here{edge}"
            texts = [f"{trial.rate:g}", str(trial.config["epochs"]), str(trial.config["batch_size"]), source]
            yield [Cell(curve.label), Cell(panel.facts.folder), *map(Cell, texts)]


if __name__ == "__main__":
    sys.exit(main())
