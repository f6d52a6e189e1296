"""The algorithms that this package ships, by name: settings that name them are checked without loading any, which takes
torch. Others are looked for where users register theirs (`trainer/ppo/core_algos.py`)."""

ADV_ESTIMATORS = frozenset({"grpo"})
POLICY_LOSSES = frozenset({"vanilla", "gspo"})
# Each also with a '+' behind it.
KL_PENALTIES = frozenset({"kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"})
DISCRIMINATOR_LOSSES = frozenset({"bradley_terry", "hinge", "two_sided_hinge", "ranking"})
