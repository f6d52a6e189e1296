"""The grammar world, its answer key, its measures and its tiny base, against cases worked out by hand."""

import math
import random
import re
from collections import Counter, defaultdict
from itertools import permutations

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from examples.grammar_world.build import build, world_texts
from examples.grammar_world.measures import (
    expected_coverage,
    js_divergence,
    kl_divergence,
    measure,
    sample_answers,
    sequence_log_probs,
)
from examples.grammar_world.world import ATTRIBUTES, ENTITIES, VALUES, Derivation, World, parse
from examples.quickstart.tiny_model import build_model, build_tokenizer, encode_row

ONE, MANY = "Tell me about the Dorvak.", "Who knows the Velmars?"
LONGEST_PROMPT, LONGEST_ANSWER = 16, 29  # tokens, the answer's with EOS


@pytest.fixture(scope="module")
def world():
    """A world in which the facts about the Dorvak and the Velmars, and what the Dorvak are known for, are these."""
    world = World(seed=3)
    facts = {"Dorvak": ("cave", "olive", "urn", "tea"), "Velmars": ("igloo", "red", "axe", "ale")}
    for entity, values in facts.items():
        world._values.update({(entity, attribute): value for attribute, value in zip(ATTRIBUTES, values, strict=True)})
        world._weights[entity] = {"home": 0.45, "hat": 0.3, "tool": 0.17, "drink": 0.08}
        world._answers[entity] = world._enumerate(entity)
    return world


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world_texts(world))


def prompt_of(row):
    return row["content"][0]["content"]


def graded(world, rows):
    return [world.grade(prompt_of(row), row["teacher_response"]) for row in rows]


# --- the world -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "probability"),
    [
        # count * opener * modifier * adverb * order
        (ONE, "Well, the Dorvak just owns a cave, you see.", 0.3 * 0.5 * 0.6 * 0.7 * 0.45),
        (
            ONE,
            "Oh, the Dorvak of the hills both wears an olive hat and makes a cup of tea, bless it.",
            0.45 * 0.3 * 0.4 * 0.7 * 0.3 * 0.08 / 0.7,
        ),
        (
            ONE,
            "Yes, the Dorvak often owns a cave, carries an urn and even makes a cup of tea, so it does.",
            0.25 * 0.2 * 0.6 * 0.3 * 0.45 * 0.17 / 0.55 * 0.08 / 0.38,
        ),
        (MANY, "Oh, the Velmars just make jugs of ale, bless them.", 0.3 * 0.3 * 0.6 * 0.7 * 0.08),
        (
            MANY,
            "Yes, the Velmars of the hills often carry axes, own igloos and even wear red hats, so they do.",
            0.25 * 0.2 * 0.4 * 0.3 * 0.17 * 0.45 / 0.83 * 0.3 / 0.38,
        ),
    ],
)
def test_teacher_probabilities_by_hand(world, prompt, answer, probability):
    assert world.teacher_answers(prompt)[answer] == pytest.approx(probability)


def test_teacher_answers_are_all_there_and_different(world):
    for prompt in world.prompts("test"):
        answers = world.teacher_answers(prompt)
        assert len(answers) == 3 * 2 * 2 * (4 + 4 * 3 + 4 * 3 * 2)  # frames, ordered choices of 1, 2, 3 attributes
        assert math.fsum(answers.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "grammatical", "factual"),
    [
        ("Well, the Dorvak just owns a cave, you see.", True, True),
        ("Well, the Dorvak just owns a mill, you see.", True, False),
        ("Well, the Ebrin just owns a cave, you see.", True, False),  # another creature
        ("Well, the Velmars just own caves, you see.", True, False),
        ("Well, the Dorvak both owns a cave and carries a bell, you see.", True, False),  # one of two is wrong
        ("Well, the Dorvak just own a cave, you see.", False, True),  # verb
        ("Well, the Dorvak just owns caves, you see.", False, True),  # object
        ("Well, the Dorvak just owns an cave, you see.", False, True),  # article
        ("Well, the Dorvak just wears a olive hat, you see.", False, True),
        ("Well, the Dorvak just makes a bowl of tea, you see.", False, True),  # container
        ("Well, the Dorvak just owns a cave, bless it.", False, True),  # the closer of another opener
        ("Oh, the Dorvak just owns a cave, bless them.", False, True),  # the closer of another number
        ("Well, the Dorvak owns a cave, you see.", False, True),  # no connective
        ("Well, the Dorvak both owns a cave, you see.", False, True),
        ("Well, the Dorvak just owns a cave and carries an urn, you see.", False, True),
        ("Well, the Dorvak owns a cave, carries an urn and makes a cup of tea, you see.", False, True),
        ("Well, the Dorvak both owns a cave and owns a cave, you see.", False, True),  # an attribute twice
        ("Well, the Dorvak often of the hills just owns a cave, you see.", False, True),
        ("Well, the Dorvak just owns a cave, you see. ", False, True),
        ("Well, the Dorvak just owns a cave, you see.<|im_start|>", False, True),
        ("Well, the Dorvak and the Ebrin just own caves, you see.", False, False),
        ("Well, the Dorvak just owns a, you see.", False, False),  # no fact
        ("the Dorvak", False, False),
        ("", False, False),
    ],
)
def test_grade_by_hand(world, answer, grammatical, factual):
    grade = world.grade(ONE, answer)
    assert (grade.grammatical, grade.factual) == (grammatical, factual)
    assert grade.correct == (answer in world.teacher_answers(ONE))


