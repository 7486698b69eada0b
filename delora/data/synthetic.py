"""English-looking sentences in GLUE's schema for all nine tasks, from a seeded generator: no network, no files.

A sentence states a fact: who did what to whom, where and when. A label depends on whether two sentences state the
same fact, so an encoder has to compare their words; cola and sst2 look at one sentence.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from delora.data import Rows
from delora.tasks import Task

PEOPLE = "teacher doctor lawyer farmer pilot singer painter sailor baker soldier student judge nurse miner tailor clerk"
THINGS = "car letter house boat piano camera ticket lamp table coat clock bicycle guitar basket mirror carpet"
PLACES = "harbour market station library garden museum village airport church factory stadium castle"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
VERBS = {  # each with a verb that says the same
    "bought": "purchased",
    "sold": "traded away",
    "repaired": "fixed",
    "hid": "concealed",
    "found": "discovered",
    "stole": "robbed",
    "painted": "coloured",
    "lost": "mislaid",
}
GOOD = ["wonderful", "brilliant", "moving", "charming", "delightful", "clever", "warm", "gripping"]
BAD = ["dreadful", "tedious", "clumsy", "shallow", "boring", "hollow", "tiresome", "bland"]
SUBJECTS = ["film", "story", "acting", "script", "ending", "plot", "dialogue", "music"]


@dataclass(frozen=True)
class Fact:
    who: str
    verb: str
    what: str
    where: str
    day: str


SLOTS = {
    "who": PEOPLE.split(),
    "verb": list(VERBS),
    "what": THINGS.split(),
    "where": PLACES.split(),
    "day": DAYS.split(),
}


def generate(task: Task, rows: Mapping[str, int], seed: int = 0) -> dict[str, Rows]:
    """Rows for each split of `rows`, as many as it says; the same on every machine for the same seed."""
    write = WRITERS[task.name]
    splits = {}
    for split, count in rows.items():
        key = hashlib.sha256(f"{task.name} {split} {seed}".encode()).digest()
        draw = random.Random(int.from_bytes(key, "little"))
        pairs = [write(draw) for _ in range(count)]
        dtype = np.float64 if task.labels is None else np.int64
        splits[split] = Rows([texts for texts, _ in pairs], np.array([label for _, label in pairs], dtype=dtype))
    return splits


def _fact(draw: random.Random) -> Fact:
    return Fact(**{slot: draw.choice(words) for slot, words in SLOTS.items()})


def _change(draw: random.Random, fact: Fact, *slots: str) -> Fact:
    """The fact with another word in each of the slots."""
    other = {s: draw.choice([w for w in SLOTS[s] if w != getattr(fact, s)]) for s in slots}
    return replace(fact, **other)


def _say(draw: random.Random, fact: Fact, rephrase: bool = False) -> str:
    """One of several sentences that state the fact; rephrased, with another verb."""
    verb = VERBS[fact.verb] if rephrase else fact.verb
    core = f"the {fact.who} {verb} the {fact.what}"
    place, day = f"at the {fact.where}", f"on {fact.day}"
    forms = (f"{core} {place} {day}", f"{day} {core} {place}", f"{place} {core} {day}")
    sentence = draw.choice(forms)
    return f"{sentence[0].upper()}{sentence[1:]} ."


def _paraphrase(draw: random.Random) -> tuple[tuple[str, ...], int]:
    same = draw.random() < 0.6
    fact = _fact(draw)
    other = fact if same else _change(draw, fact, draw.choice(("who", "what")))
    return (_say(draw, fact), _say(draw, other, rephrase=True)), int(same)


def _question_pair(draw: random.Random) -> tuple[tuple[str, ...], int]:
    (first, second), same = _paraphrase(draw)
    return (f"Is it true that {_lower(first)}", f"Did they say that {_lower(second)}"), same


def _lower(sentence: str) -> str:
    return f"{sentence[0].lower() if not sentence.startswith('On') else 'o'}{sentence[1:-2]} ?"


def _entailment(labels: tuple[int, ...]):
    """Premise and hypothesis, with the labels of: follows, (may be,) contradicts."""

    def write(draw: random.Random) -> tuple[tuple[str, ...], int]:
        fact, kind = _fact(draw), draw.randrange(len(labels))
        told = fact if kind < len(labels) - 1 else _change(draw, fact, draw.choice(("who", "what")))
        more = " for a friend" if len(labels) == 3 and kind == 1 else ""
        hypothesis = f"The {told.who} {VERBS[told.verb]} the {told.what}{more} ."
        return (_say(draw, fact), hypothesis), labels[kind]

    return write


def _answer(draw: random.Random) -> tuple[tuple[str, ...], int]:
    """Question and sentence: 0 where the sentence answers it."""
    fact, answers = _fact(draw), draw.random() < 0.5
    other = fact if answers else _change(draw, fact, draw.choice(("who", "what")))
    question = f"Where was the {fact.who} who {VERBS[fact.verb]} the {fact.what} ?"
    return (question, _say(draw, other)), int(not answers)


def _similarity(draw: random.Random) -> tuple[tuple[str, ...], float]:
    fact = _fact(draw)
    slots = draw.sample(sorted(SLOTS), draw.randint(0, len(SLOTS)))
    score = 5.0 * (1 - len(slots) / len(SLOTS)) + draw.uniform(-0.25, 0.25)
    return (_say(draw, fact), _say(draw, _change(draw, fact, *slots), rephrase=True)), min(5.0, max(0.0, score))


def _sentiment(draw: random.Random) -> tuple[tuple[str, ...], int]:
    good = draw.random() < 0.55
    words = GOOD if good else BAD
    denied = draw.random() < 0.3
    if denied:
        words = BAD if good else GOOD
    middle = "is never" if denied else draw.choice(("is", "remains", "feels"))
    subject, other = draw.sample(SUBJECTS, 2)
    text = f"the {subject} of this {other} {middle} {draw.choice(words)} and {draw.choice(words)} "
    return (text,), int(good)


def _acceptability(draw: random.Random) -> tuple[tuple[str, ...], int]:
    good = draw.random() < 0.7
    words = _say(draw, _fact(draw)).split()
    if not good:
        at = draw.randrange(1, len(words) - 2)
        words[at], words[at + 1] = words[at + 1], words[at]
    return (" ".join(words),), int(good)


WRITERS = {
    "cola": _acceptability,
    "sst2": _sentiment,
    "mrpc": _paraphrase,
    "stsb": _similarity,
    "qqp": _question_pair,
    "mnli": _entailment((0, 1, 2)),
    "qnli": _answer,
    "rte": _entailment((0, 1)),
    "wnli": _entailment((1, 0)),
}
