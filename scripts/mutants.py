"""What no test notices: mutants of the core modules, each against the tests of its module.

A mutant is one small change by an operator of mutmut: another number or comparison, an argument left out, a value that
is None. A sample of places is drawn, evenly over all, and of each place one change. Both follow from the text around
the place, so that editing a module elsewhere changes neither the sample nor what is known of it.

Tests run in copies of the tree in a temporary folder, in a process forked from this one, which has imported the
libraries but nothing of delora. Of a module's tests those run that reach the changed function (as coverage measures it
once for each file of tests), the quickest first, until one fails or they have had four minutes. Results are kept in
`outputs/mutants`: the same command goes on, and after an edit runs again what the edit may change.
"""

import argparse
import ast
import collections
import contextlib
import difflib
import hashlib
import importlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import coverage
import libcst
import pytest
import yaml
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
NO_CHANGE = Path(__file__).with_suffix(".yaml")  # mutants that change no behaviour, each with its reason
TESTS = {
    "delora/methods/*.py": ["methods", "model", "train"],
    "delora/model.py": ["model", "encoders", "train", "run"],
    "delora/layers.py": ["model", "encoders", "methods", "train"],
    "delora/encoders/*.py": ["encoders", "model", "config", "run"],
    "delora/attention.py": ["attention", "encoders", "model"],
    "delora/train.py": ["train", "encoders", "run"],
    "delora/optim.py": ["optim", "train"],
    "delora/randomness.py": ["randomness", "attention", "encoders", "train"],
    "delora/data/batches.py": ["batches", "encoders", "train"],
    "delora/data/splits.py": ["splits"],
    "delora/metrics.py": ["metrics", "train"],
    "delora/storage/*.py": ["storage", "report", "run", "sweep"],
    "delora/sweep.py": ["sweep", "run"],
    "delora/report/statistics.py": ["statistics", "report"],
}
# What tests are made of.
HELPERS = ("tests/conftest.py", "tests/fake_trials.py", "tests/forked.py", "tests/small_hub.py")
CAUGHT_AT_LEAST = 0.95  # of the mutants that change behaviour
BUDGET = 240  # seconds of tests that a mutant is put to, of those that reach it, as they take without it
# A mutant's time: so many seconds, and so many times what its tests take without it.
PROCESSOR_SECONDS, SECONDS = (30, 4), (120, 10)
OUT_OF_TIME = "out of time"
LIBRARIES = ["datasets", "evaluate", "hydra", "matplotlib.figure", "pandas", "peft", "pydantic", "safetensors.torch"]
LIBRARIES += ["scipy.stats", "sklearn.metrics", "torch.fx.experimental", "transformers.masking_utils", "wandb"]
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "bert", "roberta")]


@dataclass(frozen=True)
class Mutant:
    """One change of one module: whole lines before and after, without their indentation."""

    file: str
    function: str
    line: int
    before: str
    after: str
    code: str  # the whole module, changed

    @property
    def content(self) -> tuple[str, str, str, str]:
        """What it is, wherever its lines have moved to."""
        return self.file, self.function, self.before, self.after

    def __str__(self) -> str:
        lines = [f"  - {line}" for line in self.before.splitlines()]
        lines += [f"  + {line}" for line in self.after.splitlines()]
        return "\n".join([f"{self.file}:{self.line} {self.function}", *lines])


@dataclass
class Place:
    """A node of a module that can be changed, and the nodes that may stand for it."""

    file: str
    function: str
    line: int
    module: libcst.Module
    node: libcst.CSTNode
    changed: list[libcst.CSTNode]
    rank: str = ""

    def mutant(self) -> Mutant | None:
        """One of the changes; None where each is no Python or none."""
        first = int(self.rank, 16) % len(self.changed)
        for changed in [*self.changed[first:], *self.changed[:first]]:
            code = self.module.deep_replace(self.node, changed).code
            if compiles(code) and (edit := edited(self.module.code.splitlines(), code.splitlines())):
                return Mutant(self.file, self.function, self.line, *edit, code)
        return None


