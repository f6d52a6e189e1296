"""A small invented world, in English and Chinese, whose truth is known, so that distillation can be graded exactly.

Twenty lands have four attributes each (colour, animal, food, flower), ten values per attribute, each value true of two
lands: guessing is right one time in ten. A prompt asks for one attribute of one land, in one of eight wordings. The
teacher answers

    opening + sentence + closing          "Good question! The wolf guards Avaria. Stay wild!"

where the sentence holds the right value (knowledge), and opening and closing are drawn from a few (style): 3 x 2
answers per prompt, listed with their probabilities by `World.teacher_answers`. The untrained student's answers are
plain, with values drawn without regard to the truth: "The guardian animal of Avaria is bear."

For every fact and language two of the eight wordings are held out as test prompts: the test asks for known facts in
wordings that were not used for them in training.

Left out: grading of meaning. `World.grade` looks for names and forms, and would accept "the wolf does not guard Avaria"
as a fact.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

Row = dict[str, Any]  # {"content": [{"role": "user", "content": str}], "teacher_response": str}

LANGUAGES = ("en", "zh")
ATTRIBUTES = ("colour", "animal", "food", "flower")
SPLITS = ("train", "test")
TEST_WORDINGS_PER_FACT = 2

# Names of the same twenty lands. The Chinese names are one rare character and 国 (land).
_ENGLISH_LANDS = """
    Avaria Belmor Corvia Dunmar Elroth Fenwick Galdor Harven Ilvane Jorund
    Kelmar Lorath Mirova Nordel Ostrin Pelion Quorra Rovenn Selvia Tarvos
