"""Whether the Hugging Face hub can be used, found out in seconds whatever the network does."""

import contextlib
import functools
import threading
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.utils import get_session

LIMIT_SECONDS = 3.0


@functools.cache
def why_unreachable() -> str | None:
    """Why the hub cannot be used now, or None where it answers. Asked once a process, and over after 3 seconds."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answer = [f"no answer from {constants.ENDPOINT} within {LIMIT_SECONDS:.0f} s"]
    # Looking up a name has no timeout of its own, so the wait is bounded by leaving the thread behind.
    thread = threading.Thread(target=_ask, args=(answer,), daemon=True)
    thread.start()
    thread.join(LIMIT_SECONDS)
    return answer[-1] or None


@contextlib.contextmanager
def from_cache_where_offline() -> Iterator[None]:
    """Where the hub cannot be reached, has the caches of `datasets` and `evaluate` answer at once."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or why_unreachable() is not None
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def hub_is_reachable() -> bool:
    """Whether the hub (or the mirror named by HF_ENDPOINT) answers."""
    return why_unreachable() is None


def _ask(answer: list[str]) -> None:
    """Appends the reason for which the hub does not answer, or "" where it does."""
    try:
        status = get_session().head(constants.ENDPOINT, timeout=LIMIT_SECONDS).status_code
        answer.append(f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else "")
    except Exception as error:
        answer.append(f"{constants.ENDPOINT}: {error}")
