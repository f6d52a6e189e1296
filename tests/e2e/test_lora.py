"""Whole stages that train adapters: what moves, what is written, gone on from, merged, and read by PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tests.e2e.running import assert_equal_tensors, read_metrics, train
from verl.model_merger.card import card_of
from verl.model_merger.cli import main as merger
from verl.models.finding import is_discriminator
from verl.models.loading import load_model
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = pytest.mark.e2e
IDS = torch.arange(4, 34).view(2, 15)
LORA = ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8", "critic.model.lora_rank=2")
QUIET = ("trainer.test_freq=-1", "trainer.val_before_train=False", "critic.optim.lr=1e-3")


def saved(run: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return read_full_tensors(run / f"global_step_{step}" / part / "model")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, which differs with where in memory the same weights lie."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def stages(folder, run):
    """The runs' folders of SeqKD, warmup from its adapters and GAD from those of both, on one rank in this process. The
    fixture `run` ends their process group."""
    seqkd = train(folder, "seqkd", "stage=seqkd", *QUIET, *LORA[:2], "trainer.total_training_steps=3",
                  "actor_rollout_ref.actor.optim.lr=1e-2", run_with=run_in_process)  # fmt: skip
    actor = f"actor_rollout_ref.model.path={seqkd}/global_step_3/actor"
    warmup = train(folder, "warm", "stage=warmup", *QUIET, actor, f"critic.model.path={folder}/base", LORA[2],
                   "trainer.critic_warmup=2", "trainer.total_training_steps=3", run_with=run_in_process)  # fmt: skip
    return seqkd, warmup, train(folder, "gad", *gad_of(warmup), run_with=run_in_process)


def gad_of(warmup: Path) -> tuple[str, ...]:
    source = warmup / "global_step_3"
    models = (f"actor_rollout_ref.model.path={source}/actor", f"critic.model.path={source}/critic")
    return ("stage=gad", *QUIET, *models, "trainer.total_training_steps=4", "trainer.save_freq=2")


def test_the_engine_has_the_merged_weights_at_every_step(stages):
    for run in stages[1:]:
        metrics = read_metrics(run)
        gaps = [data["training/rollout_probs_diff_max"] for data in metrics.values() if "actor/lr" in data]
        assert gaps and max(gaps) < 1e-4
    assert read_metrics(stages[0])[2]["actor/sft_loss"] < read_metrics(stages[0])[0]["actor/sft_loss"]


def test_the_reference_is_the_student_as_the_run_found_it(stages):
    """With the adapters that it came with, not without any; it stays when they are trained."""
    metrics = read_metrics(stages[2])
    assert metrics[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-8)
    assert metrics[3]["actor/kl_loss"] > 1e-5


def test_checkpoints_hold_adapters_and_not_the_base(stages, folder):
    base = load_model(folder / "base", "policy").state_dict()
    whole = sum(tensor.nbytes for tensor in base.values())
    for run, step, parts in ((stages[0], 3, ["actor"]), (stages[2], 4, ["actor", "critic"])):
        for part in parts:
            tensors = saved(run, step, part)
            others = {name for name in tensors if ".lora_" not in name}
            assert others == ({"score.weight", "score.bias"} if part == "critic" else set())
            assert len(tensors) - len(others) == 2 * 2 * 7
            checkpoint = run / f"global_step_{step}" / part
            entries = json.loads((checkpoint / "adapter_config.json").read_text())
            assert entries["base_model_name_or_path"] == f"{folder}/base"
            assert entries["r"] == (2 if part == "critic" else 4)
            written = sum(file.stat().st_size for kind in ("model", "optim") for file in (checkpoint / kind).iterdir())
            assert written < whole
    merged = load_model(stages[2] / "global_step_4" / "actor", "policy").state_dict()
    same = {name for name, tensor in merged.items() if torch.equal(tensor, base[name])}
    assert same == {name for name in base if "_proj.weight" not in name}


def test_adapters_are_trained_when_the_whole_model_would_be(stages):
    seqkd, warmup, gad = stages
    before, after = saved(seqkd, 3, "actor"), saved(warmup, 3, "actor")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    before, after = saved(warmup, 3, "critic"), saved(gad, 4, "critic")
    assert all(not torch.equal(before[name], after[name]) for name in ("score.weight", *list(before)[:4]))


def test_resuming_is_exact(stages, folder):
    _, warmup, gad = stages
    resumed = folder / "runs" / "gad_resumed"
    resumed.mkdir()
    shutil.copytree(gad / "global_step_2", resumed / "global_step_2")
    (resumed / "latest_checkpointed_iteration.txt").write_text("2")
    train(folder, "gad_resumed", *gad_of(warmup), run_with=run_in_process)
    assert_resumed(gad, resumed)
    rank = ("actor_rollout_ref.model.path=" + str(folder / "base"), "actor_rollout_ref.model.lora_rank=8")
    path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={gad}/global_step_2")
    with pytest.raises(ValueError, match=r"of other adapters: .*lora_A.* \(expected \(8, .*, got \(4, "):
        train(folder, "gad_other", *gad_of(warmup), *rank, *path, run_with=run_in_process)
    # Of the same shapes, and worth twice as much.
    scale = (rank[0], "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=64")
    with pytest.raises(ValueError, match=r"adapters of other settings than this run's \(lora_alpha=64, not "):
        train(folder, "gad_scaled", *gad_of(warmup), *scale, *path, run_with=run_in_process)


def assert_resumed(run: Path, resumed: Path) -> None:
    for part in ("actor", "critic"):
        assert_equal_tensors(saved(resumed, 4, part), saved(run, 4, part))
        states = [read_full_tensors(r / "global_step_4" / part / "optim") for r in (run, resumed)]
        assert_equal_tensors(*states)
    once, again = read_metrics(run), read_metrics(resumed)
    assert {2, 3} <= again.keys()
    for step in (2, 3):
        same = {name for name in once[step] if not name.startswith(("timing", "perf/"))}
        assert {name: again[step][name] for name in same} == {name: once[step][name] for name in same}


@pytest.mark.parametrize("stage", ["warmup", "gad"])
def test_a_base_of_its_own_changes_no_bit_of_a_run(stages, folder, stage, caplog):
    """All runs here share the student's, as they can. Validation and held-out pairs are looked at too; a run goes on
    from the other's checkpoint."""
    seqkd, warmup, _ = stages
    actor = (f"actor_rollout_ref.model.path={seqkd}/global_step_3/actor", f"critic.model.path={folder}/base", LORA[2])
    begun = ("stage=warmup", *QUIET, *actor, "trainer.critic_warmup=1", "trainer.save_freq=2")
    looks = ("trainer.test_freq=2", "trainer.total_training_steps=4", "critic.held_out_prompts=3")
    run = (*(begun if stage == "warmup" else gad_of(warmup)), *looks)
    own = "critic.model.share_base=False"
    with caplog.at_level("INFO"):
        shared = train(folder, f"{stage}_shared", *run, run_with=run_in_process)
    assert f"student and discriminator share the frozen weights of {folder}/base" in caplog.text
    assert "onto the student's base" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        apart = train(folder, f"{stage}_apart", *run, own, run_with=run_in_process)
    assert "onto the student's base" not in caplog.text
    assert_resumed(shared, apart)
    assert any(name.startswith("val/critic/") for name in read_metrics(shared)[2])
    for source, way in ((shared, own), (apart, "critic.model.share_base=True")):
        resumed = folder / "runs" / f"{source.name}_goes_on"
        resumed.mkdir()
        shutil.copytree(source / "global_step_2", resumed / "global_step_2")
        (resumed / "latest_checkpointed_iteration.txt").write_text("2")
        train(folder, resumed.name, *run, way, run_with=run_in_process)
        assert_resumed(shared, resumed)
    for name in ("adapter_config.json", "extra_state.json", "fsdp_config.json", "huggingface/config.json"):
        written = [(run / "global_step_4" / "critic" / name).read_bytes() for run in (shared, apart)]
        assert written[0] == written[1], name


