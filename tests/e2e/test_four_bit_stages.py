"""Whole stages that train adapters beside weights in 4 bits: what is written, gone on from, merged and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tests.e2e.running import assert_equal_tensors, read_metrics, train
from verl.model_merger.card import card_of
from verl.model_merger.cli import main as merger
from verl.models.four_bit import round_to_4bit
from verl.models.loading import load_model
from verl.trainer.in_process import run_in_process
from verl.trainer.main_ppo import run_ppo
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = pytest.mark.e2e
IDS = torch.arange(4, 34).view(2, 15)
QUIET = ("trainer.test_freq=-1", "trainer.val_before_train=False", "critic.optim.lr=1e-3")
LORA = ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.load_in_4bit=True")
CRITIC = ("critic.model.lora_rank=2", "critic.model.load_in_4bit=True")


def saved(run: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return read_full_tensors(run / f"global_step_{step}" / part / "model")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def stages(folder, run):
    """The runs' folders of SeqKD, and of GAD from its adapters with a fresh discriminator on the same base, on one rank
    in this process. The fixture `run` ends their process group."""
    seqkd = train(folder, "seqkd", *seqkd_of(), run_with=run_in_process)
    return seqkd, train(folder, "gad", *gad_of(folder, seqkd), run_with=run_in_process)


def seqkd_of() -> tuple[str, ...]:
    return ("stage=seqkd", *QUIET, *LORA, "trainer.total_training_steps=3", "actor_rollout_ref.actor.optim.lr=1e-2")


def gad_of(folder: Path, seqkd: Path) -> tuple[str, ...]:
    """The student's adapters keep what they were trained beside without being told."""
    models = (f"actor_rollout_ref.model.path={seqkd}/global_step_3/actor", f"critic.model.path={folder}/base", *CRITIC)
    steps = ("trainer.critic_warmup=1", "trainer.total_training_steps=4", "trainer.save_freq=2")
    return ("stage=warmup", *QUIET, *models, *steps)


def go_on(folder: Path, source: Path, name: str, *settings: str, run_with=run_in_process) -> Path:
    """A run that goes on from step 2 of another."""
    resumed = folder / "runs" / name
    resumed.mkdir()
    shutil.copytree(source / "global_step_2", resumed / "global_step_2")
    (resumed / "latest_checkpointed_iteration.txt").write_text("2")
    return train(folder, name, *settings, run_with=run_with)


def assert_equal_runs(run: Path, other: Path, step: int, parts: Sequence[str] = ("actor", "critic")) -> None:
    for part in parts:
        for kind in ("model", "optim"):
            folders = [each / f"global_step_{step}" / part / kind for each in (run, other)]
            assert_equal_tensors(*map(read_full_tensors, folders))


def test_the_engine_has_the_merged_weights_and_losses_fall(stages):
    seqkd, gad = (read_metrics(run) for run in stages)
    gaps = [data["training/rollout_probs_diff_max"] for data in gad.values() if "actor/lr" in data]
    assert gaps and max(gaps) < 1e-4
    assert seqkd[2]["actor/sft_loss"] < seqkd[0]["actor/sft_loss"]


def test_checkpoints_hold_adapters_alone_and_say_what_they_are_beside(stages):
    for part in ("actor", "critic"):
        others = {name for name in saved(stages[1], 4, part) if ".lora_" not in name}
        assert others == ({"score.weight", "score.bias"} if part == "critic" else set())
        checkpoint = stages[1] / "global_step_4" / part
        entries = json.loads((checkpoint / "base_quantization.json").read_text())
        assert entries["load_in_4bit"] and entries["bnb_4bit_compute_dtype"] == "float32"


def test_a_base_of_its_own_changes_no_bit_of_a_run(stages, folder, caplog):
    with caplog.at_level("INFO"):
        settings = (*gad_of(folder, stages[0]), "critic.model.share_base=True")
        shared = train(folder, "shared", *settings, run_with=run_in_process)
    assert "onto the student's base" in caplog.text
    settings = (*gad_of(folder, stages[0]), "critic.model.share_base=False")
    apart = train(folder, "apart", *settings, run_with=run_in_process)
    for other in (shared, apart):
        assert_equal_runs(stages[1], other, 4)


