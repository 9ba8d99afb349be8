"""Say what to do in place of options that other trainers have: Hugging Face's Trainer, PEFT, TRL and Ovis's scripts."""

from __future__ import annotations

import re

_ALWAYS_WRITTEN = "metrics.jsonl, training.html and, if it is installed, TensorBoard's files are always written"
_RESUMES = "the same command continues from the last checkpoint"
_EVAL_STEPS = "the validation loss is computed each --eval-steps, of --eval-rows or --eval-input"
_ADVICE = {
    "output_dir|logging_dir": "OUTPUT is the second argument",
    "model_name_or_path|model_path|pretrained_model_name_or_path": "use --model",
    "train_file|train_data|data_path|data_name|dataset|dataset_name|data": "INPUT is the first argument",
    "validation_file|eval_file|eval_dataset|eval_data|val_dataset|eval_data_path": "use --eval-input",
    "validation_split_percentage|eval_split|split_dataset_ratio|test_size": "use --eval-rows",
    "do_train|do_eval|do_predict": "training always runs; " + _EVAL_STEPS,
    "bf16|fp16|torch_dtype|mixed_precision|bf16_full_eval|fp16_full_eval": "use --dtype bfloat16 or float32",
    "tf32": "products are in --dtype bfloat16 or float32",
    "use_cpu|no_cuda": "use --device cpu",
    "local_rank|nproc_per_node|num_gpus|num_processes|world_size": "use --num-workers; Ray starts the workers",
    "nnodes|node_rank|master_addr|master_port|ddp_.*": "workers of all nodes of the Ray cluster find each other",
    "deepspeed|zero_stage|parallelism_config|accelerator_config": "use --fsdp to divide weights and optimizer",
    "fsdp_.*": "--fsdp divides layers, tables and optimizer; it has no settings",
    "resume_from_checkpoint|resume|ignore_data_skip|restore_callback_states_from_checkpoint": _RESUMES,
    "overwrite_output_dir": "use --overwrite",
    "eval_strategy|evaluation_strategy|eval_on_start|eval_delay|do_eval_.*": _EVAL_STEPS,
    "per_device_eval_batch_size|eval_accumulation_steps": "validation uses --per-device-train-batch-size",
    "save_strategy": "a checkpoint is written each --save-steps and at the end",
    "save_total_limit": "two checkpoints are kept",
    "save_only_model|save_on_each_node|save_safetensors|enable_jit_checkpoint": (
        "OUTPUT/model is the model, OUTPUT/training_state holds the checkpoints"
    ),
    "load_best_model_at_end|metric_for_best_model|greater_is_better|early_stopping_.*": (
        "OUTPUT/model is that of the last step; metrics.jsonl has the validation losses"
    ),
    "logging_strategy|logging_first_step": "use --logging-steps",
    "report_to|run_name|project|trackio_.*|wandb_.*": _ALWAYS_WRITTEN,
    "log_level.*|disable_tqdm|log_on_each_node|debug": "the driver logs progress and warnings",
    "push_to_hub|hub_.*": "nothing is uploaded; OUTPUT/model can be, with its card",
    "optim|optim_.*|adam_epsilon": "the optimizer is AdamW with an epsilon of 1e-8",
    "warmup_steps": "use --warmup-ratio, a share of the steps",
    "lr|base_lr": "use --learning-rate",
    "lr_scheduler|lr_scheduler_kwargs|min_lr.*": "use --lr-scheduler-type cosine, linear or constant",
    "vision_lr|vit_lr|projector_lr|mm_projector_lr|aligner_lr": "use --learning-rates PART=RATE",
    "batch_size|train_batch_size|micro_batch_size|per_gpu_train_batch_size": "use --per-device-train-batch-size",
    "auto_find_batch_size": "the job estimates the memory before it starts",
    "accumulation_steps|grad_accum_steps|gradient_accumulation": "use --gradient-accumulation-steps",
    "epochs|num_epochs": "use --num-train-epochs",
    "clip_grad|gradient_clipping|max_norm": "use --max-grad-norm",
    "data_seed|full_determinism": "use --seed, which also decides the order of rows",
    "activation_checkpointing.*|gradient_checkpointing_.*|use_reentrant": "use --gradient-checkpointing",
    "num_workers_dataloader|dataloader_.*": "use --dataloader-num-workers",
    "train_sampling_strategy|group_by_length|length_column_name|packing": (
        "rows of similar length form a step, and none is padded"
    ),
    "model_max_length|max_seq_length|max_seq_len|cutoff_len|multimodal_max_length": "use --max-length",
    "truncation.*": "rows longer than --max-length are errors, and none is cut",
    "max_partition|max_partitions": "use --max-tiles",
    "use_lora|use_peft|train_type|tuner_type|lora_r|lora_dim": "use --lora-rank",
    "lora_dropout|lora_target_modules|target_modules|lora_bias|use_dora|use_rslora|init_lora_weights": (
        "LoRA is added to all projections of the language model, without dropout"
    ),
    "merge_lora|merge_and_unload": "use --merge",
    "load_in_4bit|load_in_8bit|bnb_.*|quantization_.*|use_qlora": "frozen weights are bfloat16; QLoRA is not supported",
    "freeze_.*|unfreeze_.*|tune_.*|trainable_parameters|modules_to_save": "use --train-modules",
    "rlhf_type|loss_type|ref_model|ref_model_path": "use --stage dpo; the reference is the model at the start",
    "dpo_beta": "use --beta",
    "attn_implementation|use_flash_attn|flash_attn": "the fastest attention that is installed is used",
    "torch_compile.*|use_liger_kernel|liger_kernel_config|use_cache|torch_empty_cache_steps": "leave it out",
    "remove_unused_columns|label_names|prediction_loss_only|skip_memory_metrics|include_.*": "leave it out",
    "eval_do_concat_batches|eval_use_gather_object|batch_eval_metrics|logging_nan_inf_filter": "leave it out",
    "average_tokens_across_devices": "leave it out: a gradient is always divided by the learnt tokens of all workers",
    "label_smoothing_factor|neftune_noise_alpha": "the loss is plain cross-entropy, of embeddings without noise",
    "trust_remote_code": "leave it out: no code of a checkpoint is run",
}


def advise(name: str) -> str:
    """Return what to do in place of another trainer's option, "" if it is none that is known."""
    plain = name.strip("-").replace("-", "_").removeprefix("no_")
    return next((advice for pattern, advice in _ADVICE.items() if re.fullmatch(pattern, plain)), "")