class Places(libcst.CSTVisitor):
    """Finds all places but annotations, decorators and docstrings, which change nothing or every import."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, file: str, module: libcst.Module) -> None:
        super().__init__()
        self.found: list[Place] = []
        self._file, self._module = file, module
        self._within: list[libcst.CSTNode] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.Annotation | libcst.Decorator | libcst.Import | libcst.ImportFrom):
            return False
        if isinstance(node, libcst.FunctionDef | libcst.ClassDef):
            self._within.append(node)
        changed = [new for kind, change in mutation_operators if isinstance(node, kind) for new in change(node)]
        if changed:
            line = self.get_metadata(PositionProvider, node).start.line
            function = outer_function(self._within)
            self.found.append(Place(self._file, function, line, self._module, node, changed))
        return True

    def on_leave(self, original_node: libcst.CSTNode) -> None:
        if self._within and self._within[-1] is original_node:
            self._within.pop()


def outer_function(within: Iterable[Any]) -> str:
    """The module's function or method that holds the innermost of these definitions: "f", "Class.method", ""."""
    names = []
    for node in within:
        names.append(node.name if isinstance(node.name, str) else node.name.value)
        if isinstance(node, libcst.FunctionDef | ast.FunctionDef):
            return ".".join(names)
    return ""


def draw(root: Path, size: int, seed: int) -> list[Mutant]:
    """The sample, by file and line."""
    files = [str(path.relative_to(root)) for glob in TESTS for path in root.glob(glob)]
    places = sorted((place for file in files for place in places_of(root, file, seed)), key=lambda place: place.rank)
    built = (mutant for place in places if (mutant := place.mutant()))
    return sorted(itertools.islice(built, size), key=lambda mutant: (mutant.file, mutant.line, mutant.after))


def places_of(root: Path, file: str, seed: int) -> list[Place]:
    """All places of a module, ranked by a hash of the seed and of the text around them."""
    wrapper = MetadataWrapper(libcst.parse_module((root / file).read_text()))
    visitor, lines = Places(file, wrapper.module), wrapper.module.code.splitlines()
    wrapper.visit(visitor)
    met = collections.Counter[tuple[str, ...]]()
    for place in visitor.found:
        text = wrapper.module.code_for_node(place.node).strip()
        about = (file, place.function, lines[place.line - 1].strip(), text)
        met[about] += 1
        place.rank = digest(seed, *about, met[about])
    return visitor.found


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def compiles(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def edited(before: list[str], after: list[str]) -> tuple[str, str] | None:
    """The lines that differ, before and after."""
    removed, added = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            removed += before[a:b]
            added += after[c:d]
    joined = tuple("\n".join(line.strip() for line in part) for part in (removed, added))
    return (joined[0], joined[1]) if joined[0] != joined[1] else None


# --- Running tests


class Trees:
    """Copies of the repository, each with the folder `shared` beside it.

    Attributes:
        whole: stays as it is, whatever happens to the repository meanwhile.
        paths: one for each mutant that runs at the same time.
    """

    def __init__(self, folder: Path, jobs: int):
        self.whole, *self.paths = (folder / str(i) / ROOT.name for i in range(jobs + 1))
        ignored = shutil.ignore_patterns(".*", "outputs", "build", "dist", "__pycache__")
        for path in (self.whole, *self.paths):
            shutil.copytree(ROOT if path == self.whole else self.whole, path, ignore=ignored)
            if (shared := ROOT.parent / "shared").is_dir():
                (path.parent / "shared").symlink_to(shared)


class Chosen:
    """A plugin of pytest: runs the tests of these names in this order, and keeps the name of the one that failed.

    Tests that nothing is known of run before them.
    """

    def __init__(self, names: list[str], known: Container[str]):
        self.places, self.known = {name: i for i, name in enumerate(names)}, known
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = (item for item in items if item.nodeid in self.places or item.nodeid not in self.known)
        items[:] = sorted(chosen, key=lambda item: self.places.get(item.nodeid, -1))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid}, which cannot be imported"


class Measured:
    """A plugin of pytest: how long each test takes, and under which name coverage counts it."""

    def __init__(self, measure: coverage.Coverage):
        self.measure, self.seconds, self.unusable = measure, collections.Counter[str](), set[str]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.measure.switch_context(item.nodeid)
        os.environ["MUTANTS_TEST"] = item.nodeid
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.unusable.add(report.nodeid)


