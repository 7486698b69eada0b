"""MPNet (Song et al. 2020, arXiv 2004.09297): positions start after the id of padding, and attention has a bias that
depends on the distance of two tokens, the same in all layers.
"""

from collections.abc import Mapping
from typing import Any

from delora.encoders.base import Encoder, first_tokens

BUCKETS = 32  # of distances; transformers takes so many whatever the config says


def distance_bias(self: Any, x: Any, **_: Any) -> Any:
    """In the place of MPNetEncoder.compute_position_bias: the table (heads, 2·R − 1) of `delora.attention.Relative`."""
    import torch

    layout = self.layer[0].attention.dropout.keys.layout
    reach = x.shape[1] if layout is None else layout.span
    distance_R = torch.arange(1 - reach, reach, device=x.device)
    return self.relative_attention_bias(self.relative_position_bucket(distance_R, num_buckets=BUCKETS)).mT


def attend(self: Any, hidden_states: Any, attention_mask: Any = None, position_bias: Any = None, **_: Any) -> Any:
    """In the place of MPNetAttention.forward, whose weights are bound to padded examples."""
    from delora.attention import encoder_attention

    attn = self.attn
    shape = (*hidden_states.shape[:-1], -1, attn.attention_head_size)
    q, k, v = (linear(hidden_states).view(shape).transpose(1, 2) for linear in (attn.q, attn.k, attn.v))
    dropout = attn.dropout.p if self.training else 0.0
    attended = encoder_attention(attn, q, k, v, attention_mask, dropout=dropout, bias_HR=position_bias)[0].flatten(-2)
    if self.dropout.of_first:
        attended, hidden_states = (first_tokens(x, self.dropout.keys) for x in (attended, hidden_states))
    return (self.LayerNorm(self.dropout(attn.o(attended)) + hidden_states),)


class MPNet(Encoder):
    types = ("mpnet",)
    prefix = "mpnet"
    roles = {
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_output": "attention.attn.o",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
    }
    places = {**Encoder.places, "attention_sublayer": "attention.dropout"}
    stays = ("relative_attention_bias",)  # the kernel's bias has no gradient; 32 numbers a head
    attention = "attention.attn"
    cut, after_attention = None, ("attention.dropout", "intermediate", "output")
    replaced = {"MPNetEncoder.compute_position_bias": distance_bias, "MPNetAttention.forward": attend}

    def first_position(self, config: Mapping[str, Any]) -> int:
        return 2  # transformers pads with 1 whatever the config says
