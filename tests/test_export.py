"""Trials saved for others, read by their own code: transformers' pipeline and PEFT; and what PEFT saved, read here."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from conftest import FEW, METHODS, SMALL, compose_trial
from safetensors.torch import load_file, save_file
from test_encoders import KINDS, checkpoints, fleet_of, padded, tokens_of, trials_of  # noqa: F401
from tokenizers import Tokenizer, models

import delora
from delora import results
from delora.errors import UserError
from delora.export import peft_folder
from delora.missing import identified
from delora.sweep import run

# Methods that are no adapter of linear layers, or whose change is no product of thin matrices.
NO_PEFT = {"adapter", "adapter_ffn", "bitfit", "full", "head", "loreft", "red"}
OWN_TYPES = {"ia3": "IA3", "miss": "MISS", "oft": "OFT", "vera": "VERA"}
FORMS = [(method, ()) for method in METHODS] + [("delora", ("method.init=zero",)), ("ether", ("method.side=both",))]


def moved(trials):
    """A fleet whose trained values are away from where they start, as if it were loaded."""
    fleet, loaded = fleet_of(trials)
    draw = torch.Generator().manual_seed(1)
    for parameter in fleet.trained().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    fleet.tokenizer, fleet.origin = loaded.tokenizer, loaded.origin
    return fleet.eval(), padded(tokens_of(fleet, loaded)["validation"])


def stock(folder: Path, base: Path, labels: int = 2, dtype=torch.float64) -> torch.nn.Module:
    """PEFT's own model over transformers' own, with a head drawn anew."""
    with contextlib.redirect_stderr(None):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def each_alone(model, inputs):
    """Logits of each example without padding, where transformers' windows can leave nothing to see."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].sum(1).tolist(), strict=True)
    return torch.cat([model(input_ids=ids[None, :length]).logits for ids, length in rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits(kind, checkpoints, tmp_path):  # noqa: F811
    """Every method over every family, in PEFT's own code, or refused with the way out."""
    for number, (method, more) in enumerate(FORMS):
        words = [f"method={method}", *more]
        words += [] if method in NO_PEFT - {"red"} else ["method.targets=[query,value,ffn_out]"]
        words += ["method.block_size=16"] if method == "oft" else []
        if method == "bitfit" and kind == "modernbert":  # which has no biases
            continue
        fleet, inputs = moved(trials_of(checkpoints(kind), [3], *words))
        folder = tmp_path / str(number)
        if method in NO_PEFT or (
            method == "oft" and kind == "modernbert"
        ):  # rotations of parts are not one of the whole
            with pytest.raises(UserError, match="--format transformers|nor is it a change of weights") as refused:
                fleet.save(folder, "peft")
            assert "\n" not in str(refused.value) and not folder.exists()
            continue
        fleet.save(folder, "peft")
        described = json.loads((folder / "adapter_config.json").read_text())
        own = "DELORA" if more == ("method.init=zero",) else OWN_TYPES.get(method, "LORA")
        fused = kind == "modernbert" and own != "IA3"
        assert described["peft_type"] == ("LORA" if fused else own) and set(described["modules_to_save"])
        found, wanted = each_alone(stock(folder, checkpoints(kind)), inputs), fleet(**inputs).logits
        assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max(), (method, more)