class Child:
    """A forked process that runs some tests of a tree; `work` gives what is read from `result` when it has ended."""

    running: ClassVar[list["Child"]] = []

    def __init__(self, tree: Path, seconds: float, work: Callable[[], dict[str, Any]]):
        """`seconds` is what the work takes as a rule."""
        self.tree, self.start = tree, time.monotonic()
        processor, self.limit = (fixed + times * seconds for fixed, times in (PROCESSOR_SECONDS, SECONDS))
        self.late = False
        self._result = tree.parent / "result.json"
        self._result.unlink(missing_ok=True)
        sys.stdout.flush()
        self.running.append(self)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(tree)
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(processor), math.ceil(processor) + 5))
                self._result.write_text(json.dumps(work()))
            finally:
                os._exit(0)

    def _become(self, tree: Path) -> None:
        os.setsid()
        output = os.open(tree.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(tree)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
        sys.path[:] = [str(tree), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "scripts"))]
        # A module of the same size and second as its mutant would be taken for it.
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}

    def ended(self) -> bool:
        """Whether it has ended, by itself or by its time limit; what it started ends with it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.seconds = time.monotonic() - self.start
        if not pid and self.seconds <= self.limit:
            return False
        self.end()
        self.late = not pid or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL))
        if not pid:
            os.waitpid(self.pid, 0)
        return True

    def end(self) -> None:
        self.running.remove(self)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def result(self) -> dict[str, Any] | None:
        """What it found; None where it came to no end."""
        return json.loads(self._result.read_text()) if self._result.exists() else None


def pytest_in(tree: Path, plugin: object, files: Iterable[str], *options: str) -> int:
    words = ["-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tmp'}", *options]
    return int(pytest.main([*words, *(f"tests/test_{name}.py" for name in files)], plugins=[plugin]))


def run_mutant(tree: Path, job: "Job") -> dict[str, Any]:
    chosen = Chosen(job.names, job.tests)
    status = pytest_in(tree, chosen, job.files, "-x")
    return {"caught": status != 0, "by": chosen.failed or f"pytest ends with status {status}"}


def measure(tree: Path, file: str) -> dict[str, Any]:
    """Of each test of a file: seconds, the functions it reaches as "file::function", and whether it passes."""
    data, config = tree.parent / "coverage", tree.parent / "coveragerc"
    config.write_text(
        f"[run]\nsource = {tree / 'delora'}\ndata_file = {data}\nparallel = true\ncontext = ${{MUTANTS_TEST}}\n"
    )
    os.environ["COVERAGE_PROCESS_START"] = str(config)
    cover = coverage.Coverage(data_file=str(data), source=[str(tree / "delora")], config_file=False)
    plugin = Measured(cover)
    cover.start()
    pytest_in(tree, plugin, [file])
    cover.stop()
    cover.save()
    cover.combine([str(data.parent)], keep=True)
    reached = collections.defaultdict[str, set[str]](set)
    for path in cover.get_data().measured_files():
        functions = function_of_lines(Path(path).read_text())
        for line, tests in cover.get_data().contexts_by_lineno(path).items():
            for test in tests:
                if line in functions:
                    reached[test].add(f"{Path(path).relative_to(tree)}::{functions[line]}")
    for path in data.parent.glob("coverage.*"):
        path.unlink()
    return {
        name: {"seconds": seconds, "reaches": sorted(reached[name]), "passes": name not in plugin.unusable}
        for name, seconds in sorted(plugin.seconds.items())
    }


def function_of_lines(source: str) -> dict[int, str]:
    """The outer function of each line of a function's body."""
    found: dict[int, str] = {}

    def walk(node: Any, within: list[Any]) -> None:
        for child in ast.iter_child_nodes(node):
            inside = [*within, child] if isinstance(child, ast.FunctionDef | ast.ClassDef) else within
            if name := outer_function(inside):
                body = inside[-1].body
                found.update((line, name) for line in range(body[0].lineno, body[-1].end_lineno + 1))
            else:
                walk(child, inside)

    walk(ast.parse(source), [])
    return found


# --- What is known


