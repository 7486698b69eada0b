"""What is known of a family of encoders: where things are in transformers' code of it. Imports no torch.

A family is one file beside this one with a subclass of `Encoder`, found by existing, and a file conf/model/<name>.yaml
for each of its published checkpoints. A method says what is trained; an encoder says where.

Roles and places are the same in all families: the linear layers query, key, value, attention_output, ffn_in, ffn_out,
and where hidden states are attention_sublayer, ffn_sublayer, ffn_residual, layer_output. Names of layers, linears and
modules are those of transformers' sequence classification model.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from delora.randomness import TokenKeys

Width = Annotated[int, Field(ge=1, le=100_000)]


class Shape(BaseModel):
    """The shape of an encoder: enough to name its linear layers without loading it. Widths in features.

    Attributes:
        family: the name of its file in delora/encoders.
        positions: the longest input, in tokens.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    family: str
    layers: Annotated[int, Field(ge=1, le=1000)]
    width: Width
    ffn: Width
    heads: Width
    positions: Annotated[int, Field(ge=1, le=10**7)]

    @field_validator("family")
    @classmethod
    def _has_a_file(cls, family: str) -> str:
        from delora.encoders import families

        if family not in families():
            raise ValueError(f"expected one of {', '.join(families())}")
        return family


class Encoder:
    """One family of encoders. The attributes are those of a post-norm encoder as BERT's is; families change them.

    Attributes:
        types: the `model_type` of its checkpoints' config.json.
        prefix: the encoder in the classification model.
        layers: its layers, in the encoder; a number in the place of each *.
        roles: the linear layer of each role, in a layer.
        places: the module of each place of hidden states, in a layer; "" is the layer itself. attention_sublayer and
            ffn_sublayer: what a block gives to the residual, its output after dropout. ffn_residual: the sum of both,
            which is the input of this LayerNorm, or in pre-norm encoders the output of the layer. layer_output.
        stays: modules whose weights no method trains, in the classification model.
        others: linear layers outside its layers, in the encoder: input and output as the shape's keys.
        gated: whether ffn_in makes two vectors of the shape's ffn, one of which gates the other.
        fused: linear layers of which each third is another one, with the thirds' names: they are taken apart when the
            model is loaded, and joined again where it leaves the house.
        attention: the module of a layer whose `dropout` drops attention weights.
        embeddings: the module that makes hidden states of token ids, in the encoder.
        output: the module whose output are the hidden states that the head reads, in the encoder.
        head: modules that are drawn anew for each seed also where a checkpoint has them, in the classification model.
        packs: whether it takes rows of examples without padding.
        after_attention: what follows attention in a layer: of packed rows the last layer lets only first tokens through
            it. Empty where it does not.
        cut: the module of a layer at which the others are left out; None where what is `replaced` leaves them out.
        replaced: functions that stand in for methods of transformers' classes, by "Class.method".
        keys: the names of the shape's values in config.json.
    """

    types: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""
    layers: ClassVar[str] = "encoder.layer.*"
    roles: ClassVar[Mapping[str, str]] = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
    }
    places: ClassVar[Mapping[str, str]] = {
        "attention_sublayer": "attention.output.dropout",
        "ffn_sublayer": "output.dropout",
        "ffn_residual": "output.LayerNorm",
        "layer_output": "",
    }
    stays: ClassVar[tuple[str, ...]] = ()
    others: ClassVar[Mapping[str, tuple[str, str]]] = {}
    gated: ClassVar[bool] = False
    fused: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    attention: ClassVar[str] = "attention.self"
    embeddings: ClassVar[str] = "embeddings"
    output: ClassVar[str] = "encoder"
    head: ClassVar[tuple[str, ...]] = ("classifier",)
    packs: ClassVar[bool] = True
    after_attention: ClassVar[tuple[str, ...]] = ("attention.output", "intermediate", "output")
    cut: ClassVar[str | None] = "attention.output"
    replaced: ClassVar[Mapping[str, Callable]] = {}
    keys: ClassVar[Mapping[str, str]] = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "positions": "max_position_embeddings",
    }

    @property
    def family(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    # --- Without the model

    def shape(self, config: Mapping[str, Any]) -> Shape | None:
        """The shape that a config.json says; None where it does not say enough."""
        sizes = {name: config.get(key) for name, key in self.keys.items()}
        if isinstance(sizes["positions"], int):
            sizes["positions"] -= self.first_position(config)
        try:
            return Shape(family=self.family, **sizes)  # type: ignore[arg-type]
        except ValueError:
            return None

    def first_position(self, config: Mapping[str, Any]) -> int:
        """The position of an example's first token."""
        return 0

    def layer_names(self, shape: Shape) -> list[str]:
        """Its layers by name, each once."""
        return [f"{self.prefix}.{self.layers.replace('*', str(i))}" for i in range(shape.layers)]

    def linears(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear layer, by name."""
        sizes = dict(shape)
        widths = {role: (shape.width, shape.width) for role in self.roles}
        widths |= {"ffn_in": (shape.width, shape.ffn * (1 + self.gated)), "ffn_out": (shape.ffn, shape.width)}
        inside = {f"{layer}.{self.roles[r]}": widths[r] for layer in self.layer_names(shape) for r in self.roles}
        outside = {f"{self.prefix}.{name}": (sizes[i], sizes[o]) for name, (i, o) in self.others.items()}
        return inside | outside

    def multiplications(self, shape: Shape) -> int:
        """Multiplications of a token with weights: a layer that has several turns counts as often."""
        turns = shape.layers / len(self.layer_names(shape))
        inside = tuple(f"{name}." for name in self.layer_names(shape))
        return round(sum(i * o * (turns if n.startswith(inside) else 1) for n, (i, o) in self.linears(shape).items()))

    def hidden_places(self, layers: Iterable[str]) -> dict[str, str]:
        """The module of each place of hidden states in these layers, by the layer's name and the place's."""
        return {
            f"{layer}.{place}": f"{layer}.{m}" if m else layer for layer in layers for place, m in self.places.items()
        }

    def matching(self, target: str, names: Iterable[str]) -> list[str]:
        """Which of the names of linear layers, other modules and places a target means.

        A target is a role, `layers` for all that is in a layer, or a pattern as `matches` takes it.
        """
        if target == "layers":
            return [name for name in names if self._is_in_layer(name, "**")]
        role = self.roles.get(target)
        return [name for name in names if (self._is_in_layer(name, role) if role else matches(target, name))]

    def role_of(self, name: str) -> str | None:
        """The role of a linear layer; None of one that has none."""
        return next((role for role, inside in self.roles.items() if self._is_in_layer(name, inside)), None)

    def _is_in_layer(self, name: str, inside: str = "") -> bool:
        """Whether the name is that of a layer, or of what has the name `inside` in one."""
        return _numbered(".".join(filter(None, (self.prefix, self.layers, inside)))).fullmatch(name) is not None

    # --- In the model

    def find_layers(self, model: "nn.Module") -> "list[tuple[str, nn.Module]]":
        """The layers of a classification model by name, in their order, each once."""
        return [(name, module) for name, module in model.named_modules() if self._is_in_layer(name)]

    def prepare(self, model: "nn.Module", keys: "TokenKeys") -> None:
        """Whatever else the model needs before methods and dropout are put into it."""

    def pools_mean(self, config: Any) -> bool:
        """Whether the head reads the mean of an example's tokens, and not its first token."""
        return False


@functools.cache
def _numbered(name: str) -> re.Pattern[str]:
    """A dotted name with any number for each *, and anything for **."""
    return re.compile(re.escape(name).replace(r"\*\*", ".+").replace(r"\*", r"\d+"))


def matches(pattern: str, name: str) -> bool:
    """Whether a layer's dotted name ends, from a dot on, as the pattern says; * and [0-3] as in file names.

    `query` and `layer.[0-3].attention.self.query` match roberta.encoder.layer.0.attention.self.query.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def first_tokens(x: "Tensor", keys: "TokenKeys") -> "Tensor":
    """Of hidden states (K, N, H) of packed rows those of the examples' first tokens, (K, B, H); others as they are."""
    layout = keys.layout
    if layout is None:
        return x
    index_KBH = layout.first_KB[:, :, None].expand(-1, -1, x.shape[-1])
    return x.gather(1, index_KBH)