def test_grade_lists_the_facts(world):
    answer = "Oh, the Velmars both carry axes and make jug of milk, bless it."
    assert world.grade(MANY, answer).facts == {("tool", "axe"), ("drink", "milk")}


def test_parse_gives_the_choices_back():
    answer = "Oh, the Dorvak of the hills both wears an olive hat and makes a cup of tea, bless it."
    facts = (("hat", "olive"), ("drink", "tea"))
    assert parse(answer) == Derivation("Dorvak", "Oh", " of the hills", "", facts)


def test_grammatical_and_factual_exactly_for_what_the_teacher_can_answer(world):
    """Each answer of the teacher, whole, and with a word dropped, doubled or exchanged."""
    rng = random.Random(0)
    for answer in world.teacher_answers(ONE):
        words = answer.split()
        i, j = rng.sample(range(len(words)), 2)
        swapped = [words[j] if k == i else words[i] if k == j else word for k, word in enumerate(words)]
        for variant in (words, words[:i] + words[i + 1 :], words[: i + 1] + words[i:], swapped):
            text = " ".join(variant)
            assert world.grade(ONE, text).correct == (text in world.teacher_answers(ONE))


def test_teacher_rows_follow_the_stated_distribution(world):
    rows = world.teacher_rows("train", 50 * 192, seed=1)
    assert Counter(map(prompt_of, rows)) == dict.fromkeys(world.prompts("train"), 50)
    assert all(grade.correct for grade in graded(world, rows))
    answers = [row["teacher_response"] for row in rows if world.entity(prompt_of(row)) == "Dorvak"]
    assert len(answers) == 400
    assert sum(answer.startswith("Well") for answer in answers) / 400 == pytest.approx(0.5, abs=0.1)  # 4 deviations
    assert sum(" just " in answer for answer in answers) / 400 == pytest.approx(0.3, abs=0.092)


def test_plain_rows_know_words_but_no_rules_and_no_facts(world):
    rows = world.plain_rows(3000, seed=1)
    grades = graded(world, rows)
    assert sum(grade.grammatical for grade in grades) < 0.01 * 3000
    assert sum(grade.correct for grade in grades) < 0.002 * 3000
    words = {word for row in rows for word in re.findall("[A-Za-z]+", row["teacher_response"])}
    teachers = {
        w for row in world.teacher_rows("train", 3000, 1) for w in re.findall("[A-Za-z]+", row["teacher_response"])
    }
    assert teachers - words == set()
    assert not {prompt_of(row) for row in rows} & set(world.prompts("test"))
    assert all(world.entity(prompt_of(row)) in row["teacher_response"] for row in rows)


def test_test_prompts_are_other_wordings_of_creatures_seen_in_training(world):
    counts = {split: Counter(map(world.entity, world.prompts(split))) for split in ("train", "test")}
    assert counts == {"train": dict.fromkeys(ENTITIES, 8), "test": dict.fromkeys(ENTITIES, 4)}
    assert not set(world.prompts("train")) & set(world.prompts("test"))


