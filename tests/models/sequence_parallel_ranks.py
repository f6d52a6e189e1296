"""Child of the tests of sequence parallelism: models on several ranks that share their tokens, against Hugging Face's
own forward of one row at a time."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import leave
from tests.recent_families import FAMILIES as RECENT
from tests.recent_families import recent, recent_scorer
from tests.tiny import answer_rows, causal_lm, scorer
from verl.models.answer_models import AnswerModel, PolicyModel, ScoreModel
from verl.models.layers import decoder_layers, recompute_layers
from verl.models.packing import AnswerRows
from verl.models.row_mixers import row_mixers
from verl.models.sequence_parallel import own_shard


def run(rank: int, world_size: int, models: list[str], folder: Path) -> None:
    """One rank: each of `models` (`policy/FAMILY`, `score/FAMILY`, or one of them compiled or with recomputed layers)
    on all rows that `rows_of_many_kinds` gives."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    for name in models:
        kind, family, *how = name.split("/")
        own, reference = build(kind, family), build(kind, family)
        own.shard = own_shard(world_size)
        if "recomputed" in how:
            recompute_layers(own.hf, 1.0)
            own.train()
        if "compiled" in how:
            for layer in decoder_layers(own.hf):
                # Without a break, so that all of the layer would be fused on a GPU.
                layer.forward = torch.compile(layer.forward, dynamic=True, backend="eager", fullgraph=True)
        kinds = rows_of_many_kinds()
        for what, rows in kinds.items() if not how else [("shared prompts", kinds["shared prompts"])]:
            compare(own, reference, rows, f"{name}, {what}, {world_size} ranks")
    leave()


def build(kind: str, family: str) -> AnswerModel:
    if kind == "score":
        return ScoreModel(scorer() if family == "qwen2" else recent_scorer(family), proven=True)
    return PolicyModel(recent(family) if family in RECENT else causal_lm(family), proven=True)


def rows_of_many_kinds() -> dict[str, AnswerRows]:
    """Rows by what is special about them; those of up to 23 tokens exceed the recent families' windows."""
    shared = answer_rows([9, 9, 9, 4, 12, 12], [8, 3, 1, 6, 11, 2])
    for row, same in ((1, 0), (2, 0), (5, 4)):
        shared.prompts[row] = shared.prompts[same]
    return {
        "shared prompts": shared,
        "rows of their own": answer_rows([5, 1, 14], [3, 8, 1]),
        # Fewer tokens than four ranks: some have none, and one or none has the answer's.
        "two tokens": answer_rows([1], [1]),
    }


def compare(own: AnswerModel, reference: AnswerModel, rows: AnswerRows, what: str) -> None:
    """Values, and the gradients of a sum of them with weights, which every rank's loss is. FSDP makes the mean of the
    ranks' gradients."""
    torch.manual_seed(4)
    weights = torch.randn(rows.responses.shape)
    for model, values in ((own, own.values), (reference, reference.plain)):
        model.zero_grad()
        model.computed = values(rows)
        (model.computed * weights).sum().backward()
    # Parts of a state's gradient, from every rank, are larger than their sum.
    close = partial(assert_close, what=what, tolerance=5e-5 if row_mixers(own.hf) else 1e-5)
    close("values", own.computed.detach(), reference.computed.detach())
    for (name, parameter), expected in zip(own.named_parameters(), reference.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(gradient)
        close(
            name,
            gradient / dist.get_world_size(),
            torch.zeros_like(expected) if expected.grad is None else expected.grad,
        )


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    allowed = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=allowed, rtol=tolerance, msg=lambda m: f"{what}, {name}: {m}")
