"""Child process of test_gpu_engine: one actor with a vLLM engine on one GPU, in sync, out of sync, in sync again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.gpu.shapes import language_model
from tests.tiny import byte_tokenizer
from verl.config import SamplingConfig
from verl.protocol import DataProto
from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.local import LocalWorkerGroup
from verl.trainer.config import compose_config
from verl.trainer.ppo.metric_utils import compute_sync_metrics
from verl.workers.fsdp_workers import ActorRolloutRefWorker

PROMPTS, ANSWERS, WIDTH = 16, 4, 64
LESSONS = 8
SAMPLING = SamplingConfig(n=ANSWERS, do_sample=True, temperature=0.8, top_p=1.0, top_k=-1)


def main(folder: Path, overrides: list[str]) -> None:
    """Writes what it saw to folder/result.json."""
    language_model("qwen2").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    config = compose_config([
        "stage=seqkd", "data.train_files=x", "trainer.experiment_name=x", "trainer.device=cuda",
        f"actor_rollout_ref.model.path={folder / 'model'}", f"data.train_batch_size={PROMPTS}",
        f"data.max_prompt_length={WIDTH}", f"data.max_response_length={WIDTH}",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.1", "actor_rollout_ref.actor.optim.lr=3e-3", *overrides,
    ])  # fmt: skip
    group = LocalWorkerGroup(
        ClassWithInitArgs(
            ActorRolloutRefWorker, config.actor_rollout_ref, device="cuda", seed=0, total_steps=9, use_reference=False
        )
    )
    group.init_model()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, WIDTH + 1, (PROMPTS, 1), generator=generator)
    mask = (torch.arange(WIDTH) >= WIDTH - lengths).long()
    prompts = {"input_ids": torch.randint(4, 260, mask.shape, generator=generator) * mask, "attention_mask": mask}
    prompts = DataProto.from_dict(prompts)

    def gap(seed: int) -> tuple[dict[str, float], torch.Tensor]:
        prompts.meta_info = {"sampling": SAMPLING, "seed": seed, "report_log_probs": PROMPTS}
        batch = DataProto.from_dict(dict(prompts.batch.items())).union(group.generate_sequences(prompts))
        batch.union(group.compute_log_prob(batch))
        return compute_sync_metrics(batch), batch.batch["responses"]

    def learn(answer: int) -> None:
        """Teach the policy to answer every prompt with one token, again and again."""
        teacher = torch.full((PROMPTS, WIDTH), answer)
        whole = torch.cat([mask, torch.ones_like(teacher)], -1)
        lesson = {**prompts.batch, "teacher_response": teacher, "teacher_attention_mask": whole}
        for _ in range(LESSONS):
            group.update_actor(DataProto.from_dict(lesson))

    seen = {}
    group.push_weights()
    seen["first"], answers = gap(0)
    group.push_weights()
    seen["same seed"] = torch.equal(answers, gap(0)[1])
    learn(answer=7)
    group.push_weights()
    seen["pushed"], answers = gap(1)
    seen["learned"] = (answers == 7).float().mean().item()
    learn(answer=9)
    try:
        # An engine that dropped its weights refuses to work without them; the others go on with the old ones.
        seen["left out"], _ = gap(2)
    except RuntimeError as error:
        seen["refused"] = str(error)
    group.push_weights()
    seen["pushed again"], answers = gap(2)
    seen["learned again"] = (answers == 9).float().mean().item()
    (folder / "result.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
