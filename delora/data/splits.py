"""The paper's protocol: a new validation and a new test set, drawn from GLUE's validation rows for each seed."""

import numpy as np

from delora.errors import UserError
from delora.tasks import Task


def paper_split(task: Task, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the n validation rows (MNLI: matched) are the new validation and the new test set of a seed.

    The permutation and its cut are those of the published DeLoRA code, which draws from the run's own seed: 1000
    validation rows for MNLI, QNLI and QQP, half of the rows for the others, CoLA's two sets swapped. Sets of other
    sizes than GLUE's, as of synthetic data, are cut at half if they are too small for 1000.

    Returns:
        (validation, test): positions of rows, int64, in the order of the permutation.

    Raises:
        UserError: fewer than 2 rows, or a seed outside 0 … 2³²−1.
    """
    if n < 2:
        raise UserError(f"{task.name}: {n} validation rows cannot be split in two; protocol=standard needs no split")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: the paper's split takes seeds from 0 to {2**32 - 1}")
    order = np.random.RandomState(seed).permutation(n)
    cut = min(task.paper_validation or n, n // 2)
    first, second = order[:cut], order[cut:]
    return (second, first) if task.paper_swapped else (first, second)
