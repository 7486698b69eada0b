"""What trials say of texts: labels and probabilities, or scores. Imports no torch until a model predicts.

Shapes: S texts, C labels.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from delora import storage
from delora.config import Trial
from delora.errors import UserError
from delora.tasks import Task
from delora.terminal import printable

if TYPE_CHECKING:
    import pandas

    from delora.model import Fleet

    Texts = Sequence[str] | Sequence[tuple[str, ...]]

logger = logging.getLogger(__name__)

AT_ONCE = 1 << 14  # texts whose tokens are in memory, and which are sorted by length


@dataclass(frozen=True)
class Predictions:
    """Predictions for S texts, in their order.

    Attributes:
        names: the labels in the order of the columns; None where a score is predicted.
        logits: (S, C), or (S, 1) scores, float64. Of several trials the logarithms of their mean probabilities, or
            their mean scores.
    """

    names: tuple[str, ...] | None
    logits: np.ndarray

    @property
    def probabilities(self) -> np.ndarray | None:
        """(S, C), each row sums to 1; None where a score is predicted."""
        return None if self.names is None else softmax(self.logits)

    @property
    def labels(self) -> list[str] | None:
        """The most probable label of each text; None where a score is predicted."""
        return None if self.names is None else [self.names[i] for i in self.logits.argmax(-1)]

    @property
    def scores(self) -> np.ndarray | None:
        """(S,), where a score is predicted; else None. It may lie outside of the range of those trained on."""
        return self.logits[:, 0] if self.names is None else None

    def __len__(self) -> int:
        return len(self.logits)


def softmax(logits_SC: np.ndarray) -> np.ndarray:
    """Probabilities (S, C), float64."""
    import scipy.special

    return scipy.special.softmax(logits_SC.astype(np.float64), axis=-1)


def mean(several: Iterable[Predictions]) -> Predictions:
    """The mean of probabilities, or of scores, of several trials for the same texts and labels."""
    several = list(several)
    names = several[0].names
    if len(several) == 1:
        return several[0]
    if names is None:
        return Predictions(None, np.mean([one.logits for one in several], axis=0))
    return Predictions(names, np.log(np.mean([softmax(one.logits) for one in several], axis=0)))


def predict(
    fleet: "Fleet", texts: "Texts", batch_size: int, progress: Callable[[int], object] = lambda _: None
) -> Predictions:
    """What `Fleet.predict` gives.

    Args:
        progress: is told after each batch how many more texts are done.
    """
    import torch

    from delora import train
    from delora.data import Rows
    from delora.data.batches import Tokens

    task, tokenizer = fleet.trials[0].facts, fleet.tokenizer
    if tokenizer is None:
        raise UserError("a model without a tokenizer cannot read texts: delora.load gives one with it")
    rows = as_rows(task, texts)
    logits_KSC, longest, cut = np.empty((len(fleet.trials), len(rows), task.num_labels)), fleet.trials[0].max_length, 0
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        unknown_S = np.zeros(len(some), dtype=np.int64)
        tokens = Tokens(Rows(some, unknown_S), tokenizer, longest, fleet.device, fleet.dtype)
        cut += tokens.cut
        index_KS = torch.arange(len(some)).expand(len(fleet.trials), -1)
        logits_KSC[:, first : first + AT_ONCE] = train.predict(fleet, tokens, index_KS, batch_size, progress).cpu()
    if cut:
        _say(f"{cut} of {len(rows)} texts are longer than max_length={longest} tokens and were cut")
    return mean(Predictions(task.labels, logits_SC) for logits_SC in logits_KSC)


@functools.cache
def _say(text: str) -> None:
    """Warns once of texts that are predicted by one trial after the other."""
    logger.warning("%s", text)


def as_rows(task: Task, texts: "Texts") -> list[tuple[str, ...]]:
    """The texts as rows of the data are.

    Raises:
        UserError: they are not texts, or not as many a row as the task's.
    """
    if isinstance(texts, str):
        raise UserError("expected a list of texts, such as [text], not one text")
    rows: list[tuple[str, ...]] = []
    for number, given in enumerate(texts):
        row = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else ()
        if not all(isinstance(text, str) for text in row) or len(row) not in (1, 2):
            raise UserError(f"row {number}: expected a text or a pair of texts, not {printable(repr(given)[:80])}")
        wanted = len(task.text) or len(rows[0] if rows else row)
        if len(row) != wanted:
            plural = ("one text", "two texts")
            raise UserError(f"row {number}: {plural[len(row) - 1]}, {task.name} takes {plural[wanted - 1]} a row")
        rows.append(row)
    return rows


# --- What a trial was scored by


def text_sha256(texts: Iterable[str]) -> str:
    """What tells a row's texts from others': the first 16 digits of the sha256 of the texts with tabs between them."""
    return hashlib.sha256("\t".join(texts).encode()).hexdigest()[:16]


def predictions(folder: str | Path) -> "pandas.DataFrame":
    """What a trial predicted for the rows that it was scored on, with its best checkpoint.

    Columns: split (validation, test, and of MNLI mismatched), row (its number in the data's validation rows, from 0; of
    mismatched in validation_mismatched, of a test file in that), text_sha256 (`text_sha256` of its texts), label,
    prediction (names, or scores) and probability (of the predicted label; missing where a score is predicted). Row,
    text_sha256 and label are missing of trials of earlier versions, which did not keep them.

    Raises:
        UserError: the folder holds no trial that has ended, or its predictions are damaged.
    """
    import pandas

    from delora import winner

    stored = winner.trial_in(folder)
    tensors = stored.tensors(storage.PREDICTIONS, "numpy")
    names = Trial.from_config(stored.result["config"]).task.facts.labels
    parts = []
    for split in (name for name in ("validation", "test", "mismatched") if name in tensors):
        made = Predictions(names, tensors[split].astype(np.float64))
        rows, labels = (tensors.get(f"{split}.{of}") for of in ("row", "label"))
        sha256 = tensors.get(f"{split}.text_sha256")
        none = [None] * len(made)
        probabilities = made.probabilities
        part = {
            "split": split,
            "row": pandas.array(none if rows is None else rows, dtype="Int64"),
            "text_sha256": none if sha256 is None else [bytes(digest).hex() for digest in sha256],
            "label": none if labels is None else labels if names is None else [names[label] for label in labels],
            "prediction": made.scores if names is None else made.labels,
            "probability": np.nan if probabilities is None else probabilities.max(-1),
        }
        parts.append(pandas.DataFrame(part))
    return pandas.concat(parts, ignore_index=True)
