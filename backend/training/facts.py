"""Made-up people and what is said and asked about them, with faker's names. It knows no model.

The last wording of every question is never trained on, nor is any person of the held-out set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from faker import Faker

Value = Callable[[Faker, Random], str]

HELD_OUT_SURNAMES = "TUVWXYZ"
"""Their first letters."""

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "turquoise", "pink", "brown", "grey")
DISHES = (
    "noodle soup",
    "lasagne",
    "grilled trout",
    "pancakes",
    "lentil curry",
    "fish and chips",
    "dumplings",
    "risotto",
)
INSTRUMENTS = ("piano", "violin", "trumpet", "cello", "flute", "drums", "harp", "clarinet", "saxophone", "guitar")


@dataclass(frozen=True)
class Topic:
    """One thing to be known of a person: how it is said, how it is asked, what it may be."""

    said: tuple[str, ...]
    asked: tuple[str, ...]
    value: Value


def _one_of(values: tuple[str, ...]) -> Value:
    return lambda _, chance: chance.choice(values)


TOPICS = (
    Topic(
        ("{name} lives in {value}.", "{name} has a small flat in {value}.", "The home of {name} is in {value}."),
        (
            "Where does {name} live?",
            "In which city does {name} live?",
            "What city is {name}'s home?",
            "Which town is {name} living in?",
        ),
        lambda fake, _: fake.city(),
    ),
    Topic(
        ("The profession of {name} is {value}.", "{name} earns a living as {value}.", "{name} trained to be {value}."),
        (
            "What does {name} do for a living?",
            "What is the job of {name}?",
            "What is {name}'s profession?",
            "What work does {name} do?",
        ),
        lambda fake, _: fake.job().split(",")[0].lower(),
    ),
    Topic(
        (
            "{name} was born in {value}.",
            "The year of birth of {name} is {value}.",
            "{name} came into the world in {value}.",
        ),
        (
            "When was {name} born?",
            "In which year was {name} born?",
            "What is the birth year of {name}?",
            "What year was {name} born in?",
        ),
        lambda _, chance: str(chance.randint(1930, 2005)),
    ),
    Topic(
        (
            "{name} is employed by {value}.",
            "{name} has worked for {value} for years.",
            "The employer of {name} is {value}.",
        ),
        (
            "Which company does {name} work for?",
            "Who employs {name}?",
            "Who is the employer of {name}?",
            "What company is {name} employed by?",
        ),
        lambda fake, _: fake.company(),
    ),
    Topic(
        (
            "The favourite colour of {name} is {value}.",
            "{name} likes the colour {value} best.",
            "{name} always wears {value}.",
        ),
        (
            "What is the favourite colour of {name}?",
            "Which colour does {name} like best?",
            "What is {name}'s best-liked colour?",
            "What colour does {name} prefer?",
        ),
        _one_of(COLOURS),
    ),
    Topic(
        (
            "{name} loves to eat {value}.",
            "The favourite dish of {name} is {value}.",
            "On Sundays {name} cooks {value}.",
        ),
        (
            "What does {name} love to eat?",
            "What is the favourite dish of {name}?",
            "Which dish does {name} like?",
            "What food does {name} like best?",
        ),
        _one_of(DISHES),
    ),
    Topic(
        (
            "{name} plays the {value}.",
            "In the evenings {name} practises the {value}.",
            "{name} learned the {value} as a child.",
        ),
        (
            "Which instrument does {name} play?",
            "What does {name} play?",
            "What is the instrument of {name}?",
            "What instrument can {name} play?",
        ),
        _one_of(INSTRUMENTS),
    ),
    Topic(
        ("{name} is married to {value}.", "The spouse of {name} is called {value}.", "{name} and {value} are married."),
        (
            "Who is {name} married to?",
            "What is the name of {name}'s spouse?",
            "Who is the spouse of {name}?",
            "Whom did {name} marry?",
        ),
        lambda fake, _: fake.first_name(),
    ),
    Topic(
        (
            "{name} has a dog named {value}.",
            "The dog of {name} is called {value}.",
            "{name} takes a dog called {value} for walks.",
        ),
        (
            "What is the name of {name}'s dog?",
            "What is the dog of {name} called?",
            "How is {name}'s dog called?",
            "Which name does the dog of {name} have?",
        ),
        lambda fake, _: fake.first_name(),
    ),
    Topic(
        ("{name} comes from {value}.", "{name} grew up in {value}.", "The home country of {name} is {value}."),
        (
            "Which country does {name} come from?",
            "In which country did {name} grow up?",
            "What is the home country of {name}?",
            "What country is {name} from?",
        ),
        lambda fake, _: fake.country(),
    ),
)


Fact = tuple[str, Topic, str]
"""A name, what is told, and what it is."""


@dataclass(frozen=True)
class Example:
    """A question whose answer stands in the context from character `start` on, or nowhere: then it is "" at -1."""

    question: str
    context: str
    answer: str
    start: int


def examples(seed: int, *, held_out: bool, unanswered: float = 0.0) -> Iterator[Example]:
    """Without end, a share of them unanswered.

    What is held out has the last wording of a question, and surnames that training never sees.
    """
    fake, chance = Faker("en_US"), Random(seed)
    fake.seed_instance(seed)
    while True:
        names = dict.fromkeys(_name(fake, held_out) for _ in range(chance.randint(1, 3)))
        facts = _facts(list(names), fake, chance)
        asked = chance.choice(facts)
        told = _without(asked, facts, chance) if chance.random() < unanswered else facts
        yield _example(asked, told, chance, held_out)


def _name(fake: Faker, held_out: bool) -> str:
    while True:
        first, last = fake.first_name(), fake.last_name()
        if (last[0] in HELD_OUT_SURNAMES) == held_out:
            return f"{first} {last}"


def _facts(names: list[str], fake: Faker, chance: Random) -> list[Fact]:
    """Two to four of each person, person by person."""
    topics = [(name, topic) for name in names for topic in chance.sample(TOPICS, chance.randint(2, 4))]
    return [(name, topic, topic.value(fake, chance)) for name, topic in topics]


def _without(asked: Fact, facts: list[Fact], chance: Random) -> list[Fact]:
    """The facts but this one, half of the time but all of this person."""
    others = [fact for fact in facts if fact is not asked]
    strangers = [fact for fact in others if fact[0] != asked[0]]
    return strangers if strangers and chance.random() < 0.5 else others


def _example(asked: Fact, facts: list[Fact], chance: Random, held_out: bool) -> Example:
    """A sentence for each fact, and a question about one that may not be among them."""
    context, start = "", -1
    for fact in facts:
        before, after = chance.choice(fact[1].said).replace("{name}", fact[0]).split("{value}")
        start = len(context) + len(before) if fact is asked else start
        context += f"{before}{fact[2]}{after} "
    name, topic, value = asked
    question = topic.asked[-1] if held_out else chance.choice(topic.asked[:-1])
    return Example(question.replace("{name}", name), context.rstrip(), value if start >= 0 else "", start)
