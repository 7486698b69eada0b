"""Full finetuning: all of the encoder's weights, biases, norms and embeddings, one copy a trial."""

from delora.methods.base import CopyMethod


class Full(CopyMethod):
    """Full finetuning."""

    copied = ("weight", "bias")
