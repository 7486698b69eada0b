import hashlib
import json

import numpy as np
import pytest

from delora.data.splits import paper_split
from delora.errors import UserError
from delora.tasks import TASKS


def sha256(index: np.ndarray) -> str:
    return hashlib.sha256(",".join(map(str, index)).encode("ascii")).hexdigest()


def test_every_published_split_to_the_index(shared):
    golden = json.loads((shared / "golden" / "splits.json").read_text())["tasks"]
    checked = 0
    for name, facts in golden.items():
        for seed, expected in facts["seeds"].items():
            validation, test = paper_split(TASKS[name], int(seed), facts["n"])
            assert (len(validation), len(test)) == (facts["val_count"], facts["test_count"])
            assert validation[:10].tolist() == expected["val_first10"]
            assert test[-10:].tolist() == expected["test_last10"]
            assert (sha256(validation), sha256(test)) == (expected["val_sha256"], expected["test_sha256"])
            checked += 1
    assert checked == 24  # eight tasks, three seeds


@pytest.mark.parametrize("n", [2, 71, 400, 3000])
@pytest.mark.parametrize("name", TASKS)
def test_sets_of_any_size_are_cut_without_loss(name, n):
    validation, test = paper_split(TASKS[name], 7, n)
    assert sorted([*validation, *test]) == list(range(n))
    assert len(validation) and len(test)


def test_wnli_takes_half():
    validation, test = paper_split(TASKS["wnli"], 42, 71)
    assert (len(validation), len(test)) == (35, 36)


def test_impossible_splits_are_refused():
    with pytest.raises(UserError, match="mrpc: 1 validation rows"):
        paper_split(TASKS["mrpc"], 42, 1)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed {seed}"):
            paper_split(TASKS["mrpc"], seed, 408)
    for seed in (0, 2**32 - 1):
        assert len(paper_split(TASKS["mrpc"], seed, 408)[0]) == 204
