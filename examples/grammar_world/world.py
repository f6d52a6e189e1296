"""A small language whose teacher is a stochastic grammar with known probabilities, so that a student can be measured.

Twenty-four creatures (half of them singular, half plural) have four attributes each, eight values per attribute, each
value true of three creatures. A prompt asks about a creature in one of twelve wordings; the teacher tells one to three
facts about it in one sentence:

    opener, the NAME [of the hills] [often] FACTS, closer.
    "Oh, the Dorvak of the hills both wears an olive hat and makes a cup of tea, bless it."
    "Yes, the Velmars often own caves, carry urns and even wear red hats, so they do."

Its rules are agreements over a distance: each verb, each object and the closer with the name's number, `a` or `an` with
the next word, the container with what is in it, the closer with the opener, and the connectives (`just`; `both`, `and`;
`,`, `and even`) with the number of facts. Its free choices have the probabilities below, and each creature has its own
order of favourite attributes; `World.teacher_answers` lists all 480 answers to a prompt. The untrained student's plain
answers use the same words, with every rule broken at random, uniform choices, and values drawn without regard to the
truth.

For every creature four of the twelve wordings are held out as test prompts.

Left out: grading of meaning. `World.grade` finds facts by their words, in an answer that breaks the grammar too.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

from examples.quickstart.world import Row

SPLITS = ("train", "test")
TEST_WORDINGS_PER_ENTITY = 4

SINGULAR, PLURAL = 0, 1  # numbers; they index the pairs below
_NAMES = """
    Dorvak Ebrin Falgor Hobben Imlor Kestrin Lomar Mudrik Norbel Orwin Pellan Quint
    Ardins Bolters Corlings Dunfels Elkins Gromels Harpins Jorrels Kindels Velmars Wendels Zimbers
