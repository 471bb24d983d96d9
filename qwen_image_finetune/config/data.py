"""Keys of the data: which sets there are, and how their pairs are read."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from qwen_image_finetune.config.values import (
    Allowed,
    ClassPath,
    Count,
    Natural,
    Positive,
    Rate,
    Repeats,
    Section,
    Side,
    Size,
    Switch,
    Text,
    refuse,
)

OUR_DATASETS = ("src.data.dataset.ImageDataset", "qwen_image_finetune.data.dataset.ImageDataset")


class Columns(Section):
    """The columns of a data set of shards or tables."""

    target: Text = Field(description="the picture that is wanted")
    references: Text | list[Text] = Field([], description="column of the references, one or a list in it, or columns")
    prompt: Text = Field(description="the instruction")
    mask: Text | None = Field(None, description="the edit mask")


Resolution = Annotated[
    Side | Annotated[list[Side], Field(min_length=1)], Allowed("whole number from 1 to 65536, or a list of them")
]


def areas(resolution: int | list[int] | None) -> tuple[int, ...]:
    """The pixel areas of a resolution or of several, each once, the largest first; none of None."""
    sides = [] if resolution is None else [resolution] if isinstance(resolution, int) else resolution
    return tuple(side * side for side in sorted(set(sides), reverse=True))


class DataEntry(Section):
    """One data set of several, or one that needs more than its place."""

    path: Text = Field(description="folder, table, or hf://OWNER/NAME[/FOLDER][@REVISION]")
    columns: Columns | None = Field(None, description="target, references, prompt, mask; default: known by name")
    split: Text = Field("train", description="files with this word in their name, where there are several splits")
    weight: Positive | None = Field(
        None, description="its share of the visits, beside the weights of the others; default: by its samples"
    )
    repeats: Repeats = Field(1, description="visits of an epoch to each of its samples")
    prefix: Text | None = Field(None, description="stands before every prompt of it")
    prompt_per_line: Switch = Field(False, description="each line of a caption is a prompt; one is drawn a visit")
    identity: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="its pairs become: the source as it is, asked for with this sentence, or one of a list"
    )
    image_size: Size | None = Field(None, description="in place of that, and of the resolution, of data.init_args")
    resolution: Resolution | None = Field(None, description="the same")
    caption_dropout_rate: Rate | None = Field(None, description="in place of that of data.init_args")
    prompt_image_dropout_rate: Rate | None = Field(None, description="the same")

    @model_validator(mode="after")
    def _consistent(self) -> DataEntry:
        problems = []
        for one, other in (("image_size", "resolution"), ("weight", "repeats")):
            values = [getattr(self, name) for name in (one, other)]
            if values[0] is not None and values[1] not in (None, 1):
                problems.append(
                    f"{one}={values[0]} and {other}={values[1]} of {self.path} exclude each other: give one of them"
                )
        refuse(problems)
        return self

    @property
    def on_hub(self) -> bool:
        """Whether its files come from the hub."""
        return self.path.startswith("hf://")


def _all_weighed(entries: list[str | DataEntry]) -> list[str | DataEntry]:
    without = [one if isinstance(one, str) else one.path for one in entries if isinstance(one, str) or not one.weight]
    if 0 < len(without) < len(entries):
        raise ValueError(
            f"weight is given for some data sets and not for {', '.join(without)}: give it to all, or none"
        )
    return entries


DatasetPath = (
    Text
    | Annotated[
        list[Text | DataEntry],
        Field(min_length=1),
        AfterValidator(_all_weighed),
        Allowed("list of texts, or of sections, path and what a set has of its own"),
    ]
)


class DatasetArguments(Section):
    """Arguments of the dataset class. A class of your own may take others; they are passed on."""

    model_config = ConfigDict(extra="allow")  # a class of the user's own may take more; ours is checked in DataConfig

    dataset_path: DatasetPath = Field(
        "data/face_seg",
        description="a folder of pairs or of shards (parquet, arrow, tar), a table, hf://OWNER/NAME, or a list of them",
    )
    shards_dir: Text = Field(
        "shards", description="folder for shards of the hub, and for what is known of the pictures in shards"
    )
    image_size: Size | None = Field(
        None, description="[width, height] in pixels of every target; without it the aspect ratio is kept"
    )
    resolution: Resolution | None = Field(
        None,
        description="side, in pixels, of the square whose area pictures are scaled to; of several, visits take turns; "
        "default: the model's own",
    )
    max_buckets: Count | None = Field(
        None,
        description="most sizes that targets have, at each resolution; a picture of another shape is cropped to the "
        "nearest; default: each keeps its shape",
    )
    streaming: Switch = Field(
        False,
        description="for what fits no disk: shards of the hub are encoded into the cache one by one, and removed",
    )
    caption_dropout_rate: Rate = Field(0.0, description="share of samples trained on the empty prompt")
    prompt_image_dropout_rate: Rate = Field(0.0, description="share of samples trained without their references")
    use_edit_mask: Switch = Field(False, description="read STEM_mask beside the target, for loss.mask_loss")
    center_crop: Switch = Field(False, description="keep the centre of every picture of a pair")
    center_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0), Allowed("number above 0, at most 1")] = Field(
        1.0, description="share of width and height that center_crop keeps"
    )
    random_crop: Switch = Field(False, description="a random window, the same for all pictures of a pair")
    crop_size: Count | Size | None = Field(
        None, description="pixels of the random window in the target, a side or [width, height]; default: the largest"
    )
    crop_scale: Annotated[list[Rate], Field(min_length=2, max_length=2), Allowed("[smallest, largest]")] = Field(
        [1.0, 1.0], description="range of the random window's scale, [smallest, largest]"
    )
    random_flip: Switch = Field(False, description="every other visit, by chance: the whole pair left to right")

    @model_validator(mode="after")
    def _consistent(self) -> DatasetArguments:
        problems = []
        if self.image_size is not None and self.resolution is not None:
            problems.append(
                f"data.init_args.image_size={self.image_size} and data.init_args.resolution={self.resolution} exclude "
                "each other: give one of them"
            )
        if self.max_buckets is not None and self.streaming:
            problems.append(
                f"data.init_args.max_buckets={self.max_buckets} and data.init_args.streaming=true exclude each other: "
                "which sizes are kept follows from all pictures, and a shard shows its own; give image_size"
            )
        if self.center_crop and self.random_crop:
            problems.append(
                "data.init_args.center_crop=true and data.init_args.random_crop=true exclude each other: give one"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            problems.append(
                f"data.init_args.crop_scale={self.crop_scale} is not [smallest, largest] with 0 < smallest <= largest"
            )
        refuse(problems)
        return self

    @property
    def area(self) -> int | None:
        """Pixel area that pictures are scaled to, the largest of several; None is the model's own."""
        if self.image_size is not None:
            return self.image_size[0] * self.image_size[1]
        return next(iter(areas(self.resolution)), None)

    def sized_by(self, entry: DataEntry) -> DataEntry | DatasetArguments:
        """What says the sizes of a data set: its own section, or, where that says nothing of them, this one."""
        return self if entry.image_size is None and entry.resolution is None else entry

    @property
    def largest(self) -> tuple[tuple[int, int], int | None]:
        """(width, height) of the largest pictures that are asked for, and their area; 1024 x 1024 and None for the
        model's own."""
        found: list[tuple[tuple[int, int], int | None]] = []
        for one in map(self.sized_by, self.entries):
            area = next(iter(areas(one.resolution)), None)
            side = 1024 if area is None else isqrt(area)
            width, height = one.image_size or (side, side)
            found.append(((width, height), area if one.image_size is None else width * height))
        return max(found, key=lambda each: each[0][0] * each[0][1])

    @property
    def drops_captions(self) -> bool:
        """Whether any sample is trained on the empty prompt."""
        return any((self.caption_dropout_rate if one is None else one) > 0 for one in
                   (entry.caption_dropout_rate for entry in self.entries))  # fmt: skip

    @property
    def drops_references(self) -> bool:
        """Whether any sample is trained without its references."""
        return any((self.prompt_image_dropout_rate if one is None else one) > 0 for one in
                   (entry.prompt_image_dropout_rate for entry in self.entries))  # fmt: skip

    @property
    def entries(self) -> tuple[DataEntry, ...]:
        """dataset_path as sections, one or several."""
        given = [self.dataset_path] if isinstance(self.dataset_path, str) else self.dataset_path
        return tuple(DataEntry(path=one) if isinstance(one, str) else one for one in given)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those of dataset_path that are on this machine."""
        return tuple(Path(entry.path).expanduser() for entry in self.entries if not entry.on_hub)


class DataConfig(Section):
    """The pairs, and how they are read."""

    class_path: ClassPath = Field(OUR_DATASETS[0], description="import path of the dataset class")
    init_args: DatasetArguments = Field(DatasetArguments(), description="its arguments")
    batch_size: Count = Field(1, description="samples per process in one forward pass")
    num_workers: Natural = Field(0, description="processes that read data; 0 reads in the training process")
    prefetch_factor: Count = Field(2, description="batches read ahead, by each worker where there are some")
    persistent_workers: Switch = Field(False, description="no effect: workers live as long as the run")
    shuffle: Switch = Field(True, description="a new order of the samples every epoch")
    max_bad_share: Rate = Field(
        0.0, description="share of the samples that may be left out, and listed, because they cannot be read"
    )

    @model_validator(mode="after")
    def _known_arguments(self) -> DataConfig:
        unknown = sorted(self.init_args.model_extra or ())
        if self.class_path in OUR_DATASETS:  # load_config has named the nearest key before this is reached
            refuse([f"'data.init_args.{name}' is not an argument of {self.class_path}" for name in unknown])
        return self

    @property
    def is_random(self) -> bool:
        """Whether a sample may look otherwise each time it is seen; a class of the user's own may do anything."""
        return self.class_path not in OUR_DATASETS or self.init_args.random_crop or self.init_args.random_flip
