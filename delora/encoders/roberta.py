"""RoBERTa (Liu et al. 2019, arXiv 1907.11692), XLM-RoBERTa (1911.02116) and CamemBERT (1911.03894).

Positions start after the id of padding.
"""

from collections.abc import Mapping
from typing import Any

from delora.encoders.base import Encoder


class Roberta(Encoder):
    types = ("roberta", "xlm-roberta", "camembert")
    prefix = "roberta"

    def first_position(self, config: Mapping[str, Any]) -> int:
        return (config.get("pad_token_id") or 0) + 1
