"""What pyproject.toml cannot say: the wheel brings the toy bases and the two small data sets, for `qif demo`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MATERIALS = ("toy/flux-kontext", "toy/qwen-image-edit", "data/face_seg", "data/face_seg_held_out")
CONFIGURATIONS = ("configs/demo_flux_kontext.yaml", "configs/demo_qwen_image_edit.yaml")
INSIDE = Path("qwen_image_finetune", "demo_files")  # where command/materials.py looks for them


class WithDemo(build_py):
    """Copies them from where they lie in the repository; an installation from a checkout uses them there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in self._materials():
                target = Path(self.build_lib, INSIDE, file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target), preserve_mode=False)

    def _materials(self) -> list[Path]:
        inside = [file for folder in MATERIALS for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        return [*inside, *map(Path, CONFIGURATIONS)]


setup(cmdclass={"build_py": WithDemo})