class Known:
    """What was found before, in `outputs/mutants`, of the tree that lies in `root`."""

    def __init__(self, root: Path, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._folder, self._lines = folder, folder / "results.jsonl"
        self._results: dict[tuple[str, ...], dict[str, Any]] = {}
        if self._lines.exists():
            for line in self._lines.read_text().splitlines():
                stored = json.loads(line)
                self._results[tuple(stored["mutant"])] = stored

    def result(self, mutant: Mutant) -> dict[str, Any] | None:
        return self._results.get(mutant.content)

    def keep(self, mutant: Mutant, result: dict[str, Any]) -> None:
        stored = {"mutant": mutant.content, **result}
        self._results[mutant.content] = stored
        with self._lines.open("a") as file:
            file.write(json.dumps(stored) + "\n")

    def tests(self, file: str, old: bool) -> dict[str, Any]:
        """What `measure` found of a file of tests; empty where it has changed since, unless `old` will do."""
        path = self._folder / f"tests-{file}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        same = stored and stored["hash"] == self.hash(f"tests/test_{file}.py", *HELPERS)
        return stored["tests"] if stored and (same or old) else {}

    def keep_tests(self, file: str, tests: dict[str, Any]) -> None:
        stored = {"hash": self.hash(f"tests/test_{file}.py", *HELPERS), "tests": tests}
        (self._folder / f"tests-{file}.json").write_text(json.dumps(stored))

    def hash(self, *files: str) -> str:
        return digest(*((self._root / file).read_text() for file in files))

    def state(self, job: "Job", by: str | None) -> str:
        """A hash of what a result depends on: the module, and the tests that let it live or the one that caught it."""
        tests = [f"tests/test_{file}.py" for file in job.files]
        catching = [file for file in tests if by and by.startswith(file)]
        return self.hash(job.mutant.file, *(catching or tests), *HELPERS)


@dataclass
class Job:
    """A mutant and its tests."""

    mutant: Mutant
    files: list[str]
    tests: dict[str, dict[str, Any]]  # of these files

    @cached_property
    def names(self) -> list[str]:
        """The tests that reach the function, the quickest first; of what runs on import, or is new, any of them."""
        place = f"{self.mutant.file}::{self.mutant.function}"
        passing = [name for name, test in self.tests.items() if test["passes"]]
        reaching = [name for name in passing if place in self.tests[name]["reaches"]]
        ordered = sorted(reaching or passing, key=lambda name: self.tests[name]["seconds"])
        spent = itertools.accumulate((self.tests[name]["seconds"] for name in ordered[:-1]), initial=0)
        return [name for name, before in zip(ordered, spent, strict=True) if before < BUDGET]

    @property
    def seconds(self) -> float:
        return sum(self.tests[name]["seconds"] for name in self.names)


def no_change() -> dict[tuple[str, str, str, str], str]:
    """The reasons of the mutants that change no behaviour."""
    entries = yaml.safe_load(NO_CHANGE.read_text())
    keys = ("file", "function", "before", "after")
    return {tuple(str(entry[key]).strip() for key in keys): entry["reason"] for entry in entries}


def measure_tests(files: list[str], trees: Trees, known: Known, old: bool) -> None:
    waiting, running = [file for file in files if not known.tests(file, old)], dict[str, Child]()
    while waiting or running:
        for tree in trees.paths:
            if waiting and tree not in [child.tree for child in running.values()]:
                file = waiting.pop(0)
                running[file] = Child(tree, 600, lambda tree=tree, file=file: measure(tree, file))
        for file, child in list(running.items()):
            if child.ended():
                tests = child.result()
                if not tests:
                    raise SystemExit(
                        f"scripts/mutants: tests/test_{file}.py did not run: {child.tree.parent}/output.txt"
                    )
                passing = sum(test["passes"] for test in tests.values())
                print(f"tests/test_{file}.py: {passing} of {len(tests)} pass, {child.seconds:.0f} s", flush=True)
                known.keep_tests(file, tests)
                del running[file]
        time.sleep(0.2)


def run_mutants(jobs: list[Job], trees: Trees, known: Known) -> None:
    """Those of which nothing is known for the module and the tests as they are."""
    waiting, noted = [], no_change()
    for job in jobs:
        if job.mutant.content in noted:
            continue
        before = known.result(job.mutant)
        if before and before["by"] in job.names:  # what caught it before will catch it soonest
            job.names.insert(0, job.names.pop(job.names.index(before["by"])))
        if not before or before["state"] != known.state(job, before["by"]):
            waiting.append(job)
    total, running, done = len(waiting), list[tuple[Job, Child]](), itertools.count(1)
    while waiting or running:
        for tree in trees.paths:
            if waiting and tree not in [child.tree for _, child in running]:
                job = waiting.pop(0)
                (tree / job.mutant.file).write_text(job.mutant.code)
                work = lambda tree=tree, job=job: run_mutant(tree, job)  # noqa: E731
                running.append((job, Child(tree, job.seconds, work)))
        for job, child in list(running):
            if child.ended():
                running.remove((job, child))
                # One that ends without a word is caught too.
                found = child.result() or {"caught": True, "by": OUT_OF_TIME if child.late else "the process ended"}
                by = found["by"] if found["caught"] else None
                known.keep(job.mutant, {"by": by, "state": known.state(job, by), "seconds": round(child.seconds, 1)})
                shutil.copy(trees.whole / job.mutant.file, child.tree / job.mutant.file)
                told = f"caught by {by}" if by else "ALIVE"
                print(
                    f"{next(done)}/{total} {job.mutant.file}:{job.mutant.line} {child.seconds:.0f} s {told}", flush=True
                )
        time.sleep(0.05)


# --- The report


def report(jobs: list[Job], known: Known) -> bool:
    """Prints what was caught and what lives; whether enough was."""
    noted, late, living = no_change(), 0, []
    rows, table = collections.defaultdict[str, list[int]](lambda: [0, 0, 0, 0]), Table(box=None)
    for job in jobs:
        same, counts = job.mutant.content in noted, rows[job.mutant.file]
        by = (known.result(job.mutant) or {}).get("by")
        late += by == OUT_OF_TIME
        for i, counted in enumerate((True, same, not same and by, not same and not by)):
            counts[i] += bool(counted)
        if not same and not by:
            living.append(job.mutant)
    for name in ("module", "mutants", "change nothing", "caught", "alive"):
        table.add_column(name, justify="left" if name == "module" else "right")
    for file, counts in sorted(rows.items()):
        table.add_row(file, *map(str, counts))
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    table.add_row("all", *map(str, total))
    Console(width=110).print(table)
    print(*living, sep="\n")
    share = total[2] / max(1, total[0] - total[1])
    print(f"caught: {total[2]} of {total[0] - total[1]} that change behaviour, {share:.1%} ({late} out of time)")
    return share >= CAUGHT_AT_LEAST


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="*", help="report and run those of the sample whose file begins so")
    parser.add_argument("--sample", type=int, default=300, help="how many places, of all modules (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at the same time (default 2)")
    parser.add_argument("--old", action="store_true", help="do not measure again which functions changed tests reach")
    parser.add_argument("--list", action="store_true", help="run nothing, print the sample")
    options = parser.parse_args()

    if options.list:
        print(*draw(ROOT, options.sample, options.seed), sep="\n")
        return

    for library in LIBRARIES:
        importlib.import_module(library)
    assert not any(name.split(".")[0] == "delora" for name in sys.modules)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: [child.end() for child in list(Child.running)])
        trees = Trees(Path(folder), options.jobs)
        known = Known(trees.whole, ROOT / "outputs" / "mutants")
        sample = draw(trees.whole, options.sample, options.seed)
        chosen = [m for m in sample if m.file.startswith(tuple(options.modules) or "")]
        files_of = {
            m.file: [f for glob, files in TESTS.items() if fnmatch(m.file, glob) for f in files] for m in chosen
        }
        measure_tests(sorted({file for files in files_of.values() for file in files}), trees, known, options.old)
        jobs = []
        for mutant in chosen:
            tests = {name: test for file in files_of[mutant.file] for name, test in known.tests(file, old=True).items()}
            jobs.append(Job(mutant, files_of[mutant.file], tests))
        run_mutants(jobs, trees, known)
    sys.exit(0 if report(jobs, known) else 1)


if __name__ == "__main__":
    main()
