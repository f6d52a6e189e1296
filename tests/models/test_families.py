"""Every family of causal language models that transformers has: right to 1e-4 against plain Hugging Face, or refused.

Families come from transformers' own mapping. The reference is written here and nowhere else: one whole row at a time,
no padding, the class's own logits. Models are small ones with other weights than those that the verdicts are made on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.tiny import answer_rows
from verl.models.answer_models import ANSWER_MODELS
from verl.models.proof import prove
from verl.models.twin import small_config
from verl.tools.families import KINDS, Family, look_at, model_types, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
# Prompts of the first, second and fourth row are one.
ROWS = ([6, 6, 3, 6, 1], [4, 7, 5, 2, 3])


@pytest.fixture(scope="module")
def families() -> dict[tuple[str, str], Family]:
    return {(name, kind): look_at(name, kind) for name in model_types() for kind in KINDS}


def rows_of(vocabulary: int):
    rows = answer_rows(*ROWS)
    prompts = (rows.prompts % (vocabulary - 10) + 5) * rows.prompt_mask
    prompts[1] = prompts[3] = prompts[0]
    answers = (rows.responses % (vocabulary - 10) + 5) * rows.response_mask
    return type(rows)(prompts, rows.prompt_mask, answers, rows.response_mask).select([0, 1, 3, 2, 4])


def small_model(family: Family) -> transformers.PreTrainedModel:
    """Weights of another seed than the proof's, none of them zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = family.model_class(small_config(family.config)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.dim() < 2 else 0.15))
    return model.requires_grad_(False)


def reference(model, rows, kind: str) -> torch.Tensor:
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    result = torch.zeros(rows.responses.shape)
    for row in range(len(rows)):
        prompt = rows.prompts[row][rows.prompt_mask[row].bool()]
        answer = rows.responses[row][rows.response_mask[row].bool()]
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0]
        if kind == "policy":
            values = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, answer[:, None])[:, 0]
        else:
            values = logits[len(prompt) :, 0]
        result[row, : len(answer)] = values
    return result


def distance(family: Family, remove_padding: bool) -> float:
    model = small_model(family)
    rows = rows_of(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        expected = reference(model, rows, family.kind)
        return (
            (ANSWER_MODELS[family.kind](model, remove_padding, proven=True).values(rows) - expected).abs().max().item()
        )


def test_what_is_accepted_is_right(families):
    """Packed where it is accepted packed, and padded where padding is offered or chosen."""
    accepted = [
        (family, remove_padding)
        for family in families.values()
        for remove_padding, verdict in ((True, family.packed), (False, family.padded))
        if verdict.compared and verdict.fault is None
    ]
    wrong = {}
    for family, remove_padding in accepted:
        error = distance(family, remove_padding)
        if not error <= 1e-4:
            wrong[family.model_type, family.kind, remove_padding] = error
    assert not wrong
    for kind in KINDS:
        assert len({family.model_type for family, _ in accepted if family.kind == kind}) >= 40


def test_what_could_not_be_compared_is_right_or_refused_on_its_own_weights(families):
    unclear = [f for f in families.values() if f.model_class is not None and not f.packed.compared]
    for family in unclear:
        try:
            model = ANSWER_MODELS[family.kind](small_model(family), proven=True)
            prove(model, torch.float32)
        except Exception as error:
            # A model that cannot be built is refused as such (`find_class`) before it comes to a comparison.
            assert str(error), family
        else:
            assert distance(family, remove_padding=True) <= 1e-4, family


def test_what_is_refused_says_why(families):
    for family in families.values():
        for verdict in (family.packed, family.padded):
            assert verdict.fault is None or len(verdict.fault) > 20, family


def test_the_document_is_what_the_proof_says(families):
    """Where it was written with the transformers that is installed."""
    text = DOCUMENT.read_text()
    if f"transformers {transformers.__version__} " in text:
        assert text == table((families[name, "policy"], families[name, "score"]) for name in model_types())