@pytest.mark.distributed
def test_resuming_on_two_ranks_is_exact(stages, folder):
    """On real Ray."""
    two = (*gad_of(stages[1]), "trainer.n_gpus_per_node=2")
    run = train(folder, "two", *two)
    resumed = folder / "runs" / "two_resumed"
    resumed.mkdir()
    shutil.copytree(run / "global_step_2", resumed / "global_step_2")
    (resumed / "latest_checkpointed_iteration.txt").write_text("2")
    # The first run shares its base, the second does not.
    train(folder, "two_resumed", *two, "critic.model.share_base=False")
    assert_resumed(run, resumed)
    said = ["onto the student's base" in (each / "logs" / "ranks.log").read_text() for each in (run, resumed)]
    assert said == [True, False]


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_the_merger_writes_the_whole_model(stages, tmp_path, part):
    checkpoint, out = stages[2] / "global_step_4" / part, tmp_path / "hf"
    merger(["--local_dir", str(checkpoint), "--target_dir", str(out), "--dtype", "float32"])
    merger(["test", "--local_dir", str(checkpoint), "--test_hf_dir", str(out)])
    assert not (out / "adapter_config.json").exists()
    kind, auto = ("policy", AutoModelForCausalLM) if part == "actor" else ("score", AutoModelForTokenClassification)
    merged = logits(auto.from_pretrained(out))
    assert_close(merged, logits(load_model(checkpoint, kind)))
    assert is_discriminator(out) == (part == "critic")
    entries = json.loads((out / "config.json").read_text())
    assert entries.get("discriminator", {}).get("pooling") == ("mean" if part == "critic" else None)
    with pytest.raises(SystemExit, match="holds a model already"):
        merger(["--local_dir", str(checkpoint), "--target_dir", str(out), "--adapter"])


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_the_merger_writes_a_peft_folder(stages, folder, tmp_path, part, capsys):
    checkpoint, out = stages[2] / "global_step_4" / part, tmp_path / "peft"
    merger(["--local_dir", str(checkpoint), "--target_dir", str(out), "--adapter"])
    merger(["test", "--local_dir", str(checkpoint), "--test_hf_dir", str(out)])
    assert f"{28 + 2 * (part == 'critic')} tensors are equal in float32" in capsys.readouterr().out
    assert not (out / "model.safetensors").exists() and (out / "tokenizer.json").is_file()
    kind = "policy" if part == "actor" else "score"
    expected = logits(load_model(checkpoint, kind))
    auto, labels = (
        (AutoModelForCausalLM, {}) if part == "actor" else (AutoModelForTokenClassification, {"num_labels": 1})
    )
    base = auto.from_pretrained(
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"], **labels
    )
    assert_close(logits(PeftModel.from_pretrained(base, out)), expected)
    assert is_discriminator(out) == (part == "critic")
    assert_close(logits(load_model(out, kind)), expected)
    merger(["--local_dir", str(out), "--target_dir", str(tmp_path / "whole"), "--dtype", "float32"])
    assert_close(logits(load_model(tmp_path / "whole", kind)), expected)
    card = card_of(checkpoint, "me/adapter", part == "critic", adapter="/private/base")
    assert "library_name: peft" in card and 'PeftModel.from_pretrained(base, "me/adapter")' in card
    assert "/private" not in card and ("num_labels=1" in card) == (part == "critic")
    with pytest.raises(SystemExit, match="holds an adapter already"):
        merger(["--local_dir", str(checkpoint), "--target_dir", str(out)])
    with pytest.raises(SystemExit, match="is a folder of this machine, which nobody else"):
        merger(["--local_dir", str(checkpoint), "--target_dir", str(out), "--adapter", "--hf_upload_path", "o/n"])


