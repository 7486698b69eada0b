"""The command `delora-run`. Imports neither torch nor transformers until a run starts."""

import logging
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

DONE, FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130

HELP = """\
delora-run [GROUP=OPTION ...] [KEY=VALUE ...]     compares parameter-efficient finetuning methods on GLUE

  delora-run +experiment=quickstart                         MiniLM and synthetic data, no network
  delora-run task=mrpc method=delora lr=1e-3                RoBERTa-base and GLUE from the hub or its cache
  delora-run task=rte method=lora seed=43 model=minilm data.dir=FOLDER      GLUE's official TSV files
  delora-run -m task=mrpc lr=1e-3,3e-3,1e-2 model=minilm    one run for each value

Groups (an option is a file of values; GROUP.KEY=VALUE changes one of them):
{groups}

Keys:
{keys}

  --cfg job     print the resolved config and stop
  -m            run all combinations of comma-separated values

Exit status: 0 done, 1 a trial failed, 2 bad input or something is missing, 3 the trial diverged, 130 interrupted.
"""


def conf_folder() -> Path:
    """The folder of configs: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of `delora-run`."""
    arguments = [argument.removeprefix("+") if argument.startswith("+experiment=") else argument for argument in sys.argv[1:]]
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return
    sys.argv[1:] = arguments
    try:
        status = _run(arguments)
    except KeyboardInterrupt:
        print("delora-run: interrupted; finished trials stay valid", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


def _run(arguments: Sequence[str]) -> int:
    try:
        _check(arguments)
    except UserError as error:
        return _report(error)

    import hydra

    statuses: list[int] = []

    def task(config: "DictConfig") -> None:
        statuses.append(_run_trial(config))

    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)()
    return max(statuses, default=DONE)


def _run_trial(config: "DictConfig") -> int:
    from omegaconf import OmegaConf

    from delora.config import Trial

    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        trial = Trial.from_config(plain)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

        from delora.console import print_results
        from delora.run import run

        results = run([trial])
    except UserError as error:
        return _report(error)
    except OSError as error:
        print(f"delora-run: {error}", file=sys.stderr)
        return FAILED
    except Exception:  # noqa: BLE001 - a fault of the program: the traceback is what a person can report
        traceback.print_exc()
        return FAILED
    print_results([trial], results)
    return DIVERGED if results[0]["status"] == "diverged" else DONE


def _report(error: UserError) -> int:
    from delora.results import ResultsError

    print(f"delora-run: error: {error}", file=sys.stderr)
    return FAILED if isinstance(error, ResultsError) else BAD_INPUT


# --- Checking a command line before anything heavy is imported


def _check(arguments: Sequence[str]) -> None:
    """Raises ConfigError with all that is wrong with the overrides, each with the nearest right name."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from delora.config import ConfigError, Trial, expected, nearest
    from delora.results import flatten

    groups = _groups()
    faults: list[object] = []
    choices: list[str] = []
    values: list[tuple[str, list[Any]]] = []
    parser = OverridesParser.create()
    for argument in _overrides(arguments):
        try:
            override = parser.parse_override(argument)
        except HydraException:
            faults.append(f"{argument}: expected KEY=VALUE, such as lr=1e-3 (quote values with spaces or commas)")
            continue
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra":
            continue
        several = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        if key in groups:
            wrong = [value for value in several if str(value) not in groups[key] and value is not None]
            faults += [f"{key}={value}: {expected(value, groups[key])}" for value in wrong]
            if not wrong:
                choices.append(f"{key}={'null' if several[0] is None else several[0]}")
        else:
            values.append((key, several))
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=choices)
    known = set(flatten(OmegaConf.to_container(config, resolve=False)))  # type: ignore[arg-type]
    sections = {part.rpartition(".")[0] for part in known} - {""}
    good: list[tuple[str, list[Any]]] = []
    for key, several in values:
        if key in known or key in sections:
            good.append((key, several))
        else:
            near = nearest(key, [*known, *groups])
            faults.append(f"{key}: no such key{f'; did you mean {near}?' if near else ''}{_owner(key)}")
    OmegaConf.set_struct(config, False)
    for overridden in _one_by_one(good):
        changed = config.copy()
        try:
            for key, value in overridden.items():
                OmegaConf.update(changed, key, _plain(value))
            faults += Trial.check(changed)[1]
        except OmegaConfBaseException as error:
            faults.append(str(error).splitlines()[0])
    if faults:
        raise ConfigError(faults)


def _plain(value: Any) -> Any:
    """A parsed value as YAML would give it: quoted text as text."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.text if hasattr(value, "text") else value


def _overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments that change the config, without Hydra's own options."""
    takes_value = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
    found, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("-"):
            found.append(argument)
        skip = argument in takes_value
    return found


def _one_by_one(values: Sequence[tuple[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    """The first value of each key, then every other value in turn."""
    first = {key: several[0] for key, several in values}
    yield first
    for key, several in values:
        for value in several[1:]:
            yield first | {key: value}


def _owner(key: str) -> str:
    """Whose option a key of another choice of its group is: "; it belongs to delora"."""
    group, _, option = key.partition(".")
    files = sorted((conf_folder() / group).glob("*.yaml")) if option else []
    owners = [file.stem for file in files if re.search(rf"^{re.escape(option)}:", file.read_text(), re.MULTILINE)]
    return f"; it belongs to {' and '.join(owners)}" if owners else ""


# --- Help


def _groups() -> dict[str, list[str]]:
    """The options of each group of configs."""
    folders = sorted(folder for folder in conf_folder().iterdir() if folder.is_dir())
    return {f.name: sorted(str(p.relative_to(f).with_suffix("")) for p in f.rglob("*.yaml")) for f in folders}


def _help() -> str:
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^  - (\w+): (\w+)$", text, re.MULTILINE))
    groups = [
        f"  {name:<11} {', '.join(f'{o} (default)' if o == defaults.get(name) else o for o in options)}"
        for name, options in _groups().items()
    ]
    keys = re.findall(r"^(\w+): (\S+)  # (.+)$", text, re.MULTILINE)
    lines = [f"  {f'{key}={value}':<38} {comment}" for key, value, comment in keys]
    return HELP.format(groups="\n".join(groups), keys="\n".join(lines))
