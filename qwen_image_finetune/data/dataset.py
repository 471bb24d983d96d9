"""Pairs of pictures with prompts, read from folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from PIL.Image import Image, Resampling, Transpose

from qwen_image_finetune.data import looks, suspects, told
from qwen_image_finetune.data.captions import has_several, prompts_of
from qwen_image_finetune.data.geometry import (
    Crop,
    Picture,
    Plan,
    Scaled,
    Size,
    drawn,
    fit,
    generator,
    same_aspect,
    stretched,
    transfer,
)
from qwen_image_finetune.data.headers import Headers, files_of
from qwen_image_finetune.data.images import DataError, fitted, open_upright
from qwen_image_finetune.data.left_out import LeftOut
from qwen_image_finetune.data.listing import Row, RowFault
from qwen_image_finetune.data.sizes import Sizes, fixed_notes, rounded
from qwen_image_finetune.data.sources import read_sets
from qwen_image_finetune.records import Example, Extent

if TYPE_CHECKING:
    from qwen_image_finetune.config import DatasetArguments

_CHUNK = 64  # rows that one thread checks at a time


class _Checked(NamedTuple):
    """What was found in a row."""

    problems: list[str]
    empty: bool = False  # its prompt
    enlargement: float = 0.0  # of its target, where the headers can be read
    decoded: looks.Decoded | None = None  # where its pictures were read to their end
    prompt: str = ""


class ImageDataset:
    """The rows of one or several folders; pictures are read when asked for.

    Attributes:
        rows: what the folders hold, sorted by key within each folder. Rows that lack a file are not among them.
        notes: what the user should be told once.
        left_out: rows that are not among them because they cannot be read, as `data.max_bad_share` allows.
    """

    left_out: tuple[LeftOut, ...] = ()

    def __init__(
        self,
        arguments: DatasetArguments,
        size: Size,
        side_multiple: int,
        max_references: int,
        seed: int = 0,
        scaled: Scaled = stretched,
        resampling: Resampling = Resampling.LANCZOS,
        follow: bool = False,
    ) -> None:
        """List the folders. Opens no picture, and leaves what is wrong with them to `check`.

        Args:
            size: `Family.size`.
            side_multiple: sides of pictures are multiples of this, in pixels.
            max_references: most references of one row.
            seed: of random crops and flips.
            scaled: `Family.scaled`.
            resampling: `Family.resampling`.
            follow: `Family.references_follow`.

        Raises:
            DataError: options that no data could fulfil.
        """
        self.notes: list[str] = []
        self.rows: Sequence[Row]
        self._size, self._scaled, self._max_references, self._seed = size, scaled, max_references, seed
        self.resampling, self._follow = resampling, follow
        self._crop, self._random_flip = _crop(arguments), arguments.random_flip
        self._side_multiple, self._max_buckets = side_multiple, arguments.max_buckets
        self._problems: list[str] = []
        self.rows = self._list(arguments)
        self.notes += fixed_notes(self.rows, side_multiple)
        self._use_edit_mask = arguments.use_edit_mask
        self._seen: dict[int, _Checked] = {}  # of rows that `faults` has looked at, for the next check
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the rows."""
        self._noted = len(self.notes)
        self.notes += [*told.about_sets(self.rows), *told.about_files(self.rows, self._use_edit_mask)]
        self._headers = Headers(self.rows)
        self._sizes = Sizes(
            self.rows, self._size, self._side_multiple, self._seed, self._crop, self._max_buckets,
            self._headers.of_target,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def check(
        self,
        decode: bool = False,
        progress: Callable[[int, int], None] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[str]:
        """Every problem of the data, one line each; an empty list means that it can be trained on.

        Args:
            decode: read every picture to its end; otherwise headers alone, which misses damage behind them.
            progress: called with (rows done, rows).
            rows: numbers of the rows to look at; all by default.
        """
        checked = self._inspect(decode, progress, rows)
        problems = dict.fromkeys(self._problems)  # in order, and once where rows share a file
        problems.update((line, None) for row in checked.values() for line in row.problems)
        if rows is None and not problems:
            edits = [row for row in self.rows if not row.shared.identity]
            problems.update(dict.fromkeys(suspects.unchanged_problem(edits)))
        if not problems:
            self._note_checked(checked, everything=rows is None)
        return list(problems)

    def faults(self, decode: bool = False) -> list[RowFault]:
        """What is wrong with single rows, also with those that lack a file and so are none: the rest of `check`."""
        checked = self._seen = self._inspect(decode, None, None)
        found = [RowFault(line, self.rows[index].key) for index, row in checked.items() for line in row.problems]
        return [*(line for line in self._problems if isinstance(line, RowFault)), *found]

    def leave_out(self, rows: Sequence[LeftOut]) -> None:
        """Go on as if there had never been these rows."""
        keys = {row.key for row in rows}
        self.left_out += tuple(rows)
        self._problems = [line for line in self._problems if not (isinstance(line, RowFault) and line.row in keys)]
        kept = [index for index, row in enumerate(self.rows) if row.key not in keys]
        self._seen = {place: self._seen[index] for place, index in enumerate(kept) if index in self._seen}
        self.rows = [self.rows[index] for index in kept]
        del self.notes[self._noted :]
        self._prepare()

    def _inspect(
        self, decode: bool, progress: Callable[[int, int], None] | None, rows: Sequence[int] | None
    ) -> dict[int, _Checked]:
        wanted = range(len(self)) if rows is None else rows
        self._sizes.settle()
        checked, self._seen = {index: self._seen[index] for index in wanted if index in self._seen}, {}
        chosen = [index for index in wanted if index not in checked] if checked else wanted
        chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            for chunk, found in zip(chunks, pool.map(lambda rows: self._check_rows(rows, decode), chunks), strict=True):
                checked.update(zip(chunk, found, strict=True))
                if progress is not None:
                    progress(len(checked), len(wanted))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest of the rows
        return checked

    def plan(self, index: int, visit: int | None = None) -> Plan:
        """What becomes of the pictures of a row, from the headers of its files.

        Args:
            visit: how often the row was seen before; random crops and flips differ from visit to visit, and sizes take
                turns. None: nothing is random, and the largest size, as pairs are seen that are not trained on.

        Raises:
            DataError: a header that cannot be read, or a picture too long and narrow.
        """
        row = self.rows[index]
        extents = self._headers.of(index)
        images = extents[: 1 + len(row.reference_names)]
        image_size, area = self._sizes.of(row, visit)
        nominal = self._crop.nominal(images[0], image_size)
        snap = None if image_size is not None else self._sizes.snap(area)
        random = self._crop.random or self._random_flip
        draw = generator(self._seed, row.key, visit) if random and visit is not None else None
        box = self._crop.box(images[0], nominal, draw)
        mirrored = draw is not None and self._random_flip and bool(draw.integers(2))
        try:
            parts = fit(images, box, nominal, self._size, image_size, area, self._follow, snap)
        except DataError as error:
            raise DataError([f"{row.target}: {line}" for line in error.problems]) from None
        paths = (row.target, *row.references)
        target, *references = (Picture(path, *part, mirrored) for path, part in zip(paths, parts, strict=True))
        mask = None
        if row.mask is not None:
            mask = Picture(row.mask, transfer(target.box, images[0], extents[-1]), target.size, mirrored)
        return Plan(target, tuple(references), mask, area)

    def geometry(self, index: int, visit: int | None = None) -> tuple[Extent, ...]:
        """Final sizes of the target and the references of a row; the same at every visit but for `turns`."""
        plan = self.plan(index, visit)
        return (plan.target.size, *(picture.size for picture in plan.references))

    def turns(self, index: int) -> int:
        """How many sizes a row has; its visits take turns at them."""
        return max(1, len(self.rows[index].shared.areas))

    def scaled(self, picture: Extent, size: Extent, references: int, area: int | None) -> Extent:
        """Size to which a picture of a row with so many references is resized before it is brought to `size`.

        Args:
            area: that of its plan.
        """
        return self._scaled(picture, size, area, references)

    def fitted(self, image: Image, size: Extent, references: int, area: int | None) -> Image:
        """A picture at its final size, as the family's pipeline brings it there."""
        return fitted(image, self.scaled(image.size, size, references, area), size, self.resampling)

    def prompt(self, index: int) -> str:
        """The prompt of a row, or the first of several.

        Raises:
            DataError: the file is gone or not UTF-8.
        """
        return prompts_of(self.rows[index])[0]

    def prompts(self, index: int) -> tuple[str, ...]:
        """All prompts of a row, of which one is drawn at a visit. Raises DataError as `prompt`."""
        row = self.rows[index]
        return prompts_of(row) if has_several(row) else (self.prompt(index),)

    def wording(self, index: int, visit: int | None, number: int) -> int:
        """Which of so many prompts of a row a visit has; None: the first."""
        if visit is None or number == 1:
            return 0
        return drawn("prompt", self._seed, self.rows[index].key, visit, number)

    def load(self, index: int, visit: int | None = None) -> Example:
        """Read a row: the target and its mask at their final size, the references cropped but at their own size.

        Args:
            visit: as that of `plan`; with one, a prompt is drawn where there are several.

        Raises:
            DataError: a file that cannot be read, or has changed since its header was.
        """
        plan = self.plan(index, visit)
        extents = self._headers.of(index)
        target = self.fitted(cropped(plan.target, extent=extents[0]), plan.target.size, len(plan.references), plan.area)
        mask = None
        if plan.mask is not None:
            whole = cropped(plan.mask, True, extents[-1]).convert("L")
            mask = self.fitted(whole, plan.mask.size, len(plan.references), plan.area)
        prompts = self.prompts(index)
        return Example(
            key=self.rows[index].key,
            prompt=prompts[self.wording(index, visit, len(prompts))],
            references=tuple(
                cropped(picture, extent=extents[place]) for place, picture in enumerate(plan.references, start=1)
            ),
            reference_sizes=tuple(picture.size for picture in plan.references),
            target=target,
            mask=mask,
            area=plan.area,
        )

    def _list(self, arguments: DatasetArguments) -> list[Row]:
        rows, self._problems = read_sets(arguments, masks=arguments.use_edit_mask)
        entries = arguments.entries
        if not entries:
            self._problems.append("data.init_args.dataset_path is an empty list; name at least one folder")
        if rows and arguments.use_edit_mask and all(row.mask_name is None for row in rows):
            sources = ", ".join(entry.path for entry in entries)
            self._problems.append(
                f"data.init_args.use_edit_mask=true, but no row of {sources} has a mask; put STEM_mask beside the "
                "target"
            )
        return rows

    def _note_checked(self, checked: dict[int, _Checked], everything: bool) -> None:
        """Once headers are read, or pictures decoded. Each note once, however often rows are checked."""
        found: list[str] = []
        if everything:
            found += suspects.caption_note(self.rows, [index for index, row in checked.items() if row.empty])
            found += suspects.aspect_note(self.rows, self._headers.extents, self._headers.first)
            found += suspects.enlarged_note(self.rows, {index: row.enlargement for index, row in checked.items()})
            found += self._sizes.notes()
            fixed = [row.shared.image_size for row in self.rows]
            for given in dict.fromkeys(size for size in fixed if size is not None and self._crop == Crop()):
                own = [index for index, size in enumerate(fixed) if size == given]
                targets = self._headers.extents[self._headers.first[own]]
                found += suspects.cut_off_note(targets, rounded(given, self._side_multiple))
        decoded = {index: row.decoded for index, row in checked.items() if row.decoded is not None}
        looked = {index: each.look for index, each in decoded.items()
                  if each.look is not None and not self.rows[index].shared.identity}  # fmt: skip
        found += suspects.look_notes(self.rows, looked)
        found += suspects.remark_notes(self.rows, decoded)
        prompts = {index: checked[index].prompt for index in decoded}
        found += suspects.near_copies_note(self.rows, decoded, prompts)
        self.notes += [note for note in found if note not in self.notes]

    def _check_rows(self, rows: Sequence[int], decode: bool) -> list[_Checked]:
        return [self._check_row(index, decode) for index in rows]

    def _check_row(self, index: int, decode: bool) -> _Checked:
        row, prompt = self.rows[index], ""
        problems = []
        if len(row.reference_names) > self._max_references:
            problems.append(
                f"{row.target}: {len(row.reference_names)} references; this model takes at most {self._max_references}"
            )
        try:
            prompt = "\n".join(self.prompts(index))
        except DataError as error:
            problems += error.problems
        try:
            plan = self.plan(index)
            extents = self._headers.of(index)
        except DataError as error:
            return _Checked([*problems, *error.problems])
        if row.mask is not None and not same_aspect(extents[-1], extents[0]):
            sizes = [f"{width} x {height}" for width, height in (extents[-1], extents[0])]
            problems.append(f"{row.mask}: {sizes[0]} pixels have not the aspect ratio of the target's {sizes[1]}")
        checked = _Checked(problems, not prompt, suspects.enlargement(plan))
        if not decode:
            return checked
        decoded = looks.decode(files_of(row), row.mask_name is not None, prompt)
        return checked._replace(problems=problems + decoded.problems, decoded=decoded, prompt=prompt)


def _crop(arguments: DatasetArguments) -> Crop:
    if arguments.center_crop:
        return Crop(center_ratio=arguments.center_crop_ratio)
    if not arguments.random_crop:
        return Crop()
    window = arguments.crop_size
    sides = (window, window) if isinstance(window, int) else None if window is None else (window[0], window[1])
    return Crop(random=True, window=sides, scale=(arguments.crop_scale[0], arguments.crop_scale[1]))


def cropped(picture: Picture, mask: bool = False, extent: Extent | None = None) -> Image:
    """The part of a picture that is used, upright or mirrored, at its own size.

    Args:
        extent: upright size that the file had when it was planned for, where that is to be checked.

    Raises:
        DataError: the file cannot be read, or has another size now.
    """
    image = open_upright(picture.path, mask)
    if extent is not None and image.size != extent:
        raise DataError(f"{picture.path}: changed while it was used; it had {extent} pixels, now {image.size}")
    if picture.box != (0, 0, *image.size):
        image = image.crop(picture.box)
    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if picture.mirrored else image
