"""Token ids: those of the tokenizer itself, whatever it is and however long the texts; and their cache."""

import os
import pickle
import random
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import compose_trial
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from delora import pretrained
from delora.data import Rows, tokenizing
from delora.data.batches import Tokens
from delora.data.tokenizing import encode
from delora.tasks import TASKS

CPU = torch.device("cpu")
ODD = ["", " ", "a", "<s> </s> [SEP] [CLS]", "naïve ② 中文字 🙂", "tab\tand\u00a0blank", "word " * 60, "x" * 90]


WORDS = "the quick brown foxes unbelievably jumped over lazily sleeping dogs , thrice . Zürich 1984 don't"


def draw_texts(count: int) -> list[str]:
    draw, words = random.Random(0), WORDS.split()
    return [*ODD, *(" ".join(draw.choices(words, k=draw.randint(1, 24))) for _ in range(count - len(ODD)))]


TEXTS = draw_texts(270)  # more than one chunk
ROWS = {"single": [(text,) for text in TEXTS], "pair": list(zip(TEXTS, TEXTS[::-1], strict=True))}


def roberta_like() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with merges, and RoBERTa's special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    return transformers.RobertaTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


TOKENIZERS = {
    "minilm": lambda: pretrained.load(compose_trial("model=minilm").model, TASKS["mrpc"]).tokenizer,
    "bytes": pretrained.byte_tokenizer,
    "roberta": roberta_like,
    "written in Python": transformers.ByT5Tokenizer,
    "of token types, in Python": transformers.CanineTokenizer,
}


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_the_tokenizer_called_for_each_row(name, what):
    tokenizer, theirs = TOKENIZERS[name](), TOKENIZERS[name]()
    for max_length, side in ((16, "right"), (16, "left"), (100, "right"), (2000, "right")):
        tokenizer.truncation_side = theirs.truncation_side = side
        ours = encode(ROWS[what], tokenizer, max_length)
        ends, cut = ours.lengths_S.cumsum(), 0
        for row, end, length in zip(ROWS[what], ends, ours.lengths_S, strict=True):
            columns = [[text] for text in row]
            expected = theirs(*columns, truncation=True, max_length=max_length)
            assert set(ours.inputs) == set(expected) - {"attention_mask"}
            for key, ids in ours.inputs.items():
                assert ids[end - length : end].tolist() == expected[key][0], row
            cut += len(theirs(*columns)["input_ids"][0]) > max_length
        assert ours.cut == cut and len(ours.inputs["input_ids"]) == ends[-1]
        dtypes = {"input_ids": np.int32, "token_type_ids": np.int8}
        assert all(ids.dtype == dtypes[key] for key, ids in ours.inputs.items())
    assert len(tokenizer(["word " * 60])["input_ids"][0]) > 16  # what was set for a split is not left to the next call


@pytest.mark.parametrize("name", ["minilm", "bytes"])
def test_padded_and_packed_batches_hold_the_same_tokens_as_the_tokenizers_own(name):
    tokenizer = TOKENIZERS[name]()
    rows = Rows(ROWS["pair"], np.zeros(len(TEXTS), np.int64))
    tokens = Tokens(rows, tokenizer, 40, CPU, torch.float32)
    index_KB = torch.tensor([[269, 0, 6], [7, 269, 8]])
    padded, packed = tokens.gather(index_KB, packed=False), tokens.gather(index_KB)
    chosen = [list(column) for column in zip(*(rows.texts[i] for i in index_KB.flatten()), strict=True)]
    theirs = tokenizer(*chosen, truncation=True, max_length=40, padding=True, return_tensors="pt")
    assert padded.inputs.keys() == theirs.keys()
    assert all(torch.equal(padded.inputs[key].long(), theirs[key]) for key in theirs)
    assert padded.inputs["input_ids"].dtype == torch.int32
    for k, several in enumerate(theirs["attention_mask"].bool().split(3)):
        ids = theirs["input_ids"].split(3)[k][several]
        assert torch.equal(packed.inputs["input_ids"][k, : len(ids)].long(), ids)


# --- The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for data sets of any size; `count` has how often texts were encoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tokenizing, "CACHED_FROM", 1)
    plain, calls = tokenizing._encode, []
    monkeypatch.setattr(tokenizing, "_encode", lambda *args: (calls.append(args), plain(*args))[1])
    folder = tmp_path / "delora" / "tokens"
    return folder, calls


def same(one: tokenizing.Encoded, other: tokenizing.Encoded) -> bool:
    arrays = zip(one.inputs.values(), other.inputs.values(), strict=True)
    equal = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in arrays)
    lengths = np.array_equal(one.lengths_S, other.lengths_S) and one.lengths_S.dtype == other.lengths_S.dtype
    return equal and lengths and one.inputs.keys() == other.inputs.keys() and one.cut == other.cut


