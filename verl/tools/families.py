"""Which model families can be trained, as docs/models.md says: the proof of every class that transformers has.

    python -m verl.tools.families > docs/models.md
    python -m docs_site.generate    # the Chinese page, from that

Families are found by walking the auto classes' mapping of causal language models, with each family's default config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from verl.models.answer_models import ANSWER_MODELS
from verl.models.loading import Kind, NoSuchClass, as_discriminator, find_class, quiet_transformers
from verl.models.proof import Verdict, class_verdict
from verl.models.twin import own_config, small_config
from verl.utils.command_line import called_as

UNKNOWN = Verdict(compared=False)
KINDS: tuple[Kind, ...] = ("policy", "score")
HEAD = """\
# Models

Which families can be trained, found with transformers {version} by comparing packed rows, padded rows
(`use_remove_padding=False`) and each row alone with the class's own `forward().logits`, for a small model of each
family's default config. Written by `python -m verl.tools.families`; your own model is compared in the same way before
anything starts, and once more on its own weights.

- **packed**: right as it is. "up to N": for rows of at most N tokens (prompt and answer), because of the entry named.
- **padded**: right with `use_remove_padding=False` only, which is slower.
- **own weights**: the default config makes no small model that works. Yours may; otherwise it is compared on its own
  weights, when the worker has read them.
- **not tried**: the default config makes no model at all.
- **no**: refused before anything starts, for the reason given.

Windows, sinks, capped scores and scaled or capped logits are computed packed, and a prompt that answers share once. Two
things cost more there, and the log says so at the start. Layers that carry a state along a row (linear attention,
state-space layers, short convolutions) are padded to the longest row of a micro-batch, compute a shared prompt once for
each answer and are not compiled; on GPUs transformers asks for `flash-linear-attention` and `causal-conv1d`, without
which they are slow. Capped scores (Gemma 2) have no kernel: attention is then computed plainly in fp32, row by row, and
again in the backward pass, in time and, for one row at a time, in memory that grow with the square of the length.

Where transformers has no token-classification class for a family, the discriminator is the family's backbone and a
linear `score` (`verl.models.score_classes.register_score_class`). Outside of this package such a critic opens once that
function has been called with the class of its config.

A reward model (`...ForSequenceClassification`) with one label is taken as a discriminator with its head; its score is
that of the last token, which is EOS here: a chat template that closes an answer with something else, as Gemma 2's
does, is not followed there. One whose score its own code computes is refused. A discriminator may be of another
family than the student, with a tokenizer of its own ([the stages](stages.md)).

A model whose code is in its folder is not in the table, and is compared as any other. Its code runs where
`actor_rollout_ref.model.trust_remote_code` is set, in student and discriminator, and goes into checkpoints and merged
folders; as a discriminator it gets the same linear `score`, unless its code has a class for
`AutoModelForTokenClassification`.

| family | policy | discriminator | why not packed |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Family:
    """A model type as policy or discriminator. `model_class` is None where none can be built, `problem` says why,
    and `is_refused` that none would be from any config. What is right packed is not looked at padded."""

    model_type: str
    kind: Kind
    config: PretrainedConfig | None = None
    model_class: type[PreTrainedModel] | None = None
    packed: Verdict = UNKNOWN
    padded: Verdict = UNKNOWN
    problem: str = ""
    is_refused: bool = False

    @property
    def outcome(self) -> str:
        """A word or two, as in the table."""
        if self.model_class is None:
            return "no" if self.is_refused else "not tried"
        if not (self.packed.compared or self.padded.compared):
            return "own weights"
        if self.packed.compared and self.packed.fault is None:
            limit = self.packed
            return "packed" if limit.longest is None else f"packed up to {limit.longest} ({limit.reason})"
        return "padded" if self.padded.compared and self.padded.fault is None else "no"


def look_at(model_type: str, kind: Kind) -> Family:
    """What the proof says of a family's default config."""
    try:
        config = AutoConfig.for_model(model_type)
        if kind == "score":
            as_discriminator(config)
        model_class = find_class(small_config(config), kind)
        config = own_config(model_class, config)
    except Exception as error:
        # Some default configs are not meant to be used, and fail in any way.
        lines = str(error).strip().splitlines()
        problem = lines[0][:120] if lines else type(error).__name__
        return Family(model_type, kind, problem=problem, is_refused=isinstance(error, NoSuchClass))
    packed = class_verdict(ANSWER_MODELS[kind], model_class, config, remove_padding=True)
    right = packed.compared and packed.fault is None and packed.longest is None
    padded = UNKNOWN if right else class_verdict(ANSWER_MODELS[kind], model_class, config, remove_padding=False)
    return Family(model_type, kind, config, model_class, packed, padded)


def model_types() -> list[str]:
    """Every family of causal language models, by name."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(families: Iterator[tuple[Family, Family]]) -> str:
    """docs/models.md, from each family as policy and as discriminator."""
    lines = []
    for policy, score in families:
        fault = policy.packed.fault or score.packed.fault or policy.problem
        cells = [policy.model_type, policy.outcome, score.outcome, (fault or "").replace("|", "/").replace("\n", " ")]
        lines.append("| " + " | ".join(cells) + " |")
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"


def main() -> None:
    """Print the document."""
    argparse.ArgumentParser(
        prog=called_as("verl.tools.families"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    quiet_transformers()
    sys.stdout.write(table((look_at(name, "policy"), look_at(name, "score")) for name in model_types()))


if __name__ == "__main__":
    main()