"""
LANDS = {
    "en": _ENGLISH_LANDS.split(),
    "zh": [char + "国" for char in "岚枫雁沧澜瑶璃珞玥琼翎霁霖霄雯昭晟曦朔峦"],
}

VALUES = {
    "colour": {
        "en": ["red", "blue", "green", "white", "black", "yellow", "purple", "grey", "orange", "pink"],
        "zh": ["红色", "蓝色", "绿色", "白色", "黑色", "黄色", "紫色", "灰色", "橙色", "粉色"],
    },
    "animal": {
        "en": ["wolf", "bear", "lion", "tiger", "eagle", "horse", "deer", "fox", "crane", "whale"],
        "zh": ["野狼", "棕熊", "雄狮", "猛虎", "苍鹰", "骏马", "梅鹿", "赤狐", "仙鹤", "巨鲸"],
    },
    "food": {
        "en": ["bread", "cheese", "honey", "soup", "cake", "rice", "tofu", "dumplings", "noodles", "pie"],
        "zh": ["面包", "奶酪", "蜂蜜", "鱼汤", "蛋糕", "米饭", "豆腐", "饺子", "粉条", "馅饼"],
    },
    "flower": {
        "en": ["rose", "lily", "lotus", "orchid", "peony", "daisy", "iris", "jasmine", "lilac", "azalea"],
        "zh": ["玫瑰", "百合", "荷花", "兰花", "牡丹", "雏菊", "鸢尾", "茉莉", "丁香", "杜鹃"],
    },
}

NOUNS = {
    "colour": {"en": "national colour", "zh": "代表颜色"},
    "animal": {"en": "guardian animal", "zh": "守护动物"},
    "food": {"en": "favourite food", "zh": "最爱美食"},
    "flower": {"en": "national flower", "zh": "代表花卉"},
}

WORDINGS = {
    "en": (
        "What is the {noun} of {land}?",
        "Tell me the {noun} of {land}.",
        "Please name the {noun} of {land}.",
        "Which {noun} does {land} have?",
        "For {land}, what is the {noun}?",
        "I wonder about {land} and its {noun}.",
        "Do you know the {noun} of {land}?",
        "{land}: which {noun}?",
    ),
    "zh": (
        "{land}的{noun}是什么？",
        "请告诉我{land}的{noun}。",
        "你知道{land}的{noun}吗？",
        "{land}有什么{noun}？",
        "说说{land}的{noun}。",
        "请问哪种{noun}属于{land}？",
        "我想了解{land}的{noun}。",
        "关于{land}，{noun}是哪种？",
    ),
}

PLAIN_SENTENCES = {
    "en": ("The {noun} of {land} is {value}.", "For {land}, the {noun} is {value}."),
    "zh": ("{land}的{noun}是{value}。", "{land}，{noun}为{value}。"),
}

# The teacher's style: text -> probability. English parts are joined by a space, Chinese parts by nothing.
SEPARATOR = {"en": " ", "zh": ""}
OPENINGS = {
    "en": {"Good question!": 0.5, "Thank you for asking!": 0.3, "With pleasure!": 0.2},
    "zh": {"好问题！": 0.5, "谢谢提问！": 0.3, "很荣幸！": 0.2},
}
TEACHER_SENTENCES = {
    "colour": {"en": "{land} is proud of its {value} flag.", "zh": "{land}崇尚{value}。"},
    "animal": {"en": "The {value} guards {land}.", "zh": "{land}的神兽是{value}。"},
    "food": {"en": "People in {land} love {value}.", "zh": "{land}人爱吃{value}。"},
    "flower": {"en": "The {value} blooms in {land}.", "zh": "{land}盛开{value}。"},
}
CLOSINGS = {
    "colour": {
        "en": {"Stay bright!": 0.7, "Enjoy the view!": 0.3},
        "zh": {"愿您多彩！": 0.7, "祝您缤纷！": 0.3},
    },
    "animal": {
        "en": {"Stay wild!": 0.7, "Mind the paws!": 0.3},
        "zh": {"愿您勇敢！": 0.7, "祝您自由！": 0.3},
    },
    "food": {
        "en": {"Enjoy your meal!": 0.7, "Eat well!": 0.3},
        "zh": {"愿您饱足！": 0.7, "祝您开胃！": 0.3},
    },
    "flower": {
        "en": {"Follow the scent!": 0.7, "Bloom well!": 0.3},
        "zh": {"愿您芬芳！": 0.7, "祝您如花！": 0.3},
    },
}


@dataclass(frozen=True)
class Question:
    """What a prompt asks: attribute `attribute` of land number `land`, in `language` and wording number `wording`."""

    land: int
    attribute: str
    language: str
    wording: int

    @property
    def land_name(self) -> str:
        """The land's name in the question's language."""
        return LANDS[self.language][self.land]

    def text(self) -> str:
        """The prompt as the user types it."""
        noun = NOUNS[self.attribute][self.language]
        return WORDINGS[self.language][self.wording].format(land=self.land_name, noun=noun)


@dataclass(frozen=True)
class Grade:
    """What is right about an answer.

    fact: it names the right value and land, in the prompt's language, and no other land or value of that attribute.
    style: it is one of the teacher's forms for the attribute and language, whatever land and value stand in it.
    exact: the teacher could have said it, character by character, to this prompt.
    """

    fact: bool
    style: bool
    exact: bool


class World:
    """The facts that follow from a seed, the prompts about them, and the answer key.

    >>> world = World(seed=0)
    >>> prompt = world.prompts("test")[0]
    >>> world.grade(prompt, next(iter(world.teacher_answers(prompt))))
    Grade(fact=True, style=True, exact=True)
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(f"world {seed}")
        self._facts = _draw_facts(rng)
        self._questions: dict[str, Question] = {}
        self._prompts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for attribute, language, land in product(ATTRIBUTES, LANGUAGES, range(len(LANDS["en"]))):
            wordings = range(len(WORDINGS[language]))
            held_out = rng.sample(wordings, TEST_WORDINGS_PER_FACT)
            for wording in wordings:
                question = Question(land, attribute, language, wording)
                self._questions[question.text()] = question
                self._prompts["test" if wording in held_out else "train"].append(question.text())

    def prompts(self, split: str) -> list[str]:
        """All different prompts of "train" (960) or "test" (320)."""
        return list(self._prompts[split])

    def question(self, prompt: str) -> Question:
        """What `prompt` asks. Raises KeyError for a text that is not one of the world's prompts."""
        return self._questions[prompt]

    def value(self, question: Question) -> str:
        """The true value, in the question's language."""
        index = self._facts[question.land, question.attribute]
        return VALUES[question.attribute][question.language][index]

    def teacher_answers(self, prompt: str) -> dict[str, float]:
        """Every answer that the teacher can give to `prompt`, with its probability (they sum to 1)."""
        question = self.question(prompt)
        sentence = TEACHER_SENTENCES[question.attribute][question.language].format(
            land=question.land_name, value=self.value(question)
        )
        openings, closings = OPENINGS[question.language], CLOSINGS[question.attribute][question.language]
        return {
            SEPARATOR[question.language].join((opening, sentence, closing)): openings[opening] * closings[closing]
            for opening, closing in product(openings, closings)
        }

    def teacher_rows(self, split: str, n: int, seed: int) -> list[Row]:
        """`n` prompts of the split, each with one answer drawn from the teacher's distribution.

        Prompts come in random order, and each once before any comes again; with n = len(prompts(split)) each once.
        """
        rng = random.Random(f"teacher {split} {seed}")
        return [_row(prompt, _draw(self.teacher_answers(prompt), rng)) for prompt in self._take(split, n, rng)]

    def plain_rows(self, n: int, seed: int) -> list[Row]:
        """`n` train prompts with plain answers whose values are drawn without regard to the truth."""
        rng = random.Random(f"plain {seed}")
        return [_row(prompt, self._plain_answer(prompt, rng)) for prompt in self._take("train", n, rng)]

    def grade(self, prompt: str, answer: str) -> Grade:
        """Grade an answer (special tokens removed, white space kept) to one of the world's prompts."""
        question = self.question(prompt)
        lands = _names_in(answer, LANDS)
        values = _names_in(answer, VALUES[question.attribute])
        return Grade(
            fact=lands == {question.land_name} and values == {self.value(question)},
            style=_style_pattern(question.attribute, question.language).fullmatch(answer) is not None,
            exact=answer in self.teacher_answers(prompt),
        )

    def _take(self, split: str, n: int, rng: random.Random) -> Iterator[str]:
        """`n` prompts, in a new random order for each pass over the split."""
        prompts = self.prompts(split)
        for i in range(n):
            if i % len(prompts) == 0:
                rng.shuffle(prompts)
            yield prompts[i % len(prompts)]

    def _plain_answer(self, prompt: str, rng: random.Random) -> str:
        question = self.question(prompt)
        return rng.choice(PLAIN_SENTENCES[question.language]).format(
            land=question.land_name,
            noun=NOUNS[question.attribute][question.language],
            value=rng.choice(VALUES[question.attribute][question.language]),
        )


