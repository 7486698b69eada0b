"""Tasks: the facts of GLUE's nine, which only this file knows, and those of one's own. Imports nothing heavy.

Sources: column names, label order and row counts are those of `nyu-mll/glue` on the Hugging Face hub; folders, files
and TSV columns are those of the GLUE distribution; headline metrics and split sizes are the DeLoRA paper's and code's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """One task: GLUE's, or one's own, which has a name, labels and metrics alone.

    Attributes:
        name: the task's name; on the hub, "mrpc".
        labels: the label names in the order of their ids, or None where the label is a score (GLUE's are 0 to 5).
        folder: its folder in the GLUE distribution, "MRPC"; what reports call it.
        text: the text columns on the hub, in the order the tokenizer gets them.
        rows: the number of rows of each split, by the hub's name of the split.
        sha256: the hash of each split's published rows, as `delora.data.hash_of` gives it, computed from GLUE's own
            files. It is not known of the tasks whose files were not at hand.
        tsv_text, tsv_label: the columns of text and label in the TSV files: names, or positions if there is no header.
        tsv_label_names: whether the files hold label names; otherwise they hold ids or scores.
        empty_text: whether published rows may hold an empty text (two of QQP's do; MNLI's rows were not all seen).
        metrics: what is measured; see `delora.metrics`.
        headline: the metric that selects checkpoints and that the paper reports.
        paper_validation: rows of the new validation set under the paper's protocol, or None for half of the rows.
        paper_swapped: whether the new validation and test sets trade places.
    """

    name: str
    labels: tuple[str, ...] | None
    folder: str = ""
    text: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict, hash=False)
    tsv_text: tuple[str, ...] | tuple[int, ...] = ()
    tsv_label: str | int = ""
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    tsv_label_names: bool = False
    empty_text: bool = False
    metrics: tuple[str, ...] = ("accuracy",)
    headline: str = "accuracy"
    paper_validation: int | None = None
    paper_swapped: bool = False

    @property
    def num_labels(self) -> int:
        """Outputs of the classification head; 1 for a score."""
        return len(self.labels) if self.labels else 1

    def file(self, split: str) -> str:
        """The TSV file of a split: "validation_matched" is "dev_matched.tsv"."""
        return split.replace("validation", "dev") + ".tsv"


PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            folder="CoLA",
            text=("sentence",),
            labels=("unacceptable", "acceptable"),
            rows={"train": 8_551, "validation": 1_043},
            sha256={
                "train": "08d057daa741692ec647622e854205865f036bb938286d5b832ee6d380dd8063",
                "validation": "b22d1ba7b4c7209a6bbe6fced88ed942c02852fff26bb5c8927353999625a3c8",
            },
            tsv_text=(3,),
            tsv_label=1,
            metrics=("matthews",),
            headline="matthews",
            paper_swapped=True,
        ),
        Task(
            name="sst2",
            folder="SST-2",
            text=("sentence",),
            labels=("negative", "positive"),
            rows={"train": 67_349, "validation": 872},
            sha256={
                "train": "8c6357e935ec1c40746d39d4dbeb73b833f40dccfbd3195d8e69d29e0de1df79",
                "validation": "27bfc3ffbe5c438e3340b562042cb755cfc8e25d5a8da1030bd24f6d6ce49c47",
            },
            tsv_text=("sentence",),
            tsv_label="label",
        ),
        Task(
            name="mrpc",
            folder="MRPC",
            text=PAIR,
            labels=("not_equivalent", "equivalent"),
            rows={"train": 3_668, "validation": 408},
            sha256={
                "train": "8cdceba6382620518aa2ff2db14de60c4d3a8845a1b93fa794315a5eb6bb0d5d",
                "validation": "9636de648e1a9c2dc13acba533cf43a631430c09893f291d309500ea08155de7",
            },
            tsv_text=("#1 String", "#2 String"),
            tsv_label="Quality",
            metrics=("accuracy", "f1"),
        ),
        Task(
            name="stsb",
            folder="STS-B",
            text=PAIR,
            labels=None,
            rows={"train": 5_749, "validation": 1_500},
            sha256={
                "train": "6bffbf9c016bace6aa0d4c32b22e835091c944173719b1f18e8dfafd1a5571c5",
                "validation": "eb36a24fae594d13849d41dbb332580c13369db2c17d9364f85e6ff1ae4f0238",
            },
            tsv_text=PAIR,
            tsv_label="score",
            metrics=("pearson", "spearman", "pearson_spearman"),
            headline="pearson_spearman",
        ),
        Task(
            name="qqp",
            folder="QQP",
            text=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            rows={"train": 363_846, "validation": 40_430},
            tsv_text=("question1", "question2"),
            tsv_label="is_duplicate",
            empty_text=True,
            metrics=("accuracy", "f1"),
            paper_validation=1000,
        ),
        Task(
            name="mnli",
            folder="MNLI",
            text=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            rows={"train": 392_702, "validation_matched": 9_815, "validation_mismatched": 9_832},
            tsv_text=PAIR,
            tsv_label="gold_label",
            tsv_label_names=True,
            empty_text=True,
            paper_validation=1000,
        ),
        Task(
            name="qnli",
            folder="QNLI",
            text=("question", "sentence"),
            labels=("entailment", "not_entailment"),
            rows={"train": 104_743, "validation": 5_463},
            tsv_text=("question", "sentence"),
            tsv_label="label",
            tsv_label_names=True,
            paper_validation=1000,
        ),
        Task(
            name="rte",
            folder="RTE",
            text=PAIR,
            labels=("entailment", "not_entailment"),
            rows={"train": 2_490, "validation": 277},
            sha256={
                "train": "cd2bd103773c87273e3bb53f32c00c0162da347e62830d3f92808e9946ac3d41",
                "validation": "fb32fbc8bde2c0a25deb685dd4f68a60af0cdfe27336078c637e9f91a49a93c2",
            },
            tsv_text=PAIR,
            tsv_label="label",
            tsv_label_names=True,
        ),
        Task(
            name="wnli",
            folder="WNLI",
            text=PAIR,
            labels=("not_entailment", "entailment"),
            rows={"train": 635, "validation": 71},
            tsv_text=PAIR,
            tsv_label="label",
        ),
    )
}


def of(config: Mapping[str, Any]) -> Task:
    """The task that the section `task` of an identified or a stored config means.

    GLUE's by its name; of one's own the section says what it is.
    """
    if "labels" not in config:
        return TASKS[config["name"]]
    name, labels, metrics = config["name"], config["labels"], tuple(config["metric"])
    return Task(name, tuple(labels) if labels else None, name, metrics=metrics, headline=metrics[0])
