"""One frozen base for student and discriminator: the bits of two, in the memory of one; and when it is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.adapters import write_peft_folder
from tests.e2e.running import assert_equal_tensors
from tests.tiny import causal_lm, write_model
from tests.workers import shared_base_ranks
from verl.config import ActorRolloutRefConfig, CriticConfig
from verl.models.shared_base import shares_base, why_not_shared
from verl.trainer.config import compose_config


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, ("float32", "bfloat16", "float32-dora", "float32-4bit")),
        (3, ("bfloat16", "bfloat16-4bit")),
    ],
)
def test_nothing_but_memory_differs_from_two_bases(tmp_path, ranks, cases):
    """Gradients after an update of each, values and merged weights, to the bit, offloaded or not, gathered layer by
    layer or at once; the child looks at the memory. On three ranks the last one's shards are shorter, 86 of 260 rows of
    the embedding and 10 of 32 of others."""
    write_model(tmp_path / "base")
    torch.multiprocessing.spawn(shared_base_ranks.run, args=(ranks, tmp_path, cases), nprocs=ranks)
    for case in cases:
        seen = torch.load(tmp_path / f"{case}{ranks}.pt", weights_only=True)
        # Of two layers' q_proj and down_proj: A and B, and DoRA's lengths.
        adapters = sum(".lora_" in name for name in seen[False]["critic"])
        assert adapters == 2 * 2 * (3 if case.endswith("dora") else 2)
        for part, expected in seen[False].items():
            assert all(tensor.any() for name, tensor in expected.items() if ".lora_" in name), part
            for way in (True, "offloaded", "at once"):
                assert_equal_tensors(seen[way][part], expected)


# --- whether ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and a link to it, a base of another seed, and adapters on the first."""
    path = tmp_path_factory.mktemp("shared")
    base = write_model(path / "base")
    (path / "link").symlink_to(base)
    write_model(path / "other", seed=1)
    write_peft_folder(path / "adapter", base, causal_lm())
    return path


def settings_of(folder: Path, *overrides: str) -> tuple[ActorRolloutRefConfig, CriticConfig]:
    models = [f"actor_rollout_ref.model.path={folder}/base", "actor_rollout_ref.model.lora_rank=4"]
    required = ["stage=gad", "data.train_files=x", "trainer.experiment_name=x", "trainer.device=cpu"]
    config = compose_config([*required, *models, "critic.model.lora_rank=2", *(o.format(folder) for o in overrides)])
    return config.actor_rollout_ref, config.critic


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["critic.model.path={}/adapter", "critic.model.lora_rank=0"],
        ["critic.model.path={}/link"],
        ["actor_rollout_ref.model.path={}/adapter", "actor_rollout_ref.model.lora_rank=0", "critic.model.path={}/base"],
        # What the layers compute differs; what they compute it with does not.
        ["+critic.model.override_config.rms_norm_eps=1e-5"],
        ["critic.model.target_modules=[q_proj]", "critic.model.use_dora=True"],
        ["actor_rollout_ref.model.load_in_4bit=True", "critic.model.load_in_4bit=True"],
    ],
)
def test_a_base_is_shared_wherever_it_can_be(folder, overrides):
    for wanted in ("null", "True"):
        assert shares_base(*settings_of(folder, *overrides, f"critic.model.share_base={wanted}"))
    assert not shares_base(*settings_of(folder, *overrides, "critic.model.share_base=False"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["critic.model.lora_rank=0"], r"all weights of critic\.model\.path=.*/base are trained: set critic"),
        (["actor_rollout_ref.model.lora_rank=0"], r"all weights of actor_rollout_ref\.model\.path=.* are trained"),
        (["critic.model.path={}/other"], r"the student's is .*/base, the discriminator's .*/other: give critic\.model"),
        (["critic.model.load_in_4bit=True"], r"the discriminator's are in 4 bits, the student's not: set load_in_4bit"),
        (["critic.model.fsdp_config.dtype=bfloat16"], r"expected weights of one type, got .*=float32 and critic\..*16"),
        (
            ["+actor_rollout_ref.model.override_config.num_hidden_layers=1"],
            r"Qwen2ForTokenClassification has 12 parameters that Qwen2ForCausalLM has not, or of another shape, e\.g\. "
            r"layers\.1\.self_attn\.q_proj\.weight",
        ),
    ],
)
def test_what_cannot_be_shared_is_not_and_is_refused_where_it_is_asked_for(folder, overrides, said):
    assert not shares_base(*settings_of(folder, *overrides))
    assert re.search(said, why_not_shared(*settings_of(folder, *overrides)))
    with pytest.raises(ValueError, match=r"critic\.model\.share_base=True: .*" + said + ".*; or leave critic"):
        shares_base(*settings_of(folder, *overrides, "critic.model.share_base=True"))
