"""A Hugging Face model with the head this trainer needs, as one module: the unit that FSDP wraps.

`PolicyModel` turns rows into log-probs of their answer tokens, `ScoreModel` into one value per answer token. Both
call the backbone and apply the head themselves, on answer tokens only. Rows come from host memory; results are on the
model's device. That this gives what the class itself computes is proved (`proof.py`), not assumed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from verl.models.attention import PACKED_ATTENTION, set_attention
from verl.models.head_log_probs import Entropy, head_log_probs
from verl.models.layers import decoder_layers, is_recomputed
from verl.models.logits import logit_form
from verl.models.packing import AnswerRows, pack
from verl.models.proof import Verdict, check_class, too_long
from verl.models.row_mixers import row_mixers, run_on_rows
from verl.models.sequence_parallel import Shard
from verl.models.twin import sliding_window

# The names that families give the head of a token-classification model.
SCORE_HEADS = ("score", "classifier")


class AnswerModel(nn.Module, ABC):
    """The backbone's hidden states around the answers, packed or padded.

    Nothing in it is left to chance: the backbone is always in eval mode, see `train`.

    Where several ranks share their tokens (`shard`, which its builder sets) they are given the same rows, and have the
    same results.

    Raises:
        ValueError: the class's values are not those of its own plain forward (`proof.check_class`). With `proven` the
            caller compares them.
    """

    def __init__(self, hf: PreTrainedModel, remove_padding: bool = True, proven: bool = False):
        super().__init__()
        self.hf = hf
        self.remove_padding = remove_padding
        self.shard: Shard | None = None
        self.window = sliding_window(hf.config)
        for mixer in row_mixers(hf):
            run_on_rows(mixer)
        self.verdict = Verdict() if proven else check_class(type(self), type(hf), hf.config, remove_padding)
        self._set_attention()
        self.train()

    def _set_attention(self) -> None:
        if self.remove_padding:
            set_attention(self.hf, PACKED_ATTENTION)
        else:
            set_attention(self.hf, plain_attention(self.hf))

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Pad rows within the block instead of packing them."""
        packed, self.remove_padding = self.remove_padding, False
        self._set_attention()
        try:
            yield
        finally:
            self.remove_padding = packed
            self._set_attention()

    def train(self, mode: bool = True) -> AnswerModel:
        """Set training mode, as `nn.Module.train`, on this module and the recomputed layers alone, not on what is
        inside them: router jitter, dropout and dropped layers belong to training mode, and old log-probs, scores and
        the update have to see one and the same function."""
        self.training = mode
        self.hf.eval()
        for layer in decoder_layers(self.hf):
            layer.training = mode and is_recomputed(layer)
        return self

    @property
    def sequence_parallel_size(self) -> int:
        """The ranks that share the tokens of their rows."""
        return 1 if self.shard is None else self.shard.size

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.hf.parameters()).device

    @abstractmethod
    def values(self, rows: AnswerRows) -> torch.Tensor:
        """One fp32 number for each answer token, (R, T)."""

    def plain(self, rows: AnswerRows, noise: float = 0.0) -> torch.Tensor:
        """The same as `values`, from the class's own forward of one whole row at a time without any padding.

        Args:
            noise: a relative disturbance of the embeddings; its effect tells how large that of rounding may be.
        """
        values = torch.zeros(rows.responses.shape, device=self.device)
        attention = self.hf.config._attn_implementation
        set_attention(self.hf, plain_attention(self.hf))

        def disturb(module: nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
            sign = torch.arange(embedded.numel(), device=embedded.device).view_as(embedded) % 2 * 2 - 1
            return embedded * (1 + noise * sign).to(embedded.dtype)

        try:
            with self.hf.get_input_embeddings().register_forward_hook(disturb) if noise else nullcontext():
                for row, (prompt, answer) in enumerate(rows.unpadded()):
                    ids = torch.cat([prompt, answer]).to(self.device)
                    logits = self.hf(input_ids=ids.unsqueeze(0)).logits[0]
                    values[row, : len(answer)] = self.of_logits(logits.float(), ids, len(prompt))
        finally:
            set_attention(self.hf, attention)
        return values

    @abstractmethod
    def of_logits(self, logits: torch.Tensor, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """The answer's values (T,), from a row's logits (P + T, V), its tokens (P + T,), and P."""

    def answers(self, rows: AnswerRows, before: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (K, D) at the answer tokens, or at the token before each, in the order of the mask; the answer
        tokens (K,), and their places in the flattened (R * T) answers, (K,). Where ranks share the tokens, K are this
        rank's."""
        packed = pack(rows, self.window)
        self._check_length(packed.layout.width)
        if not self.remove_padding:
            packed = packed.to(self.device)
            return self._padded_hidden(rows, before), packed.answer_ids, packed.grid_index
        packed = (packed if self.shard is None else packed.of(self.shard, before)).to(self.device)
        hidden = self.hf.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **packed.layout.arguments()
        ).last_hidden_state
        index = packed.before_index if before else packed.answer_index
        return hidden[0].index_select(0, index), packed.answer_ids, packed.grid_index

    def answer_grid(self, values: torch.Tensor, grid_index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """`to_answer_grid`, with the values of all ranks that share the tokens."""
        grid = to_answer_grid(values, grid_index, shape)
        return grid if self.shard is None or not self.remove_padding else self.shard.sum(grid)

    def _check_length(self, tokens: int) -> None:
        if self.verdict.longest is not None and tokens > self.verdict.longest:
            raise ValueError(f"{type(self.hf).__name__}: {too_long(self.verdict, tokens)}")

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


def plain_attention(hf: PreTrainedModel) -> str:
    """The attention implementation of transformers that the class would choose itself; where scores are capped, its own
    code, since SDPA leaves caps out and some versions choose it all the same."""
    capped = getattr(hf.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if hf._supports_sdpa and not capped else "eager"


def score_head(hf: PreTrainedModel) -> nn.Linear:
    """The head of a token-classification model, whatever the family calls it; ValueError unless it has one label."""
    return getattr(hf, score_head_name(hf))


def score_head_name(hf: PreTrainedModel) -> str:
    """The attribute that holds `score_head`."""
    for name in SCORE_HEADS:
        head = getattr(hf, name, None)
        if isinstance(head, nn.Linear):
            if head.out_features != 1:
                raise ValueError(
                    f"expected a score head with one label, got {head.out_features} in {type(hf).__name__}"
                )
            return name
    raise ValueError(
        f"{type(hf).__name__} has no linear score head under {' or '.join(SCORE_HEADS)}: use another model as "
        "discriminator"
    )


def to_answer_grid(values: torch.Tensor, grid_index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Values of the real answer tokens, (K,), as (R, T) with zeros elsewhere."""
    return values.new_zeros(shape).index_put((grid_index // shape[1], grid_index % shape[1]), values)


class PolicyModel(AnswerModel):
    """Log-probs of the answers under a causal language model whose logits are the LM head's output, scaled or capped
    as its config says (`logits.py`)."""

    def __init__(self, hf: PreTrainedModel, remove_padding: bool = True, proven: bool = False):
        super().__init__(hf, remove_padding, proven)
        self.form = logit_form(type(hf), hf.config)

    def values(self, rows: AnswerRows) -> torch.Tensor:
        return self(rows)[0]

    def of_logits(self, logits: torch.Tensor, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        log_probs = logits[prompt - 1 : -1].log_softmax(-1)
        return log_probs.gather(-1, ids[prompt:].unsqueeze(-1)).squeeze(-1)

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
        log_probs, entropies = head_log_probs(
            hidden, head.weight, head.bias, answer_ids, temperature, entropy, self.form
        )
        shape = rows.responses.shape
        log_probs = self.answer_grid(log_probs, grid_index, shape)
        return log_probs, None if entropies is None else self.answer_grid(entropies, grid_index, shape)


class ScoreModel(AnswerModel):
    """The discriminator: one fp32 value per answer token from a token-classification model with one label.

    The head's dropout is left out: a score must not depend on chance, and the scores before an update must equal
    those of its own forward.
    """

    @property
    def head(self) -> nn.Linear:
        """The score head."""
        return score_head(self.hf)

    def values(self, rows: AnswerRows) -> torch.Tensor:
        return self(rows)

    def of_logits(self, logits: torch.Tensor, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        return logits[prompt:, 0]

    def forward(self, rows: AnswerRows) -> torch.Tensor:
        """Values (R, T) in fp32, zero outside the mask."""
        hidden, _, grid_index = self.answers(rows, before=False)
        head = self.head
        bias = None if head.bias is None else head.bias.float()
        values = nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
        return self.answer_grid(values, grid_index, rows.responses.shape)


ANSWER_MODELS: dict[str, type[AnswerModel]] = {"policy": PolicyModel, "score": ScoreModel}
