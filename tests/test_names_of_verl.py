"""Names that code written for verl imports: each is where verl has it, wherever this project keeps it."""

import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

import verl

ROOT = Path(__file__).parents[1]
NAMES = {
    "verl": "DataProto __version__",
    "verl.protocol": """
        DataProto DataProtoConfig DataProtoFuture DataProtoItem all_gather_data_proto collate_fn
        deserialize_single_tensor deserialize_tensordict fold_batch_dim list_of_dict_to_dict_of_list
        pad_dataproto_to_divisor serialize_single_tensor serialize_tensordict unfold_batch_dim union_numpy_dict
        union_tensor_dict unpad_dataproto""",
    "verl.single_controller": "ClassWithInitArgs ResourcePool Worker WorkerGroup __version__",
    "verl.single_controller.base": "ClassWithInitArgs ResourcePool Worker WorkerGroup",
    "verl.single_controller.base.decorator": """
        Dispatch Execute get_predefined_dispatch_fn make_nd_compute_dataproto_dispatch_fn register
        register_dispatch_mode update_dispatch_mode""",
    "verl.single_controller.base.worker": "Worker",
    "verl.single_controller.base.worker_group": "ClassWithInitArgs ResourcePool WorkerGroup",
    "verl.single_controller.ray": """
        RayClassWithInitArgs RayResourcePool RayWorkerGroup create_colocated_worker_cls merge_resource_pool""",
    "verl.trainer.main_ppo": "TaskRunner create_rl_dataset main run_ppo",
    "verl.trainer.ppo.core_algos": """
        ADV_ESTIMATOR_REGISTRY POLICY_LOSS_REGISTRY AdaptiveKLController AdvantageEstimator FixedKLController agg_loss
        compute_entropy_loss compute_grpo_outcome_advantage compute_policy_loss compute_policy_loss_gspo
        compute_policy_loss_vanilla compute_rewards get_adv_estimator_fn get_kl_controller get_policy_loss_fn kl_penalty
        kl_penalty_forward register_adv_est register_policy_loss""",
    "verl.trainer.ppo.metric_utils": "compute_data_metrics compute_throughout_metrics compute_timing_metrics",
    "verl.trainer.ppo.reward": "get_custom_reward_fn",
    "verl.trainer.ppo.ray_trainer": """
        RayPPOTrainer ResourcePoolManager Role apply_kl_penalty compute_advantage compute_response_mask""",
    "verl.trainer.ppo.utils": "Role need_critic need_reference_policy",
    "verl.utils.checkpoint.checkpoint_manager": "find_latest_ckpt_path get_checkpoint_tracker_filename",
    "verl.utils.checkpoint.fsdp_checkpoint_manager": "FSDPCheckpointManager",
    "verl.utils.dataset.rl_dataset": "RLHFDataset collate_fn",
    "verl.utils.seqlen_balancing": """
        calculate_workload ceildiv get_reverse_idx get_seqlen_balanced_partitions greedy_partition karmarkar_karp
        log_seqlen_unbalance prepare_dynamic_batch rearrange_micro_batches restore_dynamic_batch roundup_divisible""",
    "verl.utils.torch_functional": """
        clip_by_value entropy_from_logits get_constant_schedule_with_warmup get_cosine_schedule_with_warmup
        get_response_mask get_wsd_schedule_with_warmup logprobs_from_logits masked_mean masked_sum masked_var
        masked_whiten pad_2d_list_to_length pad_sequence_to_length postprocess_data""",
    "verl.utils.tracking": "Tracking ValidationGenerationsLogger",
    "verl.workers.config": "ActorConfig CriticConfig FSDPConfig OptimizerConfig RolloutConfig",
    "verl.workers.fsdp_workers": "ActorRolloutRefWorker CriticWorker",
}
# The methods of a table, each with its arguments.
TABLE = {
    "check_consistency": "",
    "chunk": "chunks",
    "concat": "data",
    "from_dict": "tensors non_tensors meta_info num_batch_dims auto_padding",
    "from_single_dict": "data meta_info auto_padding",
    "from_tensordict": "tensor_dict meta_info",
    "get_data_info": "",
    "is_padding_enabled": "",
    "load_from_disk": "filepath",
    "make_iterator": "mini_batch_size epochs seed dataloader_kwargs",
    "padding": "padding_size padding_candidate",
    "pop": "batch_keys non_tensor_batch_keys meta_info_keys",
    "print_size": "prefix",
    "rename": "old_keys new_keys",
    "reorder": "indices",
    "repeat": "repeat_times interleave",
    "sample_level_repeat": "repeat_times",
    "save_to_disk": "filepath",
    "select": "batch_keys non_tensor_batch_keys meta_info_keys deepcopy",
    "select_idxs": "idxs",
    "slice": "start end step",
    "split": "split_size",
    "to": "device",
    "to_tensordict": "",
    "unfold_column_chunks": "n_split split_keys",
    "union": "other",
}
MODES = "RANK_ZERO ONE_TO_ALL ALL_TO_ALL DP_COMPUTE DP_COMPUTE_PROTO DP_COMPUTE_PROTO_WITH_FUNC DP_COMPUTE_METRIC"
WORKER = "rank world_size get_master_addr_port register_dispatch_collect_info query_dispatch_info"
WORKER_GROUP = "world_size execute_all_async execute_all_sync execute_rank_zero_async execute_rank_zero_sync"


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_verl_has_them(module):
    found = import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("method", TABLE)
def test_a_table_has_verls_methods(method):
    arguments = [name for name in signature(getattr(verl.DataProto, method)).parameters if name != "self"]
    assert arguments == TABLE[method].split()


def test_workers_have_verls_members():
    from verl.single_controller.base import Worker, WorkerGroup
    from verl.single_controller.base.decorator import Dispatch, get_predefined_dispatch_fn

    assert [name for name in WORKER.split() if not hasattr(Worker, name)] == []
    assert [name for name in WORKER_GROUP.split() if not hasattr(WorkerGroup, name)] == []
    for mode in MODES.split():
        assert {"dispatch_fn", "collect_fn"} <= get_predefined_dispatch_fn(getattr(Dispatch, mode)).keys()


def test_importing_verl_leaves_torch_alone():
    code = "import sys, verl; assert 'torch' not in sys.modules; print(verl.DataProto, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "<class 'verl.protocol.DataProto'> True\n"


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'verl' has no attribute 'nothing'"):
        _ = verl.nothing


def test_the_version_stands_in_one_place():
    asked = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split()[-1] == verl.__version__ == import_module("verl.single_controller").__version__
