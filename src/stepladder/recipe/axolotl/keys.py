"""Every key of an Axolotl configuration with what becomes of it here, one row a key or a group with one reason.

A dot leads into a block, `[]` into a list; a name that ends in `*` stands for all keys that
begin so and have no row of their own. Read against Axolotl's schema of July 2026, and its older keys.
"""

from __future__ import annotations

from stepladder.recipe.axolotl import data, strategy, values
from stepladder.recipe.axolotl.config import Config
from stepladder.recipe.axolotl.outcome import (
    Rule,
    drop,
    each,
    harmless,
    only,
    only_with,
    refused,
    same,
    switch,
    usual,
    variable,
)


def keep(names: str, needs: str = "") -> dict[str, Rule]:
    """Keys of the same name and meaning; `needs` is the key without which they have no effect."""
    rules = {name: same(name) for name in names.split()}
    return {name: only_with(lambda c: c.get(needs), f"no {needs}", r) for name, r in rules.items()} if needs else rules


def lora(rule: Rule) -> Rule:
    return only_with(lambda c: c.get("adapter"), "no adapter", rule)


def evaluating(rule: Rule) -> Rule:
    return only_with(Config.evaluates, "nothing to evaluate on", rule)


def watched(service: str, rule: Rule, by: str = "") -> Rule:
    """A key of a monitoring service, which `use_…` switches on, or the key `by`."""
    return only_with(lambda c: c.get(f"use_{service}") or c.get(by), f"{service} is off", rule)


OTHER = "it changes the training, and nothing here does the same"
SFT_ONLY = "another kind of training: this is supervised fine-tuning"
TEXT_ONLY = "text only"
KERNEL = "a kernel for speed and memory: the loss is the same"
WATCHING = "for watching or asking the model, not for training it"
LAUNCHER = "the launch command decides"
TOKENS = "tokenizer and embeddings stay as the model has them"
STORAGE = "bitsandbytes' 4 and 8 bits only"
WANDB = "wandb_project"
PACKS = "how packs are found"
FSDP = "accelerate_configs/fsdp.yaml has its own: the curve is the same"

MODEL: dict[str, Rule] = {
    "base_model": same("model_name_or_path"),
    **each("revision_of_model model_revision", same("model_revision")),
    "trust_remote_code": switch("trust_remote_code"),
    **each("overrides_of_model_config model_config", same("model_init_kwargs", "overrides of the model's config")),
    **each("overrides_of_model_kwargs model_kwargs", same("model_init_kwargs", "arguments of from_pretrained")),
    **each("base_model_config tokenizer_config processor_config", values.other_source),
    **each("model_type type_of_model cls_model_config", values.model_class),
    "tokenizer_type": drop("the model's own"),
    "tokenizer_use_fast": drop("fast tokenizers only, which give the same tokens"),
    "tokenizer_legacy": refused("the tokenizer's own config decides: write it there"),
    "tokenizer_use_mistral_common": usual(why="Transformers' tokenizers only"),
    "tokenizer_save_jinja_files": drop("the template is saved with the tokenizer"),
    **each("processor_type processor_kwargs image_size image_resize_algorithm role_boundaries", refused(TEXT_ONLY)),
    "freeze_mm_modules": usual(why=TEXT_ONLY),
    **each("is_falcon_derived_model is_llama_derived_model", drop("read from the model")),
    **each("is_mistral_derived_model is_qwen_derived_model", drop("read from the model")),
    **{f"special_tokens.{name}": same(name) for name in ("pad_token", "eos_token")},
    "special_tokens.bos_token": values.bos_token,
    "special_tokens.unk_token": drop("never trained"),
    **each("special_tokens.additional_special_tokens tokens added_tokens_overrides", refused(TOKENS)),
    **each("resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings", usual(why=TOKENS)),
    **each("fix_untrained_tokens reinit_weights num_labels", usual(why=OTHER)),
    "embeddings_skip_upcast": harmless("memory only"),
    "attn_implementation": values.attention,
    **{f"{name}_attention": values.attention_flag(name) for name in ("eager", "xformers", "sage", "s2")},
    "sdp_attention": values.attention_flag("sdpa"),
    "flash_attention": values.attention_flag("flash_attention_2"),
    "flex_attention": values.attention_flag("flex_attention"),
    **each("flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_d512", harmless(KERNEL)),
    **each("flash_optimum flex_attn_compile_kwargs sdpa_varlen fused_attn_kernel", harmless(KERNEL)),
    **each("large_head_attention gemma4_hybrid_attn_impl use_kernels unsloth_*", harmless(KERNEL)),
    **each("lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel", harmless(KERNEL)),
    **each("experts_implementation use_scattermoe use_sonicmoe expert_backend moe_*", harmless(KERNEL)),
    **each("chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp", harmless(KERNEL)),
    **each("tiled_mlp_num_shards tiled_mlp_use_original_mlp llama4_linearized_experts", harmless(KERNEL)),
    **each("use_dsv4_kernels use_glm_dsa_kernels dsv4_* gemma4_* nvfp4_*", usual(why=OTHER)),
    **each("scaling_softmax scaling_softmax_factor scaling_softmax_bias rope_scaling", usual(why=OTHER)),
    **each("device_map max_memory gpu_memory_limit low_cpu_mem_usage device", drop(LAUNCHER)),
    "experimental_skip_move_to_device": drop(LAUNCHER),
    "base_model_ignore_patterns": drop("what is not needed is not fetched"),
}

