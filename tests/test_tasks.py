import subprocess
import sys

import pytest

from delora.tasks import TASKS

# Rows as the hub's metadata of nyu-mll/glue states them: train, then the validation splits.
HUB_ROWS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "qqp": (363846, 40430),
    "mnli": (392702, 9815, 9832),
    "qnli": (104743, 5463),
    "rte": (2490, 277),
    "wnli": (635, 71),
}


def test_rows_are_the_hubs():
    assert {name: tuple(task.rows.values()) for name, task in TASKS.items()} == HUB_ROWS
    assert all(next(iter(task.rows)) == "train" for task in TASKS.values())


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_facts_agree_with_each_other(task):
    assert task.headline in task.metrics
    assert len(task.text) == len(task.tsv_text)
    assert task.num_labels == (len(task.labels) if task.labels else 1)


def test_files_are_named_as_in_the_distribution():
    assert [TASKS["mrpc"].file(split) for split in TASKS["mrpc"].rows] == ["train.tsv", "dev.tsv"]
    mnli = [TASKS["mnli"].file(split) for split in TASKS["mnli"].rows]
    assert mnli == ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"]


def test_facts_import_nothing_heavy():
    heavy = "{'torch', 'numpy', 'datasets', 'transformers'}"
    program = f"import sys, delora.tasks; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
