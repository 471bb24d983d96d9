"""Embeddings of a dataset: computed by the frozen encoders once and kept, or computed on the way.

Both roads end in the same `Encoded` rows. A row consists of entries of the store: one for the target (with its mask),
one for each reference, and one for each text it can be trained or sampled with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config
from qwen_image_finetune.data import difference
from qwen_image_finetune.data.dataset import ImageDataset, cropped
from qwen_image_finetune.data.geometry import Picture
from qwen_image_finetune.data.images import READING
from qwen_image_finetune.encoding.store import Entry, Fingerprints, Store, bytes_of, entry_key
from qwen_image_finetune.families.base import Family, Reference
from qwen_image_finetune.levers import tiling
from qwen_image_finetune.machine import console
from qwen_image_finetune.records import Batch, Encoded, Example, collate, laid_out, memory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
ReadEntry: TypeAlias = Callable[[str], dict[str, Tensor]]  # key of an entry -> its tensors by name


class TextVariant(NamedTuple):
    """One way a row can be described to the model."""

    prompt: str | None = None  # None: the row's own, or one of them; "": a dropped one
    references: bool = True  # False: as if there were none


AS_IT_IS = TextVariant()


class RowKeys(NamedTuple):
    """Names of a row's entries in the store."""

    target: str
    references: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]  # in the order of `EncodedDataset.variants`; of each one for every prompt

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (self.target, *self.references, *(key for text in self.texts for key in text))


class PictureSource(NamedTuple):
    """What an image entry is made of."""

    picture: Picture
    references: int  # of its row
    area: int | None  # of its plan
    mask: Picture | None
    source: Picture | None = None  # what the picture is compared with, where the difference is its mask


class TextSource(NamedTuple):
    """What a text entry is made of."""

    prompt: str
    references: tuple[Picture, ...]


@dataclass(frozen=True)
class Missing:
    """Entries that the store lacks, by key."""

    images: dict[str, PictureSource]
    texts: dict[str, TextSource]
    entries: int  # all that the dataset needs, present ones included
    damaged: int = 0  # how many were there, but not as they were written

    def __len__(self) -> int:
        return len(self.images) + len(self.texts)

    def share(self, rank: int, processes: int) -> Missing:
        """The part of process `rank`."""

        def deal(entries: dict[str, Any]) -> dict[str, Any]:
            return {key: source for key, source in entries.items() if owner(key, processes) == rank}

        return Missing(deal(self.images), deal(self.texts), self.entries, self.damaged)


def owner(key: str, processes: int) -> int:
    """The process that encodes an entry.

    It follows from the key alone, not from what is missing: processes that looked at different moments still leave
    nothing out and do nothing twice.
    """
    return int(key[:8], 16) % processes


def text_variants(config: Config, family: Family, trained_on: bool = True) -> tuple[TextVariant, ...]:
    """Every text that rows of this configuration can be trained or sampled with."""
    arguments = config.data.init_args
    prompts: list[str | None] = [None]
    if arguments.drops_captions:
        prompts.append("")
    if config.validation.enabled:
        prompts.append(family.negative_prompt)
    if trained_on:
        prompts += [prompt for prompt in config.loss.preservation.asked if prompt not in prompts]
    blind = arguments.drops_references and family.text_sees_references
    return tuple(TextVariant(prompt, seen) for prompt in prompts for seen in ((True, False) if blind else (True,)))


