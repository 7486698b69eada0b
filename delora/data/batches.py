"""Rows as tokens, and batches of K trials gathered by index.

Shapes: K trials, B examples a trial, T tokens of the longest example of a batch, S examples of a split.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor

from delora.data import Rows
from delora.randomness import permutation


@dataclass
class Batch:
    """Inputs of the encoder, (K·B, T) each, and labels (K, B)."""

    inputs: dict[str, Tensor]
    labels_KB: Tensor
    real_tokens: int

    @property
    def computed_tokens(self) -> int:
        return self.inputs["input_ids"].numel()


class Tokens:
    """A split as token matrices on the device, from which batches are gathered without a copy from the host.

    Args:
        rows: the split.
        tokenizer: a transformers tokenizer.
        max_length: examples with more tokens are cut.
        device: where the matrices stay.
        score_dtype: the dtype of regression labels.

    Attributes:
        cut: how many examples were.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: transformers.PreTrainedTokenizerBase,
        max_length: int,
        device: torch.device,
        score_dtype: torch.dtype,
    ):
        columns = [list(column) for column in zip(*rows.texts, strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
        self.lengths_S = np.array([len(ids) for ids in encoded["input_ids"]])
        full = np.flatnonzero(self.lengths_S == max_length)
        self.cut = sum(bool(encoded.encodings[i].overflowing) for i in full)
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0}
        self.inputs = {
            name: _padded(encoded[name], self.lengths_S, value).to(device)
            for name, value in fill.items()
            if name in encoded
        }
        self._length_S = torch.from_numpy(self.lengths_S).to(device)
        integral = np.issubdtype(rows.labels.dtype, np.integer)
        self.labels_S = torch.from_numpy(rows.labels).to(device, torch.long if integral else score_dtype)

    def __len__(self) -> int:
        return len(self.lengths_S)

    def gather(self, index_KB: Tensor) -> Batch:
        """The examples `index_KB` (int64, on the CPU), padded to the longest among them."""
        lengths = self.lengths_S[index_KB.numpy()]
        longest = int(lengths.max())
        index = index_KB.to(self.labels_S.device, non_blocking=True)
        inputs = {name: matrix[:, :longest].index_select(0, index.flatten()) for name, matrix in self.inputs.items()}
        position_T = torch.arange(longest, device=index.device)
        inputs["attention_mask"] = position_T < self._length_S[index.flatten(), None]
        return Batch(inputs, self.labels_S[index], int(lengths.sum()))

    def order_by_length(self, index_KS: Tensor) -> Tensor:
        """Columns (K, S) of `index_KS` that put each trial's short examples first, equal ones as they were."""
        return torch.from_numpy(np.argsort(self.lengths_S[index_KS.numpy()], axis=1, kind="stable"))

    def in_order(self, index_KS: Tensor, size: int) -> Iterator[tuple[Tensor, Batch]]:
        """Batches of `size` that cover `index_KS`, short examples first: (columns of index_KS (K, B), Batch)."""
        for columns in self.order_by_length(index_KS).split(size, dim=1):
            yield columns, self.gather(index_KS.gather(1, columns))


def epoch_order(seeds: list[int], epoch: int, rows: int) -> Tensor:
    """The order (K, S) in which each trial sees the training rows in `epoch`, a function of its seed and the epoch."""
    return torch.stack([permutation(rows, "order", seed, epoch) for seed in seeds])


def _padded(sequences: list[list[int]], lengths: np.ndarray, value: int) -> Tensor:
    matrix = np.full((len(sequences), int(lengths.max())), value, dtype=np.int32)
    inside = np.arange(matrix.shape[1]) < lengths[:, None]
    matrix[inside] = np.concatenate([np.asarray(s, dtype=np.int32) for s in sequences])
    return torch.from_numpy(matrix)
