"""The two workers of a rank: the student with its engine and reference, and the discriminator.

Both live in one process and share its process group. What they have in common is in `worker_base.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from verl.config import ActorRolloutRefConfig, CriticConfig, SamplingConfig
from verl.memory.errors import explain_out_of_memory
from verl.memory.knobs import Phase
from verl.memory.offload import build_offloader
from verl.models.adapters import AsFound, adapters_in
from verl.models.finding import find_model
from verl.models.layers import compile_seconds, compiler_as_before
from verl.models.loading import load_config
from verl.models.sharding import build_sharded_model, full_parameters, reshard
from verl.models.shared_base import shares_base
from verl.models.tokenizer import all_eos_token_ids
from verl.protocol import DataProto
from verl.single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    metrics_of_groups,
    register,
)
from verl.utils.rendezvous import reserve_port
from verl.utils.run_log import phase
from verl.utils.startup import noted
from verl.utils.units import GIB
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.pairs import PairPolicy
from verl.workers.critic.dp_critic import DataParallelPPOCritic
from verl.workers.rollout import get_rollout_class
from verl.workers.rollout.weight_line import SENDER, WeightLine
from verl.workers.worker_base import COLLECTIVE_TIMEOUT, FSDPWorker

# The meshes in which rows are shared out, by whose computations they are for.
ACTOR, CRITIC = "actor", "critic"


class ActorRolloutRefWorker(FSDPWorker):
    """The policy, the engine that generates from it, and the frozen reference where a KL term needs one.

    Args:
        use_engine: whether there is an engine; without one nothing can be generated.
    """

    # Bytes that PyTorch counts as allocated for an engine that sleeps through training.
    engine_bytes = 0
    # Where adapters are trained: the reference is the trained model itself, as it was found.
    as_found: AsFound | None = None
    # Of rank 0, where engines of other processes get the policy's weights.
    line: WeightLine | None = None

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        device: str,
        seed: int,
        total_steps: int,
        use_reference: bool,
        collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
        use_engine: bool = True,
    ):
        super().__init__(device, seed, ACTOR, config.actor.ulysses_sequence_parallel_size, collective_timeout)
        self.config = config
        self.collective_timeout = collective_timeout
        self.total_steps = total_steps
        self.use_reference = use_reference
        self.use_engine = use_engine

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build the policy, its reference and engine, as far as there are any; the engine sleeps, without weights."""
        with explain_out_of_memory("init", self.config):
            self._build_actor()
            if self.use_reference:
                self._build_reference()
            if self.use_engine:
                self._build_rollout()
        self.compiled_before = compile_seconds()

    def _build_actor(self) -> None:
        config = self.config
        fsdp, optim = config.actor.fsdp_config, config.actor.optim
        shards = config.actor.ulysses_sequence_parallel_size
        module = self._build_trained(config.model, "policy", fsdp, optim, self.total_steps, shards)
        self.actor = DataParallelPPOActor(config.actor, config.rollout, module, self.optimizer)

    def _build_reference(self) -> None:
        config, fsdp = self.config, self.config.ref.fsdp_config
        module = self.actor.actor_module
        if adapters_in(module.hf) is not None:
            with self.offloader.on_device():
                self.as_found = AsFound(module, fresh=find_model(config.model.path).adapter is None)
            self.reference = DataParallelPPOActor(config.actor, config.rollout, module)
            self.reference_offloader = self.offloader
            return
        shards = config.actor.ulysses_sequence_parallel_size
        module = build_sharded_model(
            config.model, "policy", fsdp, self.device, frozen=True, sequence_parallel_size=shards
        )
        self.reference = DataParallelPPOActor(config.actor, config.rollout, module)
        self.reference_offloader = build_offloader(module, None, fsdp, self.device)
        self.reference_offloader.rest()

    @contextmanager
    def _reference_at_work(self) -> Iterator[None]:
        """Keep the reference on the device within the block; of a model with adapters, have it as it was found."""
        with explain_out_of_memory("compute_ref_log_prob", self.config), self.reference_offloader.on_device():
            if self.as_found is None:
                yield
                return
            reshard(self.reference.actor_module)
            with self.as_found.back():
                yield

    def _build_rollout(self) -> None:
        model, rollout = self.config.model, self.config.rollout
        model_config = load_config(model.path, "policy", model.override_config, model.trust_remote_code)
        before = torch.cuda.memory_allocated()
        with phase(f"building the {rollout.name} engine"), compiler_as_before():
            self.rollout = get_rollout_class(rollout.name)(
                model_config,
                self.tokenizer,
                rollout,
                self.device,
                model.trust_remote_code,
                all_eos_token_ids(self.tokenizer, model.path),
            )
        if rollout.drops_weights:
            self.engine_bytes = torch.cuda.memory_allocated() - before
        self.rollout.sleep()

    @contextmanager
    def _engine_at_work(self, phase: Phase, call: str) -> Iterator[None]:
        """Within the block an error says in one line, which a user reads last, whose it is and in which call.

        Raises:
            torch.OutOfMemoryError, MemoryError: with the settings to lower.
            FloatingPointError: the student's weights are at fault and not the engine; its own words say how.
            RuntimeError: any other error of the engine, which is its cause.
        """
        try:
            with explain_out_of_memory(phase, self.config):
                yield
        except FloatingPointError:
            raise
        except Exception as error:
            full = isinstance(error, torch.OutOfMemoryError | MemoryError)
            kind, said = (type(error), "") if full else (RuntimeError, f"{type(error).__name__}: ")
            said += " ".join(str(error).split())
            engine = f"the {self.config.rollout.name} engine of rank {self.rank} of {self.world_size}"
            raise kind(f"{engine} failed in {call}: {said}") from error

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def peak_memory(self) -> dict[str, float]:
        """Peak GiB that PyTorch held on this rank's GPU since the last call, for all roles of this process, without the
        memory that it counts for an engine that can sleep; empty without a GPU."""
        if not self.device.startswith("cuda"):
            return {}
        held = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        torch.cuda.reset_peak_memory_stats()
        return {f"perf/max_memory_{kind}_gb": (size - self.engine_bytes) / GIB for kind, size in held.items()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def push_weights(self) -> None:
        """Give the engine the policy's present weights."""
        dtype = getattr(torch, self.config.rollout.dtype)
        at_work = self._engine_at_work("push_weights", "push_weights")
        with noted("giving the engine its first weights"), self.on_device("push_weights"), at_work:
            self.rollout.wake()
            self.rollout.push_weights(full_parameters(self.actor.actor_module.hf, dtype))

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def offer_weights(self) -> tuple[str, int]:
        """An address and a port of this process, at which engines of other processes may ask for weights."""
        address = os.environ["MASTER_ADDR"]
        return address, reserve_port(address)

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def open_line(self, address: str, port: int, engine_ranks: int) -> None:
        """Wait there for the engines, so many ranks of them."""
        self.line = WeightLine(address, port, SENDER, 1 + engine_ranks, self.device, self.collective_timeout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def send_weights(self) -> None:
        """Give those engines the policy's present weights; they have to receive them at the same time."""
        dtype = getattr(torch, self.config.rollout.dtype)
        with noted("giving the engine its first weights"), self.on_device("push_weights"):
            weights = full_parameters(self.actor.actor_module.hf, dtype)
            if self.line is not None:
                self.line.send(weights)
            # Gathering is collective, and what is gathered here is sent by rank 0.
            for _ in weights:
                pass

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Answer this rank's prompts; `meta_info` has `sampling` (SamplingConfig), `seed`, `report_log_probs` and, if
        answers are to be cut before their time, `longest`."""
        sampling: SamplingConfig = prompts.meta_info["sampling"]
        # Engines hold different prompts; a seed each keeps equal prompts from getting equal answers.
        engine = self.rank // self.config.rollout.tensor_model_parallel_size
        seed = prompts.meta_info["seed"] * self.world_size + engine
        with self._engine_at_work("generate", "generate_sequences"):
            asked = {key: prompts.meta_info[key] for key in ("report_log_probs", "longest") if key in prompts.meta_info}
            answers = self.rollout.generate(prompts, sampling, seed, **asked)
            self.rollout.sleep()
        return answers

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(ACTOR))
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """`old_log_probs` and `entropys` (B, N, T) of the answers under the present policy."""
        with self.on_device("compute_log_prob"):
            log_probs, entropies = self.actor.compute_log_prob(data)
        return DataProto.from_dict({"old_log_probs": log_probs, "entropys": entropies})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(ACTOR))
    def compute_teacher_log_prob(self, data: DataProto) -> DataProto:
        """`teacher_log_probs` (B, T) of the teacher's answers under the present policy, at temperature 1."""
        with self.on_device("compute_log_prob"):
            return DataProto.from_dict({"teacher_log_probs": self.actor.compute_teacher_log_prob(data)})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(ACTOR))
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """`ref_log_prob` (B, N, T) of the answers under the frozen reference."""
        with self._reference_at_work():
            log_probs, _ = self.reference.compute_log_prob(data, entropy=False)
        return DataProto.from_dict({"ref_log_prob": log_probs})

    @register(dispatch_mode=metrics_of_groups(ACTOR))
    def update_actor(self, data: DataProto) -> dict[str, float]:
        """Train the policy on the batch; the same metrics from every rank."""
        with self.update_on_device("update_actor"):
            metrics = self.actor.update_policy(data)
        return {**metrics, "actor/lr": self.finish_update(), **self.mfu("actor", self.actor.work)}

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(ACTOR))
    def compute_pair_ref_log_prob(self, data: DataProto) -> DataProto:
        """`chosen_ref_log_prob` and `rejected_ref_log_prob` (B,) under the frozen reference. Without one they are the
        policy's, which is the reference as long as it has its first weights."""
        if self.use_reference:
            with self._reference_at_work():
                return DataProto.from_dict(PairPolicy(self.reference).compute_log_prob(data))
        with self.on_device("compute_log_prob"):
            return DataProto.from_dict(PairPolicy(self.actor).compute_log_prob(data))

    @register(dispatch_mode=metrics_of_groups(ACTOR))
    def update_actor_on_pairs(self, data: DataProto) -> dict[str, float]:
        """Train the policy on preference pairs as `meta_info["soda"]` (SodaConfig) says; the same metrics from every
        rank."""
        policy = PairPolicy(self.actor)
        with self.update_on_device("update_actor"):
            metrics = policy.update(data, data.meta_info["soda"])
        return {**metrics, "actor/lr": self.finish_update(), **self.mfu("actor", policy.work)}


