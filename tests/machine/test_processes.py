"""The processes of a run waiting for each other; what takes several of them is tried in tests/distributed."""

from __future__ import annotations

from qwen_image_finetune.machine.processes import Team


def test_alone_nobody_is_waited_for() -> None:
    team = Team()
    team.meet("loading")
    assert team.share(lambda: {"a": [1]}, "resume") == {"a": [1]}
    with team.watched(1):
        team.enter("step 1")
