"""What trials cost: how many fit into a device's memory, and how long they take."""

import contextlib
import functools
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from delora.config import Trial
from delora.data.batches import Tokens
from delora.encoders import Shape, families
from delora.methods.base import find
from delora.train import examples_on_cpu

MOST = {"cpu": 8, "cuda": 64}  # with more trials a step takes as long for each
SHARE = 0.8  # of the memory that is free
WORDS = 51_000  # of a vocabulary that is not known; RoBERTa's
UNKNOWN = 8  # trials of an encoder whose shape is not known
PADDING = 1.05  # tokens computed for each real one, as scripts/benchmark measures it
SPREAD = 1.25  # tokens of the longest batch over those of the mean one


def largest_fleet(
    trial: Trial, tokens: Mapping[str, Tokens], device: torch.device, share: float = 1.0, memory: float | None = None
) -> int:
    """The most trials like this one that fit into the memory that is free.

    Args:
        share: of the memory, where several processes share the device.
        memory: bytes to take for free instead, of a device elsewhere.
    """
    most = MOST.get(device.type, UNKNOWN)
    if trial.model.known_shape is None:
        return min(most, UNKNOWN)
    encoder, each = needed_bytes(trial, most, trial.model.known_shape, tokens, device)
    free = (free_bytes(device) if memory is None else memory) * share
    return max(1, min(most, int((free * SHARE - encoder) / each)))


def needed_bytes(
    trial: Trial, trials: int, shape: Shape, tokens: Mapping[str, Tokens], device: torch.device
) -> tuple[int, int]:
    """Estimated bytes of the encoder, and over it of each of so many trials in a training step.

    Activations after Korthikanti et al. 2022 (arXiv 2205.05198), Eq. 2, with 2 bytes a value: a layer keeps
    T·h·(34 + 5·a·T/h) bytes for T tokens, width h and a heads. Frozen layers keep less, so it is an upper bound.
    """
    size = {"float64": 8, "bfloat16": 2}.get(trial.precision, 4)
    train, longest = tokens["train"], max(t.longest for t in tokens.values())
    examples = -(-trial.batch_size // trial.accumulation)
    packs = families()[shape.family].packs
    count = examples * (min(SPREAD * float(train.lengths_S.mean()), longest) if packs else longest)
    if device.type == "cpu":  # in parts, one of which has the longest examples
        count = min(examples, examples_on_cpu(trials, shape.width)) * longest
    per_token = shape.width * 34 + 5 * shape.heads * longest
    activations = int(count * shape.layers * per_token * size / 2)
    linears = families()[shape.family].linears(shape).values()
    words = (trial.model.described or {}).get("vocab_size", WORDS)
    weights = sum(i * o for i, o in linears) + (words + shape.positions) * shape.width
    encoder = weights * size
    if "weight" in getattr(find(trial.method.target), "copied", ()):
        trained = weights
    else:
        trained = sum(i + o for i, o in linears) * (trial.method.rank or trial.method.bottleneck or 1)
    trained += 2 * shape.width**2
    return encoder, activations + 7 * max(size, 4) * trained


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):  # on Linux, with what the file cache would give back
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else free
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's or a job's, where there is one
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
    return free


def seconds(trials: Sequence[Trial], tokens: Mapping[str, Tokens], device: torch.device) -> float | None:
    """Roughly how long a fleet takes, from its multiplications and how fast the device does them.

    None for an encoder whose shape is not known.
    """
    shape = trials[0].model.known_shape
    if shape is None:
        return None
    per_token = 2 * families()[shape.family].multiplications(shape)
    trained = 2 * per_token * tokens["train"].lengths_S.sum() * trials[0].epochs
    scored = per_token * sum(t.lengths_S.sum() for n, t in tokens.items() if n != "train") * (trials[0].epochs + 1)
    return PADDING * len(trials) * float(trained + scored) / _operations_a_second(shape, device, trials[0].precision)


@functools.cache
def _operations_a_second(shape: Shape, device: torch.device, precision: str) -> float:
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(precision, torch.float32)
    x, w = torch.randn(1024, shape.width, device=device), torch.randn(shape.width, shape.ffn, device=device)
    x, w = x.to(dtype), w.to(dtype)
    done, start = 0, 0.0
    for i in range(1000):
        if i == 3:  # after warming up
            done, start = 0, time.perf_counter()
        (x @ w).sum().item()
        done += 1
        if start and time.perf_counter() - start > 0.2:
            break
    # A step does other things too: measured, about half of its time goes into multiplications.
    return 0.5 * done * 2 * 1024 * shape.width * shape.ffn / (time.perf_counter() - start)