DATA: dict[str, Rule] = {
    "val_set_size": values.validation,
    "dataset_prepared_path": drop("where Axolotl keeps prepared rows"),
    **each("dataset_num_proc dataset_processes", same("dataset_num_proc")),
    **each("dataset_keep_in_memory skip_prepare_dataset num_dataset_shards_to_save", harmless("preparation only")),
    **each("push_dataset_to_hub hf_use_auth_token", harmless("`hf auth login` signs in; rows are not sent anywhere")),
    **each("dataset_shard_num dataset_shard_idx", refused("the data would be whole: `rows: N` takes N rows")),
    **each("dataset_exact_deduplication min_sample_len", usual(why="no row is taken out: clean the file")),
    **each("shuffle_merged_datasets shuffle_before_merging_datasets", drop("rows are shuffled in every epoch")),
    "curriculum_sampling": values.sequential,
    "group_by_length": switch("train_sampling_strategy", "group_by_length"),
    "streaming": harmless("memory only: the rows are the same"),
    "streaming_multipack_buffer_size": drop("of streaming only"),
    **each("pretraining_dataset pretraining_sample_concatenation", usual(why="use datasets with type: completion")),
    **each("pretrain_multipack_buffer_size pretrain_multipack_attn", drop("of pretraining_dataset only")),
    "sequence_len": same("max_length"),
    "eval_sequence_len": harmless("max_length holds for evaluation too"),
    "max_prompt_len": drop("of preference training only"),
    "excess_length_strategy": usual("truncate", why="longer rows are cut at max_length: take them out of the file"),
    "sample_packing": values.packing,
    "eval_sample_packing": only_with(lambda c: c.get("sample_packing"), "no sample_packing", same("eval_packing")),
    **each(
        "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially", drop("how packs are found")
    ),
    **each("sample_packing_mp_start_method sample_packing_eff_est multipack_real_batches", drop("how packs are found")),
    "max_packed_sequence_len": refused("gone from Axolotl too: sample_packing"),
    "pad_to_sequence_len": drop("padding trains nothing"),
    "pad_to_multiple_of": same("pad_to_multiple_of"),
    "batch_flattening": harmless(KERNEL),
    "train_on_inputs": switch("train_on", "everything"),
    "chat_template": data.chat_template,
    "chat_template_jinja": data.chat_template_jinja,
    "chat_template_kwargs": refused("give each row a column chat_template_kwargs"),
    "default_system_message": refused("write it into the rows"),
    "eot_tokens": drop("the end of turn that is trained follows from the template"),
    "remove_unused_columns": drop("rows hold only what the model takes"),
}

