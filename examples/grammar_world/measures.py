"""How near a student's distribution of answers is to the teacher's, which is known exactly.

`measure` samples answers to test prompts, grades them, and compares distributions. An outcome is a sequence of answer
tokens with its EOS. A text may have several tokenizations: the teacher's whole probability is put on the canonical one
(what the tokenizer makes of the text), and a student's sample counts with the tokens that it drew. The divergences are
thus exact between distributions of sequences, and an upper bound of those between texts; a student trained on canonical
tokens hardly draws others, and the grades and coverages look at the text alone.

Shapes: B prompts, S samples per prompt, K answers of the teacher, N sequences, T tokens.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from examples.grammar_world.world import World
from examples.quickstart.tiny_model import IGNORE, collate, encode_row

Pair = tuple[list[int], list[int]]  # token ids of a prompt, and of an answer that ends with EOS


@dataclass(frozen=True)
class Measures:
    """A student's means over prompts; shares lie in 0..1, lengths are in tokens with EOS, divergences in nats.

    grammatical, factual, correct: share of the samples; correct is both, which is what the teacher can answer. A sample
        without EOS is not grammatical.
    ended: share of the samples that ended with EOS within `max_new_tokens`.
    length, teacher_length: mean of the samples, and the teacher's exact expectation.
    answer_coverage, fact_set_coverage: the teacher's probability of the different answers (of the sets of facts in
        correct answers) among the S samples, divided by what S samples of the teacher's own would have on average.
    forward_kl: KL(teacher || student), exact for the prompts looked at.
    js: Jensen-Shannon divergence, 0..ln 2; its teacher half is exact, its student half a mean over the S samples.
    """

    grammatical: float
    factual: float
    correct: float
    ended: float
    length: float
    teacher_length: float
    answer_coverage: float
    fact_set_coverage: float
    forward_kl: float
    js: float


@dataclass(frozen=True)
class Sample:
    """One answer that the student drew: its token ids with EOS if it `ended`, and its text without."""

    ids: list[int]
    text: str
    ended: bool


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    prompts: list[str],
    *,
    samples: int = 16,
    divergence_prompts: int = 24,
    max_new_tokens: int = 32,
    batch_size: int = 512,
    seed: int = 0,
) -> Measures:
    """All measures of a student (in eval mode) at temperature 1, on `prompts` of the world.

    The divergences look at `divergence_prompts` of them, spread evenly. `max_new_tokens` must hold every teacher answer
    with its EOS. The seed fixes the samples; torch's global generator is left as it was.
    """
    drawn = sample_answers(
        model, tokenizer, prompts, samples, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )
    picked = range(0, len(prompts), max(1, len(prompts) // divergence_prompts))[:divergence_prompts]
    divergences = [
        _divergences(model, tokenizer, world.teacher_answers(prompts[i]), prompts[i], drawn[i], batch_size)
        for i in picked
    ]
    return Measures(
        **_grades(world, prompts, drawn),
        **_lengths(tokenizer, world, prompts, drawn),
        **_coverages(world, prompts, drawn),
        forward_kl=_mean([kl for kl, _ in divergences]),
        js=_mean([js for _, js in divergences]),
    )


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    samples: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[list[Sample]]:
    """`samples` answers to each of the B prompts at temperature 1, at most `batch_size` at a time."""
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = [ids for prompt in prompts for ids in [_prompt_ids(tokenizer, prompt)] * samples]
    drawn: list[Sample] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = {name: t.to(model.device) for name, t in _pad_left(rows[start : start + batch_size]).items()}
            output = model.generate(**batch, generation_config=config)
            responses = output[:, batch["input_ids"].shape[1] :].tolist()
            drawn += [_cut(tokenizer, response) for response in responses]
    return [drawn[start : start + samples] for start in range(0, len(drawn), samples)]


def sequence_log_probs(model: PreTrainedModel, pairs: list[Pair], batch_size: int) -> Tensor:
    """Log-probability of each answer's tokens given its prompt, summed over the tokens: (N,), float64, on the CPU."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))  # little padding
    sums = torch.empty(len(pairs), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            picks = order[start : start + batch_size]
            batch = {name: t.to(model.device) for name, t in collate([pairs[i] for i in picks], 0).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # of the next token
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
            )  # (N * T,), zero outside the answer
            sums[picks] = -losses.view_as(labels).double().sum(-1).cpu()
    return sums


def expected_coverage(p: Tensor, samples: int) -> float:
    """Expected probability of the different outcomes among `samples` draws from p (K,): sum of p (1 - (1 - p)^S)."""
    return (p * (1 - (1 - p) ** samples)).sum().item()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, of log-probabilities (K,) of everything that p can draw."""
    return (log_p.exp() * (log_p - log_q)).sum().item()


def js_divergence(log_p: Tensor, log_q: Tensor, drawn_log_p: Tensor, drawn_log_q: Tensor) -> float:
    """Jensen-Shannon divergence of p and q in nats, with m their equal mixture: 0.5 E_p[ln p/m] + 0.5 E_q[ln q/m].

    The first half is exact, from log-probabilities (K,) of everything that p can draw; the second is the mean over S
    draws from q, with their log-probabilities (S,) under both; -inf where p cannot draw it.
    """
    half_p = (log_p.exp() * (log_p - _log_mixture(log_p, log_q))).sum()
    half_q = (drawn_log_q - _log_mixture(drawn_log_p, drawn_log_q)).mean()
    return (0.5 * half_p + 0.5 * half_q).item()


def _log_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _grades(world: World, prompts: list[str], drawn: list[list[Sample]]) -> dict[str, float]:
    pairs = [(prompt, sample) for prompt, row in zip(prompts, drawn, strict=True) for sample in row]
    grades = [(world.grade(prompt, sample.text), sample.ended) for prompt, sample in pairs]
    return {
        "grammatical": _mean([grade.grammatical and ended for grade, ended in grades]),
        "factual": _mean([grade.factual for grade, _ in grades]),
        "correct": _mean([grade.correct and ended for grade, ended in grades]),
        "ended": _mean([ended for _, ended in grades]),
    }


def _lengths(
    tokenizer: PreTrainedTokenizerBase, world: World, prompts: list[str], drawn: list[list[Sample]]
) -> dict[str, float]:
    expected = {}  # one tokenization per creature is enough
    for entity, answers in {world.entity(prompt): world.teacher_answers(prompt) for prompt in prompts}.items():
        ids = _answer_ids(tokenizer, list(answers))
        expected[entity] = sum(p * len(row) for p, row in zip(answers.values(), ids, strict=True))
    return {
        "length": _mean([len(sample.ids) for row in drawn for sample in row]),
        "teacher_length": _mean([expected[world.entity(prompt)] for prompt in prompts]),
    }


def _coverages(world: World, prompts: list[str], drawn: list[list[Sample]]) -> dict[str, float]:
    a_prompt = {
        world.entity(prompt): prompt for prompt in prompts
    }  # of each creature: its answers are the same for all
    fact_sets = {
        entity: {text: world.grade(prompt, text).facts for text in world.teacher_answers(prompt)}
        for entity, prompt in a_prompt.items()
    }
    answer_ratios, set_ratios = [], []
    for prompt, row in zip(prompts, drawn, strict=True):
        answers = world.teacher_answers(prompt)
        sets = fact_sets[world.entity(prompt)]
        set_p: dict[frozenset, float] = defaultdict(float)
        for text, p in answers.items():
            set_p[sets[text]] += p
        correct = {sample.text for sample in row if sample.ended} & answers.keys()
        answer_ratios.append(_ratio(answers, correct, len(row)))
        set_ratios.append(_ratio(set_p, {sets[text] for text in correct}, len(row)))
    return {"answer_coverage": _mean(answer_ratios), "fact_set_coverage": _mean(set_ratios)}


def _ratio(probabilities: dict, seen: set, samples: int) -> float:
    """Probability of what was seen, over its expectation for as many samples of the teacher's own."""
    expected = expected_coverage(torch.tensor(list(probabilities.values()), dtype=torch.float64), samples)
    return sum(probabilities[outcome] for outcome in seen) / expected


def _divergences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: dict[str, float],
    prompt: str,
    drawn: list[Sample],
    batch_size: int,
) -> tuple[float, float]:
    """Forward KL and Jensen-Shannon divergence for one prompt."""
    prompt_ids = _prompt_ids(tokenizer, prompt)
    pairs = [(prompt_ids, ids) for ids in _answer_ids(tokenizer, list(answers))]
    log_p = torch.tensor(list(answers.values()), dtype=torch.float64).log()
    by_ids = {tuple(ids): log for (_, ids), log in zip(pairs, log_p.tolist(), strict=True)}
    drawn_pairs = [(prompt_ids, sample.ids) for sample in drawn]
    log_q = sequence_log_probs(model, [*pairs, *drawn_pairs], batch_size)
    drawn_log_p = torch.tensor([by_ids.get(tuple(sample.ids), -math.inf) for sample in drawn], dtype=torch.float64)
    answers_log_q, drawn_log_q = log_q[: len(pairs)], log_q[len(pairs) :]
    return kl_divergence(log_p, answers_log_q), js_divergence(log_p, answers_log_q, drawn_log_p, drawn_log_q)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return encode_row(tokenizer, {"content": [{"role": "user", "content": prompt}], "teacher_response": ""})[0]


def _answer_ids(tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> list[list[int]]:
    """Token ids of each answer with its EOS, as `encode_row` has them."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]


def _pad_left(rows: list[list[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask, each (N, T); the mask hides the padding, so its id is of no account."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def _cut(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Sample:
    """The sample in a generated row: all up to the first EOS. Other special tokens show in the text."""
    ended = tokenizer.eos_token_id in ids
    answer = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    return Sample(ids[: len(answer) + ended], tokenizer.decode(answer), ended)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
