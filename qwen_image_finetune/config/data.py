"""Keys of the data: which sets there are, and how their pairs are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from qwen_image_finetune.config.values import (
    Allowed,
    ClassPath,
    Count,
    Natural,
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


class DataEntry(Section):
    """One data set of several, or one that needs more than its place."""

    path: Text = Field(description="folder, table, or hf://OWNER/NAME[/FOLDER][@REVISION]")
    columns: Columns | None = Field(None, description="target, references, prompt, mask; default: known by name")
    split: Text = Field("train", description="files with this word in their name, where there are several splits")
    repeats: Repeats = Field(1, description="visits of an epoch to each of its samples")
    prefix: Text | None = Field(None, description="stands before every prompt of it")

    @property
    def on_hub(self) -> bool:
        """Whether its files come from the hub."""
        return self.path.startswith("hf://")


class DatasetArguments(Section):
    """Arguments of the dataset class. A class of your own may take others; they are passed on."""

    model_config = ConfigDict(extra="allow")  # a class of the user's own may take more; ours is checked in DataConfig

    dataset_path: (
        Text
        | Annotated[
            list[Text | DataEntry],
            Field(min_length=1),
            Allowed("list of texts, or of sections: path, columns, split, repeats, prefix"),
        ]
    ) = Field(
        "data/face_seg",
        description="a folder of pairs or of shards (parquet, arrow, tar), a table, hf://OWNER/NAME, or a list of them",
    )
    shards_dir: Text = Field(
        "shards", description="folder for shards of the hub, and for what is known of the pictures in shards"
    )
    image_size: Size | None = Field(
        None, description="[width, height] in pixels of every target; without it the aspect ratio is kept"
    )
    resolution: Side | None = Field(
        None, description="side, in pixels, of the square whose area pictures are scaled to; default: the model's own"
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
        """Pixel area that pictures are scaled to; None is the model's own."""
        if self.image_size is not None:
            return self.image_size[0] * self.image_size[1]
        return None if self.resolution is None else self.resolution**2

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
