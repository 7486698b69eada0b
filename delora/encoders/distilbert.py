"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108)."""

from delora.encoders.base import Encoder


class DistilBert(Encoder):
    types = ("distilbert",)
    prefix = "distilbert"
    layers = "transformer.layer.*"
    roles = {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "ffn_in": "ffn.lin1",
        "ffn_out": "ffn.lin2",
    }
    places = {
        "attention_sublayer": "attention.out_lin",
        "ffn_sublayer": "ffn.dropout",
        "ffn_residual": "output_layer_norm",
        "layer_output": "",
    }
    attention = "attention"
    output = "transformer"
    head = ("pre_classifier", "classifier")
    cut, after_attention = None, ()
    keys = {
        "layers": "n_layers",
        "width": "dim",
        "ffn": "hidden_dim",
        "heads": "n_heads",
        "positions": "max_position_embeddings",
    }