def test_a_peft_folder_is_gone_on_from(stages, folder, tmp_path):
    """GAD from what the merger wrote is GAD from the checkpoint."""
    _, warmup, gad = stages
    paths = []
    for part in ("actor", "critic"):
        merger(["--local_dir", f"{warmup}/global_step_3/{part}", "--target_dir", str(tmp_path / part), "--adapter"])
        paths.append(f"{'critic' if part == 'critic' else 'actor_rollout_ref'}.model.path={tmp_path / part}")
    again = train(folder, "gad_of_peft", *gad_of(warmup), *paths, run_with=run_in_process)
    for part in ("actor", "critic"):
        assert_equal_tensors(saved(again, 4, part), saved(gad, 4, part))


def test_whole_weights_have_no_adapters_to_write(run, folder, tmp_path):
    whole = run("whole", steps=1)
    with pytest.raises(SystemExit, match="holds whole weights and no adapters: leave --adapter out"):
        merger(["--local_dir", f"{whole}/global_step_1/actor", "--target_dir", str(tmp_path / "x"), "--adapter"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["actor_rollout_ref.model.use_dora=True"], "use_dora=True is of adapters, and .*lora_rank=0 makes none"),
        (["actor_rollout_ref.model.target_modules=[q_proj]"], "target_modules=.*'q_proj'.* is of adapters"),
        (["critic.model.use_rslora=True", LORA[0]], "critic.model.use_rslora=True is of adapters"),
        ([LORA[0], "actor_rollout_ref.model.target_modules=[query]"], "names query, and Qwen2ForCausalLM has no such"),
        ([LORA[0], "actor_rollout_ref.ref.fsdp_config.dtype=bfloat16"], "the reference is the actor without them"),
        (["critic.model.lora_rank=2", "critic.model.target_modules=[score]"], "score of .* cannot have an adapter"),
        (["actor_rollout_ref.model.lora_rank=-1"], "lora_rank"),
        (
            [*LORA[::2], "critic.model.share_base=True", "critic.model.fsdp_config.dtype=bfloat16"],
            "weights of one type",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_start(run, overrides, said):
    with pytest.raises(ValueError, match=said):
        run("refused", *overrides)


def test_adapters_of_a_folder_are_beside_the_layers_that_the_settings_name(stages, run):
    folder = (f"actor_rollout_ref.model.path={stages[0]}/global_step_3/actor", *LORA[:2])
    run("again", *folder, steps=1)
    said = (
        r"beside other layers than actor_rollout_ref\.model\.target_modules and exclude_modules say, 10 of them "
        r"\(model\.layers\.0\.mlp\.down_proj has one, and should have none; .*\): leave actor_rollout_ref\.model\.lora"
    )
    with pytest.raises(ValueError, match=said):
        run("others", *folder, "actor_rollout_ref.model.target_modules=[q_proj,k_proj]")
