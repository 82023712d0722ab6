"""The names DeepSpeed knows in a ds_config, so that a typo is found before anything heavy is loaded.

DeepSpeed itself accepts any unknown name at the top level and then trains without the setting. A test
compares these lists with the installed DeepSpeed. Source: DeepSpeed 0.19.8, runtime/config.py and the
sub-configs it reads.
"""

_OFFLOAD = frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "pin_memory"})

# top-level name -> names allowed inside; None = DeepSpeed (or the optimizer named there) checks the inside
TOP_LEVEL: dict[str, frozenset[str] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "managed_gradient_accumulation": None,
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
    "fp16": frozenset(
        {
            "enabled",
            "auto_cast",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
            "fp16_master_weights_and_grads",
        }
    ),
    "bf16": frozenset(
        {
            "enabled",
            "immediate_grad_update",
            "check_grad_overflow",
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
        }
    ),
    "bfloat16": None,
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "amp": None,
    "communication_data_type": None,
    "seq_parallel_communication_data_type": None,
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "gradient_allreduce_op": None,
    "sparse_gradients": None,
    "gradient_clipping": None,
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "disable_allgather": None,
    "disable_python_gc": None,
    "log_level": None,
    "dataloader_drop_last": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "zero_optimization": frozenset(
        {
            "stage",
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "allgather_sequential",
            "overlap_comm",
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "offload_param",
            "offload_optimizer",
            "zenflow",
            "sub_group_size",
            "cpu_offload",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "ignore_unused_parameters",
            "legacy_stage1",
            "round_robin_gradients",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "leaf_module",
            "compute_grad_norm",
            "enable_sanity_checks",
            "parameter_alignment",
            "save_muon_momentum_buffer_in_memory",
        }
    ),
    "activation_checkpointing": frozenset(
        {
            "partition_activations",
            "cpu_checkpointing",
            "contiguous_memory_optimization",
            "number_checkpoints",
            "synchronize_checkpoint_boundary",
            "profile",
        }
    ),
    "tensorboard": frozenset({"enabled", "output_path", "job_name"}),
    "wandb": frozenset({"enabled", "group", "team", "project"}),
    "csv_monitor": frozenset({"enabled", "output_path", "job_name"}),
    "comet": None,
    "flops_profiler": None,
    "comms_logger": None,
    "timers": None,
    "aio": frozenset(
        {
            "block_size",
            "queue_depth",
            "thread_count",
            "intra_op_parallelism",
            "single_submit",
            "overlap_events",
            "use_gds",
        }
    ),
    "checkpoint": None,
    "compile": None,
    "nebula": None,
    "compression_training": None,
    "data_efficiency": None,
    "curriculum_learning": None,
    "hybrid_engine": None,
    "weight_quantization": None,
    "sparse_attention": None,
    "tensor_parallel": None,
    "pipeline": None,
    "use_data_before_expert_parallelism": None,
    "autotuning": None,
}

NESTED: dict[tuple[str, str], frozenset[str]] = {
    ("zero_optimization", "offload_param"): _OFFLOAD | {"max_in_cpu"},
    ("zero_optimization", "offload_optimizer"): _OFFLOAD
    | {"pipeline_read", "pipeline_write", "fast_init", "ratio", "cpuadam_cores_perc", "super_offload"},
}

# Only for the optimizer our run files use; others are checked by their own constructor.
# Source: DeepSpeed engine._configure_basic_optimizer, torch.optim.AdamW
ADAM_PARAMS = frozenset(
    {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
        "maximize",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "bias_correction",
        "torch_adam",
        "adam_w_mode",
        "adamw_mode",
        "fp32_optimizer_states",
    }
)

_REMOVED = "DeepSpeed has removed it"

# What DeepSpeed reads and nothing here uses, with the reason or what to write instead
UNSERVED = {
    "pipeline": "blocks are not spread over ranks",
    "tensor_parallel": "blocks are not spread over ranks",
    "use_data_before_expert_parallelism": "there are no experts",
    "seq_parallel_communication_data_type": "sequences are not spread over ranks",
    "data_efficiency": "samples come from {kind}.data",
    "curriculum_learning": "samples come from {kind}.data",
    "dataloader_drop_last": "samples come from {kind}.data",
    "autotuning": "python -m cmae_scale.plan compares layouts",
    "hybrid_engine": "it is for generating text while training",
    "weight_quantization": "it is for inference",
    "checkpoint": "see {kind}.checkpoint",
    "compile": "for pre-training there is cmae.compile",
    "disable_allgather": "DeepSpeed does not use it",
    "amp": f"{_REMOVED}, see torch_autocast",
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
}

# What DeepSpeed writes to its log at level "info" only, which is below what is shown
LOGGED = {
    "comms_logger": 'it needs log_level "info" and verbose; see also {kind}.monitor.breakdown',
    "dump_state": 'it needs log_level "info"',
}
