"""What is promised to users, promise by promise, with the tests that prove it; these exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Every key that users were promised, in all the places where they may stand; others are this project's own.
PROMISED_KEYS = """
model.pretrained_model_name_or_path model.quantize model.rank model.lora model.lora.r model.lora.lora_alpha
model.lora.target_modules model.lora.adapter_name model.lora.init_lora_weights model.lora.pretrained_weight
data.class_path data.init_args data.init_args.dataset_path data.init_args.image_size data.init_args.use_edit_mask
data.batch_size data.num_workers data.prefetch_factor data.persistent_workers data.shuffle
data.init_args.batch_size data.init_args.num_workers data.init_args.prefetch_factor data.init_args.persistent_workers
data.init_args.shuffle data.init_args.caption_dropout_rate data.init_args.prompt_image_dropout_rate
data.init_args.cache_drop_rate data.use_cache data.cache_dir data.init_args.use_cache data.init_args.cache_dir
data.init_args.center_crop data.init_args.center_crop_ratio data.init_args.random_crop data.init_args.crop_size
data.init_args.crop_scale
train.trainer train.num_epochs train.max_train_steps train.gradient_accumulation_steps train.gradient_checkpointing
train.mixed_precision train.max_grad_norm train.checkpointing_steps train.checkpoints_total_limit
train.resume_from_checkpoint resume_from_checkpoint train.low_memory train.vae_encoder_device
train.text_encoder_device train.text_encoder_2_device
optimizer.class_path optimizer.init_args
lr_scheduler.scheduler_type lr_scheduler.warmup_steps lr_scheduler.num_cycles lr_scheduler.power
cache.use_cache cache.cache_dir cache.vae_encoder_device cache.text_encoder_device cache.text_encoder_2_device
cache.prompt_empty_drop_keys
logging.output_dir logging.logging_dir logging.report_to logging.tracker_project_name
validation.enabled validation.steps validation.validation_steps validation.num_validation_samples
loss.mask_loss loss.forground_weight loss.foreground_weight loss.background_weight
predict.devices.vae predict.devices.text_encoder predict.devices.text_encoder_2 predict.devices.transformer
"""

# promise -> tests, as file::test below tests/.
PROMISES: dict[str, tuple[str, ...]] = {
    # Commands
    "src.main trains": ("test_guide.py::test_cache_then_train_then_launch",),
    "src.main --cache computes the embeddings and exits": ("test_guide.py::test_cache_then_train_then_launch",),
    "under accelerate launch, one process": ("test_guide.py::test_cache_then_train_then_launch",),
    "under a launcher, several processes": (
        "distributed/test_data_parallel.py::test_two_processes_train_as_one_with_twice_the_accumulation",
    ),
    "src.* are thin doors": ("test_contract.py::test_the_doors_hold_no_logic",),
    "overrides on the command line": ("command/test_cli.py::test_overrides_stand_anywhere",),
    "unknown keys are refused with the nearest known one": (
        "config/test_config.py::test_any_typo_is_refused_and_the_right_key_named",
    ),
    "tensorboard shows every version side by side": ("test_contract.py::test_tensorboard_shows_versions_side_by_side",),
    # Configuration
    "interpolation": ("config/test_config.py::test_interpolation",),
    "1e-4 is a number": ("config/test_config.py::test_numbers_as_people_write_them",),
    "mistakes are refused before anything is loaded": ("command/test_cli.py::test_refused_before_any_model_loads",),
    "one message names key, given, allowed": (
        "config/test_config.py::test_refused",
        "config/test_config.py::test_all_problems_in_one_message",
    ),
    "a key without effect says so once": (
        "config/test_config.py::test_key_without_effect_is_said_once_and_one_with_effect_is_not",
        "command/test_cli.py::test_idle_and_overruled_keys_are_said_once",
    ),
    "dry run": ("command/test_cli.py::test_dry_run_needs_no_network_no_gpu_and_no_model",),
    "model.pretrained_model_name_or_path: hub id or folder": (
        "config/test_config_family.py::test_folder_says_its_family",
        "config/test_config_family.py::test_cached_checkpoint_says_its_family",
    ),
    "model.pretrained_model_name_or_path: the language model": (
        "config/test_config_family.py::test_language_model_is_named_as_one",
        "command/test_cli.py::test_refused_before_any_model_loads",
    ),
    "train.trainer: the checkpoint decides": ("config/test_config_family.py::test_tiny_checkpoint_is_of_its_family",),
    "train.trainer: a disagreement": (
        "config/test_config_family.py::test_disagreement_with_train_trainer",
        "command/test_cli.py::test_refused_before_any_model_loads",
    ),
    "train.trainer: offline the default is assumed and said": (
        "command/test_cli.py::test_dry_run_assumes_the_default_family_and_says_so",
    ),
    "model.quantize": (
        "levers/test_quantize.py::test_layers_inside_blocks_are_quantised_modulation_included",
        "levers/test_quantize.py::test_output_stays_near",
        "levers/test_quantize.py::test_stored_weights_are_not_trained",
    ),
    "model.rank": ("config/test_config.py::test_disagreeing_spellings",),
    "model.lora.r, lora_alpha, target_modules, adapter_name": (
        "lora/test_adapters.py::test_targets_are_read_as_peft_reads_them",
        "lora/test_lora_files.py::test_the_file_describes_itself",
        "test_contract.py::test_a_named_adapter_and_a_regular_expression",
    ),
    "model.lora.init_lora_weights": (
        "lora/test_adapters.py::test_decompositions_are_those_of_peft",
        "lora/test_adapters.py::test_an_adapter_starts_as_the_base_and_leaves_its_weights_alone",
    ),
    "model.lora.pretrained_weight: ours, comfy, kohya": (
        "test_contract.py::test_training_starts_from_a_lora_of_any_dialect",
    ),
    "model.lora.pretrained_weight: a mismatch shows both": (
        "lora/test_lora_files.py::test_a_file_of_another_rank_or_other_targets_is_refused",
    ),
    "model.lora.pretrained_weight: hub id": ("lora/test_lora_files.py::test_a_lora_of_the_hub",),
    "model.lora: null": ("training/test_train.py::test_full_fine_tuning_is_saved_as_a_transformer_that_loads",),
    "model.lora absent": ("config/test_config.py::test_lora_null_is_full_fine_tuning_and_an_absent_one_is_not",),
    "data.class_path": (
        "data/test_dataset.py::test_the_import_path_of_configurations",
        "config/test_config.py::test_a_data_set_class_of_ones_own_takes_its_own_arguments",
        "test_contract.py::test_a_dataset_class_of_ones_own",
    ),
    "dataset_path: several folders": (
        "data/test_dataset.py::test_several_folders",
        "test_contract.py::test_several_folders_are_trained_on",
    ),
    "image_size": (
        "data/test_dataset.py::test_image_size_crops_the_pair_alike",
        "data/test_dataset.py::test_image_size_is_rounded_down_to_what_the_family_takes",
    ),
    "without image_size: the model's own area, bucketed": (
        "data/test_dataset.py::test_a_pair_at_the_familys_sizes",
        "data/test_batches.py::test_every_row_in_turn_and_one_geometry_a_batch",
    ),
    "batch_size and others in two places": (
        "config/test_config.py::test_older_spellings_move",
        "config/test_config.py::test_disagreeing_spellings",
    ),
    "num_workers, prefetch_factor, persistent_workers": ("training/test_train.py::test_data_workers_change_nothing",),
    "shuffle": ("test_contract.py::test_without_shuffle_the_rows_come_in_their_order",),
    "caption_dropout_rate": (
        "data/test_batches.py::test_shares_of_dropouts",
        "training/test_train.py::test_cached_equals_uncached",
    ),
    "cache_drop_rate": ("config/test_config_guide.py::test_older_keys_found_in_the_wild",),
    "prompt_image_dropout_rate": (
        "training/test_train.py::test_cached_equals_uncached",
        "drawing/test_predict.py::test_image_guidance_is_obeyed",
    ),
    "use_cache, cache_dir under data": ("config/test_config_guide.py::test_snippet_loads_and_arrives",),
    "crop keys": (
        "data/test_dataset.py::test_center_crop",
        "data/test_dataset.py::test_random_crop",
        "data/test_dataset.py::test_masks_follow_the_target",
        "test_contract.py::test_crops_reach_training",
    ),
    "num_epochs, max_train_steps": ("training/test_train.py::test_epochs_end_training_when_they_come_first",),
    "a step is an optimizer step": (
        "training/test_train.py::test_steps_are_optimizer_steps_whatever_the_accumulation",
    ),
    "gradient_accumulation_steps": ("training/test_train.py::test_two_micro_batches_equal_one_batch_of_two",),
    "gradient_checkpointing": ("training/test_train.py::test_gradient_checkpointing_changes_nothing_but_memory",),
    "mixed_precision": ("test_contract.py::test_bf16_trains_float32_adapters",),
    "max_grad_norm": ("test_contract.py::test_gradients_are_clipped",),
    "checkpointing_steps, checkpoints_total_limit": ("test_contract.py::test_the_oldest_checkpoints_go",),
    "resume_from_checkpoint: a folder": ("training/test_train.py::test_resume_is_bit_identical",),
    "resume_from_checkpoint: latest": (
        "training/test_train.py::test_latest_finds_the_newest_checkpoint_and_starts_afresh_without_one",
    ),
    "resume_from_checkpoint at top level": ("config/test_config_guide.py::test_older_keys_found_in_the_wild",),
    "low_memory": ("test_contract.py::test_low_memory_changes_nothing_but_memory",),
    "devices": (
        "command/test_cli.py::test_refused_before_any_model_loads",
        "drawing/test_predict.py::test_devices_of_prediction_are_used",
        "drawing/test_predict.py::test_a_device_that_is_not_there_is_refused_with_the_ones_that_are",
    ),
    "optimizer": (
        "training/test_train.py::test_resume_is_bit_identical_for_every_optimizer",
        "config/test_config_family.py::test_optimizers_of_the_guide",
        "config/test_config_family.py::test_what_is_no_optimizer",
    ),
    "lr_scheduler": ("training/test_optim.py::test_schedules_follow_their_formulas",),
    "lr_scheduler: whatever the number of processes": (
        "distributed/test_data_parallel.py::test_two_processes_train_as_one_with_twice_the_accumulation",
    ),
    "cache: an incomplete one is completed": ("test_contract.py::test_an_incomplete_cache_is_completed_and_said",),
    "logging: report_to": (
        "training/test_trackers.py::test_a_tracker_shows_what_was_measured_and_drawn",
        "config/test_config.py::test_refused",
    ),
    "logging: none": ("test_contract.py::test_no_tracker_writes_no_events",),
    "validation": ("test_contract.py::test_validation_draws_samples_and_changes_nothing",),
    "mask loss": (
        "test_contract.py::test_the_mask_weights_the_loss",
        "test_flow.py::test_weighted_loss_is_a_weighted_mean",
    ),
    "prompt_empty_drop_keys": ("test_contract.py::test_a_dropped_prompt_replaces_the_chosen_embeddings",),
    # Data
    "pairs by exact stem": ("data/test_sources.py::test_stems_match_exactly",),
    "formats, modes, orientations": (
        "data/test_images.py::test_every_orientation_ends_upright",
        "data/test_images.py::test_cmyk",
        "data/test_images.py::test_alpha_is_laid_over_white",
        "data/test_images.py::test_grey_and_palette",
        "data/test_images.py::test_sixteen_bits_are_scaled_not_clipped",
        "data/test_sources.py::test_endings_in_any_case",
    ),
    "extra references": (
        "data/test_sources.py::test_references_beside_the_first_and_in_folders",
        "test_contract.py::test_three_references_are_cached_trained_and_drawn_with",
    ),
    "no reference": ("test_contract.py::test_captions_alone",),
    "edit masks": ("data/test_sources.py::test_masks_are_never_targets",),
    "all problems in one report, nothing skipped": (
        "data/test_dataset.py::test_one_report_of_everything",
        "data/test_sources.py::test_nothing_is_skipped_silently",
    ),
    "data/face_seg": ("test_guide.py::test_the_example_dataset_is_complete",),
    # Outputs
    "events directly in vN": ("test_contract.py::test_what_a_version_holds",),
    "the resolved configuration": ("test_contract.py::test_what_a_version_holds",),
    "checkpoint-EPOCH-STEP": ("test_contract.py::test_what_a_version_holds",),
    "diffusers loads the LoRA": ("lora/test_lora_files.py::test_a_pipeline_with_our_file_is_the_trained_model",),
    "the same LoRA in every program": (
        "lora/test_readers.py::test_one_file_changes_every_weight_alike_in_every_program",
    ),
    "no pickle": (
        "test_contract.py::test_what_a_version_holds",
        "disk/test_checkpoint.py::test_pickles_do_not_execute",
        "test_architecture.py::test_nothing_forbidden",
    ),
    "vN is claimed atomically": ("disk/test_runs.py::test_many_claim_at_once",),
    "short ended versions go": ("disk/test_runs.py::test_short_ended_versions_go",),
    "live versions and checkpoints stay": ("disk/test_runs.py::test_a_live_version_stays_whatever_its_age_and_steps",),
    "a resumed run continues its version": (
        "training/test_train.py::test_resume_is_bit_identical_for_every_optimizer",
    ),
    # Python
    "load_config_from_yaml": (
        "config/test_config.py::test_the_door_of_older_scripts",
        "test_guide.py::test_inference_example",
    ),
    "FluxKontextLoraTrainer, QwenImageEditTrainer": ("test_contract.py::test_trainer_classes_cache_fit_and_predict",),
    "predict returns a list of pictures": ("drawing/test_predict.py::test_predict_sets_itself_up",),
    "load_lora before or after setup_predict": ("drawing/test_predict.py::test_a_lora_before_or_after_the_setup",),
    "--lora A --lora B --strength a --strength b": (
        "drawing/test_predict.py::test_a_lora_before_or_after_the_setup",
        "drawing/test_predict.py::test_strengths_belong_to_loras_one_by_one",
        "command/test_options.py::test_options_that_join_are_given_repeatedly",
    ),
    "guidance_scale is obeyed": ("drawing/test_predict.py::test_guidance_scale_is_obeyed",),
    "predict sets itself up": ("drawing/test_predict.py::test_predict_sets_itself_up",),
    # Claims
    "figures of others are not given as ours": ("test_docs.py::test_no_figure_of_others_is_given_as_ours",),
}


def names_of_tests(file: Path) -> set[str]:
    """Names of the test functions in a file."""
    found = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_has_a_test(promise: str) -> None:
    for node in PROMISES[promise]:
        file, _, name = node.partition("::")
        assert name in names_of_tests(TESTS / file), f"{promise}: there is no test {node}"


def test_every_promised_key_is_a_key_or_an_older_spelling() -> None:
    from qwen_image_finetune.config import SPELLINGS
    from qwen_image_finetune.config.words import known_keys

    keys = {*known_keys(), *(older for older, _ in SPELLINGS)}
    assert [key for key in PROMISED_KEYS.split() if key not in keys] == []
