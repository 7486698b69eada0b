"""BERT (Devlin et al. 2019, arXiv 1810.04805). Its pooler is frozen where the checkpoint has one."""

from delora.encoders.base import Encoder


class Bert(Encoder):
    types = ("bert",)
    prefix = "bert"
    others = {"pooler.dense": ("width", "width")}
