"""The command `delora-run`. Imports neither torch nor transformers until a run starts."""

import logging
import os
import platform
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from delora import __version__, terminal
from delora.errors import UserError

if TYPE_CHECKING:
    import argparse

    from omegaconf import DictConfig

    from delora.config import Trial
    from delora.storage import Result, StoredTrial

INTERRUPTION = "delora-run: interrupted; the same command goes on from the last checkpoint"
FAILED, DIVERGED, INTERRUPTED = 1, 3, 130
# Parts of the config's files that are no keys to be changed: names, how reports show a method, and Hydra's own.
NOT_TO_CHANGE = ("_target_", "defaults", "hydra", "place", "rung", "styles", "title")
LOWEST = -1.0  # of all headline scores: a sweeper that looks for the best stays away from trials that diverge
STOPPED = -2.0  # in the place of a score, of a trial that a halving has stopped

HELP = """\
delora-run [GROUP=OPTION ...] [KEY=VALUE ...]     trains a parameter-efficient finetuning method on a task

Examples
  delora-run +experiment=quickstart                       MiniLM and synthetic data, no network
  delora-run task=mrpc method=delora lr=1e-3              RoBERTa-base and GLUE, from the hub or its cache
  delora-run task=rte method=lora seed=43 model=minilm data.dir=FOLDER        GLUE's official TSV files
  delora-run task=own data=files data.train=FILE data.text=[COLUMN] data.label=COLUMN model=minilm        one's own rows
  delora-run method=lora method.rank=16 --cfg job         the config with all its keys, nothing is trained
  delora-run -m model=minilm lr=1e-3,3e-3,1e-2            a run for each value

Groups (* is the default; the keys of an option are changed with a dot: method.rank=16)
{groups}

Keys
{keys}

Keys of the options; what stands first is of all options of a group that do not say otherwise
{more_keys}

Flags
  --again FOLDER    repeat the trial in FOLDER from its stored config, KEY=VALUE changed, as <its name>-again
  --cfg job         print the config and stop; with --resolve, values instead of references
  -m, --multirun    run all combinations of values with commas between them
  --worker SWEEP    take fleets of a sweep in OUTPUT_DIR that an engine's command has handed out, until none is free
  --version         the versions of delora and of what it stands on
  -sc install=bash  what completes words in bash: eval "$(delora-run -sc install=bash)"
  --hydra-help      Hydra's other flags

Exit status
  0 done   1 a trial failed   2 bad input, or something is missing   3 the trial diverged   130 interrupted
"""