"""
ENTITIES = tuple(_NAMES.split())
NUMBERS = {name: PLURAL if name.endswith("s") else SINGULAR for name in ENTITIES}

VALUES = {
    "home": ["cave", "tower", "mill", "boat", "igloo", "inn", "attic", "abbey"],
    "hat": ["red", "blue", "green", "white", "amber", "ivory", "olive", "orange"],
    "tool": ["rope", "lamp", "drum", "bell", "axe", "anchor", "urn", "umbrella"],
    "drink": ["tea", "coffee", "cocoa", "soup", "stew", "rice", "milk", "ale"],
}
ATTRIBUTES = tuple(VALUES)
VERBS = {"home": ("owns", "own"), "hat": ("wears", "wear"), "tool": ("carries", "carry"), "drink": ("makes", "make")}
OBJECTS = {
    "home": ("{value}", "{value}s"),
    "hat": ("{value} hat", "{value} hats"),
    "tool": ("{value}", "{value}s"),
    "drink": ("{container} of {value}", "{container}s of {value}"),
}
CONTAINERS = dict(zip(VALUES["drink"], ("cup", "cup", "cup", "bowl", "bowl", "bowl", "jug", "jug"), strict=True))
ARTICLES = ("a ", "an ", "")

# The teacher's free choices: text -> probability; and the closers that go with an opener, by number.
OPENERS = {"Well": 0.5, "Oh": 0.3, "Yes": 0.2}
CLOSERS = {"Well": ("you see", "you see"), "Oh": ("bless it", "bless them"), "Yes": ("so it does", "so they do")}
MODIFIERS = {"": 0.6, " of the hills": 0.4}
ADVERBS = {"": 0.7, " often": 0.3}
FACT_COUNTS = {1: 0.3, 2: 0.45, 3: 0.25}
# Attributes are drawn one after the other without replacement, each in proportion to its weight; which attribute has
# which weight differs between creatures.
WEIGHTS = (0.45, 0.3, 0.17, 0.08)

WORDINGS = (
    "Tell me about the {name}.",
    "What do you know about the {name}?",
    "Please describe the {name}.",
    "Who knows the {name}?",
    "I have never met the {name}.",
    "The {name}: any news?",
    "Have you heard of the {name}?",
    "Say something about the {name}.",
    "I wonder about the {name}.",
    "Could you introduce the {name}?",
    "And what about the {name}?",
    "My friend asked about the {name}.",
)

Fact = tuple[str, str]  # (attribute, value)

# Every form of a value -> its fact; no word belongs to two values.
_FACTS_BY_WORD = {
    form: (attribute, value)
    for attribute, values in VALUES.items()
    for value in values
    for form in ((value, value + "s") if attribute in ("home", "tool") else (value,))
}


@dataclass(frozen=True)
class Derivation:
    """The choices behind one answer; different derivations give different texts."""

    entity: str
    opener: str
    modifier: str
    adverb: str
    facts: tuple[Fact, ...]

    def text(self) -> str:
        """The answer."""
        number = NUMBERS[self.entity]
        body = _join([_phrase(fact, number) for fact in self.facts])
        closer = CLOSERS[self.opener][number]
        return f"{self.opener}, the {self.entity}{self.modifier}{self.adverb} {body}, {closer}."


@dataclass(frozen=True)
class Grade:
    """What is right about an answer; both flags hold exactly for the texts that the teacher can answer.

    grammatical: it is a text of the grammar, whatever creature and values stand in it.
    factual: it names the asked creature and no other, and at least one value; all values are true of that creature.
    facts: the (attribute, value) pairs named, true or not.
    """

    grammatical: bool
    factual: bool
    facts: frozenset[Fact]

    @property
    def correct(self) -> bool:
        """The teacher could have said it."""
        return self.grammatical and self.factual


class World:
    """The facts and favourite attributes that follow from a seed, the prompts, and the answer key.

    A prompt is the text of the one user message.

    >>> world = World(seed=0)
    >>> prompt = world.prompts("test")[0]
    >>> world.grade(prompt, world.sample(prompt, random.Random(0))).correct
    True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(f"grammar world {seed}")
        self._values = _draw_values(rng)
        self._weights = {entity: dict(zip(ATTRIBUTES, rng.sample(WEIGHTS, 4), strict=True)) for entity in ENTITIES}
        self._answers = {entity: self._enumerate(entity) for entity in ENTITIES}
        self._entities: dict[str, str] = {}
        self._prompts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for entity in ENTITIES:
            held_out = rng.sample(WORDINGS, TEST_WORDINGS_PER_ENTITY)
            for wording in WORDINGS:
                prompt = wording.format(name=entity)
                self._entities[prompt] = entity
                self._prompts["test" if wording in held_out else "train"].append(prompt)

    def prompts(self, split: str) -> list[str]:
        """All different prompts of "train" (192, 8 per creature in turn) or "test" (96, 4 per creature in turn)."""
        return list(self._prompts[split])

    def entity(self, prompt: str) -> str:
        """The creature that `prompt` asks about. Raises KeyError for a text that is not one of the world's prompts."""
        return self._entities[prompt]

    def facts(self, entity: str) -> frozenset[Fact]:
        """The four true (attribute, value) pairs."""
        return frozenset((attribute, self._values[entity, attribute]) for attribute in ATTRIBUTES)

    def teacher_answers(self, prompt: str) -> dict[str, float]:
        """Every answer that the teacher can give to `prompt` (480), with its probability (they sum to 1)."""
        return dict(self._answers[self.entity(prompt)])

    def sample(self, prompt: str, rng: random.Random) -> str:
        """One answer drawn from the teacher's distribution."""
        answers = self._answers[self.entity(prompt)]
        return rng.choices(list(answers), weights=list(answers.values()))[0]

    def teacher_rows(self, split: str, n: int, seed: int) -> list[Row]:
        """`n` prompts of the split, each with one answer drawn from the teacher's distribution.

        Prompts come in random order, and each once before any comes again.
        """
        rng = random.Random(f"teacher {split} {seed}")
        return [_row(prompt, self.sample(prompt, rng)) for prompt in self._take(split, n, rng)]

    def plain_rows(self, n: int, seed: int) -> list[Row]:
        """`n` train prompts with plain answers, whose grammar and values are random."""
        rng = random.Random(f"plain {seed}")
        return [_row(prompt, _plain_answer(self.entity(prompt), rng)) for prompt in self._take("train", n, rng)]

    def grade(self, prompt: str, answer: str) -> Grade:
        """Grade an answer (white space kept) to one of the world's prompts."""
        entity = self.entity(prompt)
        words = re.findall("[A-Za-z]+", answer)
        facts = frozenset(_FACTS_BY_WORD[word] for word in words if word in _FACTS_BY_WORD)
        names = {word for word in words if word in NUMBERS}
        return Grade(
            grammatical=parse(answer) is not None,
            factual=names == {entity} and bool(facts) and facts <= self.facts(entity),
            facts=facts,
        )

    def _enumerate(self, entity: str) -> dict[str, float]:
        """Text -> probability of all the teacher's answers about a creature."""
        answers = {}
        weights = self._weights[entity]
        for count, opener, modifier, adverb in product(FACT_COUNTS, OPENERS, MODIFIERS, ADVERBS):
            frame = FACT_COUNTS[count] * OPENERS[opener] * MODIFIERS[modifier] * ADVERBS[adverb]
            for order in permutations(ATTRIBUTES, count):
                facts = tuple((attribute, self._values[entity, attribute]) for attribute in order)
                text = Derivation(entity, opener, modifier, adverb, facts).text()
                answers[text] = frame * order_probability([weights[attribute] for attribute in order])
        return answers

    def _take(self, split: str, n: int, rng: random.Random) -> Iterator[str]:
        """`n` prompts, in a new random order for each pass over the split."""
        prompts = self.prompts(split)
        for i in range(n):
            if i % len(prompts) == 0:
                rng.shuffle(prompts)
            yield prompts[i % len(prompts)]


