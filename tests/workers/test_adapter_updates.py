"""Updates of adapters: PEFT's own gradients, however the batch is cut, and on several ranks."""

from __future__ import annotations

import pytest
import torch

from tests.adapters import adapter_config, with_peft, write_peft_folder
from tests.tiny import causal_lm, write_model
from tests.workers import adapters_on_two_ranks
from tests.workers.adapters_setup import adapted_update
from tests.workers.updates_setup import LOSSES, batch, settings
from verl.batch import teacher_rows
from verl.models.adapters import add_adapters
from verl.models.answer_models import PolicyModel
from verl.models.four_bit import round_to_4bit
from verl.workers.updates import build_optimizer, optimizer_step


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "some", "4bit"])
@pytest.mark.parametrize("split", ["whole", "tokens", "rows", "padded"])
def test_gradients_are_those_of_peft_and_hugging_face(kind, split):
    """Hugging Face's cross-entropy of the teacher's tokens through PEFT's own model, one padded batch; beside weights
    in 4 bits, through a plain model that has the values that they stand for."""
    rows = teacher_rows(batch())
    ids = torch.cat([rows.prompts, rows.responses], -1)
    mask = torch.cat([rows.prompt_mask, rows.response_mask], -1)
    answer = torch.cat([torch.zeros_like(rows.prompt_mask), rows.response_mask], -1).bool()
    plain = causal_lm()
    if kind == "4bit":
        round_to_4bit(plain, torch.float32)
    model = with_peft(plain, kind)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(~answer, -100))
    output.loss.backward()
    named = {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters()}
    expected = {f"hf.{name}": gradient for name, gradient in named.items() if gradient is not None}
    assert expected and all(".lora_" in name and gradient.any() for name, gradient in expected.items())

    gradients, metrics = adapted_update("sft", settings("sft", split), batch(), kind)
    assert metrics["actor/sft_loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    assert_same(gradients, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", ["tokens", "rows", "padded"])
def test_gradients_and_metrics_do_not_depend_on_the_split(loss, split):
    whole, expected = adapted_update(loss, settings(loss), batch())
    cut, metrics = adapted_update(loss, settings(loss, split), batch())
    assert_same(cut, whole)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.distributed
def test_gradients_do_not_depend_on_the_number_of_ranks(tmp_path):
    """Two processes with FSDP2 over gloo against one; and what they build from folders, which the child checks."""
    write_model(tmp_path / "base")
    write_peft_folder(tmp_path / "adapter", tmp_path / "base", causal_lm(), "dora")
    torch.multiprocessing.spawn(adapters_on_two_ranks.run, args=(2, tmp_path), nprocs=2)
    for loss in adapters_on_two_ranks.LOSSES:
        for kind in adapters_on_two_ranks.KINDS:
            whole, expected = adapted_update(loss, settings(loss), batch(), kind)
            for way in adapters_on_two_ranks.WAYS:
                gradients, metrics = torch.load(tmp_path / f"{loss}-{kind}-{way}.pt", weights_only=True)
                assert_same(gradients, whole)
                for name, value in expected.items():
                    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (loss, kind, way, name)


def test_a_step_changes_adapters_alone_and_clips_their_gradients():
    module = PolicyModel(causal_lm())
    add_adapters(module.hf, adapter_config())
    config = settings("sft", "whole", ["actor_rollout_ref.actor.optim.lr=0.1"])
    optimizer, _ = build_optimizer(module, config.actor_rollout_ref.actor.optim, total_steps=1)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    states = sum(len(group["params"]) for group in optimizer.param_groups)
    assert states == len(optimizer.state) == 2 * 2 * 7
    module(teacher_rows(batch()))[0].sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert optimizer_step(module, optimizer, max_norm=expected / 4) == pytest.approx(expected, rel=1e-6)
    clipped = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert clipped == pytest.approx(expected / 4, rel=1e-4)
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(".lora_" in name for name in moved)
