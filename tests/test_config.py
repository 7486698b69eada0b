"""Every file of conf/ against the schema, the schema's bounds, and what identifies a trial."""

import copy
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from conftest import compose_trial
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from delora import data
from delora.cli import conf_folder
from delora.config import ConfigError, Trial, look_up
from delora.encoders import matches
from delora.storage import flatten
from delora.tasks import TASKS

METHODS = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))
CHOICES = sorted(
    (group.name, path.relative_to(group).with_suffix("").as_posix())
    for group in conf_folder().iterdir()
    if group.is_dir() and group.name != "hydra"
    for path in group.rglob("*.yaml")
)


def faults_of(*overrides: str, **values: object) -> list[str]:
    """The faults of the default config under overrides, then under values by dotted key."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    try:
        Trial.from_config(config)
    except ConfigError as error:
        return error.faults
    return []


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_choice_is_a_trial_that_reads_back(group, option):
    needs = {"task": ["data=files", "data.train=own.csv"], "data": ["task=own", "data.train=own.csv"]}
    own = (group, option) in (("task", "own"), ("data", "files"))
    trial = compose_trial(f"{group}={option}", *(needs[group] if own else ()))
    by_source = group == "model" and trial.model.source
    assert group == "experiment" or getattr(trial, group).name == (
        trial.model.source.partition("/")[2] if by_source else option.replace("/", "")
    )
    assert Trial.from_config(json.loads(json.dumps(trial.resolved()))) == trial


def test_the_groups_are_complete():
    options = {group: {o for g, o in CHOICES if g == group} for group, _ in CHOICES}
    assert options["task"] >= {*TASKS, "own"}
    assert options["method"] >= {"delora", "lora", "dora", "ether", "etherplus"}


SECTIONS = ("fleet:", "halving:", "method:", "search:")


def test_every_key_has_one_value_in_conf_and_one_comment():
    optional = {name for name, field in Trial.model_fields.items() if not field.is_required()}
    assert optional == {
        "detach",
        "engine",
        "halving",
        "search",
    }  # which results of earlier versions have not, and yet are loaded
    text = (conf_folder() / "config.yaml").read_text()
    knobs = text[text.index("\n\n") : text.index("\n# Hydra")].split("\n")
    assert all(knob.count("  # ") == 1 for knob in knobs if knob and knob not in SECTIONS)
    top = [knob for knob in knobs if knob and not knob.startswith("  ")]
    assert len(top) == len(Trial.model_fields) - 6  # seven groups, of which config.yaml has a key of the method


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_options_are_what_its_class_takes(method):
    config = compose_trial(f"method={method}").method
    target = get_class(config.target)
    parameters = inspect.signature(target).parameters
    assert set(config.options()) == set(parameters) - {"weight_OI", "frozen", "width", "draw", *target.given}


@pytest.mark.parametrize("name", ["glue", "synthetic"])
def test_the_data_s_options_are_what_load_takes(name):
    options = compose_trial(f"data={name}").data.options()
    assert not options.keys() - inspect.signature(data.load).parameters


def test_base_rates_are_the_paper_s():
    rates = {method: compose_trial(f"method={method}").lr for method in METHODS}
    paper = {"lora": 6e-4, "dora": 6e-4, "delora": 6e-3, "ether": 6e-3, "etherplus": 6e-3}
    assert {method: rate for method, rate in rates.items() if method in paper} == paper


def test_minilm_s_shape_and_hash_are_the_package_s():
    config = compose_trial("model=minilm").model
    spec = importlib.util.find_spec(config.package)
    if spec is None:
        pytest.skip("the package of model=minilm is not installed: pip install 'delora[embedded]'")
    folder = Path(spec.origin).parent / "model"
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == config.sha256
    theirs = json.loads((folder / "config.json").read_text())
    names = {
        "family": "model_type",
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "positions": "max_position_embeddings",
    }
    assert config.shape.model_dump() == {ours: theirs[name] for ours, name in names.items()}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", -1, "lr=-1: must be above 0"),
        ("lr", float("nan"), "lr=nan: expected a finite number"),
        ("lr", "abc", "lr=abc: expected a number"),
        ("lr", None, "lr=null: expected a number"),
        ("lr", True, "lr=true: expected a number"),
        ("lr", "${nothing}", "lr=${nothing}: Interpolation key 'nothing' not found"),
        ("seed", "abc", "seed=abc: expected a whole number"),
        ("epochs", 2.5, "epochs=2.5: expected a whole number"),
        ("batch_size", True, "batch_size=true: expected a whole number"),
        ("accumulation", 33, "accumulation=33: a batch of 32 cannot be cut into 33 parts"),
        ("epochs", 10**20, "epochs=100000000000000000000: must be at most 100000"),
        ("epochs", 1e20, "epochs=1e+20: expected a whole number"),
        ("max_length", 513, "max_length=513: above 512, the longest input of model=roberta-base"),
        ("device", "gpu", "expected one of auto, cpu, cuda, cuda:1, mps; did you mean cpu?"),
        ("precision", "float31", "did you mean float32?"),
        ("name", "../up", "name=../up: expected up to 100 letters"),
        ("name", "a b", "name=a b: expected up to 100 letters"),
        ("name", 7, "name=7: expected text; a number needs two kinds of quotes: 'name=\"7\"'"),
        ("output_dir", "", "output_dir=: expected text"),
        ("task.name", "mprc", "did you mean mrpc?"),
        ("task.name", "RTE", "did you mean rte?"),
        ("method.rank", 769, "method.rank=769: above 768"),
        ("method.init", "zeros", "did you mean zero?"),
        ("method.betas", [0.9], "method.betas=[0.9]: the list is too short"),
        ("method.targets", [], "method.targets=[]: expected a list that is not empty"),
        ("method.targets", "query", "method.targets=query: expected a list, such as [query,value]"),
        ("method.targets", ["query", "qeury"], "method.targets=qeury: matches no layer or place of model=roberta-base"),
        ("method.targets", ["pooler.dense"], "method.targets=pooler.dense: matches no layer or place"),
        ("model.source", None, "model: expected one of source, package and random"),
        ("model.shape", 3, "model.shape=3: expected a group of keys"),
        ("model.shape.family", "brt", "model.shape.family=brt: expected one of albert, bert,"),
        ("model.shape.heads", 5, "model.shape.heads=5: does not divide the width 768"),
        ("lrr", 1, "lrr: no such key"),
        ("data.dri", 1, "data.dri: no such key"),
    ],
)
def test_an_impossible_value_is_the_one_fault(key, value, message):
    faults = faults_of(**{key: value})
    assert len(faults) == 1 and message in faults[0], faults


NEXT_TO_0, NEXT_TO_1, LARGEST = math.ulp(0.0), math.nextafter(1.0, 0.0), sys.float_info.max
NO_END = {LARGEST: None, math.inf: "expected a finite number"}
POSITIVE = {0.0: "must be above 0", NEXT_TO_0: None, **NO_END}
NOT_NEGATIVE = {-NEXT_TO_0: "must be at least 0", 0.0: None, **NO_END}
SHARE = {-NEXT_TO_0: "must be at least 0", 0.0: None, NEXT_TO_1: None, 1.0: "must be below 1"}


def whole(low: int, high: int) -> dict[int, str | None]:
    return {low - 1: f"must be at least {low}", low: None, high: None, high + 1: f"must be at most {high}"}


SEEDS, ROWS, WIDTHS = whole(0, 2**32 - 1), whole(1, 10**7), whole(1, 10**5)
BOUNDS = {  # what is said of the values at each edge and just beyond
    **dict.fromkeys(("lr", "lr_factor", "clip_norm", "method.base_lr"), POSITIVE),
    **dict.fromkeys(("method.alpha", "method.lambda_init", "method.rate_ratio", "method.d_initial"), POSITIVE),
    **dict.fromkeys(("weight_decay", "fleet.checkpoint_seconds"), NOT_NEGATIVE),
    **dict.fromkeys(("method.weight_decay", "method.lambda_lr"), NOT_NEGATIVE),
    **dict.fromkeys(("warmup_ratio", "method.dropout"), SHARE),
    **dict.fromkeys(("seed", "data.seed", "method.projection_seed"), SEEDS),
    **dict.fromkeys(("batch_size", "accumulation", "data.rows.train", "data.rows.validation"), ROWS),
    **dict.fromkeys(
        ("method.rank", "method.blocks", "method.block_size", "method.bottleneck", "method.projection_rank"), WIDTHS
    ),
    **dict.fromkeys(("model.shape.width", "model.shape.ffn", "model.shape.heads"), WIDTHS),
    **dict.fromkeys(("log_every", "fleet.size", "search.batch"), whole(1, 10**9)),
    "search.trials": whole(1, 100_000),
    "halving.keep": {0.0: "must be above 0", NEXT_TO_0: None, NEXT_TO_1: None, 1.0: "must be below 1"},
    "method.neumann_terms": whole(3, 100),
    "epochs": whole(1, 10**5),
    "max_length": whole(8, 10**5),
    "model.shape.layers": whole(1, 1000),
    "model.shape.positions": whole(1, 10**7),
}


@pytest.fixture(scope="module")
def tiny() -> dict:
    """A config as plain data."""
    return compose_trial("model=tiny", "data=synthetic").resolved()


def faults_with(config: dict, values: dict[str, object]) -> list[str]:
    """The faults of a plain config with other values by dotted key."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        part, _, last = key.rpartition(".")
        (look_up(config, part) if part else config)[last] = value
    return list(map(str, Trial.check(config)[1]))