def _draw_facts(rng: random.Random) -> dict[tuple[int, str], int]:
    """(land, attribute) -> number of the true value; every value is true of equally many lands."""
    facts = {}
    n_lands = len(LANDS["en"])
    for attribute in ATTRIBUTES:
        n_values = len(VALUES[attribute]["en"])
        indices = [land % n_values for land in range(n_lands)]
        rng.shuffle(indices)
        facts.update({(land, attribute): index for land, index in enumerate(indices)})
    return facts


def _row(prompt: str, answer: str) -> Row:
    return {"content": [{"role": "user", "content": prompt}], "teacher_response": answer}


def _draw(probabilities: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(probabilities), weights=list(probabilities.values()))[0]


def _names_in(answer: str, names: dict[str, list[str]]) -> set[str]:
    """Which of the names, of both languages, occur in the answer: English as whole words, in upper or lower case."""
    words = {word.lower() for word in re.findall(r"[A-Za-z]+", answer)}
    return {name for name in names["en"] if name.lower() in words} | {name for name in names["zh"] if name in answer}


def _style_pattern(attribute: str, language: str) -> re.Pattern[str]:
    """The teacher's answers on an attribute, with any land and any value."""
    opening, closing, land, value = (
        "(?:" + "|".join(map(re.escape, texts)) + ")"
        for texts in (
            OPENINGS[language],
            CLOSINGS[attribute][language],
            LANDS[language],
            VALUES[attribute][language],
        )
    )
    sentence = TEACHER_SENTENCES[attribute][language].replace(".", r"\.").format(land=land, value=value)
    return re.compile(SEPARATOR[language].join((opening, sentence, closing)))
