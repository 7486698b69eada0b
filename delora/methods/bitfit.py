"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases of linear layers and LayerNorms, one copy a trial."""

from delora.methods.base import CopyMethod


class BitFit(CopyMethod):
    """Bias-terms finetuning."""

    copied = ("bias",)