@pytest.mark.parametrize(
    ("key", "value", "message"), [(key, *edge) for key, edges in BOUNDS.items() for edge in edges.items()]
)
def test_each_bound_is_where_it_is_said_to_be(tiny, key, value, message):
    faults = faults_with(tiny, {key: value})
    of_bounds = [fault for fault in faults if "must be" in fault or "finite" in fault]  # others say what does not fit
    assert of_bounds == ([f"{key}={value}: {message}"] if message else [])


def test_rates_of_decay_are_two_shares(tiny):
    for value, message in SHARE.items():
        expected = [f"method.betas={value}: {message}"] if message else []
        for betas in ([value, 0.9], [0.9, value]):
            assert faults_with(tiny, {"method.betas": betas}) == expected
    assert faults_with(tiny, {"method.betas": [0.9] * 3}) == ["method.betas=[0.9,0.9,0.9]: the list is too long"]


def test_every_number_of_conf_has_bounds():
    configs = [compose_trial(f"method={method}", "model=tiny", "data=synthetic").resolved() for method in METHODS]
    flat = {key: value for config in configs for key, value in flatten(config).items()}
    numbers = {key for key, value in flat.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    assert len(numbers) > 20 and numbers <= BOUNDS.keys()


LARGEST_SHAPE = {"family": "bert", "layers": 5, "width": 50_000, "ffn": 95_000, "heads": 1, "positions": 512}


@pytest.mark.parametrize(
    ("fits", "key", "value", "message"),
    [
        ({"batch_size": 8, "accumulation": 8}, "accumulation", 9, "a batch of 8 cannot be cut into 9 parts"),
        ({"max_length": 512}, "max_length", 513, "above 512, the longest input of model=tiny"),
        ({"method.rank": 32}, "method.rank", 33, "above 32, the width of a target layer of model=tiny"),
        ({"data.rows.validation": 2}, "data.rows.validation", 1, "cannot be split in two"),
        ({"protocol.name": "standard", "data.rows.validation": 1}, "protocol.name", "paper", "cannot be split in two"),
        ({"model.shape": LARGEST_SHAPE}, "model.shape.ffn", 95_001, "1e+11 weights, at most 1e+11"),
        ({"name": "a" * 100}, "name", "a" * 101, "expected up to 100 letters"),
        ({"name": "7._-"}, "name", "", "expected up to 100 letters"),
        ({"sweep": "a"}, "sweep", ".a", "expected up to 100 letters"),
        ({"model.sha256": "0af9" * 16}, "model.sha256", "0af9" * 16 + "0", "expected 64 hexadecimal digits"),
        ({"model.sha256": "0af9" * 16}, "model.sha256", "0af9" * 15 + "0af", "expected 64 hexadecimal digits"),
        ({"device": "cuda:12"}, "device", "cuda:", "expected one of auto, cpu,"),
    ],
)
def test_what_just_fits_and_what_does_not(tiny, fits, key, value, message):
    assert faults_with(tiny, fits) == []
    [fault] = faults_with(tiny, {**fits, key: value})
    assert message in fault


def test_sizes_that_no_machine_has_are_faults():
    large = {"model.shape.layers": 1000, "model.shape.width": 9984, "model.shape.heads": 96}
    assert faults_of(**large) == ["model.shape: 4.6e+11 weights, at most 1e+11"]


@pytest.mark.parametrize(
    ("side", "targets", "blocks", "widths"),
    [
        ("in", "intermediate.dense", 3, "384"),
        ("out", "intermediate.dense", 5, "1536"),
        ("out", "intermediate.dense", 3, None),
        ("in", "intermediate.dense", 128, None),
        ("both", "*.dense", 5, "384 and 1536"),
        ("both", "*.dense", 128, None),
    ],
)
def test_blocks_divide_the_widths_they_act_on(side, targets, blocks, widths):
    shape = ["model=bert_base", "model.shape.ffn=1536", "model.shape.width=384", "method=ether"]
    if blocks == 3:  # of the two widths, one alone is a multiple of 3
        shape += ["model.shape.width=512", "model.shape.heads=8"]
        widths = widths and "512"
    faults = faults_of(*shape, f"method.side={side}", f"method.targets=['{targets}']", f"method.blocks={blocks}")
    assert [f"does not divide {widths}," in fault for fault in faults] == ([True] if widths else [])


def test_all_faults_come_together():
    wrong = {"lr": -1, "epochs": 2.5, "method.rank": 0, "method.targets": ["foo"], "model.shape.layers": 0, "nix": 1}
    del wrong["model.shape.layers"]  # a shape at fault would hide what does not fit it
    with pytest.raises(ConfigError) as caught:
        plain = compose_trial().resolved()
        for key, value in wrong.items():
            part, _, last = key.rpartition(".")
            (plain[part] if part else plain)[last] = value
        Trial.from_config(plain)
    assert {fault.split("=")[0].split(":")[0] for fault in caught.value.faults} == set(wrong)
    assert all(fault in str(caught.value) for fault in caught.value.faults)


def test_a_value_taken_from_a_faulty_key_is_no_fault_of_its_own():
    assert faults_of(**{"method.base_lr": -1}) == ["method.base_lr=-1: must be above 0"]


def test_without_a_shape_the_layers_are_left_to_the_model():
    assert not faults_of(**{"model.shape": None, "model.source": "some/encoder", "method.targets": ["c_attn"]})
    assert faults_of("model=tiny", **{"model.shape": None}) == ["model.shape=null: a random model needs a shape"]


def test_a_large_rate_and_a_method_s_own_option_are_allowed():
    assert not faults_of(**{"lr": 1e9, "method.my_option": [1, 2]})


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("query", True),
        ("self.query", True),
        ("layer.0.attention.self.query", True),
        ("layer.[0-3].attention.self.query", True),
        ("layer.[1-3].attention.self.query", False),
        ("layer.*.query", True),
        ("*", True),
        ("roberta.encoder.layer.0.attention.self.query", True),
        ("uery", False),
        ("encoder", False),
        ("attention.query", False),
        ("Query", False),
    ],
)
def test_a_pattern_matches_the_end_of_a_name_from_a_dot_on(pattern, matched):
    assert matches(pattern, "roberta.encoder.layer.0.attention.self.query") is matched


def test_the_id_says_what_is_trained_and_not_where():
    trial = compose_trial("lr=1e-3")
    assert trial.id.startswith("mrpc-delora-lr0.001-seed42-")
    elsewhere = ["name=x", "output_dir=/y", "device=cpu", "logger=none", "log_every=1", "data.dir=/glue"]
    assert compose_trial("lr=1e-3", *elsewhere).id == trial.id
    assert trial.folder == Path("outputs", trial.id)
    assert compose_trial(*elsewhere).folder == Path("/y/x")


def test_no_two_configs_share_a_folder_and_names_need_no_quotes():
    grid = itertools.product(["delora", "ether"], ["1e-3", "1e9", "1e-7"], [1, 2], [8, 16])
    trials = [
        compose_trial(f"method={method}", f"lr={lr}", f"seed={seed}", f"batch_size={batch_size}")
        for method, lr, seed, batch_size in grid
    ]
    names = {str(trial.folder) for trial in trials}
    assert len(names) == len(trials)
    assert all(shlex.quote(name) == name for name in names)
