"""Generated sentences: the same everywhere, in GLUE's schema, and of no use to a model that cannot compare them."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from delora.data import Dataset, load
from delora.data.synthetic import BAD, GOOD, SLOTS, VERBS, generate
from delora.tasks import TASKS

# sha256 of 300 training and 100 validation rows: whoever changes the sentences makes earlier results incomparable.
HASHES = {
    "cola": "3d566629a669f688ac6fbac3220a9ed78b45bf574a6839a941de0e2fcaadfb3f",
    "sst2": "6b4461628997b2e448244da120a25c925bd9404c841ce2c20dd887cbf07ab31a",
    "mrpc": "8f23a26517e76d1a5874b7d3d8a5c33a28da129e15a46ae0ab05094aa9d1ee0e",
    "stsb": "09e1a19af03f6635c4c32e5a29099357430815909b04f8c87f269ff3864e87e1",
    "qqp": "be15c9446d0c5a43153f6c99102793592f4e4ae01dac52a818050b965274c575",
    "mnli": "f63ebb4c1d170abb4f6145eb235f08f95528260bd9fd5ee28ef14907695b2a07",
    "qnli": "6c7ab8b1971fc8c1fce0d4c6878865a5af247b4820568a05b88db5f7326224c3",
    "rte": "7cdd96f4883d86a7fb9fe7dfcb6b3a84fbe2a9850f1c93b88a5a70f88968654c",
    "wnli": "fccdd205c80152127beff7c0220f9bb0e2cea67c54a49d5b65d730f56fc4a9f7",
}


def synthetic(name: str, train: int = 300, validation: int = 100, seed: int = 0) -> Dataset:
    return load(TASKS[name], source="synthetic", rows={"train": train, "validation": validation}, seed=seed)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_the_same_on_every_machine(name):
    assert synthetic(name).sha256 == HASHES[name]
    assert synthetic(name, seed=1).sha256 != HASHES[name]


@pytest.mark.parametrize("name", TASKS)
def test_more_rows_begin_with_the_same_ones(name):
    few, many = (synthetic(name, n).splits["train"] for n in (3, 50))
    assert len(few) == 3 and few.texts == many.texts[:3] and (few.labels == many.labels[:3]).all()


@pytest.mark.parametrize("name", TASKS)
def test_rows_have_glue_s_schema(name):
    task = TASKS[name]
    dataset = synthetic(name, 2000, 400)
    assert len(dataset.splits) == len(task.rows)
    assert [len(rows) for rows in dataset.splits.values()] == [2000] + [400] * (len(task.rows) - 1)
    for rows in dataset.splits.values():
        assert all(len(texts) == len(task.text) for texts in rows.texts)
        assert all(6 <= len(text.split()) <= 25 and text.isprintable() for texts in rows.texts for text in texts)
        assert len(rows.labels) == len(rows)
    labels = dataset.splits["train"].labels
    if task.labels is None:
        assert labels.dtype == np.float64 and labels.min() >= 0 and labels.max() == 5 and 2 < labels.mean() < 3
    else:
        shares = np.bincount(labels) / len(labels)
        assert labels.dtype == np.int64 and len(shares) == len(task.labels)
        assert shares.min() > 0.25 and shares.max() < 0.75


@pytest.mark.parametrize("name", TASKS)
def test_no_row_is_seen_before_it_is_scored(name):
    dataset = synthetic(name, 5000, 500)
    seen = set(dataset.splits.pop("train").texts)
    assert len(seen) > 4950
    for rows in dataset.splits.values():
        assert sum(texts in seen for texts in rows.texts) <= 5 and len(set(rows.texts)) >= 495


def test_sizes_are_glue_s_where_none_are_given():
    task = TASKS["rte"]
    assert {name: len(rows) for name, rows in load(task, source="synthetic").splits.items()} == task.rows
    assert {name: len(rows) for name, rows in generate(task, {"train": 0, "validation": 1}).items()} == {
        "train": 0,
        "validation": 1,
    }


def content(text: str) -> set[str]:
    """The words of a sentence that carry its fact, each verb as its plain form."""
    plain = {other: verb for verb, (other, _) in VERBS.items()}
    words = {plain.get(word, word) for word in text.lower().split()}
    return words & {word.lower() for slot in SLOTS.values() for word in slot}


@pytest.mark.parametrize(("name", "same"), [("mrpc", 1), ("qqp", 1), ("rte", 0)])
def test_labels_follow_from_the_sentences(name, same):
    rows = synthetic(name).splits["train"]
    swapped = 0
    for (first, second), label in zip(rows.texts, rows.labels, strict=True):
        follows = content(second) <= content(first)
        if label == same:
            assert follows
        swapped += label != same and follows
    assert 0.05 < swapped / len(rows) < 0.25  # two persons trade places: the words alone do not tell


def test_scores_fall_with_the_number_of_words_that_differ():
    rows = synthetic("stsb", 1000).splits["train"]
    common = [len(content(first) & content(second)) for first, second in rows.texts]
    assert spearmanr(common, rows.labels).statistic > 0.95


def test_verdicts_agree_with_the_label():
    for (text,), label in zip(*vars(synthetic("sst2").splits["train"]).values(), strict=True):
        for verdict in text.split(" , "):
            praise = bool({*verdict.split()} & {*GOOD.split()})
            assert praise != bool({*verdict.split()} & {*BAD.split()})
            assert praise != (" never " in verdict) if label else praise == (" never " in verdict)


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 3)])
@pytest.mark.parametrize("name", ["mrpc", "qqp", "qnli", "rte", "wnli"])
def test_words_without_comparison_are_near_the_majority(name, ngrams):
    dataset = synthetic(name, 2000, 1000)
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    words = [[f"{' '.join(texts)}" for texts in rows.texts] for rows in (train, validation)]
    model = make_pipeline(CountVectorizer(ngram_range=ngrams), LogisticRegression(max_iter=1000))
    accuracy = model.fit(words[0], train.labels).score(words[1], validation.labels)
    majority = np.bincount(validation.labels).max() / len(validation)
    assert accuracy < majority + 0.06
