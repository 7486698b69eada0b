"""English-looking sentences in GLUE's schema for all nine tasks, from a seeded generator: no network, no files.

A sentence states a fact: who gave what to whom, where and when. A label depends on whether two sentences state the
same fact, so an encoder has to compare their words and who does what; cola and sst2 look at one sentence.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from delora.data import Rows
from delora.tasks import Task

Row = tuple[tuple[str, ...], float]

# As many as make a fact hardly ever come twice.
PEOPLE = """teachers doctors lawyers farmers pilots singers painters sailors soldiers students judges nurses miners
clerks actors artists writers drivers hunters monks poets guards bankers dancers priests engineers merchants tourists
editors dealers knights scientists"""
THINGS = """cameras lamps clocks bicycles guitars baskets mirrors chairs watches radios drums statues boxes books tables
blankets shirts bottles candles knives coins letters paintings maps bells tents swords boats shoes hats ropes rings"""
PLACES = "harbour market station library museum theatre airport church factory stadium castle hotel"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
VERBS = {  # each with a verb that says the same, and the preposition of both
    "gave": ("handed", "to"),
    "lent": ("loaned", "to"),
    "sent": ("shipped", "to"),
    "showed": ("presented", "to"),
    "bought": ("purchased", "for"),
    "repaired": ("fixed", "for"),
    "chose": ("selected", "for"),
    "found": ("located", "for"),
    "hid": ("concealed", "from"),
    "took": ("seized", "from"),
}
GIVER, TAKER = ("who", "wanted to be kind"), ("whom", "had asked for them")  # reasons, and whose they are

GOOD = "wonderful brilliant moving charming delightful clever warm gripping inventive honest graceful witty"
BAD = "dreadful tedious clumsy shallow boring hollow tiresome bland careless muddled lifeless predictable"
WORKS = "film comedy drama thriller sequel documentary romance western"
PARTS = "story acting script ending plot dialogue music camerawork"


@dataclass(frozen=True)
class Fact:
    who: str
    verb: str
    what: str
    whom: str
    where: str
    day: str


SLOTS = {
    "who": PEOPLE.split(),
    "verb": list(VERBS),
    "what": THINGS.split(),
    "whom": PEOPLE.split(),
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


# --- Facts


def _fact(draw: random.Random) -> Fact:
    who, whom = draw.sample(SLOTS["who"], 2)
    rest = {slot: draw.choice(SLOTS[slot]) for slot in ("verb", "what", "where", "day")}
    return Fact(who=who, whom=whom, **rest)


def _change(draw: random.Random, fact: Fact, *slots: str) -> Fact:
    """The fact with another word in each of the slots."""
    for slot in slots:
        taken = {fact.who, fact.whom} if slot in ("who", "whom") else {getattr(fact, slot)}
        fact = replace(fact, **{slot: draw.choice([word for word in SLOTS[slot] if word not in taken])})
    return fact


def _another(draw: random.Random, fact: Fact) -> Fact:
    """A fact of other persons and another thing; or of the two persons swapped, which the words alone do not tell."""
    if draw.random() < 0.2:
        return replace(fact, who=fact.whom, whom=fact.who)
    return _change(draw, fact, "who", "what", "whom")


def _core(fact: Fact, rephrase: bool = False) -> str:
    """The clause without place and day; rephrased, with the other verb."""
    verb, to = VERBS[fact.verb]
    return f"{fact.who} {verb if rephrase else fact.verb} {fact.what} {to} {fact.whom}"


def _clause(draw: random.Random, fact: Fact, rephrase: bool = False) -> str:
    """One of several clauses that state the fact."""
    core, place, day = _core(fact, rephrase), f"at the {fact.where}", f"on {fact.day}"
    return draw.choice((f"{core} {place} {day}", f"{day} {core} {place}", f"{place} {core} {day}"))


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]} ."


# --- Tasks


def _paraphrase(draw: random.Random) -> Row:
    fact, same = _fact(draw), draw.random() < 0.5
    other = fact if same else _another(draw, fact)
    return (_sentence(_core(fact)), _sentence(_core(other, rephrase=True))), same


def _question_pair(draw: random.Random) -> Row:
    fact, same = _fact(draw), draw.random() < 0.4
    other = fact if same else _another(draw, fact)
    first, second = _clause(draw, fact), _clause(draw, other, rephrase=True)
    return (f"Is it true that {first} ?", f"Do you know whether {second} ?"), same


def _answer(draw: random.Random) -> Row:
    """Question and sentence: 0 where the sentence answers it."""
    fact, answers = _fact(draw), draw.random() < 0.5
    question = f"Where was it that {_core(fact, rephrase=True)} ?"
    return (question, _sentence(_clause(draw, fact if answers else _another(draw, fact)))), not answers


def _entailment(draw: random.Random) -> Row:
    fact, follows = _fact(draw), draw.random() < 0.5
    told = fact if follows else _another(draw, fact)
    return (_sentence(_clause(draw, fact)), _sentence(_core(told, rephrase=True))), not follows


def _inference(draw: random.Random) -> Row:
    """0 where the second sentence follows, 1 where the first says nothing of its place or day, 2 where it is wrong."""
    fact, label = _fact(draw), draw.randrange(3)
    told = _another(draw, fact) if label == 2 else fact
    stated, other = draw.sample((f"at the {fact.where}", f"on {fact.day}"), 2)
    premise, hypothesis = _core(fact), _core(told, rephrase=True)
    return (_sentence(f"{premise} {stated}"), _sentence(f"{hypothesis} {other if label == 1 else stated}")), label


def _pronoun(draw: random.Random) -> Row:
    """1 where the second sentence puts the right person in the place of the pronoun."""
    fact = _fact(draw)
    while VERBS[fact.verb][1] == "from":
        fact = _change(draw, fact, "verb")
    (owner, reason), right = draw.choice((GIVER, TAKER)), draw.random() < 0.5
    named = getattr(fact, owner if right else {"who": "whom", "whom": "who"}[owner])
    return (_sentence(f"{_clause(draw, fact)} because they {reason}"), _sentence(f"{named} {reason}")), right


def _similarity(draw: random.Random) -> Row:
    fact = _fact(draw)
    slots = draw.sample(list(SLOTS), draw.randint(0, len(SLOTS)))
    score = 5.0 * (1 - len(slots) / len(SLOTS)) + draw.uniform(-0.25, 0.25)
    other = _change(draw, fact, *slots)
    texts = _sentence(_clause(draw, fact)), _sentence(_clause(draw, other, rephrase=True))
    return texts, min(5.0, max(0.0, round(score, 2)))


def _sentiment(draw: random.Random) -> Row:
    """Two verdicts that agree; "never" turns a word round."""
    good = draw.random() < 0.55
    fitting, opposite = (GOOD, BAD) if good else (BAD, GOOD)

    def verdict() -> str:
        if draw.random() < 0.3:
            return f"is never {' or '.join(draw.sample(opposite.split(), 2))}"
        return f"{draw.choice(('is', 'remains', 'feels'))} {' and '.join(draw.sample(fitting.split(), 2))}"

    (first, second), work = draw.sample(PARTS.split(), 2), draw.choice(WORKS.split())
    return (f"the {first} in this {work} {verdict()} , and its {second} {verdict()} ",), good


def _acceptability(draw: random.Random) -> Row:
    """A sentence, or one with two neighbouring words in the wrong order."""
    good = draw.random() < 0.7
    words = _sentence(_clause(draw, _fact(draw), rephrase=draw.random() < 0.5)).split()
    if not good:
        at = draw.randrange(1, len(words) - 2)
        words[at], words[at + 1] = words[at + 1], words[at]
    return (" ".join(words),), good


WRITERS: dict[str, Callable[[random.Random], Row]] = {
    "cola": _acceptability,
    "sst2": _sentiment,
    "mrpc": _paraphrase,
    "stsb": _similarity,
    "qqp": _question_pair,
    "mnli": _inference,
    "qnli": _answer,
    "rte": _entailment,
    "wnli": _pronoun,
}
