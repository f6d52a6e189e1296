"""A Hugging Face model with the head this trainer needs, as one module: the unit that FSDP wraps.

`PolicyModel` turns rows into log-probs of their answer tokens, `ScoreModel` into one value per answer token. Both
call the backbone and apply the head themselves, on answer tokens only. Rows come from host memory; results are on the
model's device.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from verl.models.attention import PACKED_ATTENTION, check_full_attention
from verl.models.head_log_probs import Entropy, head_log_probs
from verl.models.packing import AnswerRows, pack

# Config entries by which some families change their logits after the head.
LOGIT_CHANGES = ("logits_scaling", "logit_scale", "final_logit_softcapping")


class AnswerModel(nn.Module):
    """The backbone's hidden states around the answers, packed or padded."""

    def __init__(self, hf: PreTrainedModel, remove_padding: bool = True):
        super().__init__()
        self.hf = hf
        self.remove_padding = remove_padding
        if remove_padding:
            check_full_attention(hf.config)
        hf.set_attn_implementation(PACKED_ATTENTION if remove_padding else "sdpa")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.hf.parameters()).device

    def answers(self, rows: AnswerRows, before: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (K, D) at the answer tokens, or at the token before each, in the order of the mask; the answer
        tokens (K,), and their places in the flattened (R * T) answers, (K,)."""
        packed = pack(rows).to(self.device)
        if not self.remove_padding:
            return self._padded_hidden(rows, before), packed.answer_ids, packed.grid_index
        hidden = self.hf.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **packed.layout.arguments()
        ).last_hidden_state
        index = packed.before_index if before else packed.answer_index
        return hidden[0].index_select(0, index), packed.answer_ids, packed.grid_index

    def _padded_hidden(self, rows: AnswerRows, before: bool) -> torch.Tensor:
        """The classic way: every row at full width, padding masked. The reference for the packed path."""
        mask = torch.cat([rows.prompt_mask, rows.response_mask], dim=-1).long().to(self.device)
        hidden = self.hf.base_model(
            input_ids=torch.cat([rows.prompts, rows.responses], dim=-1).to(self.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        start = rows.prompts.shape[1] - int(before)
        return hidden[:, start : start + rows.responses.shape[1]][rows.response_mask.bool().to(self.device)]


def to_answer_grid(values: torch.Tensor, grid_index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Values of the real answer tokens, (K,), as (R, T) with zeros elsewhere."""
    return values.new_zeros(shape).index_put((grid_index // shape[1], grid_index % shape[1]), values)


class PolicyModel(AnswerModel):
    """Log-probs of the answers under a causal language model whose logits are the LM head's output as it is.

    Raises:
        ValueError: the model scales or caps its logits after the head.
    """

    def __init__(self, hf: PreTrainedModel, remove_padding: bool = True):
        super().__init__(hf, remove_padding)
        changed = [key for key in LOGIT_CHANGES if getattr(hf.config, key, None) not in (None, 1, 1.0)]
        if changed:
            raise ValueError(f"{hf.config.model_type} models change their logits by {changed}, which is not supported")

    def forward(
        self, rows: AnswerRows, temperature: float | torch.Tensor = 1.0, entropy: Entropy = "none"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and entropies in nats, fp32, (R, T) each, zero outside the mask.

        Args:
            temperature: divides the logits, as in sampling; one for all rows, or one each, (R,), on the device.
            entropy: not computed (None is returned), its value only, or differentiable.
        """
        hidden, answer_ids, grid_index = self.answers(rows, before=True)
        head = self.hf.get_output_embeddings()
        if isinstance(temperature, torch.Tensor):
            temperature = temperature[grid_index // rows.responses.shape[1]]
        log_probs, entropies = head_log_probs(hidden, head.weight, head.bias, answer_ids, temperature, entropy)
        shape = rows.responses.shape
        log_probs = to_answer_grid(log_probs, grid_index, shape)
        return log_probs, None if entropies is None else to_answer_grid(entropies, grid_index, shape)


class ScoreModel(AnswerModel):
    """The discriminator: one fp32 value per answer token from a token-classification model with one label.

    The head's dropout is left out: a score must not depend on chance, and the scores before an update must equal
    those of its own forward.
    """

    def forward(self, rows: AnswerRows) -> torch.Tensor:
        """Values (R, T) in fp32, zero outside the mask."""
        hidden, _, grid_index = self.answers(rows, before=False)
        head = self.hf.score
        bias = None if head.bias is None else head.bias.float()
        values = nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
        return to_answer_grid(values, grid_index, rows.responses.shape)
