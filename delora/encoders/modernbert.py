"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): rotary positions, and layers that see no further than a window."""

from typing import TYPE_CHECKING, Any

from delora.encoders.base import Encoder

if TYPE_CHECKING:
    from torch import nn

    from delora.randomness import TokenKeys


class ModernBert(Encoder):
    types = ("modernbert",)
    prefix = "model"
    layers = "layers.*"
    roles = {
        "query": "attn.Wqkv.query",
        "key": "attn.Wqkv.key",
        "value": "attn.Wqkv.value",
        "attention_output": "attn.Wo",
        "ffn_in": "mlp.Wi",
        "ffn_out": "mlp.Wo",
    }
    places = {
        "attention_sublayer": "attn.out_drop",
        "ffn_sublayer": "mlp.Wo",
        "ffn_residual": "",
        "layer_output": "",
    }
    gated = True
    fused = {"attn.Wqkv": ("query", "key", "value")}
    attention = "attn"
    output = "final_norm"
    cut, after_attention = None, ()

    def prepare(self, model: "nn.Module", keys: "TokenKeys") -> None:
        """Its attention drops weights by a rate, and not by a module."""
        from torch import nn

        for _, layer in self.find_layers(model):
            attention: Any = layer.attn
            attention.dropout = nn.Dropout(attention.attention_dropout)

    def pools_mean(self, config: Any) -> bool:
        return config.classifier_pooling == "mean"
