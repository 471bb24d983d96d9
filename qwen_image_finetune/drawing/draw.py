"""`qif predict`: which pictures are drawn, from which references, into which files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import open_upright, size_upright
from qwen_image_finetune.data.writing import WRITTEN, is_drawn, write_picture
from qwen_image_finetune.disk.files import short_name
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.machine import console

READ = (".jpg", ".jpeg", ".png", ".webp")


if TYPE_CHECKING:
    from qwen_image_finetune.drawing.tuned import TunedPredictor
    from qwen_image_finetune.families.base import Family


class DrawingError(ValueError):
    """Pictures that cannot be drawn or written as asked."""


@dataclass(frozen=True)
class Drawing:
    """One call of the predictor, and the file of each seed."""

    references: tuple[Path, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    prompt: str
    images: tuple[Path, ...] = ()  # references of one picture
    folder: Path | None = None  # or a folder, each of whose pictures is edited on its own
    output: Path = Path("output.png")  # a file, or a folder where it has no ending
    overwrite: bool = False  # files that are there
    count: int = 1  # pictures of each, with the seeds seed, seed + 1, ...
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    image_guidance: float = 1.0
    width: int | None = None
    height: int | None = None
    loras: tuple[str, ...] = ()  # used together; one may be a checkpoint of a model tuned as a whole
    strengths: tuple[float, ...] = ()  # of each of them; without any, 1

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.count))


def draw(config: Config, request: Request, drawer: TunedPredictor | None = None) -> list[Path]:
    """Draw and save; returns the files in order. Everything that can be refused is refused before the model loads.

    Args:
        drawer: of the same configuration, to load the model once for several requests.

    Raises:
        DataError: a reference cannot be read.
        DrawingError: no references to be had, or an output that would replace a reference.
        OutputError: an output that cannot be written, or would replace something else.
        PredictionError: references or sizes that the family does not take.
    """
    drawings = plan(request)
    for file in (file for drawing in drawings for file in drawing.files):
        check_output(file, request.overwrite, is_drawn)

    from qwen_image_finetune.config import resolve_family
    from qwen_image_finetune.drawing.predict import check_request
    from qwen_image_finetune.drawing.tuned import TunedPredictor
    from qwen_image_finetune.families import get_family

    family = get_family(resolve_family(config, download=True)[0])
    for drawing in drawings:
        check_request(family, drawing.references, request.width, request.height, request.steps)
    _check_prompts(config, family, request, drawings)
    drawer = drawer or TunedPredictor(config)
    tuned, loras = chosen(request)
    drawer.load_transformer(tuned)
    drawer.load_loras(loras)
    if request.guidance is not None and drawer.predictor.ignores_guidance:
        console.note("--guidance changes nothing: the guidance embedding of this model says the same for every scale")

    written = []
    for drawing in drawings:
        references = [open_upright(path) for path in drawing.references]
        pictures = drawer.predict(
            references or None, request.prompt, request.steps, request.guidance,
            negative_prompt=request.negative_prompt, image_guidance_scale=request.image_guidance,
            width=request.width, height=request.height, seed=request.seeds,
        )  # fmt: skip
        for picture, file in zip(pictures, drawing.files, strict=True):
            write_picture(file, picture)
            console.say(str(file))
            written.append(file)
    return written


def _check_prompts(config: Config, family: Family, request: Request, drawings: Sequence[Drawing]) -> None:
    """Refuse what the text encoder cannot take, while only tokenizers are loaded.

    Raises:
        DrawingError: names the prompt or the picture.
    """
    from qwen_image_finetune import loading
    from qwen_image_finetune.drawing.predict import PredictionError, check_prompt, usual_size

    pipe = loading.load_tokenizers(family, loading.checkpoint_folder(config, family))
    for drawing in drawings:
        own = [size_upright(path) for path in drawing.references]
        area = config.data.init_args.area
        if request.width is not None and request.height is not None:
            size = request.width, request.height
        else:
            size = usual_size(family, own, area)
        seen = [family.reference_size(each, size, area, len(own)) for each in own]
        try:
            for prompt in (request.prompt, request.negative_prompt or ""):
                check_prompt(family, pipe, prompt, size, list(zip(own, seen, strict=True)))
        except PredictionError as error:
            names = ", ".join(map(str, drawing.references))
            raise DrawingError(f"{names}: {error}" if names else str(error)) from error


def chosen(request: Request) -> tuple[Path | None, list[tuple[str, float]]]:
    """What a request draws with: a checkpoint of a model tuned as a whole, if there is one, and LoRAs with strengths.

    Raises:
        DrawingError: strengths that do not belong to the LoRAs one by one; two models tuned as a whole.
    """
    from qwen_image_finetune.lora.sources import find_tuned

    if request.strengths and len(request.strengths) != len(request.loras):
        raise DrawingError(
            f"--strength is given {len(request.strengths)} times and --lora {len(request.loras)} times: give one "
            "strength for each LoRA, in their order, or none, which is 1 for each"
        )
    whole: list[Path] = []
    loras: list[tuple[str, float]] = []
    for source, strength in zip(request.loras, request.strengths or [1.0] * len(request.loras), strict=True):
        tuned = find_tuned(source)
        if tuned is None:
            loras.append((source, strength))
        elif strength != 1.0:
            raise DrawingError(f"--strength {strength:g}: {tuned} is a model tuned as a whole, which has none")
        else:
            whole.append(tuned)
    if len(whole) > 1:
        raise DrawingError(f"--lora: {whole[0]} and {whole[1]} are both models tuned as a whole: draw with one of them")
    return whole[0] if whole else None, loras


def plan(request: Request) -> list[Drawing]:
    """The drawings of a request. Every reference is opened once to see that it can be, one at a time."""
    if request.count < 1 or request.seed < 0:
        raise DrawingError(f"--count {request.count} and --seed {request.seed}: at least one picture, seeds from 0")
    if request.folder is None:
        drawings = [Drawing(request.images, _files(request, None))]
    elif request.images:
        raise DrawingError("--folder edits each picture of a folder on its own: leave --image out, or --folder")
    else:
        drawings = [Drawing((path,), _files(request, path.stem)) for path in _pictures(request.folder)]
    for drawing in drawings:
        for path in drawing.references:
            remarks: list[str] = []
            open_upright(path, remarks=remarks)
            for remark in remarks:
                console.note(f"{path}: {remark}")
    _check_kept(drawings)
    return drawings


def _check_kept(drawings: Sequence[Drawing]) -> None:
    """Refuse outputs that are references too, under whatever name: a picture that was edited is kept."""
    references = {_identity(path): path for drawing in drawings for path in drawing.references}
    for file in (file for drawing in drawings for file in drawing.files if file.exists()):
        if reference := references.get(_identity(file)):
            raise DrawingError(f"--output: {file} would overwrite {reference}, which it is made from; choose another")


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file: links, and disks that ignore case."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DrawingError(f"--folder {folder} is not a folder; a single picture is given with --image")
    # Hidden ones are none of the user's: ._cat.jpg, which macOS puts beside cat.jpg on other disks, holds no picture.
    seen = (path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = sorted(path for path in seen if path.suffix.lower() in READ)
    if not pictures:
        raise DrawingError(f"--folder {folder} holds no picture that ends in {', '.join(READ)}")
    stems = [path.stem for path in pictures]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DrawingError(f"--folder {folder} has several pictures called {', '.join(twice)}: rename all but one")
    return pictures


def _files(request: Request, stem: str | None) -> tuple[Path, ...]:
    """The file of each seed. A folder is one that exists or has no ending; a name is numbered by seed if need be."""
    output = request.output
    is_folder = output.is_dir() or not output.suffix
    if not is_folder and output.suffix.lower() not in WRITTEN:
        raise DrawingError(f"--output {output} ends in {output.suffix}; pictures end in {', '.join(WRITTEN)}")
    if stem is not None and not is_folder:
        raise DrawingError(f"--output {output} is one file, and --folder makes several: give a folder")
    folder, name = (output, stem or "output") if is_folder else (output.parent, output.stem)
    ending = ".png" if is_folder else output.suffix
    if request.count == 1:
        return (folder / short_name(name, ending),)
    return tuple(folder / short_name(name, f"-{seed}{ending}") for seed in request.seeds)