def test_resuming_is_exact_and_asks_for_the_same_base(stages, folder):
    seqkd, gad = stages
    assert_equal_runs(gad, go_on(folder, gad, "resumed", *gad_of(folder, seqkd)), 4)
    whole = (*gad_of(folder, seqkd), "critic.model.load_in_4bit=False", "critic.model.share_base=False")
    with pytest.raises(
        ValueError, match=r"adapters of other settings than this run's \(load_in_4bit=False, not True\)"
    ):
        go_on(folder, gad, "not_resumed", *whole)


@pytest.mark.distributed
def test_two_ranks_train_as_one_and_resume_exactly(stages, folder):
    """On real Ray: the losses of SeqKD, and its bits when it goes on."""
    settings = (*seqkd_of(), "trainer.n_gpus_per_node=2", "trainer.save_freq=2")
    two = train(folder, "two", *settings)
    one, other = read_metrics(stages[0]), read_metrics(two)
    for step in (0, 1, 2):
        assert other[step]["actor/sft_loss"] == pytest.approx(one[step]["actor/sft_loss"], rel=1e-4)
    assert_equal_runs(two, go_on(folder, two, "two_resumed", *settings, run_with=run_ppo), 3, parts=("actor",))


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_merged_models_are_what_was_trained(stages, folder, tmp_path, part):
    """PEFT's own model on a base with the rounded weights, against the merged folder, and a folder of adapters that
    still knows what they were beside."""
    checkpoint = stages[1] / "global_step_4" / part
    kind, auto = ("policy", AutoModelForCausalLM) if part == "actor" else ("score", AutoModelForTokenClassification)
    labels = {} if part == "actor" else {"num_labels": 1}
    merger(["--local_dir", str(checkpoint), "--target_dir", str(tmp_path / "adapter"), "--adapter"])
    base = auto.from_pretrained(folder / "base", **labels)
    plain = logits(PeftModel.from_pretrained(auto.from_pretrained(folder / "base", **labels), tmp_path / "adapter"))
    round_to_4bit(base, torch.float32)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (plain - expected).abs().max() > 1e-3, "what they were beside makes no difference"
    card = card_of(checkpoint, "me/adapter", part == "critic", adapter="/private/base")
    said = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"'
    assert "AutoTokenizer, BitsAndBytesConfig\n" in card and said in card
    merger(["--local_dir", str(checkpoint), "--target_dir", str(tmp_path / "whole"), "--dtype", "float32"])
    merger(["test", "--local_dir", str(checkpoint), "--test_hf_dir", str(tmp_path / "whole")])
    assert not (tmp_path / "whole" / "base_quantization.json").exists()
    merged = auto.from_pretrained(tmp_path / "whole")
    for model in (merged, load_model(checkpoint, kind), load_model(tmp_path / "adapter", kind)):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-5)
    # In bf16 as transformers loads what is merged, tables of positions apart, which stay in fp32.
    merger(["--local_dir", str(checkpoint), "--target_dir", str(tmp_path / "half"), "--dtype", "bfloat16"])
    half = auto.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(logits(load_model(checkpoint, kind, dtype=torch.bfloat16)), logits(half))


def test_what_cannot_be_is_said_before_the_start(stages, folder, run):
    idle = r"actor_rollout_ref\.model\.load_in_4bit=True is of adapters, and .*lora_rank=0 makes none"
    with pytest.raises(ValueError, match=idle):
        run("idle", LORA[1])
    whole = train(folder, "whole", "stage=seqkd", *QUIET, LORA[0], "trainer.total_training_steps=1",
                  run_with=run_in_process)  # fmt: skip
    with pytest.raises(ValueError, match=r"of other settings than .* says \(load_in_4bit=True, not False\)"):
        run("other", f"actor_rollout_ref.model.path={whole}/global_step_1/actor", *LORA)
    checkpoint = stages[1] / "global_step_4" / "actor"
    alone = shutil.copytree(checkpoint, folder / "alone")
    (alone / "base_quantization.json").unlink()
    with pytest.raises(ValueError, match=r"base_quantization\.json"):
        run("alone", f"actor_rollout_ref.model.path={alone}")
