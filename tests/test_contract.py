"""What is promised to users, promise by promise, with the test that proves it; the proofs nobody else has are below."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.families import FAMILIES, get_family, with_targets
from qwen_image_finetune.trainer import Trainer
from qwen_image_finetune.training.train import train

TESTS = Path(__file__).parent
FAMILY_NAMES = sorted(FAMILIES)
Configure = Callable[..., Config]
WritePairs = Callable[..., Path]

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
        "test_contract.py::test_two_processes_train_as_one_with_twice_the_accumulation",
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
        "levers/test_quantize.py::test_stored_weights_are_not_changed",
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
        "data/test_batches.py::test_every_row_once_an_epoch_and_one_geometry_a_batch",
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
        "test_contract.py::test_two_processes_train_as_one_with_twice_the_accumulation",
    ),
    "cache: an incomplete one is completed": ("test_contract.py::test_an_incomplete_cache_is_completed_and_said",),
    "logging: report_to": ("test_contract.py::test_several_trackers_are_told", "config/test_config.py::test_refused"),
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


# What is compared


@dataclass(frozen=True)
class Outcome:
    """What a run left, read at once: a version of fewer than 5 steps makes way for the next one of its project."""

    version: Path
    losses: list[float]
    weights: dict[str, Tensor]
    lora: Path


def learn(config: Config) -> Outcome:
    version = train(config)
    assert version is not None
    return read_outcome(version)


def read_outcome(version: Path) -> Outcome:
    lora = newest(version) / "pytorch_lora_weights.safetensors"
    lines = map(json.loads, (version / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]  # validation has lines of its own
    return Outcome(version, losses, load_file(lora), lora)


def newest(version: Path) -> Path:
    return max(version.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


# Commands


def test_the_doors_hold_no_logic() -> None:
    """Each door imports and names; only the command line of src.main has a function."""
    for file in (TESTS.parent / "src").rglob("*.py"):
        tree = ast.parse(file.read_text())
        if file.name != "main.py":
            assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for node in tree.body), (
                file
            )
        assert len(file.read_text().splitlines()) < 30
    from src.data.config import load_config_from_yaml
    from src.data.dataset import ImageDataset
    from src.flux_kontext_trainer import FluxKontextLoraTrainer
    from src.qwen_image_edit_trainer import QwenImageEditTrainer

    for door in (load_config_from_yaml, ImageDataset, FluxKontextLoraTrainer, QwenImageEditTrainer):
        assert door.__module__.startswith("qwen_image_finetune.")


def test_tensorboard_shows_versions_side_by_side(configure: Configure) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    config = configure("FluxKontext", "logging.report_to=tensorboard", "train.max_train_steps=5")
    train(config)
    train(config)
    shown = EventMultiplexer().AddRunsFromDirectory(str(config.logging.project_dir)).Reload()
    assert set(shown.Runs()) == {"v0", "v1"}
    assert [event.step for event in shown.Scalars("v1", "loss")] == [1, 2, 3, 4, 5]


def test_two_processes_train_as_one_with_twice_the_accumulation(configure: Configure, tmp_path: Path) -> None:
    """Same samples, same noise, same schedule in the same optimizer step; sums are rounded in another order."""
    same = ["optimizer.class_path=torch.optim.SGD", "data.init_args.caption_dropout_rate=0.3"]
    same += ["train.max_train_steps=4", "lr_scheduler.scheduler_type=cosine", "lr_scheduler.warmup_steps=1"]
    alone = learn(configure("FluxKontext", *same, "train.gradient_accumulation_steps=2"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "src.main", "--config", str(tmp_path / "config.yaml"), *same]
    subprocess.run([*command, "logging.tracker_project_name=two"], cwd=TESTS.parent, check=True)
    together = read_outcome(tmp_path / "output" / "two" / "v0")
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    for name, tensor in alone.weights.items():
        assert torch.allclose(tensor, together.weights[name], rtol=1e-4, atol=1e-6), name


# Configuration: the model and its adapter


def test_a_named_adapter_and_a_regular_expression(configure: Configure) -> None:
    config = configure("FluxKontext", "model.lora.adapter_name=lora_edit", "train.max_train_steps=1",
                       r"model.lora.target_modules='transformer_blocks\.\d+\.attn\.to_[qv]'")  # fmt: skip
    trained = learn(config).weights
    assert trained
    assert all(key.split(".lora_")[0].rpartition(".")[2] in ("to_q", "to_v") for key in trained)
    assert not [key for key in trained if ".single_transformer_blocks." in key or "lora_edit" in key]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_training_starts_from_a_lora_of_any_dialect(name: str, configure: Configure, tmp_path: Path) -> None:
    """One step at learning rate 0 gives back what it started from: our own file, and exports of it."""
    from qwen_image_finetune.lora.export import export

    trained = learn(configure(name, "train.max_train_steps=5"))
    source, expected = trained.lora, trained.weights
    naming = get_family(name).naming
    export(source, tmp_path / "comfy.safetensors", "comfy", naming)
    export(source, tmp_path / "kohya.safetensors", "kohya", naming)
    for start in (source, source.parent, tmp_path / "comfy.safetensors", tmp_path / "kohya.safetensors"):
        options = ("optimizer.class_path=torch.optim.SGD", "optimizer.init_args={lr: 0.0}", "train.max_train_steps=1")
        found = learn(configure(name, *options, f"model.lora.pretrained_weight={start}")).weights
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-7), (start, key)


# Configuration: data


def test_a_dataset_class_of_ones_own(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "from qwen_image_finetune.data.dataset import ImageDataset\n"
        "class Shouted(ImageDataset):\n"
        "    def prompt(self, index):\n"
        "        return super().prompt(index).upper()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = learn(configure("QwenImageEdit", "data.class_path=own_data.Shouted", "train.max_train_steps=2"))
    plain = learn(configure("QwenImageEdit", "train.max_train_steps=2"))
    assert own.losses != plain.losses


def test_several_folders_are_trained_on(configure: Configure, write_pairs: WritePairs, tmp_path: Path) -> None:
    """An epoch visits the rows of both."""
    first = write_pairs(tmp_path / "first", [(64, 64)] * 2)
    second = write_pairs(tmp_path / "second", [(64, 64)] * 3, seed=1)
    options = ("train.num_epochs=1", "train.max_train_steps=null")
    config = configure("FluxKontext", f"data.init_args.dataset_path=[{first}, {second}]", *options)
    assert len(learn(config).losses) == 5


def test_without_shuffle_the_rows_come_in_their_order(
    configure: Configure, write_pairs: WritePairs, tmp_path: Path
) -> None:
    from qwen_image_finetune.encoding.pairs import open_dataset
    from qwen_image_finetune.training.job import plan_batches

    folder = write_pairs(tmp_path / "rows", [(64, 64)] * 5)
    config = configure("FluxKontext", f"data.init_args.dataset_path={folder}", "data.shuffle=false")
    batches = plan_batches(config, open_dataset(config, get_family("FluxKontext")), 1)
    assert [micro.rows[0] for step in range(10) for micro in batches.at(step)] == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    "crop", ["center_crop: true, center_crop_ratio: 0.5", "random_crop: true, crop_size: 48, crop_scale: [0.8, 1.0]"]
)
def test_crops_reach_training(crop: str, configure: Configure, pairs: Path) -> None:
    def run(keys: str, cached: bool = True) -> list[float]:
        arguments = f"data.init_args={{dataset_path: {pairs}, resolution: 64, {keys}}}"
        options = ("train.max_train_steps=3", f"cache.use_cache={cached}")
        return learn(configure("FluxKontext", arguments, *options)).losses

    assert run(crop) != run("center_crop: false")
    assert run(crop) == run(crop, cached=False)  # within the first epoch, a random crop too


@pytest.mark.parametrize("cached", [True, False])
def test_the_mask_weights_the_loss(cached: bool, configure: Configure, write_pairs: WritePairs, tmp_path: Path) -> None:
    """The masks cover half of each picture: the mean of both halves' losses is the loss of the whole."""
    folder = write_pairs(tmp_path / "masked", [(64, 64)] * 3, masks=True)

    def run(*overrides: str) -> float:
        options = (f"data.init_args.dataset_path={folder}", "train.max_train_steps=1", f"cache.use_cache={cached}")
        return learn(configure("FluxKontext", *options, *overrides)).losses[0]

    masked = ("data.init_args.use_edit_mask=true", "loss.mask_loss=true")
    left = run(*masked, "loss.foreground_weight=1", "loss.background_weight=0")
    right = run(*masked, "loss.forground_weight=0", "loss.background_weight=2")
    whole = run()
    assert left != pytest.approx(right, rel=1e-3)
    assert (left + right) / 2 == pytest.approx(whole, rel=1e-5)
    three_to_one = run(*masked, "loss.foreground_weight=3", "loss.background_weight=1")
    assert (3 * left + right) / 4 == pytest.approx(three_to_one, rel=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_a_dropped_prompt_replaces_the_chosen_embeddings(cached: bool, configure: Configure) -> None:
    def run(*overrides: str) -> list[float]:
        options = ("train.max_train_steps=2", f"cache.use_cache={cached}")
        return learn(configure("FluxKontext", *options, *overrides)).losses

    dropped = "data.init_args.caption_dropout_rate=1.0"
    everything = run(dropped)
    named = run(dropped, "cache.prompt_empty_drop_keys=[prompt_embeds, pooled_prompt_embeds]")
    pooled = run(dropped, "cache.prompt_empty_drop_keys=[pooled_prompt_embeds]")
    nothing = run(dropped, "cache.prompt_empty_drop_keys=[]")
    assert named == everything
    assert nothing == run()
    assert pooled not in (everything, nothing)


@pytest.mark.parametrize("cached", [True, False])
def test_three_references_are_cached_trained_and_drawn_with(
    cached: bool, configure: Configure, write_pairs: WritePairs, tmp_path: Path
) -> None:
    folder = write_pairs(tmp_path / "three", [(64, 64), (64, 128)], references=3)
    path = f"data.init_args.dataset_path={folder}"
    config = configure("FluxKontext", path, f"cache.use_cache={cached}", "train.max_train_steps=5")
    outcome = learn(config)
    trainer = Trainer(config)
    trainer.load_lora(outcome.lora)
    files = sorted((folder / "control_images").glob("0*.png"))
    assert len(files) == 3
    pictures = [Image.open(file) for file in files]
    assert trainer.predict(pictures, "edit number 0", 2)[0].size == (64, 64)
    (folder / "control_images" / "0_control_2.png").unlink()
    (folder / "control_images" / "1_control_2.png").unlink()
    assert learn(config).losses != outcome.losses
    with pytest.raises(DataError, match="2 references; this model takes at most 1"):
        train(configure("QwenImageEdit", path))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_captions_alone(
    name: str, configure: Configure, write_pairs: WritePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a folder of references: text to picture, cached and uncached alike."""
    folder = write_pairs(tmp_path / "captions", [(64, 64), (64, 128)])
    for file in (folder / "control_images").iterdir():
        file.unlink()
    (folder / "control_images").rmdir()
    path, dropout = f"data.init_args.dataset_path={folder}", "data.init_args.caption_dropout_rate=0.5"
    cached = learn(configure(name, path, dropout, "train.max_train_steps=5"))
    assert "training on captions alone" in capsys.readouterr().out
    uncached = learn(configure(name, path, dropout, "train.max_train_steps=5", "cache.use_cache=false"))
    assert cached.losses == uncached.losses
    trainer = Trainer(configure(name, path))
    trainer.load_lora(cached.lora)
    assert trainer.predict(None, "edit number 0", 2, width=64, height=64)[0].size == (64, 64)


# Configuration: the loop


def test_bf16_trains_float32_adapters(configure: Configure) -> None:
    half = learn(configure("QwenImageEdit", "train.mixed_precision=bf16", "train.max_train_steps=2"))
    exact = learn(configure("QwenImageEdit", "train.max_train_steps=2"))
    assert {tensor.dtype for tensor in half.weights.values()} == {torch.float32}
    assert half.losses == pytest.approx(exact.losses, rel=0.05) and half.losses != exact.losses


def test_gradients_are_clipped(configure: Configure) -> None:
    """SGD at learning rate 1 moves by the gradient itself, so by no more than its largest norm."""

    def run(norm: float) -> float:
        options = (
            "optimizer.class_path=torch.optim.SGD",
            "optimizer.init_args={lr: 1.0}",
            "train.checkpointing_steps=1",
        )
        version = train(configure("FluxKontext", *options, f"train.max_grad_norm={norm}", "train.max_train_steps=2"))
        assert version is not None
        first, second = (
            load_file(next(version.glob(f"checkpoint-*-{n}")) / "pytorch_lora_weights.safetensors") for n in (1, 2)
        )
        return float(sum((second[name] - first[name]).square().sum() for name in first) ** 0.5)

    free = run(1e6)
    assert run(free / 10) == pytest.approx(free / 10, rel=1e-3) and free > 0


def test_the_oldest_checkpoints_go(configure: Configure) -> None:
    options = ("train.checkpointing_steps=2", "train.checkpoints_total_limit=2", "train.max_train_steps=7")
    run = train(configure("FluxKontext", *options))
    assert run is not None
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-0-6", "checkpoint-0-7"]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_low_memory_changes_nothing_but_memory(name: str, cached: bool, configure: Configure) -> None:
    options = ("train.max_train_steps=3", f"cache.use_cache={cached}")
    frugal, plain = learn(configure(name, *options, "train.low_memory=true")), learn(configure(name, *options))
    assert_equal(frugal.weights, plain.weights)


def test_an_incomplete_cache_is_completed_and_said(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("FluxKontext", "train.max_train_steps=1")
    first = learn(config).losses
    assert "lacks 7 texts and 14 pictures of 21 entries" in capsys.readouterr().out
    entries = sorted(
        path for path in Path(config.cache.cache_dir).rglob("*") if path.is_file() and len(path.stem) == 64
    )
    assert len(entries) == 21
    for entry in entries[::7]:
        entry.unlink()
    assert learn(config).losses == first
    assert "of 21 entries: encoding them" in capsys.readouterr().out
    train(config)
    assert "is complete: 21 entries" in capsys.readouterr().out


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_validation_draws_samples_and_changes_nothing(name: str, cached: bool, configure: Configure) -> None:
    options = ("train.max_train_steps=4", "model.lora.lora_dropout=0.2", f"cache.use_cache={cached}")
    samples = "{enabled: true, validation_steps: 2, num_validation_samples: 2, num_inference_steps: 2}"
    trackers = ("logging.report_to=tensorboard", "logging.tracker_project_name=drawn")
    run = learn(configure(name, *options, *trackers, f"validation={samples}"))
    plain = learn(configure(name, *options))
    assert run.losses == plain.losses
    assert_equal(run.weights, plain.weights)
    drawn = run.version
    files = sorted(path.relative_to(drawn).as_posix() for path in drawn.glob("samples/step-*/*.png"))
    assert files == [f"samples/step-{step}/{place}.png" for step in (2, 4) for place in (0, 1)]
    strip = Image.open(drawn / files[0])
    assert strip.size == (4 * 64, 64)  # reference, what the base draws, drawing, truth
    assert np.asarray(strip.crop((128, 0, 192, 64))).std() > 1
    assert (drawn / files[0]).read_bytes() != (drawn / files[2]).read_bytes(), "the model has learnt in between"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "samples/0" in EventAccumulator(str(drawn)).Reload().Tags()["images"]


# Outputs


def test_what_a_version_holds(configure: Configure) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from qwen_image_finetune.config import load_config

    config = configure(
        "FluxKontext", "logging.report_to=tensorboard", "train.checkpointing_steps=5", "train.max_train_steps=8"
    )
    run = train(config)
    assert run is not None
    assert run == config.logging.project_dir / "v0"
    (events,) = run.glob("events.out.tfevents.*")
    assert load_config(run / "config.yaml") == with_targets(config, get_family("FluxKontext"))

    shown = EventAccumulator(str(events)).Reload()
    tags = shown.Tags()
    assert {"loss", "grad_norm", "learning_rate"} <= set(tags["scalars"])
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx(read_outcome(run).losses)
    assert "config/text_summary" in tags["tensors"]
    assert (
        config.model.pretrained_model_name_or_path.encode()
        in shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    )
    (histogram,) = shown.Histograms("sigma")
    assert histogram.histogram_value.num == 8 and 0 < histogram.histogram_value.min < histogram.histogram_value.max < 1

    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-0-5",
        "checkpoint-1-8",
    ]  # 7 rows an epoch
    for folder in run.glob("checkpoint-*"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert (folder / "pytorch_lora_weights.safetensors") in files
        assert {path.suffix for path in files} <= {".safetensors", ".json"}
        for path in files:
            start = path.read_bytes()[:16]
            assert not start.startswith((b"\x80", b"PK")), f"{path} is a pickle or an archive"


def test_several_trackers_are_told(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_image_finetune.training import check, trackers

    class Recorder:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.calls: list[str] = []

        def start(self) -> None:
            self.calls.append("start")

        def store_init_configuration(self, values: dict[str, object]) -> None:
            assert values["model"]
            self.calls.append("configuration")

        def log(self, values: dict[str, float], step: int) -> None:
            assert values["loss"] > 0
            self.steps.append(step)

        def finish(self) -> None:
            self.calls.append("finish")

    recorder = Recorder()
    monkeypatch.setattr(trackers, "_online_tracker", lambda *arguments: recorder)
    monkeypatch.setattr(check, "unavailable", lambda names: [])
    run = train(configure("FluxKontext", "logging.report_to=[tensorboard, wandb]", "train.max_train_steps=3"))
    assert run is not None
    assert (recorder.calls, recorder.steps) == (["start", "configuration", "finish"], [1, 2, 3])
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_no_tracker_writes_no_events(configure: Configure) -> None:
    run = train(configure("FluxKontext", "logging.report_to=none", "train.max_train_steps=1"))
    assert run is not None
    assert not list(run.rglob("events.out.*"))


# Python


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_trainer_classes_cache_fit_and_predict(name: str, configure: Configure, pairs: Path) -> None:
    from qwen_image_finetune import trainer as module
    from qwen_image_finetune.config import ConfigError

    classes = {"FluxKontext": module.FluxKontextLoraTrainer, "QwenImageEdit": module.QwenImageEditTrainer}
    trainer = classes[name](configure(name, "train.max_train_steps=2"))
    trainer.cache()
    run = trainer.fit()
    trainer.setup_predict()
    assert run is not None
    trainer.load_lora(newest(run))
    reference = Image.open(pairs / "control_images" / "0.png")
    drawn = trainer.predict(
        prompt_image=reference, prompt="edit number 0", num_inference_steps=2, guidance_scale=2.0, seed=1
    )
    assert [picture.size for picture in drawn] == [(64, 64)]
    other = next(family for family in classes if family != name)
    with pytest.raises(ConfigError, match=f"trains {other}, but .* says {name}"):
        classes[other](trainer.config)
