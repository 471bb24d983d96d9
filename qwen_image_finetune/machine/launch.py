"""Whether as many processes run as the launcher was asked for, and on which devices: said before a model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # that accelerate reads


class LaunchError(ValueError):
    """The processes that run are not the ones that were asked for."""


def asked_for(environment: Mapping[str, str], parent: Sequence[str]) -> tuple[int, str]:
    """How many processes the launcher was told to start, as far as it lets us know, and who says so.

    Args:
        environment: os.environ.
        parent: command line of the parent process.
    """
    sizes = {name: int(environment[name]) for name in SIZES if environment.get(name, "").isdigit()}
    if sizes:
        name = max(sizes, key=lambda each: sizes[each])
        return sizes[name], name
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return int(environment["SLURM_STEP_NUM_TASKS"]), "srun"
    # accelerate's simple launcher starts one process whatever it is told; the address is all it leaves behind.
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        return max(_option(parent, "--num_processes"), 2), "accelerate launch"
    return 1, ""


def check_start(processes: int, environment: Mapping[str, str], parent: Sequence[str] | None = None) -> None:
    """Refuse a start with fewer processes than were asked for: each would train for itself, on all of the data.

    Args:
        processes: that take part in this run.
        environment: os.environ, as the launcher left it.
        parent: command line of the parent process; None looks for it.

    Raises:
        LaunchError: with the command that starts them.
    """
    asked, by = asked_for(environment, _parent() if parent is None else parent)
    if asked > processes:
        means = {
            "accelerate launch": "it starts one process where the launch configuration says distributed_type NO, or "
            "--cpu is given. On cards use configs/accelerate/ddp.yaml; on a CPU start them with torchrun",
            "srun": "each task would train for itself; let srun start one torchrun per machine, as in configs/cluster",
        }.get(by, "the others did not join; start them with torchrun or accelerate launch")
        raise LaunchError(
            f"{asked} processes were asked for ({by}), but {processes} takes part: {means}: "
            f"torchrun --nproc_per_node {asked} -m qwen_image_finetune.cli train CONFIG"
        )
    for engine, name in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if environment.get(name, "").lower() == "true":
            raise LaunchError(
                f"the launch configuration asks for {engine}, which this program does not use: take "
                "configs/accelerate/fsdp2.yaml to share a model between cards, or configs/accelerate/ddp.yaml"
            )


def check_cards(environment: Mapping[str, str], cards: int) -> None:
    """Refuse more processes on this machine than it has cards.

    Raises:
        LaunchError: with both numbers.
    """
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if local > cards > 0 and environment.get("ACCELERATE_USE_CPU", "").lower() != "true":
        raise LaunchError(f"{local} processes were started on this machine, which shows {cards} cards: start {cards}")


def _parent() -> Sequence[str]:
    import psutil

    parent = psutil.Process().parent()
    try:
        return parent.cmdline() if parent is not None else ()
    except psutil.Error:
        return ()


def _option(arguments: Sequence[str], name: str) -> int:
    """The number after `name` in a command line; 0 without one."""
    for place, argument in enumerate(arguments):
        value = argument.removeprefix(f"{name}=") if argument != name else (*arguments, "")[place + 1]
        if value != argument and value.isdigit():
            return int(value)
    return 0


def encoder_device(name: str | None, key: str, home: str, local_processes: int) -> str:
    """Where the encoders of one process live: `home` unless the configuration names another kind of device.

    Args:
        name: what the configuration says at `key`: null, "cpu", "cuda", "cuda:1", ...
        home: this process's own device.
        local_processes: that run on this machine.

    Raises:
        LaunchError: a numbered device with several processes here; they would all crowd onto one.
    """
    if name is None:
        return home
    kind, _, number = name.partition(":")
    if number and local_processes > 1:
        raise LaunchError(
            f"{key}={name!r} with {local_processes} processes on this machine would put the encoders of all of them on "
            f"one device; write {kind!r} (each process its own), 'cpu', or leave it out"
        )
    if kind == str(home).partition(":")[0]:
        return name if number else home
    return name