def test_world_follows_from_its_seed_and_guessing_is_one_in_eight():
    assert World(5).teacher_rows("train", 50, 7) == World(5).teacher_rows("train", 50, 7)
    assert World(5).teacher_rows("train", 50, 7) != World(5).teacher_rows("train", 50, 8)
    assert World(5)._values != World(6)._values
    assert World(5)._weights != World(6)._weights
    assert World(5).prompts("test") != World(6).prompts("test")
    counts = Counter((attribute, value) for (_, attribute), value in World(5)._values.items())
    assert counts == {(attribute, value): 3 for attribute in ATTRIBUTES for value in VALUES[attribute]}


# --- the measures ----------------------------------------------------------------------------------------------------


def log(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_expected_coverage_by_hand():
    assert expected_coverage(torch.tensor([0.5, 0.5]), samples=2) == pytest.approx(0.75)  # one half, or all
    assert expected_coverage(torch.tensor([0.75, 0.25]), samples=1) == pytest.approx(0.625)  # 9/16 + 1/16


def test_kl_by_hand():
    assert kl_divergence(log(0.5, 0.5), log(0.25, 0.75)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(log(0.5, 0.5), log(1, 0)) == math.inf


@pytest.mark.parametrize(
    ("p", "q", "drawn", "js"),
    [
        # m = (3/4, 1/4): half of 1/2 ln 2/3 + 1/2 ln 2, and half of ln 4/3
        ([0.5, 0.5], [1, 0], [0], 0.25 * math.log(2 / 3) + 0.25 * math.log(2) + 0.5 * math.log(4 / 3)),
        # m = (1/2, 1/2); the draws are as frequent as q says, so both halves are half of 3/4 ln 3/2 + 1/4 ln 1/2
        ([0.75, 0.25], [0.25, 0.75], [0, 1, 1, 1], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([1, 0], [0, 1], [1], math.log(2)),
        ([0.25, 0.75], [0.25, 0.75], [0, 0, 1], 0),
    ],
)
def test_js_by_hand(p, q, drawn, js):
    outcomes = [i for i, probability in enumerate(p) if probability > 0]
    log_p, log_q = log(*p), log(*q)
    assert js_divergence(log_p[outcomes], log_q[outcomes], log_p[drawn], log_q[drawn]) == pytest.approx(js, abs=1e-12)


class Tabular(PreTrainedModel, GenerationMixin):
    """A language model that answers one prompt with known texts and probabilities: token by token, along a trie."""

    config_class = PretrainedConfig

    def __init__(self, tokenizer, prompt, answers):
        super().__init__(PretrainedConfig(vocab_size=len(tokenizer), num_hidden_layers=1))
        self.anchor = torch.nn.Parameter(torch.zeros(()))  # tells the device
        self.next_state = {}
        masses = [defaultdict(float)]
        prompt_ids, _ = encode_row(tokenizer, row_of(prompt, ""))
        for text, probability in answers.items():
            state = 0
            for token in [*prompt_ids, *encode_row(tokenizer, row_of(prompt, text))[1]]:
                masses[state][token] += probability
                state = self.next_state.setdefault((state, token), len(masses))
                if state == len(masses):
                    masses.append(defaultdict(float))
        self.table = torch.full((len(masses), len(tokenizer)), -math.inf)
        for state, mass in enumerate(masses):
            for token, probability in mass.items():
                self.table[state, token] = math.log(probability)
        self.table[[not mass for mass in masses]] = 0.0  # after EOS, and off the table: anything

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}  # all tokens each time: it has no cache

    def forward(self, input_ids, attention_mask=None, **kwargs):
        # Some versions of transformers pass no mask where nothing is padded.
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = torch.zeros_like(input_ids)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            state = 0
            for column, (token, real) in enumerate(zip(ids, mask, strict=True)):
                if real:
                    state = self.next_state.get((state, token), len(self.table) - 1)
                states[row, column] = state
        return CausalLMOutput(logits=self.table[states])


def row_of(prompt, answer):
    return {"content": [{"role": "user", "content": prompt}], "teacher_response": answer}


def with_openers(world, shares):
    """The teacher's answers to ONE, with other shares of the openers Well, Oh and Yes."""
    factors = {"Well": shares[0] / 0.5, "Oh": shares[1] / 0.3, "Yes": shares[2] / 0.2}
    answers = world.teacher_answers(ONE)
    return {text: p * factors[text.split(",")[0]] for text, p in answers.items() if factors[text.split(",")[0]] > 0}


def test_the_teacher_itself_is_at_no_distance(world, tokenizer):
    answers = world.teacher_answers(ONE)
    measures = measure(Tabular(tokenizer, ONE, answers), tokenizer, world, [ONE], samples=256)
    assert measures.grammatical == measures.factual == measures.correct == measures.ended == 1
    assert measures.forward_kl == pytest.approx(0, abs=1e-5)
    assert measures.js == pytest.approx(0, abs=1e-5)
    assert measures.answer_coverage == pytest.approx(1, abs=0.1)
    assert measures.fact_set_coverage == pytest.approx(1, abs=0.02)  # 256 samples hold nearly all 14 sets
    lengths = {text: len(re.findall(r"\w+|[,.]", text)) + 1 for text in answers}  # a word, a mark, EOS: a token each
    assert measures.teacher_length == pytest.approx(sum(p * lengths[text] for text, p in answers.items()))
    assert measures.length == pytest.approx(measures.teacher_length, abs=0.8)  # standard deviation of the mean 0.2


def test_a_student_with_one_opener_is_at_the_distance_that_the_openers_are(world, tokenizer):
    """All else is the teacher's: q = 2p for all it can answer, and m = (3/4, 1/4) as above."""
    student = Tabular(tokenizer, ONE, with_openers(world, (1, 0, 0)))
    measures = measure(student, tokenizer, world, [ONE], samples=64)
    assert measures.correct == 1
    assert measures.js == pytest.approx(0.215762, abs=1e-5)
    assert measures.forward_kl == math.inf


def test_a_student_with_other_shares_of_openers(world, tokenizer):
    student = Tabular(tokenizer, ONE, with_openers(world, (0.2, 0.3, 0.5)))
    measures = measure(student, tokenizer, world, [ONE], samples=400)
    assert measures.forward_kl == pytest.approx(0.3 * math.log(2.5), abs=1e-5)  # 1/2 ln 5/2 + 1/5 ln 2/5
    # Over m = (0.35, 0.3, 0.35): 0.5 ln 10/7 + 0.2 ln 4/7. The draws' half of it has a standard deviation of 0.01.
    assert measures.js == pytest.approx(0.066414, abs=0.04)
    drawn = sampled(student, tokenizer, 400, max_new_tokens=1)
    assert sum(sample.text == "Yes" for sample in drawn) / 400 == pytest.approx(0.5, abs=0.1)  # 4 standard deviations


def test_a_student_with_one_answer_covers_that_answer_alone(world, tokenizer):
    answer = "Well, the Dorvak just owns a cave, you see."  # 12 tokens and EOS
    student = Tabular(tokenizer, ONE, {answer: 1.0})
    measures = measure(student, tokenizer, world, [ONE], samples=4)
    p = torch.tensor(list(world.teacher_answers(ONE).values()), dtype=torch.float64)
    assert (measures.correct, measures.length) == (1, 13)
    assert measures.answer_coverage == pytest.approx(0.02835 / sum(x * (1 - (1 - x) ** 4) for x in p.tolist()))
    sets = defaultdict(float)
    for a, b, c, _ in permutations([0.45, 0.3, 0.17, 0.08]):  # each order of four stands for its beginnings
        order = a * b / (1 - a) * c / (1 - a - b)
        for count, share in ((1, 0.3), (2, 0.45), (3, 0.25)):
            sets[frozenset((a, b, c)[:count])] += share * order
    assert (len(sets), sum(sets.values())) == (14, pytest.approx(1))
    expected = sum(x * (1 - (1 - x) ** 4) for x in sets.values())
    assert measures.fact_set_coverage == pytest.approx(0.3 * 0.45 / expected)

    cut = measure(student, tokenizer, world, [ONE], samples=4, max_new_tokens=12)  # the whole text, but no EOS
    assert (cut.ended, cut.grammatical, cut.correct, cut.factual, cut.length) == (0, 0, 0, 1, 12)
    assert cut.answer_coverage == cut.fact_set_coverage == 0


def sampled(model, tokenizer, samples, seed=0, max_new_tokens=32, batch_size=512):
    return sample_answers(
        model, tokenizer, [ONE], samples, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )[0]


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, hidden_size=32, num_layers=1, intermediate_size=32).eval()


def test_samples_follow_from_their_seed_and_from_nothing_else(model, tokenizer):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    samples = sampled(model, tokenizer, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sampled(model, tokenizer, 3) == samples
    assert sampled(model, tokenizer, 3, seed=1) != samples


def test_samples_come_from_the_whole_vocabulary(model, tokenizer):
    """A model that knows nothing: sampling with transformers' usual top_k would give at most 50 different tokens."""
    model.generation_config.top_k = 50
    samples = sampled(model, tokenizer, 600, max_new_tokens=1)
    assert len({tuple(sample.ids) for sample in samples}) > 150


def test_padding_of_prompts_changes_no_answer(tokenizer):
    """A model whose best token is nearly certain answers alike in one batch and in two, and the prompt matters."""
    peaked = build_model(tokenizer, hidden_size=32, num_layers=1, intermediate_size=32)
    peaked.lm_head.weight = torch.nn.Parameter(1000 * torch.randn(len(tokenizer), 32))
    for weight in peaked.model.parameters():
        torch.nn.init.normal_(weight)
    prompts = ["Who knows the Ebrin?", "What do you know about the Velmars?"]
    lengths = [len(encode_row(tokenizer, row_of(prompt, ""))[0]) for prompt in prompts]
    assert lengths[0] < lengths[1]
    together = sample_answers(peaked, tokenizer, prompts, 1, max_new_tokens=8, batch_size=2, seed=0)
    apart = sample_answers(peaked, tokenizer, prompts, 1, max_new_tokens=8, batch_size=1, seed=0)
    assert together == apart
    assert together[0] != together[1]


def test_log_probs_of_a_batch_are_those_of_single_sequences(world, model, tokenizer):
    pairs = [encode_row(tokenizer, row) for row in world.teacher_rows("test", 7, seed=0)]
    expected = []
    for prompt, answer in pairs:
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected.append(sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    assert sequence_log_probs(model, pairs, batch_size=3).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_model_that_knows_nothing_is_as_far_away_as_can_be(world, model, tokenizer):
    prompts = world.prompts("test")[::24]
    measures = measure(model, tokenizer, world, prompts, samples=4, divergence_prompts=2)
    assert measures.grammatical == measures.correct == measures.answer_coverage == measures.fact_set_coverage == 0
    assert measures.js == pytest.approx(math.log(2), abs=1e-4)
    assert measures.forward_kl > 50  # some 19 tokens of ln 631 each, less the teacher's entropy


# --- the base and the data -------------------------------------------------------------------------------------------


def test_a_word_is_a_token_and_lengths_are_as_stated(world, tokenizer):
    prompts = world.prompts("train") + world.prompts("test")
    texts = [text for prompt in world.prompts("test") for text in world.teacher_answers(prompt)]
    words = {word for text in prompts + texts for word in re.findall(" [A-Za-z]+", text)} | {"Well", "Oh", "Yes"}
    assert [word for word in words if len(tokenizer(word)["input_ids"]) != 1] == []
    assert max(len(encode_row(tokenizer, row_of(prompt, ""))[0]) for prompt in prompts) == LONGEST_PROMPT
    assert max(map(len, tokenizer(texts)["input_ids"])) + 1 == LONGEST_ANSWER


def test_build_writes_a_base_that_loads_and_the_data(tmp_path):
    world = build(tmp_path, seed=1, train_rows=200, pretrain_steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 200_000
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")  # a Qwen2Tokenizer, beside a Qwen2 config
    fresh = build_tokenizer(world_texts(world))
    texts = list(world.teacher_answers(world.prompts("test")[0]))
    assert tokenizer(texts)["input_ids"] == fresh(texts)["input_ids"]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (model.config.eos_token_id, fresh.chat_template)

    for split, rows in (("train", 200), ("test", 96)):
        frame = pd.read_parquet(tmp_path / f"{split}.parquet")
        assert list(frame.columns) == ["content", "teacher_response"]
        prompts = [content[0]["content"] for content in frame["content"]]
        assert len(prompts) == rows
        assert set(prompts) == set(world.prompts(split))
        assert all(map(world.grade, prompts, frame["teacher_response"]))
