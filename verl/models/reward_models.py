"""Reward models as discriminators: folders of a `...ForSequenceClassification` model with one label.

Such a model scores a conversation by a linear head on the hidden state of its last token. The same head on every
answer token is a discriminator's, and its value at the last token is the reward model's score. The head has no bias;
one that the token-classification class adds begins at zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    from torch import nn

CLASS = "ForSequenceClassification"
AUTO_CLASS = "AutoModelForSequenceClassification"
# The names that such classes give their head.
HEADS = ("score", "classifier")
# What the pooling of a reward model's score is in this trainer's terms.
POOLING = "last_token"


def is_reward_model(entries: Mapping[str, Any]) -> bool:
    """Whether the entries of a config.json are those of a sequence-classification model."""
    return any(name.endswith(CLASS) for name in entries.get("architectures") or [])


def refuse_other_rewards(path: str | Path, entries: Mapping[str, Any]) -> None:
    """ValueError for a reward model of a class of its own, or with code of its own, whose score would be another one
    here."""
    if is_reward_model(entries) and AUTO_CLASS in (entries.get("auto_map") or {}):
        raise ValueError(
            f"{path} is a reward model whose score its own code computes ({entries['auto_map'][AUTO_CLASS]}), which is "
            "not run here: expected a class of transformers' own, or a language model, which gets a fresh score head"
        )
    for name in entries.get("architectures") or []:
        if "Reward" in name and not name.endswith((CLASS, "ForTokenClassification")):
            raise ValueError(
                f"{path} is a reward model of a class of its own ({name}), whose head is not known here: expected "
                f"...{CLASS} with one label, or a language model, which gets a fresh score head"
            )


def labels_of(entries: Mapping[str, Any], weights: Sequence[Path]) -> int:
    """The outputs of a reward model's head, as its files of weights say, or, without safetensors, its config."""
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for name in {f"{head}.weight" for head in HEADS} & set(tensors.keys()):
                return tensors.get_slice(name).get_shape()[0]
    # transformers writes neither where there are two.
    return entries.get("num_labels") or len(entries.get("id2label") or (0, 1))


def refuse_more_than_a_head(path: str | Path, unexpected: Collection[str]) -> None:
    """ValueError for weights of a reward model that backbone and linear head have no place for; an LM head that it has
    kept takes no part in its score."""
    more = sorted(name for name in unexpected if not name.startswith("lm_head."))
    if more:
        raise ValueError(
            f"{path} is a reward model with {len(more)} weights more than a linear head on its backbone, e.g. "
            f"{more[:3]}: its score would be another one here; pass the language model that it was made from"
        )


def head_renaming(name: str) -> dict[str, str]:
    """`key_mapping` of `from_pretrained` by which a reward model's head becomes the one called `name`."""
    return {rf"^{head}\.": f"{name}." for head in HEADS if head != name}


def settled_bias(path: str | Path, head: nn.Linear, name: str, missing: Collection[str]) -> set[str]:
    """Set the bias to zero where the reward model's head had none; returns its name, if so.

    Args:
        head: of the model that was loaded, called `name`.
        missing: names of the tensors that were not found.

    Raises:
        ValueError: the head itself was not found.
    """
    if f"{name}.weight" in missing:
        raise ValueError(
            f"{path} says that it is a reward model, and has no head under {' or '.join(HEADS)}: expected "
            f"{HEADS[0]}.weight among its weights; save it as ...{CLASS}, or pass the language model that it was made "
            "from, for a fresh head"
        )
    if f"{name}.bias" not in missing:
        return set()
    head.bias.data.zero_()
    return {f"{name}.bias"}
