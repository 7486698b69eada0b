"""The command `delora-report`."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from delora import terminal
from delora.errors import UserError

DESCRIPTION = """Draws learning-rate robustness curves and the paper's tables from results on disk.

Everything is computed anew from each trial's result.json and metrics.jsonl. Curves are written as PNG, SVG and PDF,
tables as Markdown, LaTeX and CSV, and all of it with each trial as one page, index.html."""
EXAMPLES = """examples:
  delora-report outputs/robust-mrpc                               everything, into outputs/robust-mrpc/report/
  delora-report outputs/a outputs/b                               two sweeps together, into outputs/a/report/
  delora-report outputs/a outputs/b --only table --format latex   the tables, which are printed as well
  delora-report outputs/prolonged --factor 4                      curves over training at 4 times the base rates
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    terminal.prepare()
    options = _parser().parse_args(arguments)
    try:
        report(options)
    except UserError as error:
        print(f"delora-report: error: {terminal.printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "delora-report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="sweeps or trials")
    add("--only", choices=("curves", "table", "page"), help="make one part; table is printed as well")
    add("--format", choices=("markdown", "latex", "csv"), default="markdown", help="of the tables that are printed")
    add("--output", type=Path, metavar="FOLDER", help="where to write; default: report/ in the first FOLDER")
    add("--layer", metavar="NAME", help="layers whose ‖W′ − W‖ and λ are shown, as in method.targets; default: all")
    add("--factor", type=float, help="shows training at this factor; default: at each method's best")
    span = "factors over which worst drop and sensitivity are taken; default: all that every method covers"
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=span)
    select = (
        "the best rate: highest mean validation score over the seeds, or, as in the paper, of the lowest seed alone"
    )
    add("--select", choices=("pooled", "first-seed"), default="pooled", help=select)
    return parser


def report(options: argparse.Namespace) -> None:
    """Reads, computes, writes, and prints what was written.

    Raises:
        UserError: what `trials.read` raises, the options do not fit the trials, or a file cannot be written.
    """
    if options.range and not 0 < options.range[0] < options.range[1] < math.inf:
        raise UserError("--range LOW HIGH: two factors above 0, the lower one first, as in --range 0.25 32")

    # After the options are read: `--help` and mistakes answer at once.
    from delora import search, storage, winner
    from delora.report import curves, page, statistics, tables, trials

    found = trials.read(options.folders, options.layer)
    span = tuple(options.range) if options.range else None
    panels = statistics.panels(found.trials, span, options.select, found.stopped)
    at = [curves.shown_factor(curve, options.factor) for panel in panels for curve in panel.curves]
    if options.factor is not None and all(place is None for place in at):
        known = ", ".join(tables.number(factor) for factor in sorted({trial.factor for trial in found.trials}))
        raise UserError(f"--factor {options.factor:g}: no trial has it. The factors are {known}")
    searches, problems = search.below(options.folders)
    notes = [*tables.notes(found, panels), *problems]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for best in winner.choose(storage.StoredTrial(trial.folder, trial.result) for trial in found.trials):
        print(best, file=sys.stderr if options.only == "table" else sys.stdout)
    for one in searches:
        print(terminal.printable(str(one)), file=sys.stderr if options.only == "table" else sys.stdout)

    folder = options.output or options.folders[0] / "report"
    if options.output and folder.is_symlink():  # it is named by the user, not by a folder of results
        folder = folder.resolve()
    made: list[tables.Table] = []
    if options.only != "curves":
        made = [*tables.answers(panels), *map(tables.of_search, searches), *tables.all_tables(panels)]
    shown = [table for table in made if not table.aside]
    written: list[Path] = []
    if options.only in (None, "curves"):
        written += curves.draw(panels, folder, options.layer, options.factor, searches=searches)
    if options.only in (None, "table"):
        written += tables.write(made, folder)
    if options.only in (None, "page"):
        at = folder / "index.html"
        written.append(page.write(at, panels, made, notes, options.layer, options.factor, searches))
    printed = {
        None: [table for table in shown if table.name.startswith(("answer", "scores", "ladder"))],
        "table": shown,
    }
    print("\n".join(tables.FORMS[options.format][1](table) for table in printed.get(options.only, [])), end="")
    for path in written:
        print(terminal.printable(str(path)), file=sys.stderr if options.only == "table" else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
