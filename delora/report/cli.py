"""The command `delora-report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from delora.errors import UserError

DESCRIPTION = """Draws learning-rate robustness curves and the paper's tables from results on disk.

Everything is computed anew from each trial's result.json and metrics.jsonl, or from a trials.csv that an earlier report
wrote (with the evaluations.csv beside it)."""
EXAMPLES = """examples:
  delora-report outputs/robust-mrpc                               everything, into outputs/robust-mrpc/report/
  delora-report outputs/a outputs/b --output both                 two sweeps together
  delora-report outputs/a outputs/b --only table --format latex   prints the tables
  delora-report outputs/prolonged --factor 4                      curves over training at 4 times the base rates
"""
PARTS = ("curves", "numbers", "table", "page")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        report(options)
    except UserError as error:
        print(f"delora-report: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `delora-report ... | head`
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "delora-report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="FOLDER", help="sweeps or trials (or a trials.csv)")
    add("--only", choices=PARTS, help="one part: curves and page are written, numbers and table are printed")
    add("--format", choices=("markdown", "latex", "csv"), default="markdown", help="of what is printed")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write; default: report/ in the folder of results",
    )
    add(
        "--layer",
        metavar="NAME",
        help="the layer whose ‖W′ − W‖ and λ are drawn, a part of its name; default: mean",
    )
    add(
        "--factor",
        type=float,
        help="the rate of curves over training, times the base rate; default: each best rate",
    )
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="the factors over which worst drop and sensitivity are taken; default: those that all methods cover")  # fmt: skip
    return parser


def report(options: argparse.Namespace) -> None:
    """Reads, computes, and writes or prints what the options ask for.

    Raises:
        UserError: what `trials.read` raises, or the options do not fit the trials.
    """
    if options.range and not 0 < options.range[0] < options.range[1]:
        raise UserError("--range LOW HIGH: two factors, the lower one first, as in --range 0.25 32")
    if len(options.sources) > 1 and options.output is None and options.only not in ("numbers", "table"):
        raise UserError("several folders: say with --output FOLDER where the report of all of them goes")

    # After the options are read: `--help` and mistakes answer at once.
    from delora.report import curves, page, statistics, tables, trials

    found = trials.read(options.sources, options.layer)
    panels = statistics.panels(found.trials, tuple(options.range) if options.range else None)
    if options.factor and all(curves.shown_factor(c, options.factor) is None for p in panels for c in p.curves):
        known = ", ".join(tables.number(f) for f in sorted({t.factor for t in found.trials}))
        raise UserError(f"--factor {options.factor:g}: no trial has it. The factors are {known}.")
    notes = tables.notes(found, panels)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)

    kinds = {
        "numbers": lambda: tables.robustness_tables(panels),
        "table": lambda: [
            *tables.score_tables(panels), *tables.aggregate_tables(panels), *tables.comparison_tables(panels)
        ],
    }  # fmt: skip
    if options.only in kinds:
        print("\n".join(tables.FORMS[options.format][1](table) for table in kinds[options.only]()), end="")
        return

    folder = options.output or _default_output(options.sources[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = curves.draw(panels, folder, options.layer, options.factor) if options.only != "page" else []
        files = [path for path in pictures if path.suffix == ".png"]
        if options.only != "curves":
            made = {kind: make() for kind, make in kinds.items()}
            if options.only is None:
                files += _write_tables(made, folder)
                files += trials.write_csv(found.trials, folder)
            files.append(page.write(folder / "index.html", found, panels, made["numbers"] + made["table"], notes))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    print(f"{len(found.trials)} trials in {folder}:")
    for path in files:
        print(f"  {path.name}")


def _default_output(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / "report"


def _write_tables(made: dict, folder: Path) -> list[Path]:
    """numbers.md and .tex, table.md and .tex with all tables of a kind, and a CSV for each table."""
    from delora.report.tables import FORMS

    paths = []
    for kind, its_tables in made.items():
        for suffix, form in (FORMS["markdown"], FORMS["latex"]):
            paths.append(folder / f"{kind}.{suffix}")
            paths[-1].write_text("\n".join(form(table) for table in its_tables), encoding="utf-8")
        for table in its_tables:
            path = folder / f"{table.name}.csv"
            path.write_text(FORMS["csv"][1](table), encoding="utf-8")
            paths.append(path)
    return paths