def test_what_was_encoded_is_not_encoded_again(cache):
    folder, calls = cache
    first = encode(ROWS["pair"], TOKENIZERS["minilm"](), 20)
    tokenizer = TOKENIZERS["minilm"]()
    tokenizer(["another use of it"], truncation=True, max_length=9, padding=True)
    assert same(first, encode(ROWS["pair"], tokenizer, 20)) and len(calls) == 1
    assert len(list(folder.iterdir())) == 1 and folder.stat().st_mode & 0o077 == 0


def test_all_that_decides_the_tokens_tells_them_apart(cache, monkeypatch):
    folder, calls = cache
    rows, other = ROWS["single"][:9], pretrained.byte_tokenizer()
    left = pretrained.byte_tokenizer()
    left.truncation_side = "left"
    other.add_tokens("word ")
    typed = pretrained.byte_tokenizer()
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    plain = pretrained.byte_tokenizer()
    joined = [("a", "bc"), ("ab", "c"), ("a", "b", "c")]
    for several, tokenizer, length in (
        *((rows, plain, 16), (rows, plain, 17), (rows[::-1], plain, 16), (rows, left, 16), (rows, other, 16)),
        *((rows, typed, 16), (rows[:-1], plain, 16), (joined[:1], plain, 16), (joined[1:2], plain, 16)),
    ):
        encode(several, tokenizer, length)
    monkeypatch.setattr(tokenizing.importlib.metadata, "version", lambda package: "another")
    encode(rows, plain, 16)
    assert len(calls) == len(list(folder.iterdir())) == 10


def damages(data: bytes):
    """What can be in the place of a cache's file."""
    flipped = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in (0, 9, 200, len(data) // 2, len(data) - 1)]
    return [b"", b"x", data[:100], data[:-1], data + b"x", *flipped, pickle.dumps({"a": 1})]


def test_a_damaged_or_foreign_file_is_made_anew(cache):
    folder, calls = cache
    tokenizer = pretrained.byte_tokenizer()
    expected = encode(ROWS["pair"], tokenizer, 20)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    encode(ROWS["single"], tokenizer, 20)
    [foreign] = [file.read_bytes() for file in folder.iterdir() if file != path]
    for content in [*damages(whole), foreign]:
        path.write_bytes(content)
        before = len(calls)
        for _ in range(2):
            assert same(encode(ROWS["pair"], tokenizer, 20), expected)
        assert len(calls) == before + 1
    path.unlink()
    os.mkfifo(path)
    assert same(encode(ROWS["pair"], tokenizer, 20), expected) and path.is_file()


def test_a_cache_that_cannot_be_written_changes_nothing(cache):
    folder, calls = cache
    folder.parent.mkdir()
    folder.touch()
    tokenizer = pretrained.byte_tokenizer()
    assert same(encode(ROWS["pair"], tokenizer, 20), encode(ROWS["pair"], tokenizer, 20)) and len(calls) == 2
    folder.unlink()
    folder.mkdir()
    encode(ROWS["pair"], tokenizer, 20)
    [path] = folder.iterdir()
    path.unlink()
    path.mkdir()
    (path / "file").touch()
    encode(ROWS["pair"], tokenizer, 20)
    assert [file.name for file in folder.iterdir()] == [path.name]  # nothing half-written beside it


def test_the_cache_keeps_to_its_size_and_to_what_was_used_last(cache, monkeypatch):
    folder, calls = cache
    tokenizer = pretrained.byte_tokenizer()
    encode(ROWS["single"], tokenizer, 20)
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(tokenizing, "CACHE_BYTES", 5 * size)
    (folder / ".killed.tmp").touch()
    os.utime(folder / ".killed.tmp", (0, 0))
    (folder / "mine.txt").write_text("not a file of the cache")
    for n in range(8):
        for age, path in enumerate(sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)):
            os.utime(path, (1000 + age, 1000 + age))
        encode(ROWS["single"], tokenizer, 20)  # the one that is used each time
        encode(ROWS["single"], tokenizer, 12 - n % 4)
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5 * size
    assert len([call for call in calls if call[2] == 20]) == 1
    assert not (folder / ".killed.tmp").exists() and (folder / "mine.txt").exists()
    monkeypatch.setattr(tokenizing, "CACHE_BYTES", size)
    before = len(list(folder.iterdir()))
    encode(ROWS["pair"], tokenizer, 20)
    assert len(list(folder.iterdir())) == before  # what is too large is not kept


def test_writers_of_the_same_file_do_not_disturb_each_other(cache):
    folder, _ = cache
    expected = encode(ROWS["pair"], pretrained.byte_tokenizer(), 20)
    [path] = folder.iterdir()
    results, end = [], time.monotonic() + 1

    def work() -> None:
        tokenizer = pretrained.byte_tokenizer()
        while time.monotonic() < end:
            path.unlink(missing_ok=True)
            results.append(same(encode(ROWS["pair"], tokenizer, 20), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results and all(results) and len(list(folder.iterdir())) <= 1
