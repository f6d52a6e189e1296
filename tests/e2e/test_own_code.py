"""Models whose code is in their folder, as student and as discriminator: built, trained, saved, merged and scored with
that code; not run where it was not asked for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.own_code import AUTO_MAP, FILES, plain, write_own_code
from tests.tiny import answer_rows, write_data, write_model
from verl.model_merger import merge
from verl.model_merger.merger import compare
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.loading import load_config, load_model
from verl.tools.score.__main__ import main as score
from verl.trainer.config import compose_config
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.sharded import read_full_tensors


@pytest.mark.parametrize("named", ["both", "language model", "backbone"])
def test_values_are_those_of_the_folders_code(tmp_path, named):
    """With each of the classes that a folder may name; hidden states are three times those of Qwen2."""
    left_out = {"both": None, "language model": "AutoModel", "backbone": "AutoModelForCausalLM"}[named]
    whole = plain(write_own_code(tmp_path / "whole")).eval()
    folder = write_own_code(tmp_path / named, auto_map={k: v for k, v in AUTO_MAP.items() if k != left_out})
    # Other code, so that no earlier test's classes are known for it.
    (folder / "configuration_mine.py").write_text(FILES["configuration_mine.py"] + f"\n# {named}\n")
    rows = answer_rows([5, 5, 3], [4, 2, 6])
    hf = load_model(folder, "score", trust_remote_code=True)
    values = ScoreModel(hf)(rows)
    log_probs = (
        None if named == "backbone" else PolicyModel(load_model(folder, "policy", trust_remote_code=True))(rows)[0]
    )
    for row, (prompt, answer) in enumerate(rows.unpadded()):
        output = whole(torch.cat([prompt, answer])[None], output_hidden_states=False)
        hidden = whole.model(torch.cat([prompt, answer])[None]).last_hidden_state[0, len(prompt) :]
        expected = hidden @ hf.score.weight[0] + hf.score.bias
        torch.testing.assert_close(values[row, : len(answer)], expected, atol=2e-5, rtol=1e-4)
        if log_probs is not None:
            expected = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, answer[:, None])[:, 0]
            torch.testing.assert_close(log_probs[row, : len(answer)], expected, atol=2e-5, rtol=1e-4)


def test_code_for_a_config_of_transformers_own_needs_a_class_for_discriminators(tmp_path):
    folder = write_model(tmp_path / "m")
    file = folder / "config.json"
    own = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": own}))
    with pytest.raises(ValueError, match=r"code of its own for a Qwen2Config.*AutoModelForTokenClassification"):
        load_config(folder, "score", trust_remote_code=True)
    load_config(folder, "score")


def run(tmp_path, stage, *overrides):
    folder = tmp_path / stage
    run_in_process(
        compose_config(
            [
                f"stage={stage}", "trainer.device=cpu", f"data.train_files={tmp_path}/train.jsonl",
                "data.train_batch_size=4", "data.max_prompt_length=40", "data.max_response_length=12",
                f"actor_rollout_ref.model.path={tmp_path}/base", "actor_rollout_ref.rollout.n=2",
                "actor_rollout_ref.model.trust_remote_code=True", "actor_rollout_ref.actor.optim.lr=1e-3",
                "trainer.experiment_name=x", f"trainer.default_local_dir={folder}", "trainer.logger=[file]",
                "trainer.sft_monitor_freq=-1", "trainer.total_training_steps=2", "algorithm.cut_answers=keep",
                *overrides,
            ]
        )
    )  # fmt: skip
    return folder / "global_step_2"


def test_stages_train_it_and_hand_its_code_on(tmp_path, capsys):
    """Each stage reads the last one's checkpoint, and the base folder is gone by then."""
    base = write_own_code(tmp_path / "base")
    write_data(tmp_path / "train.jsonl")
    warmup = run(tmp_path, "warmup", f"critic.model.path={base}", "trainer.critic_warmup=1", "critic.optim.lr=1e-3")
    before = load_model(base, "policy", trust_remote_code=True).state_dict()
    base.rename(tmp_path / "elsewhere")
    gad = run(
        tmp_path,
        "gad",
        f"actor_rollout_ref.model.path={warmup}/actor",
        f"critic.model.path={warmup}/critic",
    )
    for part in ("actor", "critic"):
        for name, text in FILES.items():
            assert (gad / part / "huggingface" / name).read_text() == text
    trained = read_full_tensors(gad / "actor" / "model")
    moved = [name for name in trained if not torch.equal(trained[name], before[name])]
    assert len(moved) == len(trained)

    merged = merge(gad / "actor", tmp_path / "merged", trust_remote_code=True)
    assert compare(gad / "actor", merged, trust_remote_code=True) > 10
    opened = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True)
    assert type(opened).__name__ == "MineForCausalLM" and opened.config.output_scale == 3

    critic = merge(gad / "critic", tmp_path / "merged_critic", trust_remote_code=True)
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"content": "a?", "teacher_response": "It is 3.", "student_response": "red"}) + "\n"
    )
    reports = []
    for folder in (gad / "critic", critic):
        score(["--critic", str(folder), "--data", str(tmp_path / "answers.jsonl"), "--trust_remote_code"])
        reports.append(capsys.readouterr().out.splitlines()[2:])
    assert reports[0] == reports[1] and len(reports[0]) > 10


def test_it_is_not_run_where_it_was_not_asked_for(tmp_path):
    folder, mark = write_own_code(tmp_path / "base"), tmp_path / "ran"
    (folder / "configuration_mine.py").write_text(
        FILES["configuration_mine.py"] + f"\nopen({str(mark)!r}, 'w').close()\n"
    )
    write_data(tmp_path / "train.jsonl")
    settings = (f"critic.model.path={folder}", "actor_rollout_ref.model.trust_remote_code=False")
    with pytest.raises(Exception, match=r"set actor_rollout_ref\.model\.trust_remote_code=True"):
        run(tmp_path, "warmup", *settings)
    assert not mark.exists()
    load_model(folder, "policy", trust_remote_code=True)
    assert mark.exists(), "it would have"
