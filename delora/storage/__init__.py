"""The results of trials on disk: the only writer and the only reader. Imports no torch.

A trial's folder holds
    config.yaml              its resolved config
    metrics.jsonl            a line per `Step` and per `Evaluation`, numbers that are not finite as null
    result.json              a `Result`, written last: its `status` alone says how the trial ended, its hashes what
                             the files beside it have to be
    adapter.safetensors      the best adapter with the head
    predictions.safetensors  logits of that checkpoint by split, each with its rows' numbers, hashes of texts and labels
    log.txt                  what happened, with the traceback of a trial that failed
Files other than the two that grow are replaced whole: a reader sees the old one or the new one, never a part.
Nothing is written through a link, nothing but regular files is read.
"""

from delora.storage.files import LOG_LIMIT, Folder, ResultsError, content, explain, forget, replace
from delora.storage.made_by import cpu_name, provenance, versions
from delora.storage.reading import Found, StoredTrial, evaluations, find, finished, read, read_tensors, stored_config
from delora.storage.schema import (
    ADAPTER,
    CONFIG,
    LOG,
    METRICS,
    PREDICTIONS,
    RESULT,
    SCHEMA,
    Checkpoint,
    Evaluation,
    Extent,
    MadeBy,
    Origin,
    Parameters,
    Result,
    Scores,
    Seconds,
    Step,
    Tokens,
    differences,
    flatten,
    has_ended,
    is_of,
    share_of_seconds,
    without_hashes,
)
from delora.storage.writing import WAYS_ON, ConfigChanged, InUse, TrialFolder, lock, open_trial, set_aside

__all__ = [
    "ADAPTER",
    "CONFIG",
    "LOG",
    "LOG_LIMIT",
    "METRICS",
    "PREDICTIONS",
    "RESULT",
    "SCHEMA",
    "WAYS_ON",
    "Checkpoint",
    "ConfigChanged",
    "Evaluation",
    "Extent",
    "Folder",
    "Found",
    "InUse",
    "MadeBy",
    "Origin",
    "Parameters",
    "Result",
    "ResultsError",
    "Scores",
    "Seconds",
    "Step",
    "StoredTrial",
    "Tokens",
    "TrialFolder",
    "content",
    "cpu_name",
    "differences",
    "evaluations",
    "explain",
    "find",
    "finished",
    "flatten",
    "forget",
    "has_ended",
    "is_of",
    "lock",
    "open_trial",
    "provenance",
    "read",
    "read_tensors",
    "replace",
    "set_aside",
    "share_of_seconds",
    "stored_config",
    "versions",
    "without_hashes",
]
