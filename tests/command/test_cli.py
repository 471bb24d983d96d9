"""The commands as a person types them: what they print, what they load, what they refuse, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.families import get_family
from tests.kin import UNLIKE

ROOT = Path(__file__).parents[2]
Configure = Callable[..., Config]
VERBS = ("train", "cache", "check", "predict", "evaluate", "report", "compare", "export", "tiny")

# Every connection fails, and packages that a person without a GPU machine may not even have are as good as absent.
OFFLINE = """
import socket, sys
def refuse(*arguments, **named):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "torchvision"):
    sys.modules[name] = None
"""


def run(
    *words: str | Path, door: str = "qwen_image_finetune.cli", **environment: str
) -> subprocess.CompletedProcess[str]:
    command, whole = [sys.executable, "-m", door, *map(str, words)], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=whole, capture_output=True, text=True, check=False)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Environment of a process without network and without anything heavy."""
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(OFFLINE)
    return {"PYTHONPATH": str(tmp_path / "offline"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}


@pytest.fixture
def hub_config(tmp_path: Path) -> Path:
    """A configuration that names a checkpoint of the hub."""
    path = tmp_path / "hub.yaml"
    path.write_text(yaml.safe_dump({
        "model": {"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev"},
        "data": {"init_args": {"dataset_path": "data/face_seg"}},
        "logging": {"output_dir": str(tmp_path / "output")},
    }))  # fmt: skip
    return path


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads a model fails, and not with a message of ours."""
    from qwen_image_finetune import loading

    def load(*arguments: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_encoders", load)
    monkeypatch.setattr(loading, "load_transformer", load)


# Quick, and silent where nothing is wrong


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy(words: list[str], offline: dict[str, str]) -> None:
    done = run(*words, **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_every_verb_is_in_the_help() -> None:
    listed = run("--help").stdout
    assert all(f"\n    {verb} " in listed for verb in VERBS)


def test_a_refused_configuration_loads_nothing_heavy(hub_config: Path, offline: dict[str, str]) -> None:
    for door, words in (("qwen_image_finetune.cli", ["train", hub_config]), ("src.main", ["--config", hub_config])):
        done = run(*words, "train.max_train_stps=3", door=door, **offline)
        assert done.returncode == 2
        assert "train.max_train_steps" in done.stderr and "Traceback" not in done.stderr


def test_windows_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["tiny", "FluxKontext", str(tmp_path / "tiny")]) == 2
    assert capsys.readouterr().err == (
        "error: Windows has no locks and signals of Unix, which runs are kept safe with: use WSL2\n"
    )
    assert not (tmp_path / "tiny").exists()


# The dry run


@pytest.mark.parametrize("door,words", [("qwen_image_finetune.cli", ["train"]), ("src.main", ["--config"])])
def test_dry_run_needs_no_network_no_gpu_and_no_model(
    door: str, words: list[str], hub_config: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    done = run(
        *words, hub_config, "--dry-run", "train.trainer=FluxKontext", "train.max_train_steps=7", door=door, **offline
    )
    assert (done.returncode, done.stderr) == (0, "")
    head, plan = done.stdout.split("# plan")
    shown = yaml.safe_load(head)
    assert shown["train"]["max_train_steps"] == 7 and shown["model"]["lora"]["r"] == 16
    for words_of_it in ("FluxKontext", "LoRA of rank 16", "data/face_seg", "7 optimizer steps", "AdamW", "/v0"):
        assert words_of_it in plan
    assert not (tmp_path / "output").exists(), "a dry run writes nothing"


def test_an_ordinary_dry_run_leaves_torch_alone(hub_config: Path) -> None:
    """Though torch is there: an optimizer with a learning rate, and a schedule, are no reason to load it."""
    program = (
        "import sys; from qwen_image_finetune.command.cli import main; code = main(sys.argv[1:]); "
        "print('loaded', [name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules], code)"
    )
    words = ["train", str(hub_config), "--dry-run", "optimizer.init_args={lr: 2e-4, betas: [0.9, 0.99]}",
             "lr_scheduler.scheduler_type=cosine", "validation={enabled: true, share: 0.1}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded [] 0\n") and done.stderr == ""


def test_what_loads_torch_says_so_at_once(tmp_path: Path, configure: Configure) -> None:
    """And nothing comes from libraries that nobody asked, while all that is known already comes before."""
    configure("FluxKontext")
    done = run("train", tmp_path / "config.yaml", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "note: loading torch and diffusers\n")
    assert "# plan" in done.stdout and "on the card while training" in done.stdout
    assert run("check", tmp_path / "config.yaml", "train.max_train_stps=3").stderr.startswith("error:")


def test_dry_run_assumes_the_default_family_and_says_so(hub_config: Path, offline: dict[str, str]) -> None:
    done = run("train", hub_config, "--dry-run", **offline)
    assert "QwenImageEdit (assumed (checkpoint cannot be reached))" in done.stdout


def test_dry_run_names_the_next_version_and_full_fine_tuning(
    tmp_path: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    (configure("FluxKontext").logging.project_dir / "v3").mkdir(parents=True)
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run", "model.lora=null"]) == 0
    said = capsys.readouterr().out
    assert "/project/v4" in said and "every weight of the transformer" in said
    assert "FluxKontext (model_index.json of" in said


@pytest.mark.parametrize("words", [["train", "--dry-run"], ["check"], ["train"]], ids=" ".join)
def test_what_a_run_lacks_is_said_at_once(
    words: list[str], configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("FluxKontext")
    (tmp_path / "data" / "my_pairs").mkdir(parents=True)
    lacking = {
        "data.init_args.dataset_path": (f"{tmp_path}/data/my_pair", f"did you mean {tmp_path}/data/my_pairs?"),
        "train.resume_from_checkpoint": ("lastest", 'is neither "latest" nor a folder'),
        "logging.report_to": ("[swanlab]", "pip install swanlab"),
        "model.lora.pretrained_weight": (f"{tmp_path}/data/my.safetensors", "OWNER/NAME on the hub"),
        "optimizer.class_path": ("torch.optim.Adamw", "did you mean AdamW?"),
        "cache.prompt_empty_drop_keys": ("[clip]", "has no text embedding ['clip']"),
    }
    overrides = [f"{key}={value}" for key, (value, _) in lacking.items()]
    assert main([*words, str(tmp_path / "config.yaml"), *overrides]) == 2
    first, *lines = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert first == f"{len(lacking)} problems:" and len(lines) == len(lacking)
    for line, (key, (_, said)) in zip(lines, lacking.items(), strict=True):
        assert key in line and said in line


def test_a_resume_as_other_programs_write_it(hub_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(hub_config), "--resume"])
    assert "train.resume_from_checkpoint=latest" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--config", "FILE"], ["--config=FILE", "train.seed=3"]], ids=" ".join)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_configuration_named_as_in_other_programs(
    verb: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(f"error: the configuration stands without --config: qif {verb} FILE\n")


@pytest.mark.parametrize("order", [["--dry-run", "FILE", "A"], ["FILE", "--dry-run", "A"], ["FILE", "A", "--dry-run"]])
def test_overrides_stand_anywhere(order: list[str], hub_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [{"FILE": str(hub_config), "A": "train.seed=31"}.get(word, word) for word in order]
    assert main(["train", *words]) == 0
    assert "seed: 31" in capsys.readouterr().out


def test_words_that_mean_nothing(hub_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["train", str(hub_config), "--dryrun"],
        ["train", str(hub_config), "--dry-run", "--seed=3"],
        ["trian"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err


def test_idle_and_overruled_keys_are_said_once(hub_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", str(hub_config), "--dry-run", "lr_scheduler.power=2", "model.rank=8", "model.lora.r=4"])
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "lr_scheduler.power=2.0 has no effect" in line]) == 1
    assert all(line.startswith("note: ") for line in said)


# Refusals: before any model loads, in one message, with exit code 2


REFUSALS: dict[str, tuple[list[str], str]] = {
    "typo": (["train.max_train_stps=3"], "train.max_train_steps"),
    "type": (["train.max_train_steps=many"], "train.max_train_steps='many'"),
    "contradiction": (["data.init_args.image_size=[64,64]"], "exclude each other"),
    "device": (
        ["cache.use_cache=false", "train.vae_encoder_device=cuda:9"],
        "train.vae_encoder_device='cuda:9' is not a device",
    ),
    "device of the cache": (
        ["cache.text_encoder_2_device=cuda:9"],
        "cache.text_encoder_2_device='cuda:9' is not a device",
    ),
    "half precision": (["train.mixed_precision=fp16"], "needs a GPU"),
    "tracker": (["logging.report_to=[tensorboard, swanlab]"], "pip install swanlab"),
    "optimizer": (["optimizer.class_path=torch.optim.AdamX"], "torch.optim has no AdamX"),
    "no optimizer": (["optimizer.class_path=os.path.join"], "is not a subclass of torch.optim"),
    "argument of the optimizer": (["optimizer.init_args={lr: 0.1, beta: 1}"], "optimizer.init_args.beta"),
    "value of the optimizer": (["optimizer.init_args={lr: -1.0}"], "Invalid learning rate"),
    "pictures": (["data.init_args.dataset_path=nowhere"], "nowhere"),
    "class of the data": (["data.class_path=torch.utils.data.Dataset"], "data.class_path"),
    "checkpoint": (["train.resume_from_checkpoint=nowhere"], "nowhere"),
    "checkpoint of the hub": (
        ["model.pretrained_model_name_or_path=someone/model"],
        "hf download someone/model",
    ),
    "LoRA": (["model.lora.pretrained_weight=no/where/to.safetensors"], "no/where/to.safetensors"),
    "text embedding": (["cache.prompt_empty_drop_keys=[clip]"], "['prompt_embeds', 'pooled_prompt_embeds']"),
    "family": (["train.trainer=QwenImageEdit"], "set train.trainer=FluxKontext"),
    "language model": (
        ["model.pretrained_model_name_or_path=Qwen/Qwen2-VL-7B-Instruct"],
        "such as Qwen/Qwen-Image-Edit",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_any_model_loads(
    case: str, configure: Configure, nothing_loads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, words = REFUSALS[case]
    configure("FluxKontext")
    code = main(["train", str(tmp_path / "config.yaml"), *overrides])
    said = capsys.readouterr().err
    assert code == 2
    assert words in said and said.count("error:") == 1


@pytest.mark.parametrize("key", ["logging.output_dir", "cache.cache_dir"])
def test_an_output_that_cannot_be_written(
    key: str, configure: Configure, nothing_loads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    configure("FluxKontext")
    code = main(["train", str(tmp_path / "config.yaml"), f"{key}={tmp_path / 'file' / 'inside'}"])
    assert code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


# The other verbs


def test_check_counts_pairs_and_lists_every_damaged_file(
    configure: Configure, write_pairs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(tmp_path / "pairs", [(64, 64)] * 4)
    configure("QwenImageEdit")
    words = ["check", str(tmp_path / "config.yaml"), f"data.init_args.dataset_path={folder}"]
    assert main(words) == 0
    assert "4 pairs, all readable" in capsys.readouterr().out
    (folder / "training_images" / "1.txt").unlink()
    broken = folder / "control_images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:90])
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "1.txt" in said or "1.png" in said
    assert str(broken) in said
    assert main([*words, "train.resume_from_checkpoint=lastest"]) == 2
    assert str(broken) in (said := capsys.readouterr().err) and "lastest" in said


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_export_and_back(
    name: str, dialect: str, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open

    configure(name)
    assert main(["train", str(tmp_path / "config.yaml"), "train.max_train_steps=1"]) == 0
    lora = next((tmp_path / "output" / "project" / "v0").glob("checkpoint-*")) / "pytorch_lora_weights.safetensors"
    out = tmp_path / "exported.safetensors"
    capsys.readouterr()
    assert main(["export", str(lora.parent.parent), str(out), "--format", dialect, "--family", name]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out)]
    first, *others = said.err.splitlines()
    assert first == f"note: {lora.parent.parent} stands for its newest checkpoint, {lora.parent}"
    programs = [reader.program for reader in get_family(name).lora_readers if reader.dialect == dialect]
    assert programs
    assert all(sum(line.startswith(f"note: {program} reads ") for line in others) == 1 for program in programs)
    assert ("note: ComfyUI reads all of it" in others) == ("ComfyUI" in programs)
    with safe_open(out, "pt") as file:
        prefix = {"comfy": ("diffusion_model.",), "kohya": ("lora_unet_",)}[dialect]
        assert all(key.startswith(prefix) for key in file.keys())  # noqa: SIM118
    assert main(["export", str(tmp_path / "nothing.safetensors"), str(out), "--family", name]) == 2


def test_tiny_writes_a_checkpoint_that_says_its_family(tmp_path: Path) -> None:
    assert main(["tiny", "FluxKontext", str(tmp_path / "tiny")]) == 0
    assert json.loads((tmp_path / "tiny" / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"


def test_a_folder_that_is_not_empty_gets_no_tiny_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert main(["tiny", "FluxKontext", str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds files that are no tiny checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
