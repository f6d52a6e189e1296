"""Generation a step ahead on real Ray: one rank trains, one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from docs_site import metrics as catalogue
from tests.e2e.running import assert_equal_tensors, read_metrics, train
from verl.batch import Prompts, table
from verl.models.loading import load_config
from verl.models.tokenizer import all_eos_token_ids
from verl.protocol import DataProto
from verl.single_controller.ray.starting import start_alone
from verl.trainer.config import Config
from verl.trainer.looking_over import look_at
from verl.trainer.main_ppo import run_ppo
from verl.utils.checkpoint.sharded import read_full_tensors
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.refusals import Findings
from verl.workers.rollout.hf_rollout import HFRollout

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

AHEAD = ("trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1")
STEPS = 4


@pytest.fixture(scope="module")
def cluster():
    # As many threads in every process, whatever it shares the machine with: sums are rounded alike.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # The processes of a run are given back when the cluster ends.
        start_alone(5)
        yield
        ray.shutdown()


@pytest.fixture
def run(cluster, folder):
    def start(name: str, *overrides: str, configs: list[Config] | None = None) -> Path:
        """The run's folder; its settings join `configs`."""

        def note_and_run(config: Config) -> None:
            if configs is not None:
                configs.append(config)
            run_ppo(config)

        settings = ("stage=warmup", "trainer.critic_warmup=1", f"critic.model.path={folder}/base",
                    "critic.optim.lr=1e-3", f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2",
                    "data.shuffle=False")  # fmt: skip
        return train(folder, name, *settings, *overrides, run_with=note_and_run)

    return start


def of_no_time(metrics: dict[str, float]) -> dict[str, float]:
    """Without times, and what only a step ahead or only its absence has."""
    others = ("timing", "perf", "training/rollout_", "actor/entropy")
    return {name: value for name, value in metrics.items() if not name.startswith(others)}


def test_with_a_student_that_stands_still_ahead_is_in_turn_to_the_bit(run):
    """The weights of one update before are those of now: answers, scores and the discriminator are the same."""
    still = ("actor_rollout_ref.actor.optim.lr=0", "critic.replay.capacity=24", "critic.replay.fraction=0.5")
    in_turn, ahead = run("in turn", *still), run("ahead", *still, *AHEAD)
    ours, theirs = read_metrics(ahead), read_metrics(in_turn)
    assert len(ours) == STEPS + 1
    for step, expected in theirs.items():
        assert of_no_time(ours[step]) == of_no_time(expected), step
    for part in ("actor", "critic"):
        found, expected = (read_full_tensors(one / f"global_step_{STEPS}" / part / "model") for one in (ahead, in_turn))
        assert_equal_tensors(found, expected)
    assert (ahead / f"global_step_{STEPS}" / "replay.safetensors").exists()
    assert not (ahead / f"global_step_{STEPS}" / "ahead.safetensors").exists(), "after the last step nothing is ahead"


def test_answers_are_those_of_the_weights_of_one_update_before(run, folder):
    """What a checkpoint has to its next batch is what an engine writes that is given the weights of the step before."""
    configs = []
    saves = ("trainer.save_freq=1", "actor_rollout_ref.actor.optim.lr=1e-2", "algorithm.rollout_is=token")
    trained = run("moving", *saves, *AHEAD, configs=configs)
    metrics = read_metrics(trained)
    # The actor is frozen in step 0.
    known = catalogue.names("warmup") | catalogue.names("gad")
    assert sorted({name for logged in metrics.values() for name in logged} - known) == []
    assert all("timing_s/gen_wait" in metrics[step] and "timing_s/gen" not in metrics[step] for step in range(STEPS))
    assert [metrics[step]["training/rollout_staleness"] for step in range(STEPS)] == [0, 0, 1, 1]
    for step in range(STEPS - 1):
        assert metrics[step]["training/rollout_probs_diff_mean"] < 1e-4, "the engine has the weights of now"
    assert metrics[1]["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
    assert metrics[2]["rollout_corr/rollout_is_max"] > 1.01, "the weights of before are not those of now"

    [config] = configs
    rollout, (tokenizer, rows, _) = config.actor_rollout_ref.rollout, look_at(config, Findings())
    base = folder / "base"
    ends = all_eos_token_ids(tokenizer, str(base))
    engine = HFRollout(load_config(str(base), "policy"), tokenizer, rollout, "cpu", eos_token_ids=ends)
    for step in (1, 2, 3):
        stored = load_file(trained / f"global_step_{step}" / "ahead.safetensors")
        assert stored["index"].tolist() == list(range(4 * step, 4 * step + 4))
        prompts = Prompts.of(DataProto.from_single_dict(collate_fn([rows[i] for i in stored["index"].tolist()])))
        written = {}
        for updates in (step - 1, step):
            weights = load_file(base / "model.safetensors")
            if updates > 0:
                weights = read_full_tensors(trained / f"global_step_{updates}" / "actor" / "model")
            engine.push_weights(iter(weights.items()))
            answers = engine.generate(table(prompts), rollout.sampling, rollout.seed + step)
            written[updates] = answers.batch["responses"]
        assert torch.equal(written[step - 1], stored["responses"]), step
        assert torch.equal(written[step], stored["responses"]) == (step == 1), "step 0 is frozen, later ones are not"
