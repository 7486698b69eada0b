"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), as in PEFT: LoRA whose update is scaled by α/√r, not α/r."""

from torch import Tensor

from delora.methods.lora import LoRA
from delora.randomness import Draw


class RsLoRA(LoRA):
    """Rank-stabilised LoRA. Shapes as in `delora.methods.base`."""

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int, alpha: Tensor):
        super().__init__(weight_OI, draw, rank=rank, alpha=alpha)
        self.scale_K = alpha / rank**0.5
