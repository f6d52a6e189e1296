"""The metric names that each stage must log: they are an interface."""

SEQKD_METRICS = {
    "actor/sft_loss",
    "actor/teacher_pg_loss",
    "actor/entropy",
    "actor/grad_norm",
    "actor/lr",
    "train/rouge-L/mean",
    "training/rollout_probs_diff_mean",
    "training/rollout_probs_diff_max",
    *(
        f"{name}/{kind}"
        for name in ("response_length", "prompt_length")
        for kind in ("mean", "max", "min", "clip_ratio")
    ),
}
DISCRIMINATOR_METRICS = {
    *("critic/d_loss", "critic/d_acc", "critic/score_diff", "critic/raw_score_diff", "critic/ranking_loss"),
    *("critic/student_value_mean", "critic/teacher_value_mean"),
    *("critic/student_score_mean", "critic/teacher_score_mean", "critic/grad_norm", "critic/lr"),
    *("critic/length_ratio", "critic/length_reward_corr", "critic/zero_std_group_frac"),
    *("critic/length_reward_corr_in_groups", "critic/group_length_spread"),
    *("critic/student_score_std", "critic/teacher_score_std", "critic/group_score_std"),
    *("critic/score/mean", "critic/rewards/mean", "critic/advantages/mean", "critic/returns/mean"),
}
POLICY_METRICS = {
    *("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/kl_loss", "actor/kl_divergence"),
    *("actor/entropy", "actor/grad_norm", "actor/lr"),
}
VALIDATION_METRICS = {"val/rouge-L/mean", "val/sft_loss", "val/response_length/mean"}
COMMON_METRICS = {
    "perf/total_num_tokens",
    "perf/time_per_step",
    "perf/throughput",
    "timing_s/step",
    "timing_s/gen",
    "timing_s/update_actor",
    "training/global_step",
    "training/epoch",
}
