"""Rows as tokens, and batches of K trials gathered by index.

Shapes: K trials, B examples a trial, S examples of a split, T tokens of the longest example of a batch, N tokens of a
trial's row: where examples are packed its B examples one after the other, else B·T.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor

from delora.data import Rows
from delora.data.tokenizing import encode
from delora.randomness import permutation


@dataclass
class Layout:
    """Where the tokens of a batch lie in the rows (K, N) of its trials.

    Attributes:
        example_KN: which example a token is of, int32. Padding after the last example counts as of that.
        position_KN: its position in the example, int32.
        first_KB: where an example's first token lies in its row, int64.
        length_KB: the example's tokens, int32.
        place_T: the positions in a row as long as the longest example or longer, int32. As a tensor's size that
            length, the span, is one that code is not compiled for.
    """

    example_KN: Tensor
    position_KN: Tensor
    first_KB: Tensor
    length_KB: Tensor
    place_T: Tensor

    @property
    def span(self) -> int:
        return len(self.place_T)


@dataclass
class Batch:
    """Inputs of the encoder, (K, N) each where examples are packed, else (K·B, T), and labels (K, B)."""

    inputs: dict[str, Tensor]
    labels_KB: Tensor
    layout: Layout


MULTIPLE = 32  # of tokens, where each width of a row costs something: on a GPU a graph is recorded for it
FEW, STEP = 12, 8  # widths, multiples of so many tokens, for rows that are known before
LOOKED_AT = 1000  # batches, to choose them
PADDED_MULTIPLE = 8  # of an example's tokens, for the same reason


class Tokens:
    """A split as tokens on the device, from which batches are gathered without a copy from the host.

    Args:
        rows: the split.
        tokenizer: a transformers tokenizer.
        max_length: examples with more tokens are cut.
        device: where the tokens stay.
        score_dtype: the dtype of regression labels.

    Attributes:
        inputs: (tokens of all examples,) int32 or int8, one example after the other.
        lengths_S: tokens of each example, int64, on the CPU.
        longest: the tokens of the longest example.
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
        encoded = encode(rows.texts, tokenizer, max_length)
        self.lengths_S, self.cut = encoded.lengths_S, encoded.cut
        self.longest = int(self.lengths_S.max())
        self.inputs = {name: torch.from_numpy(ids).to(device) for name, ids in encoded.inputs.items()}
        self._fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0}
        self._length_S = torch.from_numpy(self.lengths_S).to(device)
        self._first_S = self._length_S.cumsum(0) - self._length_S
        integral = np.issubdtype(rows.labels.dtype, np.integer)
        self.labels_S = torch.from_numpy(rows.labels).to(device, torch.long if integral else score_dtype)

    def __len__(self) -> int:
        return len(self.lengths_S)

    @property
    def on_cpu(self) -> bool:
        return self.labels_S.device.type == "cpu"

    def few_widths(self, seeds: Sequence[int], epochs: int, size: int) -> list[int]:
        """Widths of rows for trials with these seeds, in batches of `size`: few, and of all that are as few those with
        which the fewest tokens are computed in the first batches."""
        needed: list[int] = []
        for epoch in range(epochs):
            order_KS = epoch_order(sorted({*seeds}), epoch, len(self))
            needed += [int(self.lengths_S[index_KB.numpy()].sum(1).max()) for index_KB in order_KS.split(size, dim=1)]
            if len(needed) >= LOOKED_AT:
                break
        return few_widths(np.array(needed))

    def width(self, index_KB: Tensor, packed: bool = True, few: Sequence[int] = ()) -> tuple[int, int]:
        """Tokens of a row that holds any trial's examples `index_KB` (on the CPU), and the span of an example.

        On a GPU a packed row gets the first of the `few` widths that holds it, or else a multiple of `MULTIPLE`.

        The span is the longest example's; of packed batches on a GPU one that is the same for the whole split, of
        padded ones there a multiple of `PADDED_MULTIPLE`.
        """
        lengths_KB = self.lengths_S[index_KB.numpy()]
        longest = int(lengths_KB.max())
        if not packed:
            if not self.on_cpu:
                longest = min(-(-longest // PADDED_MULTIPLE) * PADDED_MULTIPLE, self.longest)
            return index_KB.shape[1] * longest, longest
        tokens = int(lengths_KB.sum(1).max())
        if self.on_cpu:
            return tokens, longest
        width = next((width for width in few if width >= tokens), -(-tokens // MULTIPLE) * MULTIPLE)
        return width, max(16, 1 << (self.longest - 1).bit_length())

    def gather(self, index_KB: Tensor, packed: bool = True, width: tuple[int, int] | None = None) -> Batch:
        """The examples `index_KB` (int64), one after the other, or each padded to the longest.

        `width` is what the method of that name says of them; it must be given where `index_KB` is not on the CPU.
        """
        tokens, span = self.width(index_KB, packed) if width is None else width
        examples = index_KB.shape[1]
        index = index_KB.to(self.labels_S.device, non_blocking=True)
        length_KB = self._length_S[index]
        place_N = torch.arange(tokens, device=index.device)
        if packed:
            end_KB = length_KB.cumsum(1)
            example_KN = torch.searchsorted(end_KB, place_N.expand(len(index), -1).contiguous(), right=True)
        else:
            end_KB = length_KB + torch.arange(examples, device=index.device) * span
            example_KN = (place_N // span).expand(len(index), -1)
        example_KN = example_KN.clamp(max=examples - 1)
        first_KB = end_KB - length_KB
        position_KN = place_N - first_KB.gather(1, example_KN)
        real_KN = position_KN < length_KB.gather(1, example_KN)
        # What fills a row has no effect; it takes the place of a first token, which always is.
        inside_KN = torch.where(real_KN, position_KN, 0)
        token_KN = self._first_S[index].gather(1, example_KN) + inside_KN
        inputs = {name: ids[token_KN].int() for name, ids in self.inputs.items()}
        if packed:
            position_KN = inside_KN
        else:
            inputs = {name: torch.where(real_KN, ids, self._fill[name]).view(-1, span) for name, ids in inputs.items()}
            inputs["attention_mask"] = real_KN.view(-1, span)
        place_T = torch.arange(span, dtype=torch.int32, device=index.device)
        layout = Layout(example_KN.int(), position_KN.int(), first_KB, length_KB.int(), place_T)
        return Batch(inputs, self.labels_S[index], layout)

    def order_by_length(self, index_KS: Tensor) -> Tensor:
        """Columns (K, S) of `index_KS` that put each trial's short examples first, equal ones as they were."""
        return torch.from_numpy(np.argsort(self.lengths_S[index_KS.numpy()], axis=1, kind="stable"))

    def in_order(self, index_KS: Tensor, size: int, packed: bool = True) -> Iterator[tuple[Tensor, Batch]]:
        """Batches of `size` that cover `index_KS`, short examples first: (columns of index_KS (K, B), Batch)."""
        for columns_KB in self.order_by_length(index_KS).split(size, dim=1):
            yield columns_KB, self.gather(index_KS.gather(1, columns_KB), packed)


def few_widths(needed: np.ndarray) -> list[int]:
    """At most `FEW` widths for rows of which so many tokens are needed: each row gets the first that holds it, and the
    sum of all is the smallest."""
    width_W, count_W = np.unique(-(-needed // STEP) * STEP, return_counts=True)
    rows_W, cost_W = np.append(0, count_W.cumsum()), np.append(0.0, np.full(len(width_W), np.inf))
    through = np.triu(
        np.append(0, width_W) * (rows_W - rows_W[:, None]).astype(float)
    )  # of rows i to j, all as wide as j
    through[np.tril_indices(len(through), -1)] = np.inf
    chosen = []
    for _ in range(FEW):
        total = cost_W[:, None] + through
        chosen.append(total.argmin(0))
        cost_W = total.min(0)
    last, found = len(width_W), set[int]()
    for before in reversed(chosen):
        found |= {int(width_W[last - 1])} if last else set()
        last = before[last]
    return sorted(found)


def epoch_order(seeds: Sequence[int], epoch: int, rows: int) -> Tensor:
    """The order (K, S) in which each trial sees the training rows in `epoch`, a function of its seed and the epoch."""
    return torch.stack([permutation(rows, "order", seed, epoch) for seed in seeds])
