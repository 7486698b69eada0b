"""Trains experiment=table4/* for each task and seed as fleets, goes on where it was, and prints the table."""

import argparse
import sys
from pathlib import Path

from delora import cli
from delora.config import expected
from delora.report import statistics
from delora.report.cli import main as report

DESCRIPTION = """Trains DeLoRA with the hyperparameters of the paper's Table 9 on the tasks of its Table 4, with
seeds 42 to 46, and prints the table. Results go to outputs/table4/MODEL, the report to report/ in there.
The same command again trains only what is missing."""
EXAMPLES = """examples:
  scripts/table4 --plan                                      trials, memory and time; trains nothing
  scripts/table4 --tasks mrpc,rte --model minilm data.dir=FOLDER
  scripts/table4 --tasks rte seed=42 epochs=1 name=short     any words of delora-run
"""


def main() -> int:
    """Runs the command; returns its exit status."""
    published = statistics.published()
    tasks = list(published["rows"][0]["scores"])
    parser = argparse.ArgumentParser(
        "scripts/table4",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", default=",".join(tasks), help="default: %(default)s")
    parser.add_argument("--model", default="roberta_base", help="the encoder; default: %(default)s")
    parser.add_argument("--plan", action="store_true", help="say how many trials, how long, how much memory")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as delora-run takes them")
    options = parser.parse_intermixed_args()

    chosen = options.tasks.split(",")
    for task in chosen:
        if task not in tasks:
            parser.error(f"--tasks {task}: {expected(task, tasks)}")
    for word in options.words:
        if "=" not in word:
            parser.error(f"{word}: expected KEY=VALUE, as delora-run takes it")
    given = dict(word.lstrip("+").split("=", 1) for word in options.words)
    words = {
        "experiment": ",".join(f"table4/{task}" for task in chosen),
        "seed": ",".join(map(str, published["seeds"])),
        "model": options.model,
        "output_dir": "outputs/table4",
        "name": given.get("model", options.model).replace(",", "-"),
        **({"plan": "true"} if options.plan else {}),
    }
    words |= given
    sys.argv = ["delora-run", "-m", *(f"{key}={value}" for key, value in words.items())]
    status = cli.main()
    if options.plan or status not in (0, cli.FAILED):
        return status
    return report([str(Path(words["output_dir"], words["name"]))]) or status


if __name__ == "__main__":
    sys.exit(main())