def conf_folder() -> Path:
    """The folder of configs: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main() -> int:
    """Runs the command; returns its exit status."""
    terminal.prepare()
    try:
        status = _run()
        sys.stdout.flush()
        return status
    except OSError as error:  # of standard output, as on a full disk
        return _tell(error)


def _run() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_help(), end="")
        return 0
    if "--version" in sys.argv[1:]:
        print(_versions())
        return 0
    if "--worker" in sys.argv[1:]:
        return _work()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)
    try:
        _start()
    except (UserError, OSError) as error:
        return _tell(error)
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        raise
    except KeyboardInterrupt as interruption:
        print(INTERRUPTION, file=sys.stderr)
        return getattr(interruption, "status", INTERRUPTED)
    return outcome.status


def _work() -> int:
    """Takes fleets of a sweep, as the workers of engines do."""
    from delora.worker import work

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ToStandardError()])
    try:
        return work([word for word in sys.argv[1:] if word != "--worker"])
    except (UserError, OSError) as error:
        return _tell(error)
    except KeyboardInterrupt as interruption:
        print("delora-run: interrupted; another worker goes on from the last checkpoint", file=sys.stderr)
        return getattr(interruption, "status", INTERRUPTED)


def _leave(*_: object) -> None:
    """Ends the process at Ctrl-C outside the training loop: many an import swallows a KeyboardInterrupt."""
    if os.isatty(2):  # past the live view, which hides the cursor
        os.write(2, f"\x1b[?25h\r\x1b[K{INTERRUPTION}\n".encode())
    else:
        print(INTERRUPTION, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def _tell(error: UserError | OSError) -> int:
    """Prints an error for people; returns its exit status."""
    print(f"delora-run: error: {terminal.printable(str(error))}", file=sys.stderr)
    return getattr(error, "status", FAILED)


def _start() -> None:
    """Checks the command, then hands it to Hydra.

    Raises:
        UserError: the command is not right.
        SystemExit: with the status of a single trial that is not done, or Hydra's own.
    """
    folder, words = _again(sys.argv[1:])
    if folder is None:
        return _hand_over()
    from delora import again

    if any(word.startswith(("--config-", "-cd", "-cn", "-cp")) for word in words):
        raise UserError("--again takes the config of the trial: without --config-dir, --config-name and --config-path")
    outcome.repeats = again.take(folder, [word for word in words if not word.startswith("-")])
    again.say_versions(outcome.repeats)
    sys.argv[1:] = [*words, "--config-name", again.NAME]
    _hand_over()


def _again(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder that follows --again, and the other words."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--again=") else [word])]
    if "--again" not in words:
        return None, words
    at = words.index("--again")
    if words.count("--again") > 1 or not words[at + 1 :] or words[at + 1].startswith("-"):
        raise UserError("--again FOLDER: expected the folder of one trial")
    return words[at + 1], words[:at] + words[at + 2 :]


def _hand_over() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach `main`; without it Hydra prints them and exits
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException

    from delora import overrides

    sys.argv[1:] = overrides.tidy(sys.argv[1:])
    flags, unknown = get_args_parser().parse_known_args()
    if unknown:
        raise UserError(f"{' '.join(unknown)}: no such flag; keys are written without dashes: lr=1e-3")
    if sum(map(bool, (flags.run, flags.multirun, flags.cfg, flags.info, flags.shell_completion))) > 1:
        raise UserError("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if flags.resolve and not flags.cfg:
        raise UserError("--resolve needs --cfg job")
    if flags.package and not flags.cfg:
        raise UserError("--package needs --cfg job")
    if flags.experimental_rerun:
        raise UserError("--experimental-rerun: runs are not pickled; the same command again goes on")
    _refuse_hidden(flags)
    conf = [conf_folder(), *([Path(flags.config_dir)] if flags.config_dir else [])]
    words = overrides.with_encoders(flags.overrides, conf)
    sys.argv[1:] = [*(word for word in sys.argv[1:] if word not in flags.overrides), *words]
    if not (flags.shell_completion or flags.hydra_help or flags.config_path):
        overrides.check(
            words,
            conf_folder(),
            multirun=flags.multirun or "hydra.mode=MULTIRUN" in words,
            config=flags.config_name or "config",
            more=Path(flags.config_dir) if flags.config_dir else None,
        )
    if flags.shell_completion:
        from delora.completion import complete_folders

        complete_folders()
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except SystemExit as end:
        if flags.cfg and end.code:  # Hydra has said why
            raise SystemExit(UserError.status) from None
        raise
    except Exception as error:
        is_ours = isinstance(error, UserError | OSError) or _is_a_job_s(error)
        if isinstance(error, HydraException) or not is_ours:
            raise UserError(_with_cause(error)) from error
        raise


def _refuse_hidden(flags: "argparse.Namespace") -> None:
    """Refuses a config of --config-dir that would not be read, since the one of the same name of conf/ goes first."""
    name = f"{(flags.config_name or 'config').removesuffix('.yaml')}.yaml"
    if flags.config_dir and not flags.config_path and (conf_folder() / name).exists():
        hidden = Path(flags.config_dir, name)
        if (hidden.with_name("result.json")).exists():
            raise UserError(f"--config-dir {flags.config_dir}: to repeat the trial there, --again {flags.config_dir}")
        if hidden.exists():
            told = f"{hidden} would not be read, delora's own {name} goes first"
            raise UserError(f"{told}: put what it changes into {hidden.parent}/experiment/NAME.yaml, experiment=NAME")


def _is_a_job_s(error: Exception) -> bool:
    """Whether a job raised it, here or elsewhere; else Hydra or a plugin stumbled over its words and files."""
    from hydra.core.utils import JobReturn

    of_jobs = {train.__code__, JobReturn.return_value.fget.__code__}  # type: ignore[attr-defined]
    return any(frame.f_code in of_jobs for frame, _ in traceback.walk_tb(error.__traceback__))


def _with_cause(error: BaseException) -> str:
    """The message of an exception and of what it was raised from, where that says more."""
    cause = error.__cause__ and str(error.__cause__).strip().split("\n")[0]
    return f"{error}: {cause}" if cause and "\n" not in str(error) else str(error)


def job(config: "DictConfig") -> float | None:
    """Trains the trial of a composed config: what Hydra calls, in its own process under some launchers.

    Returns:
        The headline score on validation, for sweepers that look for the best.

    Raises:
        UserError: one of several trials cannot run.
        SystemExit: a single trial that is not done, with its status.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from delora.config import Trial

    if HydraConfig.get().mode is not RunMode.RUN:
        return train([Trial.from_config(config)], sweep=True)[0]
    try:
        train([Trial.from_config(config)], sweep=False)
        status = outcome.status
    except (UserError, OSError) as error:
        status = _tell(error)
    if status:
        raise SystemExit(status)
    return None


class Outcome:
    """How the command went so far: its exit status, and the trial that it repeats."""

    status = 0
    repeats: "StoredTrial | None" = None


outcome = Outcome()