class CriticWorker(FSDPWorker):
    """The discriminator.

    Args:
        eos_token_ids: the tokens that may end a student's answer, the tokenizer's EOS first; the discriminator's own
            folder need not know them. None: the tokenizer's EOS alone.
    """

    def __init__(
        self,
        config: CriticConfig,
        device: str,
        seed: int,
        total_steps: int,
        eos_token_ids: tuple[int, ...] | None = None,
        collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
    ):
        super().__init__(device, seed, CRITIC, config.ulysses_sequence_parallel_size, collective_timeout)
        self.config = config
        self.total_steps = total_steps
        self.eos_token_ids = eos_token_ids

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build the discriminator and its optimizer; on the student's frozen base, where that is shared, which has
        been built before."""
        model, optim = self.config.model, self.config.optim
        with explain_out_of_memory("init", self.config):
            base = self._student_with_base()
            shards = self.config.ulysses_sequence_parallel_size
            module = self._build_trained(model, "score", model.fsdp_config, optim, self.total_steps, shards, base)
        self.compiled_before = compile_seconds()
        eos_token_ids = self.eos_token_ids or (self.tokenizer.eos_token_id,)
        self.critic = DataParallelPPOCritic(self.config, module, self.optimizer, eos_token_ids)
        # Saved with the weights, so that whoever scores with them later pools as training did.
        module.hf.config.discriminator = self.critic.scoring()

    def _student_with_base(self) -> ActorRolloutRefWorker | None:
        """The student in this process whose frozen weights the discriminator shares; None where it has its own."""
        for worker in self.colocated.values():
            if isinstance(worker, ActorRolloutRefWorker) and shares_base(worker.config, self.config):
                return worker
        return None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(CRITIC))
    def compute_values(self, data: DataProto) -> DataProto:
        """Values per token: `values` (B, N, T), or `teacher_values` (B, T) with `meta_info["compute_teacher"]`."""
        name = "teacher_values" if data.meta_info.get("compute_teacher", False) else "values"
        with self.on_device("compute_scores"):
            return DataProto.from_dict({name: self.critic.compute_values(data)})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(CRITIC))
    def compute_scores(self, data: DataProto) -> DataProto:
        """Pooled scores of students and teachers under the present discriminator."""
        with self.on_device("compute_scores"):
            return DataProto.from_dict(self.critic.compute_scores(data))

    @register(dispatch_mode=metrics_of_groups(CRITIC))
    def update_critic(self, data: DataProto) -> dict[str, float]:
        """Train the discriminator on the batch; the same metrics from every rank."""
        with self.update_on_device("update_critic"):
            metrics = self.critic.update_critic(data)
        return {**metrics, "critic/lr": self.finish_update(), **self.mfu("critic", self.critic.work)}

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(CRITIC))
    def score_and_update_critic(self, data: DataProto) -> DataProto:
        """`compute_scores` and one update on the whole batch in one forward; `meta_info["metrics"]` as from
        `update_critic`."""
        with self.update_on_device("update_critic"):
            scores, metrics = self.critic.score_and_update(data)
        metrics |= {"critic/lr": self.finish_update(), **self.mfu("critic", self.critic.work)}
        return DataProto.from_dict(scores, meta_info={"metrics": metrics})

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(CRITIC))
    def score_and_evaluate_critic(self, data: DataProto) -> DataProto:
        """`score_and_update_critic` in a step without an update; the schedule advances all the same."""
        with self.on_device("compute_scores"):
            scores, metrics = self.critic.score_and_evaluate(data)
        return DataProto.from_dict(scores, meta_info={"metrics": {**metrics, "critic/lr": self.finish_update()}})
