"""DeBERTa-v2 and -v3 (He et al. 2021, arXiv 2111.09543): attention to content and, apart from it, to distance.

Examples are padded: what a token attends to is computed for every distance, which no kernel for packed rows does.
"""

import math
from typing import Any

from delora.encoders.base import Encoder


def attend(
    self: Any,
    hidden_states: Any,
    attention_mask: Any,
    output_attentions: bool = False,
    query_states: Any = None,
    relative_pos: Any = None,
    rel_embeddings: Any = None,
) -> Any:
    """In the place of DisentangledSelfAttention.forward: K trials have embeddings of distances of their own, once
    these went through dropout and adapted layers, and only distances within an example are computed."""
    import torch

    keys, kinds = self.dropout.keys, self.pos_att_type if self.relative_attention else []
    trials, tokens = len(keys.key_KN), hidden_states.shape[1]
    heads = self.num_attention_heads

    def by_head(x: Any) -> Any:
        """(K·B, T, H) as (K, B, heads, T, D)."""
        return x.view(trials, -1, x.shape[1], heads, x.shape[2] // heads).transpose(2, 3)

    q, k, v = (by_head(f(hidden_states)) for f in (self.query_proj, self.key_proj, self.value_proj))
    scores = q @ k.mT
    if kinds:
        span = self.pos_ebd_size
        reach = min(tokens, span)
        rows = rel_embeddings[:, span - reach : span + reach]
        own, keys.key_KN = keys.key_KN, keys.of_shared(2 * reach, span - reach)
        rows = self.pos_dropout(rows)
        of_keys: Any = self.key_proj if self.share_att_key else getattr(self, "pos_key_proj", None)
        of_queries: Any = self.query_proj if self.share_att_key else getattr(self, "pos_query_proj", None)
        pos_k = by_head(of_keys(rows)) if "c2p" in kinds else None
        pos_q = by_head(of_queries(rows)) if "p2c" in kinds else None
        keys.key_KN = own
        index = (relative_pos.view(tokens, tokens) + reach).clamp(0, 2 * reach - 1)
        if pos_k is not None:
            scores = scores + (q @ pos_k.mT).gather(-1, index.expand(*scores.shape))
        if pos_q is not None:
            scores = scores + (k @ pos_q.mT).gather(-1, index.mT.expand(*scores.shape)).mT
    scores = scores / math.sqrt(q.shape[-1] * (1 + len({"c2p", "p2c"} & set(self.pos_att_type))))
    scores = scores.flatten(0, 1).masked_fill(~attention_mask.bool(), torch.finfo(scores.dtype).min)
    weights = self.dropout(scores.softmax(-1))
    context = weights.view(trials, -1, *weights.shape[1:]) @ v
    return context.transpose(2, 3).reshape(hidden_states.shape), None


def distance_embeddings(self: Any) -> Any:
    """In the place of DebertaV2Encoder.get_rel_embedding: one for each trial, (K, distances, H)."""
    if not self.relative_attention:
        return None
    table = self.rel_embeddings
    copies = None if getattr(table, "off", True) else table.method.weight
    rows = table.weight if copies is None else copies.to(table.weight.dtype)
    rows = rows.expand(len(self.layer[0].attention.self.dropout.keys.key_KN), -1, -1)
    return self.LayerNorm(rows) if "layer_norm" in self.norm_rel_ebd else rows


def relative_positions(self: Any, hidden_states: Any, query_states: Any = None, relative_pos: Any = None) -> Any:
    """In the place of DebertaV2Encoder.get_rel_pos: made once for each length, since making them copies numbers to the
    GPU, which no recording takes."""
    import torch

    if not self.relative_attention or relative_pos is not None or query_states is not None:
        return type(self).get_rel_pos(self, hidden_states, query_states, relative_pos)
    place = hidden_states.shape[1], hidden_states.device
    known = self.__dict__.setdefault("known_positions", {})
    if place not in known:
        with torch.inference_mode(False):  # training takes them too
            known[place] = type(self).get_rel_pos(self, hidden_states)
    return known[place]


class Deberta(Encoder):
    types = ("deberta-v2",)
    prefix = "deberta"
    roles = {
        "query": "attention.self.query_proj",
        "key": "attention.self.key_proj",
        "value": "attention.self.value_proj",
        "attention_output": "attention.output.dense",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
    }
    packs = False
    cut, after_attention = None, ()
    replaced = {
        "DisentangledSelfAttention.forward": attend,
        "DebertaV2Encoder.get_rel_pos": relative_positions,
        "DebertaV2Encoder.get_rel_embedding": distance_embeddings,
    }
