"""ALBERT (Lan et al. 2020, arXiv 1909.11942): a layer that each batch passes several times, with its adapters."""

import itertools
from typing import TYPE_CHECKING, Any

from delora.encoders.base import Encoder, Shape

if TYPE_CHECKING:
    from torch import nn

    from delora.randomness import TokenKeys


class Albert(Encoder):
    types = ("albert",)
    prefix = "albert"
    layers = "encoder.albert_layer_groups.*.albert_layers.*"
    roles = {
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "attention_output": "attention.dense",
        "ffn_in": "ffn",
        "ffn_out": "ffn_output",
    }
    places = {
        "attention_sublayer": "attention.output_dropout",
        "ffn_sublayer": "ffn_output",
        "ffn_residual": "full_layer_layer_norm",
        "layer_output": "",
    }
    others = {"pooler": ("width", "width")}
    attention = "attention"
    cut, after_attention = None, ()

    def layer_names(self, shape: Shape) -> list[str]:
        """Of checkpoints with one group of one layer, as all published ones are."""
        return [f"{self.prefix}.{self.layers.replace('*', '0')}"]

    def prepare(self, model: "nn.Module", keys: "TokenKeys") -> None:
        """Each turn of a layer has dropout of its own."""
        encoder: Any = model.get_submodule(f"{self.prefix}.encoder")
        turns = itertools.count()

        def begin(*_: object) -> None:
            nonlocal turns
            turns = itertools.count()

        encoder.register_forward_pre_hook(begin)
        for group in encoder.albert_layer_groups:
            group.register_forward_pre_hook(lambda *_: keys.turn(next(turns)))
        for _, layer in self.find_layers(model):
            layer.attention.dropout = layer.attention.attention_dropout  # type: ignore[union-attr]
