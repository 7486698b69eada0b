"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA whose B has a learning rate of its own, a multiple of A's."""

from collections.abc import Mapping

from torch import Tensor

from delora.methods.lora import LoRA
from delora.randomness import Draw


class LoRAPlus(LoRA):
    """LoRA with B's rate `rate_ratio` times that of A and the head. Shapes as in `delora.methods.base`."""

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int, alpha: Tensor, rate_ratio: Tensor):
        super().__init__(weight_OI, draw, rank=rank, alpha=alpha)
        self.rate_ratio = rate_ratio

    def rate_factors(self) -> Mapping[str, Tensor]:
        return {"B": self.rate_ratio}
