"""Where the frozen encoder and its tokenizer come from: an installed package, a local folder, the hub or its cache."""

import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from delora.config import ModelConfig
from delora.errors import UserError
from delora.missing import PARTS, WEIGHTS, checkpoint, missing_encoder, snapshot, weights_file
from delora.tasks import Task

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's, in its order


@dataclass
class Pretrained:
    """A model with an untrained head, its tokenizer, what identifies its weights, and which parameters these lack."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    source: str
    sha256: str | None
    lacking: frozenset[str] = frozenset()


def load(config: ModelConfig, task: Task) -> Pretrained:
    """Loads the encoder in float32 with a head for `task`; the head is drawn anew for each trial later.

    Raises:
        UserError: weights or tokenizer are missing, or the hash is not the configured one.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if config.random:
        return Pretrained(_random_model(config, task.num_labels), byte_tokenizer(), "random", None)
    folder = _fetch(config)
    sha256 = _hash_of_weights(config, folder)
    try:
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=task.num_labels,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of a head for other labels
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the encoder {config.name} cannot be loaded from {folder}: {error}") from error
    # For what is not there transformers draws random values.
    unset = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    inside = f"{model.base_model_prefix}."
    if lacking := sorted(n for n in unset if n.startswith(inside) and not n.startswith(f"{inside}pooler.")):
        named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise UserError(f"the encoder {config.name}: the weights in {folder} lack, or have in another shape, {named}")
    return Pretrained(model, tokenizer, config.package or str(config.source), sha256, frozenset(unset))


def _fetch(config: ModelConfig) -> Path:
    if config.package:
        return Path(str(importlib.resources.files(config.package))) / "model"
    if found := checkpoint(config):
        return found
    if problem := missing_encoder(config):
        raise UserError(problem)
    try:
        if folder := snapshot(config):
            return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise UserError(f"the encoder {config.name}: {config.source} cannot be fetched: {error}") from error
    raise UserError(f"the encoder {config.name}: {config.source} lacks {PARTS}")


def _hash_of_weights(config: ModelConfig, folder: Path) -> str | None:
    """The sha256 of the weights' file, compared with the configured one where there is one."""
    path = weights_file(folder)
    if path is None:
        raise UserError(f"the encoder {config.name}: {folder} holds none of {', '.join(WEIGHTS)}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if config.sha256 and digest != config.sha256:
        raise UserError(
            f"the encoder {config.name}: {path} is not the expected file\n"
            f"    expected sha256 {config.sha256}\n    found    sha256 {digest}\n"
            "    install it again, or set model.sha256=null to use it all the same"
        )
    return digest


def _random_model(config: ModelConfig, num_labels: int) -> transformers.PreTrainedModel:
    """A small RoBERTa whose weights are drawn from a fixed seed."""
    shape = config.shape
    assert shape is not None  # the schema asks a random model for one
    roberta = transformers.RobertaConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=num_labels,  # type: ignore[call-arg]  # transformers takes it through **kwargs
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.RobertaForSequenceClassification(roberta)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that needs no files: one token a byte, with RoBERTa's special tokens and layout of pairs."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )
