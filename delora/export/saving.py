"""Saves a loaded model as a folder that others read without delora; nothing is left where that fails."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from delora.config import expected
from delora.errors import UserError
from delora.export import card, peft_folder
from delora.model import Fleet

FORMATS = ("transformers", "peft")
PROBES = (
    "The quick brown fox, 42 times.",
    "Ünïcode, naïve café — 東京 мир 🙂",
    "  two  spaces\tand\nlines",
    "UPPER lower",
    "",
)


def save(fleet: Fleet, folder: Path, format: str = "transformers") -> Path:
    """Saves a model that `delora.load` gave: weights, tokenizer, labels, and a card (README.md) with what made it.

    The tokenizer is the encoder's, cuts at the trial's max_length where it is asked to cut, and is read back and
    compared before the folder gets its name; so are the weights.

    Args:
        folder: is made; it may be there if it is empty.
        format: "transformers", a model with the adapter merged into it, which any method has that changes weights; or
            "peft", the adapter alone, for linear layers (`delora.export.peft_folder`).

    Raises:
        UserError: the method has no such form, or the folder cannot be written or holds something.
    """
    folder = folder.expanduser()
    if folder.is_symlink():
        folder = folder.resolve()
    if format not in FORMATS:
        raise UserError(f"format={format}: {expected(format, FORMATS)}")
    if fleet.tokenizer is None or fleet.origin is None:
        raise UserError("only what delora.load gave can be saved")
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: holds something already; choose another folder")
    tokenizer = _tokenizer(fleet)
    made = fleet.merge() if format == "transformers" else peft_folder.written(fleet)
    new = folder.absolute().parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        new.mkdir(parents=True)
        if isinstance(made, tuple):
            _write_peft(new, *made, fleet.trials[0].task.facts.labels)
        else:
            made.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card.text(fleet, format, folder.name), encoding="utf-8")
        _check(new, tokenizer, made)
        os.replace(new, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _tokenizer(fleet: Fleet) -> transformers.PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(fleet.tokenizer)
    assert tokenizer is not None
    tokenizer.model_max_length = fleet.trials[0].max_length
    tokenizer.backend_tokenizer.no_truncation()  # type: ignore[attr-defined]
    tokenizer.backend_tokenizer.no_padding()  # type: ignore[attr-defined]
    return tokenizer


def _write_peft(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], labels: Sequence[str] | None
) -> None:
    (folder / peft_folder.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    about = {"format": "pt", **({"labels": json.dumps(labels)} if labels else {})}
    safetensors.torch.save_file(tensors, folder / peft_folder.WEIGHTS, about)


def _check(folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, made) -> None:
    """Raises UserError where what is read back is not what was written."""
    told = f"the encoder's tokenizer ({type(tokenizer).__name__})"
    try:
        again = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind, for what it does not expect
        raise UserError(
            f"{told} cannot be read back by transformers ({type(error).__name__}); nothing is saved"
        ) from error
    vocabulary = list(tokenizer.get_vocab())
    texts = [*PROBES, " ".join(vocabulary[:: max(1, len(vocabulary) // 500)])]
    pairs = list(zip(texts, reversed(texts), strict=True))
    for given in (texts, pairs):
        for options in ({}, {"truncation": True}):
            wanted, found = (dict(one(given, **options)) for one in (tokenizer, again))
            if wanted != found:
                raise UserError(f"{told} is another one when transformers reads it back; nothing is saved")
    if isinstance(made, tuple):
        wanted, found = made[1], safetensors.torch.load_file(folder / peft_folder.WEIGHTS)
    else:
        read = type(made).from_pretrained(folder, dtype=made.dtype, local_files_only=True)
        wanted, found = made.state_dict(), read.state_dict()
        if read.config.id2label != made.config.id2label or read.config.problem_type != made.config.problem_type:
            raise UserError("the labels are others when transformers reads them back; nothing is saved")
    if wanted.keys() != found.keys() or not all(torch.equal(wanted[n].cpu(), found[n]) for n in wanted):
        raise UserError("the weights are others when they are read back; nothing is saved")
