"""Child of test_shared_base: student and discriminator on one frozen base and on two, built as workers build them."""

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.ranks import leave
from tests.tiny import answer_rows
from tests.workers.adapters_setup import gradients_of
from tests.workers.updates_setup import EOS, PROMPTS, batch, settings
from verl.config import WrapPolicy
from verl.memory.offload import Offloader
from verl.models.answer_models import AnswerModel
from verl.models.sharding import build_sharded_model, full_parameters, reshard
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic

ROWS = answer_rows([5, 3], [4, 2])


@dataclass
class Pair:
    """A student and a discriminator with their offloaders, which move weights where they are asked to."""

    student: AnswerModel
    critic: AnswerModel
    students: Offloader
    critics: Offloader


def frozen(module: AnswerModel) -> dict[str, torch.Tensor]:
    """The frozen parameters of the backbone, by their names without adapters."""
    named = module.hf.base_model.named_parameters()
    return {name.replace(".base_layer", ""): p.detach() for name, p in named if not p.requires_grad}


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard, or the whole of what is not sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def build(
    folder: Path, case: str, shared: bool, offload: bool = False, reshard: bool = True, at_once: bool = False
) -> Pair:
    """From `folder`'s base, in the type that the case names; its adapters are `dora`, its weights in `4bit`."""
    dtype, _, kind = case.partition("-")
    config = settings("gspo")
    group, critic = config.actor_rollout_ref, config.critic.model
    fsdp = replace(group.actor.fsdp_config, dtype=dtype, reshard_after_forward=reshard)
    fsdp = replace(fsdp, wrap_policy=WrapPolicy(10**6 if at_once else 0))
    adapters = {"path": str(folder / "base"), "lora_rank": 3, "use_dora": kind == "dora"}
    adapters["load_in_4bit"] = kind == "4bit"
    torch.manual_seed(5)
    student = build_sharded_model(replace(group.model, **adapters), "policy", fsdp, "cpu")
    students = Offloader(student, None, params=offload, optimizer_states=False)
    students.rest()
    with students.on_device():
        with torch.no_grad():
            # Leaves what is outside the layers whole, as a forward pass without a backward pass does.
            student(ROWS)
        # Of another rank and fewer layers: its frozen layers have other names.
        own = replace(critic, **adapters | {"lora_rank": 2, "target_modules": ["q_proj", "down_proj"]})
        base = student if shared else None
        scorer = build_sharded_model(own, "score", fsdp, "cpu", base=base)
    critics = Offloader(scorer, None, params=offload, optimizer_states=False, base=students if shared else None)
    critics.rest()
    return Pair(student, scorer, students, critics)


def seen_of(pair: Pair) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of one update of each, values after it, and the weights that an engine gets."""
    config, data = settings("gspo", "tokens"), batch()
    share = PROMPTS // dist.get_world_size()
    mine = data[slice(share * dist.get_rank(), share * (dist.get_rank() + 1))]
    mine.meta_info["mini_batches"] = 1
    seen = {}
    for _ in range(2):
        optimizer = torch.optim.AdamW([p for p in pair.critic.parameters() if p.requires_grad], lr=1e-2)
        with pair.critics.on_device(optimizer=True):
            DataParallelPPOCritic(config.critic, pair.critic, optimizer, EOS).update_critic(mine)
            seen["critic"] = gradients_of(pair.critic)
            pair.critic.zero_grad()
        group = config.actor_rollout_ref
        optimizer = torch.optim.AdamW([p for p in pair.student.parameters() if p.requires_grad], lr=1e-2)
        with pair.students.on_device(optimizer=True):
            DataParallelPPOActor(group.actor, group.rollout, pair.student, optimizer).update_policy(mine)
            seen["student"] = gradients_of(pair.student)
            pair.student.zero_grad()
    with pair.critics.on_device(), torch.no_grad():
        seen["values"] = {"scores": pair.critic(ROWS)}
    with pair.students.on_device(), torch.no_grad():
        seen["values"] |= {"log_probs": pair.student(ROWS)[0]}
    with pair.students.on_device():
        reshard(pair.student)
        seen["pushed"] = {name: tensor.clone() for name, tensor in full_parameters(pair.student.hf)}
    return seen


def check_memory(pair: Pair, shared: bool) -> None:
    """With a shared base every frozen shard of the discriminator lies where the student's does, but for those shorter
    than the first rank's; without, none does."""
    for module in (pair.critic, pair.student):
        reshard(module)
    own, students = frozen(pair.critic), frozen(pair.student)
    assert own and own.keys() <= students.keys()
    for name, parameter in own.items():
        mine, theirs = own_part(parameter), own_part(students[name])
        # Weights in 4 bits are not sharded.
        full = mine is parameter or mine.shape[0] == -(-parameter.shape[0] // dist.get_world_size())
        same = mine.untyped_storage()._cdata == theirs.untyped_storage()._cdata
        assert same == (shared and full), name
        assert torch.equal(mine, theirs)


def check_offloading(pair: Pair) -> None:
    """The base is out between uses, and comes back for the discriminator too; the student's adapters with it."""

    def bytes_of(module: AnswerModel) -> list[int]:
        return [own_part(parameter).untyped_storage().nbytes() for parameter in frozen(module).values()]

    assert not any(bytes_of(pair.student))
    for module in (pair.critic, pair.student):
        try:
            module(ROWS)
        except RuntimeError as error:
            assert "are in host memory" in str(error)
        else:
            raise AssertionError("computed with weights that were out")
    for module in (pair.critic, pair.student):
        reshard(module)
    with pair.critics.on_device():
        assert all(bytes_of(pair.critic)) and all(bytes_of(pair.student))
    assert not any(bytes_of(pair.student)) and pair.critics.is_out


def run(rank: int, world_size: int, folder: Path, cases: tuple[str, ...]) -> None:
    """One rank: what both ways see in each case, and where the memory is; rank 0 writes it to `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world_size}", rank=rank, world_size=world_size, timeout=timeout
    )
    for case in cases:
        pairs = {shared: build(folder, case, shared) for shared in (True, False)}
        for shared, pair in pairs.items():
            check_memory(pair, shared)
        seen = {shared: seen_of(pair) for shared, pair in pairs.items()}
        for shared, pair in pairs.items():
            check_memory(pair, shared)
        offloaded = build(folder, case, shared=True, offload=True, reshard=False)
        # Shards of no rows, which more ranks have, take no memory anywhere.
        if world_size == 2:
            check_offloading(offloaded)
        seen["offloaded"] = seen_of(offloaded)
        seen["at once"] = seen_of(build(folder, case, shared=True, at_once=True))
        if rank == 0:
            torch.save(seen, folder / f"{case}{world_size}.pt")
    leave()
