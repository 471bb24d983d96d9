"""The pairs of a configuration: those that are trained on, and those that are held out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen_image_finetune.config import OUR_DATASETS, Config, ConfigError, PreservationConfig, import_class
from qwen_image_finetune.data import alike, left_out
from qwen_image_finetune.data.asked import AskedDataset
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.left_out import LeftOut
from qwen_image_finetune.data.part import Part, spread
from qwen_image_finetune.data.suspects import few_note
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.limits import (
    check_prompts,
    reference_faults,
    reference_problems,
    row_problems,
    shown_references,
)
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers.stored_precision import local_checkpoint
from qwen_image_finetune.machine import console

Share = Callable[[Callable[[], Any], str], Any]


def alone(make: Callable[[], Any], what: str) -> Any:
    """`Team.share` of a process without others."""
    return make()


def open_dataset(
    config: Config, family: Family, decode: bool = False, before: Sequence[LeftOut] = (), share: Share = alone
) -> ImageDataset:
    """The dataset of a configuration, checked: every missing or unreadable file in one report.

    Args:
        decode: read every picture to its end, not its header alone. With data.max_bad_share that is done in any case,
            so that the rows are the same with and without the cache.
        before: rows that a run which goes on has left out.
        share: `Team.share`, so that one process reads for all of them.

    Raises:
        DataError: with all problems, before any model is loaded.
    """
    chosen: Any = ImageDataset
    if config.data.class_path not in OUR_DATASETS:
        chosen = import_class(config.data.class_path, "data.class_path", ImageDataset)
    arguments = config.data.init_args
    dataset: ImageDataset = chosen(
        arguments,
        family.size,
        family.side_multiple,
        family.max_references,
        config.train.seed,
        family.scaled,
        family.resampling,
        family.references_follow,
    )
    if not family.max_references and (number := sum(bool(row.reference_names) for row in dataset.rows)):
        raise DataError([f"{number} of {len(dataset)} pictures have control images: {family.takes_none}"])
    decode = decode and not arguments.streaming  # the pictures of a shard are decoded when it is encoded
    if config.data.max_bad_share:
        leave_out_bad_rows(config, family, dataset, before, share)
    problems = dataset.check(decode)
    if (
        problems and not decode and not arguments.streaming
    ):  # nothing will be trained now: report what lies behind the headers as well
        problems = dataset.check(decode=True)
    problems = problems or reference_problems(family, dataset)
    if problems:
        raise DataError(problems)
    for line in dataset.notes:
        console.note(line)
    return dataset


def leave_out_bad_rows(
    config: Config, family: Family, dataset: ImageDataset, before: Sequence[LeftOut], share: Share
) -> None:
    """Take the rows that cannot be trained on out of a dataset, and say how many, and what changed since `before`.

    Raises:
        DataError: they are more than data.max_bad_share allows, or all.
    """
    most, decode = config.data.max_bad_share, not config.data.init_args.streaming
    bad: dict[str, list[str]] = share(lambda: bad_rows(family, dataset, decode), "checking the pictures")
    total = len({*bad, *(row.key for row in dataset.rows)})
    if bad and (len(bad) / total > most or len(bad) == total):
        words = f"{len(bad)} of {total} rows cannot be trained on; data.max_bad_share={most} lets fewer be left out"
        listed = dict.fromkeys(line for lines in bad.values() for line in lines)
        raise DataError([words, *listed])
    known, present = {row.key for row in before}, {row.key for row in dataset.rows}
    stay = [row for row in before if row.key not in bad]
    found = [LeftOut(key, tuple(lines)) for key, lines in bad.items()]
    dataset.leave_out([*found, *stay])
    if dataset.left_out:
        console.note(
            f"{len(dataset.left_out)} of {total} rows are left out, as data.max_bad_share={most} allows; a run lists "
            f"them in {left_out.FILE} of its folder"
        )
    if before and (new := [row for row in found if row.key not in known]):
        console.note(f"rows that the run had when it began are left out now: {'; '.join(map(str, new))}")
    if before and (sound := [row.key for row in stay if row.key in present]):
        console.note(f"rows that can be read now stay left out, as when the run began: {', '.join(sound)}")


def bad_rows(family: Family, dataset: ImageDataset, decode: bool) -> dict[str, list[str]]:
    """What is wrong with each row that cannot be trained on, by its key."""
    found: dict[str, list[str]] = {}
    for fault in dataset.faults(decode):
        found.setdefault(fault.row, []).append(str(fault))
    for index, row in enumerate(dataset.rows):
        if row.key not in found and (lines := row_problems(family, dataset, index)):
            found[row.key] = lines
    return found


class Pairs(NamedTuple):
    """What is trained on, and what is not; None where nothing is held out, or preserved with pairs of its own."""

    training: ImageDataset
    held_out: ImageDataset | None
    preserved: ImageDataset | None = None  # pairs of loss.preservation.dataset_path


def open_pairs(
    config: Config, family: Family, decode: bool = False, before: Sequence[LeftOut] = (), share: Share = alone
) -> Pairs:
    """The data set of a configuration, checked, the pairs that validation holds out of it or reads beside it, and those
    of loss.preservation.

    No held-out row has an input that looks like one that is trained on. Of pairs beside it none is left out.

    Args:
        decode, before, share: as those of `open_dataset`.

    Raises:
        DataError: with all problems, before any model is loaded.
        ConfigError: validation.share cannot be held out.
    """
    preserved = None
    if config.loss.preserves and config.loss.preservation.dataset_path is not None:
        preserved = open_dataset(preservation_settings(config), family, decode)
    return _with_held_out(config, family, decode, before, share)._replace(preserved=preserved)


def preservation_settings(config: Config) -> Config:
    """The configuration by which the pairs of loss.preservation are read and encoded: none of them is dropped or
    left out, nothing is masked, and no samples are drawn of them."""
    plain = {
        "dataset_path": config.loss.preservation.dataset_path, "streaming": False, "use_edit_mask": False,
        "caption_dropout_rate": 0.0, "prompt_image_dropout_rate": 0.0,
    }  # fmt: skip
    arguments = config.data.init_args.model_copy(update=plain)
    sections: dict[str, Any] = {
        "data": config.data.model_copy(update={"init_args": arguments, "max_bad_share": 0.0}),
        "loss": config.loss.model_copy(update={"mask_loss": False, "preservation": PreservationConfig()}),
        "validation": config.validation.model_copy(update={"enabled": False}),
    }
    return config.model_copy(update=sections)


def _with_held_out(config: Config, family: Family, decode: bool, before: Sequence[LeftOut], share: Share) -> Pairs:
    dataset, settings = open_dataset(config, family, decode, before, share), config.validation
    for line in few_note(len(dataset)):
        console.note(line)
    if not settings.enabled or (settings.dataset_path is None and settings.share == 0):
        return Pairs(dataset, None)
    if settings.dataset_path is None:
        try:
            chosen = alike.choose(dataset, settings.share)
        except ValueError as error:
            raise ConfigError(f"validation.share={settings.share}: {error}") from error
        left = sorted(set(range(len(dataset))) - set(chosen))
        # An identity pair is kept away from training with its edit, and says nothing of how well that is learnt.
        chosen = [row for row in chosen if not dataset.rows[row].shared.identity] or chosen
        console.note(
            f"{len(chosen)} of {len(dataset)} pairs are held out of training (validation.share={settings.share})"
        )
        return Pairs(Part(dataset, left), Part(dataset, chosen))

    given = {"dataset_path": settings.dataset_path, "streaming": False}
    arguments = config.data.init_args.model_copy(update=given)
    data = config.data.model_copy(update={"init_args": arguments, "max_bad_share": 0.0})
    folder = open_dataset(config.model_copy(update={"data": data}), family, decode)
    if config.data.init_args.streaming:
        console.note("held-out pairs are not compared with those that are trained on: their pictures are not kept")
        return Pairs(dataset, folder)
    leaking = set(alike.leaking(folder, dataset))
    if len(leaking) == len(folder):
        raise DataError(f"validation.dataset_path={settings.dataset_path}: every input of it is also trained on")
    if leaking:
        names = ", ".join(folder.rows[row].key for row in sorted(leaking)[:3])
        console.note(
            f"{len(leaking)} of {len(folder)} held-out pairs are left out: their inputs look like some that are "
            f"trained on ({names}{', ...' if len(leaking) > 3 else ''})"
        )
    return Pairs(dataset, Part(folder, sorted(set(range(len(folder))) - leaking)))


def check_all_prompts(config: Config, family: Family, pairs: Pairs) -> None:
    """Refuse captions that cannot be encoded, where the checkpoint is on this machine; say which are read in part.

    Raises:
        DataError: with all of them.
    """
    checkpoint = local_checkpoint(config.model)
    for dataset in (*pairs, asked(config, family, pairs.training)):
        if checkpoint is not None and dataset is not None:
            preserved = config.loss.preservation.asked if dataset is pairs.training else ()
            check_prompts(family, checkpoint, dataset, range(len(dataset)), preserved)


def needed(config: Config, held_out: ImageDataset) -> ImageDataset:
    """The held-out rows that validation uses, spread over all there are; the others need not be encoded."""
    number = max(config.validation.num_loss_pairs, config.validation.num_validation_samples)
    return Part(held_out, spread(number, len(held_out)))


def asked(config: Config, family: Family, training: ImageDataset) -> AskedDataset | None:
    """The prompts of validation.samples, as rows; None where there are none.

    Raises:
        DataError: references that cannot be read, or are more than the family sees, each with its key.
    """
    samples = config.validation.samples
    if not samples or not config.validation.enabled:
        return None
    dataset = AskedDataset(
        samples, training.rows[0].target, family.sizing_reference, config.data.init_args, family.size,
        family.side_multiple, family.max_references, family.scaled,
    )  # fmt: skip
    problems = []
    for place, sample in enumerate(samples):
        key = f"validation.samples[{place}].references"
        if len(sample.paths) > family.max_references:
            most = (
                f"{family.name} takes at most {family.max_references}" if family.max_references else family.takes_none
            )
            problems.append(f"{key}: {len(sample.paths)} pictures; {most}")
            continue
        found = dataset.check(rows=[place])
        faults = [] if found else reference_faults(family, shown_references(dataset.plan(place)))
        problems += [f"{key}: {line}" for line in found]
        problems += [f"{key}: {sample.paths[number]}: {fault}" for number, fault in faults]
    if problems:
        raise DataError(problems)
    return dataset


class EncodedPairs(NamedTuple):
    """The rows of a run with what the encoders make of them; None where a run has no such rows."""

    training: EncodedDataset
    held_out: EncodedDataset | None
    asked: EncodedDataset | None
    preserved: EncodedDataset | None


def encoded(config: Config, family: Family, pairs: Pairs, checkpoint: Path, dtype: torch.dtype) -> EncodedPairs:
    """Rows to train on, held-out rows as far as validation needs them, prompts of one's own, pairs of
    loss.preservation; with their texts.

    Raises:
        DataError: see `asked`.
    """
    prompts = asked(config, family, pairs.training)
    own = None if prompts is None else EncodedDataset(config, family, prompts, checkpoint, dtype, trained_on=False)
    kept = None
    if pairs.preserved is not None:
        kept = EncodedDataset(preservation_settings(config), family, pairs.preserved, checkpoint, dtype)
    if pairs.held_out is None:
        return EncodedPairs(EncodedDataset(config, family, pairs.training, checkpoint, dtype), None, own, kept)
    held_out = EncodedDataset(config, family, needed(config, pairs.held_out), checkpoint, dtype, trained_on=False)
    settings = training_settings(config, held_out=True)
    return EncodedPairs(EncodedDataset(settings, family, pairs.training, checkpoint, dtype), held_out, own, kept)


def training_settings(config: Config, held_out: bool) -> Config:
    """The configuration by which rows to train on are encoded.

    Args:
        held_out: samples are drawn from other pairs, so these need no negative prompts.
    """
    if not held_out:
        return config
    return config.model_copy(update={"validation": config.validation.model_copy(update={"enabled": False})})