def train(trials: "Sequence[Trial]", sweep: bool = True, shows: bool = True) -> list[float | None]:
    """Trains trials, or says what they would take.

    Args:
        sweep: whether they belong to a sweep, which takes the name.
        shows: whether results are printed.

    Returns:
        The headline score on validation of each, `LOWEST` where it diverged, `STOPPED` where a halving ended
        it, None where it failed.

    Raises:
        UserError: something that they need is not on this machine, or cannot be used.
    """
    from delora.missing import identified, require_all

    if sweep:
        trials = [t.model_copy(update={"sweep": t.sweep or t.name, "name": None}) for t in trials]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ToStandardError()])
    trials = identified(trials)
    require_all(trials)
    if trials[0].plan:
        from delora.sweep import print_plan

        print_plan(trials)
        return [None] * len(trials)

    from delora.console import print_results
    from delora.sweep import run

    results = run(trials)
    if trials[0].detach and None in results:
        folder = trials[0].folder.parent
        print(
            f"handed out; how far it is: delora-status {folder}, results: the same command, or delora-report {folder}"
        )
        return [None] * len(trials)
    if shows:
        print_results(trials, results)
    if outcome.repeats and results[0] and not sweep:
        from delora.again import say_differences

        say_differences(outcome.repeats, results[0])
    if any(result is None for result in results):
        outcome.status = FAILED
    elif len(trials) == 1 and results[0] and results[0]["status"] == "diverged":
        outcome.status = DIVERGED
    return [_headline(result) for result in results]


class ToStandardError(logging.StreamHandler):
    """Writes to what is standard error now: the live view puts itself in its place, to have lines above it."""

    stream = property(lambda self: sys.stderr, lambda self, _: None)

    def format(self, record: logging.LogRecord) -> str:
        return terminal.printable(super().format(record))


def _headline(result: "Result | None") -> float | None:
    if result is None:
        return None
    if result["status"] == "stopped":
        return STOPPED
    best = result["best"] if result["status"] == "done" else None
    score = best["validation"][result["headline"]] if best else None
    return LOWEST if score is None else score


# --- Versions, and help from the files of conf/


def _versions() -> str:
    others = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "hydra-core")]
    return f"delora {__version__} ({', '.join(others)}, Python {platform.python_version()})"


def _help() -> str:
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^  - (\w+): (\w+)$", text, re.MULTILINE))
    groups = [line for group, default in defaults.items() for line in _help_on_group(group, default)]
    more = [line for group in ("method", "model", "data", "logger", "engine") for line in _help_on_keys(group)]
    return HELP.format(groups="\n".join(groups), keys="\n".join(_columns(_keys(text))), more_keys="\n".join(more))


def _keys(text: str, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, value and comment (or none) of each line of a config that a user may change."""
    sections: dict[str, str] = {}
    section, said = "", ""
    for line in text.splitlines():
        if found := re.fullmatch(r"(  )?(\w+): ([^#]+?)(?:  # (.+))?", line):
            indent, key, value, comment = found.groups()
            if (section if indent else key) not in NOT_TO_CHANGE:
                yield f"{prefix}{section}.{key}" if indent else f"{prefix}{key}", value, comment or ""
        elif found := re.fullmatch(r"(\w+):(?:  # (.+))?", line):
            section, said = found[1], found[2] or ""
        elif (found := re.fullmatch(r"  - (.+)", line)) and section not in NOT_TO_CHANGE:
            sections[section] = f"{sections[section]},{found[1]}" if section in sections else found[1]
    for key, items in sections.items():
        yield f"{prefix}{key}", f"[{items}]", said


def _help_on_keys(group: str) -> Iterator[str]:
    """The keys that most options of a group have with one value, then for each option its others."""
    root = conf_folder() / group
    options = {
        path.relative_to(root).with_suffix("").as_posix(): {
            key: (value, comment)
            for key, value, comment in _keys(path.read_text(encoding="utf-8"), f"{group}.")
            if key != f"{group}.name"  # follows from the option
        }
        for path in sorted(root.rglob("*.yaml"), key=lambda path: (path.parent, path))
    }
    whole = [keys for option, keys in options.items() if "/" not in option]  # what lies deeper changes another option
    shared = {}
    for key in dict.fromkeys(key for keys in whole for key in keys):
        said, count = Counter(keys[key] for keys in whole if key in keys).most_common(1)[0]
        if count > len(whole) / 2 > 1:
            shared[key] = said
    yield from _columns((key, *said) for key, said in shared.items())
    for option, keys in options.items():
        own = {key: said for key, said in keys.items() if said != shared.get(key)}
        lacking = [key for key in shared if key not in keys] if "/" not in option else []
        if own or lacking:
            yield f"  {group}={option}" + (f", without {', '.join(lacking)}" if lacking else "")
            yield from (f"  {line}" for line in _columns((key, *said) for key, said in own.items()))


def _help_on_group(group: str, default: str) -> Iterator[str]:
    root = conf_folder() / group
    for path in sorted(root.rglob("*.yaml"), key=lambda path: (path.parent, path)):
        option = path.relative_to(root).with_suffix("").as_posix()
        comments = re.findall(r"^# (?!@|delora-run)(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        mark = "*" if option == default else " "
        yield f"{mark} {f'{group}={option}':<33}{comments[0] if comments else ''}"


def _columns(keys: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    for key, value, comment in keys:
        yield f"  {f'{key}={value}':<35}  {comment}".rstrip()


if __name__ == "__main__":
    from delora import cli  # the module that the launcher sees

    sys.exit(cli.main())
