"""The command `delora-export`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from delora import terminal
from delora.errors import UserError

DESCRIPTION = """Saves a finished trial for those who have no delora: as a model of transformers, the adapter merged
into its weights, or as an adapter of PEFT's. Both with the encoder's tokenizer, the labels, and a model card."""
EXAMPLES = """examples:
  delora-export outputs/mrpc-lora -o mrpc-model                       pipeline("text-classification", "mrpc-model")
  delora-export outputs/mrpc-lora -o mrpc-adapter --format peft       PeftModel.from_pretrained(base, "mrpc-adapter")
  delora-export adapter --base FOLDER -o model                        an adapter that PEFT saved, merged
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    terminal.prepare()
    options = _parser().parse_args(arguments)
    try:
        from delora.run import load  # after the options are read: `--help` and mistakes answer at once

        saved = load(options.folder, base=options.base).save(options.output, options.format)
    except UserError as error:
        print(f"delora-export: error: {terminal.printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(terminal.printable(f"saved in {saved}, read back and compared"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "delora-export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a finished trial, or an adapter that PEFT saved")
    add("-o", "--output", type=Path, metavar="OUT", required=True, help="the folder to make; it must be empty")
    add("--format", choices=("transformers", "peft"), default="transformers", help="default: transformers")
    add("--base", metavar="MODEL", help="of an adapter that PEFT saved: a folder, ORG/NAME, or an option of model=")
    return parser


if __name__ == "__main__":
    sys.exit(main())
