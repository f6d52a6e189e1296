"""Settings that are each fine and contradict each other: all found before any process starts.

Every check returns sentences that give the numbers and a way out; none raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import signature

from verl.config import ActorConfig, CriticConfig, FSDPConfig
from verl.config.run import LONGEST_STALL, Config
from verl.config.shipped import ADV_ESTIMATORS, KL_PENALTIES, POLICY_LOSSES
from verl.monitor.rules import RuleFault, load_rules
from verl.trainer.config.discriminator_checks import discriminator_conflicts
from verl.trainer.config.number_checks import number_conflicts
from verl.trainer.config.soda_checks import soda_conflicts
from verl.trainer.config.value_checks import nothing_conflicts
from verl.utils.tracking import BACKENDS
from verl.utils.user_code import load_user_function
from verl.workers.rollout import ROLLOUTS

# What file systems take, 255 bytes, less what is appended for files named after the run.
LONGEST_NAME = 200


def find_conflicts(config: Config) -> list[str]:
    """Everything wrong with the combination of settings, as sentences."""
    checks = (
        number_conflicts,
        _batches,
        _sequence_parallel,
        _token_budgets,
        _names,
        _stage,
        _actor,
        soda_conflicts,
        _sampling,
        _kl,
        _adapters,
        discriminator_conflicts,
        _task_reward,
        _run_names,
        _resume,
        _profile,
        _stalls,
        _best,
        _monitor_rules,
        _engine,
        _ahead,
        _left_out,
        nothing_conflicts,
    )
    return [problem for check in checks for problem in check(config)]


def _batches(config: Config) -> Iterator[str]:
    batch, ranks = config.data.train_batch_size, config.trainer.ranks
    if any(ranks % part.ulysses_sequence_parallel_size for _, part in _trained(config)):
        return  # `_sequence_parallel` says so.
    if batch % max(config.actor_shares, config.critic_shares if config.use_critic else 1):
        yield f"data.train_batch_size={batch} does not divide over {ranks} ranks (nnodes x n_gpus_per_node)"
    for name, part in _trained(config):
        mini, shards = part.ppo_mini_batch_size, part.ulysses_sequence_parallel_size
        over = f"{ranks} ranks" if shards == 1 else f"{ranks // shards} groups of {shards} ranks"
        if batch % mini:
            yield (
                f"{name}.ppo_mini_batch_size={mini} does not divide data.train_batch_size={batch} "
                f"(both count prompts); use {batch} or a divisor of it"
            )
        if mini % (ranks // shards):
            yield f"{name}.ppo_mini_batch_size={mini} does not divide over {over}"


def _trained(config: Config) -> list[tuple[str, ActorConfig | CriticConfig]]:
    """The settings of what is trained, by their group."""
    actor = ("actor_rollout_ref.actor", config.actor_rollout_ref.actor)
    return [actor, ("critic", config.critic)] if config.use_critic else [actor]


def _sequence_parallel(config: Config) -> Iterator[str]:
    """Ranks that share the tokens of their rows."""
    actors, references = (
        part.ulysses_sequence_parallel_size for part in (config.actor_rollout_ref.actor, config.actor_rollout_ref.ref)
    )
    if references != actors:
        yield (
            f"actor_rollout_ref.ref.ulysses_sequence_parallel_size={references} differs from the actor's, {actors}, "
            "whose rows the reference is given: leave it out"
        )
    for (name, part), model in zip(_trained(config), ("actor_rollout_ref.model", "critic.model"), strict=False):
        size, ranks = part.ulysses_sequence_parallel_size, config.trainer.ranks
        key = f"{name}.ulysses_sequence_parallel_size={size}"
        if ranks % size:
            yield f"{key} does not divide trainer.nnodes x trainer.n_gpus_per_node = {ranks} ranks; use a divisor"
        padded = not (config.critic.model if name == "critic" else config.actor_rollout_ref.model).use_remove_padding
        if size > 1 and padded:
            yield f"{key} splits packed rows, and {model}.use_remove_padding=False pads them: set it to True, or use 1"


def _token_budgets(config: Config) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    longest = config.data.max_prompt_length + config.data.max_response_length
    actor = config.actor_rollout_ref.actor
    budgets = [("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", actor.use_dynamic_bsz,
                actor.ppo_max_token_len_per_gpu),
               ("actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu", rollout.log_prob_use_dynamic_bsz,
                rollout.log_prob_max_token_len_per_gpu)]  # fmt: skip
    if config.use_critic:
        critic = config.critic
        budgets.append(("critic.ppo_max_token_len_per_gpu", critic.use_dynamic_bsz, critic.ppo_max_token_len_per_gpu))
    for name, used, budget in budgets:
        shards = (config.critic if name.startswith("critic") else actor).ulysses_sequence_parallel_size
        if used and budget * shards < longest:
            over = "" if shards == 1 else f" over {shards} ranks"
            yield (
                f"{name}={budget} is below one whole sequence{over}, max_prompt_length + max_response_length = "
                f"{longest}; raise it to at least {-(-longest // shards)}"
            )
    for name, part in _trained(config):
        if not part.use_dynamic_bsz and part.ppo_micro_batch_size_per_gpu is None:
            yield f"{name}.use_dynamic_bsz=False needs {name}.ppo_micro_batch_size_per_gpu"
    if not rollout.log_prob_use_dynamic_bsz and rollout.log_prob_micro_batch_size_per_gpu is None:
        name = "actor_rollout_ref.rollout.log_prob"
        yield f"{name}_use_dynamic_bsz=False needs {name}_micro_batch_size_per_gpu"
    for name, value, data in (
        ("prompt_length", rollout.prompt_length, config.data.max_prompt_length),
        ("response_length", rollout.response_length, config.data.max_response_length),
    ):
        if value != data:
            yield (
                f"actor_rollout_ref.rollout.{name}={value} differs from data.max_{name}={data}: set the latter alone"
            )
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        yield (
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len} is below max_prompt_length + "
            f"max_response_length = {longest}; raise it or shorten them"
        )


def _names(config: Config) -> Iterator[str]:
    def unknown(key: str, value: str, known: list[str]) -> Iterator[str]:
        if value not in known:
            several = f"; several as {key}=[{value.replace(chr(0xFF0C), ',')}]" if re.search("[,\uff0c]", value) else ""
            yield f"{key}={value} is not known: use one of {', '.join(sorted(known))}{several}"

    estimator, loss_mode = config.algorithm.adv_estimator, config.actor_rollout_ref.actor.policy_loss.loss_mode
    if estimator not in ADV_ESTIMATORS or loss_mode not in POLICY_LOSSES:
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

        yield from unknown("algorithm.adv_estimator", estimator, list(ADV_ESTIMATOR_REGISTRY))
        yield from unknown("actor_rollout_ref.actor.policy_loss.loss_mode", loss_mode, list(POLICY_LOSS_REGISTRY))
    yield from unknown("actor_rollout_ref.rollout.name", config.actor_rollout_ref.rollout.name, list(ROLLOUTS))
    loggers = config.trainer.logger
    for logger in [loggers] if isinstance(loggers, str) else loggers:
        yield from unknown("trainer.logger", logger, list(BACKENDS))


def _stage(config: Config) -> Iterator[str]:
    trainer, critic = config.trainer, config.critic
    if critic.enable is not None and critic.enable != config.use_critic:
        yield (
            f"critic.enable={critic.enable} contradicts trainer.critic_warmup={trainer.critic_warmup}: "
            "-1 means no discriminator, anything else means one; leave critic.enable at null"
        )
    if not config.use_critic and not config.use_sft and not config.soda.enable:
        yield (
            "there is no discriminator (trainer.critic_warmup=-1), so nothing scores the answers: set "
            "actor_rollout_ref.actor.use_sft_mode=True for SeqKD, soda.enable=True for SODA, or trainer.critic_warmup "
            "to 0 or more"
        )
    if config.use_critic and config.use_sft and not trainer.warmup_use_sft:
        yield (
            "actor_rollout_ref.actor.use_sft_mode=True trains on the teacher's answers alone and leaves no use for a "
            "discriminator: set trainer.critic_warmup=-1 (stage=seqkd does), or trainer.warmup_use_sft=True to train "
            "both at once"
        )
    if trainer.warmup_use_sft and not (config.use_sft and config.use_critic):
        yield (
            "trainer.warmup_use_sft=True trains the actor by SFT beside a discriminator: it needs "
            "actor_rollout_ref.actor.use_sft_mode=True (its default then) and trainer.critic_warmup of 0 or more"
        )
    if trainer.val_only and config.data.val_files is None:
        yield "trainer.val_only=True needs data.val_files"


def _actor(config: Config) -> Iterator[str]:
    actor = config.actor_rollout_ref.actor
    if config.use_sft:
        unused = {
            "actor_rollout_ref.actor.entropy_coeff": actor.entropy_coeff,
            "algorithm.use_kl_in_reward": config.algorithm.use_kl_in_reward,
            "algorithm.task_reward_weight": config.algorithm.task_reward_weight,
            "algorithm.rollout_is": config.algorithm.rollout_is,
            # The warmup stage has one for the policy loss that it trains with otherwise.
            "actor_rollout_ref.actor.sft_anchor_coef": 0 if config.use_critic else actor.sft_anchor_coef,
        }
        for key in (key for key, value in unused.items() if value):
            yield f"{key}={unused[key]} has no effect with actor_rollout_ref.actor.use_sft_mode=True; leave it off"
    if config.algorithm.rollout_is_threshold < 1:
        yield (
            f"algorithm.rollout_is_threshold={config.algorithm.rollout_is_threshold} would scale down answers that "
            "engine and trainer agree on, whose weight is 1: use 1 or more"
        )
    mode = actor.policy_loss.loss_mode
    if config.algorithm.rollout_is and mode not in POLICY_LOSSES:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

        loss = POLICY_LOSS_REGISTRY.get(mode)
        if loss and "rollout_is_weights" not in signature(loss).parameters:
            yield (
                f"algorithm.rollout_is={config.algorithm.rollout_is}: the policy loss {mode} has no parameter "
                "rollout_is_weights, which its token losses are to be multiplied by; add it, or leave rollout_is out"
            )
    if not config.use_sft and actor.policy_loss.loss_mode == "vanilla" and actor.clip_ratio_c <= 1:
        yield f"actor_rollout_ref.actor.clip_ratio_c={actor.clip_ratio_c} must be above 1, the cap of dual clip"


def _sampling(config: Config) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    if not config.use_sft and not config.soda.enable:
        if rollout.n < 2:
            yield f"GRPO compares answers to one prompt: actor_rollout_ref.rollout.n={rollout.n} must be 2 or more"
        if not rollout.do_sample:
            yield "actor_rollout_ref.rollout.do_sample=False makes all n answers alike: advantages would be 0"
        if rollout.top_p != 1.0 or rollout.top_k > 0:
            yield (
                f"training with top_p={rollout.top_p}, top_k={rollout.top_k} makes the policy ratio wrong: "
                "use top_p=1 and top_k=-1 (val_kwargs may differ)"
            )
    for name, sampling in (("rollout", rollout.sampling), ("rollout.val_kwargs", rollout.val_kwargs)):
        if sampling.do_sample and sampling.temperature <= 0:
            yield f"actor_rollout_ref.{name}: sampling needs a temperature above 0, got {sampling.temperature}"
        if not sampling.do_sample and sampling.n > 1:
            yield f"actor_rollout_ref.{name}: n={sampling.n} greedy answers would be {sampling.n} copies"


def _kl(config: Config) -> Iterator[str]:
    named = []
    if config.actor_rollout_ref.actor.use_kl_loss:
        named.append(("actor_rollout_ref.actor.kl_loss_type", config.actor_rollout_ref.actor.kl_loss_type))
    if config.algorithm.use_kl_in_reward:
        named.append(("algorithm.kl_penalty", config.algorithm.kl_penalty))
    for key, kind in ((key, kind.removesuffix("+")) for key, kind in named):
        if kind in KL_PENALTIES:
            continue
        import torch

        from verl.trainer.ppo.core_algos import kl_penalty_forward

        try:
            kl_penalty_forward(torch.zeros(1, 1), torch.zeros(1, 1), kind)
        except NotImplementedError as error:
            yield f"{key}: {error}"


def _task_reward(config: Config) -> Iterator[str]:
    custom, weight = config.custom_reward_function, config.algorithm.task_reward_weight
    if custom.path is None and weight != 0:
        yield f"algorithm.task_reward_weight={weight} needs custom_reward_function.path, a Python file with the reward"
    if custom.path is not None:
        try:
            load_user_function(f"{custom.path}:{custom.name}")
        except ValueError as error:
            yield f"custom_reward_function: {error}"


def _adapters(config: Config) -> Iterator[str]:
    """Settings of adapters where none are made."""
    student, critic = config.actor_rollout_ref.model, config.critic.model
    plain = {
        "target_modules": ("all-linear", student.target_modules),
        "exclude_modules": (None, student.exclude_modules),
    }
    plain |= {"use_dora": (False,), "use_rslora": (False,), "load_in_4bit": (False,)}
    for name, model in [("actor_rollout_ref", student)] + [("critic", critic)] * config.use_critic:
        for key, usual in plain.items():
            value = getattr(model, key)
            # The critic's follow the student's.
            idle = value != usual[0] if model is student else value not in usual
            if model.lora_rank == 0 and idle:
                yield (
                    f"{name}.model.{key}={value} is of adapters, and {name}.model.lora_rank=0 makes none: set it to "
                    f"their rank, or leave {key} out (adapters that the path has already keep their own)"
                )


def _run_names(config: Config) -> Iterator[str]:
    """Names that folders cannot have, or that lead out of the one for checkpoints."""
    for key in ("project_name", "experiment_name"):
        name = getattr(config.trainer, key)
        parts = name.split("/")
        if not name.isprintable() or any(part.strip() in ("", ".", "..") for part in parts):
            yield (
                f"trainer.{key}={name!r:.80} is no name for a folder below that of all runs: use letters, digits, "
                "dashes, and a slash between folders, without '.' or '..' and without line breaks"
            )
        elif max(len(part.encode(errors="surrogateescape")) for part in parts) > LONGEST_NAME:
            yield f"trainer.{key}={name[:20]!r}... is too long for a folder: use at most {LONGEST_NAME} bytes"


def _resume(config: Config) -> Iterator[str]:
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path is None:
        yield "trainer.resume_mode=resume_path needs trainer.resume_from_path, a global_step_N folder"
    if trainer.resume_mode != "resume_path" and trainer.resume_from_path is not None:
        yield (
            f"trainer.resume_from_path is set but trainer.resume_mode={trainer.resume_mode} would not use it: "
            "set trainer.resume_mode=resume_path"
        )


def _profile(config: Config) -> Iterator[str]:
    trainer = config.trainer
    steps = trainer.profile_steps or []
    twice = sorted({step for step in steps if steps.count(step) > 1})
    if twice:
        yield (
            f"trainer.profile_steps={steps} names {', '.join(map(str, twice))} several times: a step is traced once, "
            "name it once"
        )
    if steps and trainer.val_only:
        yield f"trainer.profile_steps={steps} traces steps of training, and trainer.val_only=True makes none"


def _stalls(config: Config) -> Iterator[str]:
    warning, timeout = config.trainer.stall_warning, config.trainer.stall_timeout
    for key, seconds in (("stall_warning", warning), ("stall_timeout", timeout)):
        if seconds == 0:
            yield f"trainer.{key}=0: expected a number of seconds, or -1 for never"
        if seconds > LONGEST_STALL.total_seconds():
            yield f"trainer.{key}={seconds}: expected at most {LONGEST_STALL.days} days in seconds, or -1 for never"
    if timeout > 0 and warning >= timeout:
        yield (
            f"trainer.stall_warning={warning} warns of nothing, because trainer.stall_timeout={timeout} ends the run "
            "before: make it less, or -1"
        )


def _best(config: Config) -> Iterator[str]:
    trainer, data = config.trainer, config.data
    metric, patience = trainer.best_metric, trainer.early_stop_patience
    if metric is not None and data.val_files is None:
        yield f"trainer.best_metric={metric} compares validations, and there are none without data.val_files"
    elif metric is not None and trainer.test_freq <= 0 and not (trainer.val_before_train or trainer.val_only):
        yield (
            f"trainer.best_metric={metric} compares validations, and there are none with trainer.test_freq="
            f"{trainer.test_freq} and trainer.val_before_train=False: set trainer.test_freq to steps between them"
        )
    if metric == "val/sft_loss" and trainer.best_mode == "max":
        yield "trainer.best_metric=val/sft_loss with trainer.best_mode=max would keep the worst: set best_mode=min"
    if patience is not None and metric is None:
        yield f"trainer.early_stop_patience={patience} needs trainer.best_metric, the validation metric to wait for"
    elif patience is not None and trainer.test_freq <= 0:
        yield (
            f"trainer.early_stop_patience={patience} counts validations during training, and there are none with "
            f"trainer.test_freq={trainer.test_freq}: set it to steps between them"
        )


def _monitor_rules(config: Config) -> Iterator[str]:
    if config.trainer.on_alarm == "stop" and "file" not in config.trainer.logger:
        # Alarms of before are known from metrics.jsonl; without it each would stop the run again when it goes on.
        yield "trainer.on_alarm=stop needs the file logger: add file to trainer.logger, or set trainer.on_alarm=warn"
    if config.trainer.monitor_rules is not None:
        if config.trainer.on_alarm == "off":
            yield "trainer.monitor_rules is set but trainer.on_alarm=off would not use it: set trainer.on_alarm=warn"
        try:
            load_rules(config.trainer.monitor_rules)
        except RuleFault as fault:
            yield from (f"trainer.monitor_rules: {problem}" for problem in fault.problems)


def _engine(config: Config) -> Iterator[str]:
    name, size = config.actor_rollout_ref.rollout.name, config.actor_rollout_ref.rollout.tensor_model_parallel_size
    key = f"actor_rollout_ref.rollout.tensor_model_parallel_size={size}"
    own = config.actor_rollout_ref.rollout.n_gpus_per_node
    per_node = own or config.trainer.n_gpus_per_node
    if size > 1 and name != "vllm":
        yield f"{key} is not supported with rollout.name={name}, which runs one engine per rank; use 1"
    elif per_node % size:
        where = "actor_rollout_ref.rollout" if own else "trainer"
        yield f"{key} does not divide {where}.n_gpus_per_node={per_node}: an engine's ranks share a node; use a divisor"


def _ahead(config: Config) -> Iterator[str]:
    ahead, own = config.trainer.rollout_ahead, config.actor_rollout_ref.rollout.n_gpus_per_node
    key = f"actor_rollout_ref.rollout.n_gpus_per_node={own}"
    if ahead and not config.use_critic:
        yield (
            f"trainer.rollout_ahead=1 writes a step's answers while the one before trains, and {config.stage} trains "
            "on none that are written on the way: leave it at 0; it is for stage=warmup and stage=gad"
        )
    elif ahead and not own:
        yield (
            f"trainer.rollout_ahead=1 needs devices for engines beside those that train, and there are none ({key}): "
            "set it to devices per node, and trainer.n_gpus_per_node to the others, or leave trainer.rollout_ahead at 0"
        )
    elif own and not ahead:
        yield (
            f"{key} gives engines devices of their own, which would be idle while the others train, and those while "
            "engines write: set trainer.rollout_ahead=1, or leave it at 0"
        )


def _left_out(config: Config) -> Iterator[str]:
    """Keys that scripts pass and whose other values have no meaning here, or none yet."""
    trainer, algorithm = config.trainer, config.algorithm
    neutral = [
        ("trainer.default_hdfs_dir", trainer.default_hdfs_dir, None, "checkpoints go to trainer.default_local_dir"),
        ("algorithm.gamma", algorithm.gamma, 1.0, "outcome rewards are not discounted"),
        ("algorithm.lam", algorithm.lam, 1.0, "it belongs to GAE, which needs a value function"),
        ("reward_model.enable", config.reward_model.enable, False, "the discriminator is the reward"),
        (
            "actor_rollout_ref.hybrid_engine", config.actor_rollout_ref.hybrid_engine or trainer.rollout_ahead == 1,
            True, "the only layout without trainer.rollout_ahead=1",
        ),
    ]  # fmt: skip
    neutral += _sharding("actor_rollout_ref.actor", config.actor_rollout_ref.actor.fsdp_config)
    neutral += _sharding("actor_rollout_ref.ref", config.actor_rollout_ref.ref.fsdp_config)
    neutral += _sharding("critic.model", config.critic.model.fsdp_config)
    for key, value, only, why in neutral:
        if value != only:
            yield f"{key}={value} is not supported ({why}); use {only if only is not None else 'null'}"


def _sharding(name: str, fsdp: FSDPConfig) -> list[tuple]:
    return [(f"{name}.fsdp_config.fsdp_size", fsdp.fsdp_size, -1, "weights are sharded over all ranks")]