class EncodedDataset:
    """Rows of a dataset as `Encoded`, out of the store or straight from the encoders."""

    def __init__(
        self,
        config: Config,
        family: Family,
        dataset: ImageDataset,
        checkpoint: Path,
        dtype: torch.dtype,
        trained_on: bool = True,
    ) -> None:
        self.family, self.dataset = family, dataset
        # Crops and flips that are stored: visits of training take turns, other pairs are seen as they are.
        self.variations = config.cache.num_variations if config.data.is_random else 1
        self.trained_on = trained_on
        self.drop_keys = config.cache.prompt_empty_drop_keys
        self.variants = text_variants(config, family, trained_on)
        self.preserved = config.loss.preservation.asked if trained_on else ()  # prompts besides the rows' own
        self.dtype = str(dtype).removeprefix("torch.")
        self.text_format = config.model.text_format
        self.vae_tiling = config.model.vae_tiling
        folder = Path(config.cache.cache_dir).expanduser()
        self.by_difference = config.loss.mask_loss == "difference"
        self.store, self.fingerprints = Store(folder), Fingerprints(folder)
        self.checkpoint = checkpoint
        self._row_keys: list[list[RowKeys]] = []  # of each row, for each of `stored`

    def stored(self, index: int) -> tuple[int | None, ...]:
        """Visits to a row of which the pictures are stored; later ones take turns at them."""
        return tuple(range(self.variations * self.dataset.turns(index))) if self.trained_on else (None,)

    def example(self, index: int) -> Example:
        """The pictures behind `read` at the first visit."""
        return self.dataset.load(index, self.stored(index)[0])

    def content(self, index: int) -> tuple[str, str]:
        """Hashes, 16 digits each, of a row's prompts and of the files of its pictures: what it is, wherever it lies."""
        plan, prompts = self.dataset.plan(index, self.stored(index)[0]), self.dataset.prompts(index)
        pictures = [*plan.references, plan.target, *([] if plan.mask is None else [plan.mask])]
        files = [self.fingerprints.file(picture.path) for picture in pictures]
        return entry_key(text=prompts[0] if len(prompts) == 1 else prompts)[:16], entry_key(files=files)[:16]

    # Naming and filling the store

    def missing(self, verify: bool = False, rank: int = 0, processes: int = 1) -> Missing:
        """Name every entry of every row, and say which of them the store lacks.

        Args:
            verify: read the present ones of this process's share too; damaged entries count as lacking. They stay
                until they are replaced, as another run may be about to read them.
        """
        encoders = {
            "vae": self.fingerprints.folders([self.checkpoint / "vae"]),
            "text": self.fingerprints.folders([self.checkpoint / part for part in self.family.text_components]),
        }
        images: dict[str, PictureSource] = {}
        texts: dict[str, TextSource] = {}
        self._row_keys = [
            [self._name_row(index, visit, encoders, images, texts) for visit in self.stored(index)]
            for index in range(len(self.dataset))
        ]
        self.fingerprints.save()

        keys = [*images, *texts]
        lacking = set(self.store.missing(keys))
        present = [key for key in keys if key not in lacking and owner(key, processes) == rank]
        damaged = set(self._damaged(present)) if verify else set()
        return Missing(
            images={key: source for key, source in images.items() if key in lacking | damaged},
            texts={key: source for key, source in texts.items() if key in lacking | damaged},
            entries=len(keys),
            damaged=len(damaged),
        )

    def _name_row(
        self,
        index: int,
        visit: int | None,
        encoders: dict[str, str],
        images: dict[str, PictureSource],
        texts: dict[str, TextSource],
    ) -> RowKeys:
        plan, own_prompts = self.dataset.plan(index, visit), self.dataset.prompts(index)

        def identity(picture: Picture) -> list[Any]:
            left, upper, right, lower = picture.box
            scaled = self.dataset.scaled((right - left, lower - upper), picture.size, len(plan.references), plan.area)
            extra = ["mirrored"] if picture.mirrored else []
            extra += [f"cut out of {scaled}"] if scaled != picture.size else []  # or filled around it
            return [self.fingerprints.file(picture.path), READING, list(picture.box), list(picture.size), *extra]

        def image(picture: Picture, mask: Picture | None = None, source: Picture | None = None) -> str:
            extra: dict[str, Any] = {} if mask is None else {"mask": identity(mask)}
            if source is not None:
                extra["difference"] = [difference.VERSION, identity(source)]
            if self._tiles(picture.size):
                extra["tiled"] = [tiling.TILE, tiling.STRIDE]
            key = entry_key(image=identity(picture), vae=encoders["vae"], dtype=self.dtype, **extra)
            images.setdefault(key, PictureSource(picture, len(plan.references), plan.area, mask, source))
            return key

        def text(variant: TextVariant, prompt: str) -> str:
            seen = plan.references if self.family.text_sees_references and variant.references else ()
            # Families may share an encoder and ask it in other words: the family decides as well.
            extra = {} if self.text_format is None else {"weights": self.text_format}
            key = entry_key(
                text=prompt, references=[identity(picture) for picture in seen], encoder=encoders["text"],
                family=self.family.name, dtype=self.dtype, **extra,
            )  # fmt: skip
            texts.setdefault(key, TextSource(prompt, seen))
            return key

        source = plan.references[0] if self.by_difference and plan.references else None
        return RowKeys(
            target=image(plan.target, None if self.by_difference else plan.mask, source),
            references=tuple(image(picture) for picture in plan.references),
            texts=tuple(
                tuple(text(variant, one) for one in (own_prompts if variant.prompt is None else (variant.prompt,)))
                for variant in self.variants
            ),
        )

    def _damaged(self, keys: list[str]) -> Iterator[str]:
        with ThreadPoolExecutor(4) as pool:
            for key, sound in zip(keys, pool.map(self.store.verify, keys), strict=True):
                if not sound:
                    yield key

    def rows_lacking(self, missing: Missing) -> list[int]:
        """Numbers of the rows with an entry among `missing`."""
        lacking = {*missing.images, *missing.texts}
        return [
            index
            for index, variations in enumerate(self._row_keys)
            if any(not lacking.isdisjoint(keys.all) for keys in variations)
        ]

    def encode_texts(self, pipe: DiffusionPipeline, texts: dict[str, TextSource]) -> Iterator[str]:
        """Encode and store texts; yields each key when its entry is written."""

        def load(item: tuple[str, TextSource]) -> list[Reference]:
            return [Reference(cropped(picture), picture.size) for picture in item[1].references]

        for (key, source), references in ahead(texts.items(), load):
            self.store.write(key, self.family.encode_text(pipe, source.prompt, references))
            yield key

    def encode_images(self, pipe: DiffusionPipeline, images: dict[str, PictureSource]) -> Iterator[str]:
        """Encode and store pictures; yields each key when its entry is written."""

        def load(item: tuple[str, PictureSource]) -> Image:
            made_of = item[1]
            return self.dataset.fitted(cropped(made_of.picture), made_of.picture.size, made_of.references, made_of.area)

        for (key, made_of), picture in ahead(images.items(), load):
            entry = {"latent": self._latent(pipe, picture)}
            if made_of.mask is not None:
                whole = cropped(made_of.mask, mask=True).convert("L")
                mask = self.dataset.fitted(whole, made_of.mask.size, made_of.references, made_of.area)
                entry["mask"] = latent_mask(mask, entry["latent"])
            elif made_of.source is not None:
                source = self.dataset.fitted(cropped(made_of.source), picture.size, made_of.references, made_of.area)
                entry["mask"] = latent_mask(difference.difference_map(source, picture), entry["latent"])
            self.store.write(key, entry)
            yield key

    def _tiles(self, size: tuple[int, int]) -> bool:
        return self.vae_tiling and tiling.tiles(size)

    def _latent(self, pipe: DiffusionPipeline, picture: Image) -> Tensor:
        with tiling.tiled(pipe.vae, self._tiles(picture.size)):
            return self.family.encode_image(pipe, picture)

    # Reading rows

    def read(self, index: int, variant: TextVariant = AS_IT_IS, visit: int = 0) -> Encoded:
        """A row out of the store; `missing` must have named its entries.

        Args:
            visit: how often the row was seen before.

        Raises:
            DamagedEntry: an entry is not as it was written.
            FileNotFoundError: an entry is gone.
        """
        return self._row(index, variant, visit, self.store.read)

    def read_batch(self, indices: Sequence[int], variants: Sequence[TextVariant], visits: Sequence[int]) -> Batch:
        """`collate` of what `read` returns for some rows, read straight into the memory of the batch.

        Raises:
            ValueError: the rows are not of one geometry.
            DamagedEntry, FileNotFoundError: as `read`.
        """
        samples = list(zip(indices, variants, visits, strict=True))
        return read_stacked(
            self.store, lambda read: [self._row(index, variant, visit, read) for index, variant, visit in samples]
        )

    def _row(self, index: int, variant: TextVariant, visit: int, read: ReadEntry) -> Encoded:
        """A row of what `read` gives for the keys of its entries."""
        variations = self._row_keys[index]
        keys = variations[visit % len(variations)]

        def embed(wanted: TextVariant) -> dict[str, Tensor]:
            # Where the text encoder is blind, a row has one text with and without its references.
            seen = wanted.references or not self.family.text_sees_references
            wordings = keys.texts[self.variants.index(TextVariant(wanted.prompt, seen))]
            drawn = self.dataset.wording(index, visit if self.trained_on else None, len(wordings))
            return read(wordings[drawn])

        target = read(keys.target)
        pictures = keys.references if variant.references else ()
        return Encoded(
            key=self.dataset.rows[index].key,
            target=target["latent"],
            references=tuple(read(key)["latent"] for key in pictures),
            text=self._text(variant, embed),
            mask=target.get("mask"),
        )

    def encode(self, pipe: DiffusionPipeline, example: Example, variant: TextVariant = AS_IT_IS) -> Encoded:
        """The same row straight from the encoders, on the CPU."""
        references = _shown(example, variant)
        target = self._latent(pipe, example.target).cpu()
        mask = example.mask
        if self.by_difference:
            number, area = len(example.references), example.area
            sources = [self.dataset.fitted(one, example.target.size, number, area) for one in example.references[:1]]
            mask = difference.difference_map(sources[0], example.target) if sources else None
        fitted = [self.dataset.fitted(*one, len(example.references), example.area) for one in references]
        return Encoded(
            key=example.key,
            target=target,
            references=tuple(self._latent(pipe, picture).cpu() for picture in fitted),
            text=self.encode_text(pipe, example, variant),
            mask=None if mask is None else latent_mask(mask, target),
        )

    def encode_text(self, pipe: DiffusionPipeline, example: Example, variant: TextVariant) -> dict[str, Tensor]:
        """The text of the same row straight from the encoders, on the CPU."""
        references = _shown(example, variant)

        def embed(wanted: TextVariant) -> dict[str, Tensor]:
            prompt = example.prompt if wanted.prompt is None else wanted.prompt
            text = self.family.encode_text(pipe, prompt, references)
            return {name: tensor.cpu() for name, tensor in text.items()}

        return self._text(variant, embed)

    def _text(self, variant: TextVariant, embed: Callable[[TextVariant], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Embeddings of a variant; a dropped prompt ("") replaces only the configured ones."""
        text = embed(variant)
        if variant.prompt != "" or self.drop_keys is None:
            return text
        own = embed(variant._replace(prompt=None))
        return {name: text[name] if name in self.drop_keys else own[name] for name in text}


def _shown(example: Example, variant: TextVariant) -> list[Reference]:
    """The pictures that a variant of a row speaks about."""
    shown = zip(example.references, example.reference_sizes, strict=True) if variant.references else ()
    return [Reference(*one) for one in shown]


def latent_mask(mask: Image, latent: Tensor) -> Tensor:
    """Share of foreground under each latent cell, (H, W) float32 in [0, 1]; `mask` is mode L, of the target's size."""
    pixels = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)
    height, width = latent.shape[-2:]
    pooled: Tensor = torch.nn.functional.adaptive_avg_pool2d(pixels[None], (height, width))[0]
    return pooled


def read_stacked(store: Store, rows_of: Callable[[ReadEntry], list[Encoded]]) -> Batch:
    """The batch of some rows, their entries read straight into its memory: the bits that `collate` would copy there.

    Args:
        rows_of: the rows, made of what it reads; of the tensors that it is given it may use any and change none.

    Raises:
        ValueError: the rows are not of one geometry.
        DamagedEntry: an entry is not as it was written.
        FileNotFoundError: an entry is gone.
    """
    opened: list[Entry] = []

    def describe(key: str) -> dict[str, Tensor]:
        opened.append(store.open(key))
        return opened[-1].tensors

    try:
        rows = rows_of(describe)
        batch, places = laid_out(rows)
    except (KeyError, ValueError):  # a damaged header may describe anything: read whole, an entry says so itself
        return collate(rows_of(store.read))
    place_of = {
        id(tensor): place
        for row, own in zip(rows, places, strict=True)
        for tensor, place in zip(row.tensors(), own.tensors(), strict=True)
    }
    # All places first: after a file is read, torch's own code is no longer near the processor.
    into = [
        [bytes_of(place_of[id(tensor)] if id(tensor) in place_of else memory(tensor.shape, tensor.dtype))
         for tensor in entry.tensors.values()]
        for entry in opened
    ]  # fmt: skip
    for entry, places_of_entry in zip(opened, into, strict=True):
        entry.fill(places_of_entry)
    return batch


def ahead(items: Iterable[Item], load: Callable[[Item], Loaded], depth: int = 4) -> Iterator[tuple[Item, Loaded]]:
    """Items with what was loaded for them, a few loads ahead of the consumer, in a bounded amount of memory."""
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[tuple[Item, Future[Loaded]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(load, item)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def fill(
    rows: EncodedDataset,
    missing: Missing,
    homes: Mapping[str, torch.device],
    shown: bool = True,
) -> None:
    """Encode what the store lacks: first the texts, then the pictures, so that only one kind of encoder is in memory.

    Every entry is written as soon as it is known; an interrupted run continues where it was.

    Args:
        homes: where each component goes, by its name in the pipeline; "default" for the others.
    """
    dtype: torch.dtype = getattr(torch, rows.dtype)

    def encode(title: str, entries: dict[str, Any], text: bool, run: Callable[..., Iterator[str]]) -> None:
        if not entries:
            return
        pipe = loading.load_encoders(
            rows.family, rows.checkpoint, dtype, homes, text=text, vae=not text,
            text_format=rows.text_format if text else None, say=console.say if shown else lambda message: None,
        )  # fmt: skip
        with console.progress(title, len(entries), shown=shown) as update:
            for done, _ in enumerate(run(pipe, entries), start=1):
                update(done)

    encode("encoding texts", missing.texts, True, rows.encode_texts)
    encode("encoding pictures", missing.images, False, rows.encode_images)
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