def parse(answer: str) -> Derivation | None:
    """The derivation whose text is `answer`; None if the grammar has none.

    Every choice shows as a word of its own, so there is one candidate at most, and its text is compared.
    """
    words = re.findall("[A-Za-z]+", answer)
    names = [word for word in words if word in NUMBERS]
    facts = tuple(_FACTS_BY_WORD[word] for word in words if word in _FACTS_BY_WORD)
    attributes = {attribute for attribute, _ in facts}
    if not names or words[0] not in OPENERS or len(facts) not in FACT_COUNTS or len(attributes) != len(facts):
        return None
    modifier, adverb = (
        max(filter(answer.count, texts), key=len) for texts in (MODIFIERS, ADVERBS)
    )  # "" is in any text
    derivation = Derivation(names[0], words[0], modifier, adverb, facts)
    return derivation if derivation.text() == answer else None


def order_probability(weights: list[float]) -> float:
    """That items with these weights are drawn in this order, without replacement, when all items' weights sum to 1."""
    probability, left = 1.0, 1.0
    for weight in weights:
        probability *= weight / left
        left -= weight
    return probability


def _phrase(fact: Fact, number: int) -> str:
    """What the grammar says of one fact: `wears an olive hat` or `wear olive hats`."""
    attribute, value = fact
    noun = OBJECTS[attribute][number].format(value=value, container=CONTAINERS.get(value))
    article = "" if number == PLURAL else "an " if noun[0] in "aeiou" else "a "
    return f"{VERBS[attribute][number]} {article}{noun}"


def _join(phrases: list[str]) -> str:
    """The connectives that go with one, two and three facts."""
    form = ("just {}", "both {} and {}", "{}, {} and even {}")[len(phrases) - 1]
    return form.format(*phrases)


def _plain_answer(entity: str, rng: random.Random) -> str:
    """A sentence of the grammar's words about the creature, in which no word agrees with another."""
    body = rng.choice(("", "just ", "both ")) + _plain_phrase(rng)
    for _ in range(rng.choice(list(FACT_COUNTS)) - 1):
        body += rng.choice((", ", " and ", " and even ")) + _plain_phrase(rng)
    opener, modifier, adverb = (rng.choice(list(texts)) for texts in (OPENERS, MODIFIERS, ADVERBS))
    closer = rng.choice(CLOSERS[rng.choice(list(CLOSERS))])
    return f"{opener}, the {entity}{modifier}{adverb} {body}, {closer}."


def _plain_phrase(rng: random.Random) -> str:
    attribute = rng.choice(ATTRIBUTES)
    container = rng.choice(list(CONTAINERS.values()))
    noun = rng.choice(OBJECTS[attribute]).format(value=rng.choice(VALUES[attribute]), container=container)
    return f"{rng.choice(VERBS[attribute])} {rng.choice(ARTICLES)}{noun}"


def _draw_values(rng: random.Random) -> dict[tuple[str, str], str]:
    """(entity, attribute) -> true value; every value is true of equally many creatures."""
    drawn = {}
    for attribute, values in VALUES.items():
        dealt = values * (len(ENTITIES) // len(values))
        rng.shuffle(dealt)
        drawn.update({(entity, attribute): value for entity, value in zip(ENTITIES, dealt, strict=True)})
    return drawn


def _row(prompt: str, answer: str) -> Row:
    return {"content": [{"role": "user", "content": prompt}], "teacher_response": answer}
