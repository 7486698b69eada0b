"""Steps, and batches that are scored, recorded as CUDA graphs.

Starting a step's thousand kernels one by one takes the CPU longer than a GPU computes a few trials. A graph starts
them all at once.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Widths = tuple[tuple[int, int], ...]  # of the parts of a batch, as `delora.data.batches.Tokens.width` gives them


class Recorded:
    """A function of tensors on a GPU, recorded for each kind of its inputs that comes again, and then replayed.

    Args:
        function: of (index_KB, step, widths); what it does on the GPU must depend on nothing else that a later call
            changes, except on tensors that are changed in place. Called as it is for the first batch of each kind:
            what is compiled, loaded or allocated then cannot happen while a graph is recorded.
        device: the GPU.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Widths], Tensor], device: torch.device):
        self._function, self._device = function, device
        self._graphs: dict[tuple[torch.Size, Widths], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._inputs: dict[torch.Size, Tensor] = {}
        self._met: set[tuple[torch.Size, Widths]] = set()
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self._can = True

    def __call__(self, index_KB: Tensor, step: Tensor, widths: Widths) -> Tensor:
        """What `function` returns; it stays until the next call."""
        self._step.copy_(step, non_blocking=True)
        shape, kind = index_KB.shape, (index_KB.shape, widths)
        if shape not in self._inputs:
            self._inputs[shape] = torch.empty_like(index_KB, device=self._device)
        self._inputs[shape].copy_(index_KB, non_blocking=True)
        if kind not in self._met or not self._can:
            self._met.add(kind)
            return self._function(self._inputs[shape], self._step, widths)
        if kind not in self._graphs:
            try:
                self._graphs[kind] = self._record(*kind)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("kernels are started one by one, not as CUDA graphs: %s", str(error).splitlines()[0])
                self._can = False
                return self._function(self._inputs[shape], self._step, widths)
        graph, output = self._graphs[kind]
        graph.replay()
        return output

    def _record(self, shape: torch.Size, widths: Widths) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            output = self._function(self._inputs[shape], self._step, widths)
        return graph, output
