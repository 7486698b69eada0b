"""ELECTRA's discriminator (Clark et al. 2020, arXiv 2003.10555)."""

from delora.encoders.base import Encoder


class Electra(Encoder):
    types = ("electra",)
    prefix = "electra"