METHOD: dict[str, Rule] = {
    "adapter": values.adapter,
    **{name: values.quantized(name) for name in ("load_in_4bit", "load_in_8bit")},
    "bnb_config_kwargs.bnb_4bit_quant_type": same("bnb_4bit_quant_type"),
    "bnb_config_kwargs.bnb_4bit_use_double_quant": same("use_bnb_nested_quant"),
    "bnb_config_kwargs.bnb_4bit_quant_storage": same("bnb_4bit_quant_storage"),
    **each("gptq gptq_* model_quantization_config use_onebitllms nonexpert_quantization", usual(why=STORAGE)),
    **each("model_quantization_config_kwargs quantize_moe_experts", usual(why=STORAGE)),
    **{name: lora(same(name)) for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save")},
    "lora_target_parameters": lora(same("lora_target_parameters")),
    "lora_target_modules": lora(values.target_modules),
    "lora_target_linear": lora(switch("lora_target_modules", "all-linear")),
    "lora_fan_in_fan_out": drop("PEFT sees it by the layer"),
    "peft_use_dora": lora(switch("use_dora")),
    "peft_use_rslora": lora(switch("use_rslora")),
    "peft_init_lora_weights": only(True, why="LoRA's own initialization only"),
    "peft_autocast_adapter_dtype": only(True, why="the adapter is in fp32"),
    **each("lora_rank_pattern lora_alpha_pattern lora_exclude_modules peft_layers_to_transform", usual(why=OTHER)),
    **each("peft_layers_pattern peft_layer_replication peft_trainable_token_indices peft", usual(why=OTHER)),
    **each("peft_ensure_weight_tying loraplus_lr_ratio lora_model_dir", usual(why=OTHER)),
    "loraplus_lr_embedding": only_with(lambda c: c.has("loraplus_lr_ratio"), "no loraplus_lr_ratio", refused(OTHER)),
    **each("lora_on_cpu merge_lora merge_method", drop("scripts/merge.py folds the adapter in")),
    "qlora_sharded_model_loading": drop("how weights are read"),
    **each("unfrozen_parameters relora relora_* jagged_* lisa_* spectrum_* mora", usual(why=OTHER)),
    **each("neftune_noise_alpha noisy_embedding_alpha", same("neftune_noise_alpha")),
    **each("rl reward_model process_reward_model center_rewards_coefficient kd_* diffusion", usual(why=SFT_ONLY)),
    **each("ebft hatchery nemo_gym_* orpo_alpha dpo_* rl_beta simpo_gamma cpo_alpha kto_*", usual(why=SFT_ONLY)),
    **each("rpo_alpha precompute_ref_log_probs", usual(why=SFT_ONLY)),
    **each("trl vllm", only_with(lambda c: c.get("rl"), "of rl only", refused(SFT_ONLY))),
    **each("qat quantization llmcompressor", usual(why="training for a later quantization")),
    **each("use_eaft grokfast_* use_pose dense_mixer", usual(why=OTHER)),
    **each("eaft_alpha eaft_k", only_with(lambda c: c.get("use_eaft"), "no use_eaft", refused(OTHER))),
    **each(
        "pose_split_on_token_ids pose_max_context_len pose_num_chunks",
        only_with(lambda c: c.get("use_pose"), "no use_pose", refused(OTHER)),
    ),
    "trainer_cls": refused(OTHER),
    "plugins[]": values.plugins,
    "liger_use_token_scaling": usual(why="it weighs the loss"),
    **each("liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu", drop("of use_liger_kernel")),
    **each("liger_glu_activation liger_cross_entropy", drop("of use_liger_kernel")),
    "liger_fused_linear_cross_entropy": harmless("memory only: the loss here needs no whole logits either"),
    "cut_cross_entropy": harmless("memory only: the loss here needs no whole logits either"),
}

TRAINING: dict[str, Rule] = {
    "num_epochs": only_with(lambda c: not c.get("max_steps"), "max_steps decides", same("num_train_epochs")),
    **keep("max_steps seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"),
    "micro_batch_size": same("per_device_train_batch_size"),
    "eval_batch_size": evaluating(same("per_device_eval_batch_size")),
    "batch_size": values.batch_size,
    "auto_find_batch_size": usual(why="another micro-batch makes another global batch"),
    **keep("gradient_accumulation_steps lr_scheduler_kwargs warmup_steps"),
    "warmup_ratio": values.warmup_ratio,
    "optimizer": values.optimizer,
    "optim_args": values.optimizer_arguments,
    **keep("optim_target_modules"),
    "lr_scheduler": values.scheduler,
    "cosine_min_lr_ratio": values.min_lr_ratio,
    **each("cosine_constant_lr_ratio lr_quadratic_warmup lr_groups embedding_lr embedding_lr_scale", usual(why=OTHER)),
    "lr_div_factor": drop("of the one_cycle schedule only"),
    **each("adam_beta3 adam_epsilon2 dion_* qgalore_* torchdistx_path", drop("of optimizers that are not here")),
    "bf16": values.bf16,
    "fp16": values.fp16,
    "bfloat16": only_with(lambda c: c.get("bf16") is False, "bf16 decides", usual(why="set bf16: true")),
    "float32": drop("bf16 and fp16 decide"),
    **each("float16 fp8 fp8_enable_fsdp_float8_all_gather", usual(why="bf16, fp16 and fp32 only")),
    **each("fp32_norms fp32_norm_classes", usual(why=OTHER)),
    "tf32": values.tf32,
    "gradient_checkpointing": values.checkpointing,
    **keep("gradient_checkpointing_kwargs", needs="gradient_checkpointing"),
    "activation_offloading": values.offloading,
    **each("selective_checkpointing layer_offloading gc_steps gc_collect_steps", harmless("memory only")),
    "torch_compile": values.compiled,
    **keep("torch_compile_backend torch_compile_mode", needs="torch_compile"),
    **each("torch_compile_options deepcompile", harmless("speed only")),
    **keep("dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor"),
    "dataloader_drop_last": usual(why="every row is trained, the last ones too"),
    **keep("accelerator_config ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters"),
    **keep("torch_empty_cache_steps"),
    "deepspeed": strategy.deepspeed,
    **each("fsdp fsdp_config.offload_params", strategy.fsdp),
    "fsdp_config.activation_checkpointing": switch("gradient_checkpointing"),
    **each("fsdp_config.version fsdp_config.auto_wrap_policy fsdp_config.transformer_layer_cls_to_wrap", drop(FSDP)),
    **each("fsdp_config.min_num_params fsdp_config.reshard_after_forward fsdp_config.sharding_strategy", drop(FSDP)),
    **each("fsdp_config.state_dict_type fsdp_config.final_state_dict_type fsdp_config.use_orig_params", drop(FSDP)),
    **each("fsdp_config.sync_module_states fsdp_config.cpu_ram_efficient_loading", drop(FSDP)),
    **each("fsdp_config.cpu_offload_pin_memory fsdp_config.limit_all_gathers", drop(FSDP)),
    **each("fsdp_config.backward_prefetch fsdp_config.forward_prefetch", drop(FSDP)),
    "fsdp_config.mixed_precision_policy": drop("bf16 and fp16 decide"),
    **each("fsdp_version fsdp_final_state_dict_type", drop("FSDP version 2, saved whole")),
    **each("dp_shard_size dp_replicate_size world_size local_rank ddp", drop(LAUNCHER)),
    **each("context_parallel_size sequence_parallel_degree tensor_parallel_size", values.shared_rows),
    "expert_parallel_*": usual(1, why="the experts stay whole on each rank: memory and speed only", changes=False),
    **each("heads_k_stride ring_attn_func", drop("of context_parallel_size only")),
    **each("use_ray ray_run_name ray_num_workers resources_per_worker", harmless(LAUNCHER)),
}

WATCHED: dict[str, Rule] = {
    "evals_per_epoch": evaluating(values.per_epoch("eval")),
    "eval_steps": evaluating(values.every_steps("eval")),
    **each("eval_strategy evaluation_strategy", evaluating(same("eval_strategy"))),
    "saves_per_epoch": values.per_epoch("save"),
    "save_steps": values.every_steps("save"),
    **keep("save_strategy save_total_limit output_dir logging_steps"),
    "save_only_model": switch("save_only_model"),
    "save_safetensors": drop("always"),
    "save_first_step": harmless("save_steps decides"),
    "load_best_model_at_end": values.best_model,
    **keep("metric_for_best_model greater_is_better", needs="load_best_model_at_end"),
    "early_stopping_patience": refused("a run goes to its last step"),
    **each("loss_watchdog_threshold loss_watchdog_patience", harmless("no run is stopped for its loss")),
    "resume_from_checkpoint": refused("a run of Axolotl's cannot be resumed here"),
    "auto_resume_from_checkpoints": drop("how a run is started, not what it computes"),
    "dynamic_checkpoint": harmless("save_steps decides"),
    **{f"use_{name}": switch("report_to", [name]) for name in ("wandb", "mlflow", "tensorboard", "trackio")},
    "use_comet": switch("report_to", ["comet_ml"]),
    "wandb_project": values.wandb_project,
    "wandb_name": watched("wandb", same("run_name"), WANDB),
    **{
        f"wandb_{name}": watched("wandb", variable(f"WANDB_{name.upper()}"), WANDB)
        for name in ("run_id", "entity", "mode", "watch", "log_model")
    },
    **{
        name: watched("mlflow", variable(name.upper()))
        for name in ("mlflow_tracking_uri", "mlflow_experiment_name", "hf_mlflow_log_artifacts")
    },
    "mlflow_run_name": watched("mlflow", same("run_name")),
    "trackio_project_name": watched("trackio", same("project")),
    "trackio_run_name": watched("trackio", same("run_name")),
    "trackio_space_id": watched("trackio", same("trackio_space_id")),
    **each("comet_* use_swanlab swanlab_*", harmless("set it in the environment")),
    **each("use_otel_metrics otel_metrics_host otel_metrics_port gradio_* generate_samples", harmless(WATCHING)),
    **each("num_generation_samples generation_* lm_eval_* profiler_steps profiler_steps_start", harmless(WATCHING)),
    **each("do_bench_eval bench_* do_causal_lm_eval eval_causal_lm_metrics eval_table_size", harmless(WATCHING)),
    **each("eval_max_new_tokens include_tokens_per_second include_tkps", harmless(WATCHING)),
    "hub_model_id": values.hub,
    **keep("hub_strategy hub_revision", needs="hub_model_id"),
    **each("strict debug axolotl_config_path is_preprocess preprocess_iterable", drop("of Axolotl's own running")),
    **each("total_num_tokens total_supervised_tokens", drop("of Axolotl's own running")),
}

KEYS: dict[str, Rule] = {**MODEL, **DATA, **METHOD, **TRAINING, **WATCHED}
KEYS |= {f"{sets}[].{name}": rule for sets in ("datasets", "test_datasets") for name, rule in data.KEYS.items()}
