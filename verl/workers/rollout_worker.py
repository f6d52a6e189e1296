"""The worker of a rank that generates and does nothing else: an engine on a device of its own."""

from __future__ import annotations

from datetime import timedelta

from verl.config import ActorRolloutRefConfig
from verl.memory.errors import explain_out_of_memory
from verl.models.tokenizer import load_tokenizer
from verl.protocol import DataProto
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.fsdp_workers import ActorRolloutRefWorker
from verl.workers.rollout.weight_line import WeightLine
from verl.workers.worker_base import COLLECTIVE_TIMEOUT


class RolloutWorker(ActorRolloutRefWorker):
    """The engine of an `ActorRolloutRefWorker` without its models: it gets its weights from other processes.

    Calls return at once, so that the driver does other things meanwhile. A rank makes them one after the other, in
    their order.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        device: str,
        seed: int,
        collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
    ):
        super().__init__(config, device, seed, 1, use_reference=False, collective_timeout=collective_timeout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def init_model(self) -> None:
        """Build the engine; no policy."""
        model = self.config.model
        with explain_out_of_memory("init", self.config):
            self.tokenizer = load_tokenizer(model.tokenizer_path or model.path, model.trust_remote_code)
            self._build_rollout()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def ask_for_weights(self, address: str, port: int) -> None:
        """Meet there the rank that sends weights, and the other engines' ranks."""
        size = 1 + self.world_size
        self.line = WeightLine(address, port, 1 + self.rank, size, self.device, self.collective_timeout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def receive_weights(self) -> None:
        """Take over the weights that are being sent."""
        weights = self.line.receive()
        with self._engine_at_work("push_weights", "receive_weights"):
            try:
                self.rollout.wake()
                self.rollout.push_weights(weights)
            finally:
                # Where they are refused the others are sent the rest all the same, and wait for this rank.
                for _ in weights:
                    pass

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """As of any engine (`ActorRolloutRefWorker.generate_sequences`)."""
        return super().generate_sequences(prompts)
