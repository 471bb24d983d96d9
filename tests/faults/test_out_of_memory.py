"""Memory that runs out, in each phase of a run."""

from __future__ import annotations

import pytest
from lab import FAMILIES, FULL, Lab, checkpoints, difference, half_written, outcome, record, versions

from qwen_image_finetune.disk.manifest import verify_folder

PACKAGE = "qwen_image_finetune"
# What is called in a phase, the number of the call that fails, the words for the phase, the steps saved by then.
PHASES = {
    "loading the encoders": ("loading:load_encoders", 1, "encoding the data set", 0),
    "encoding": ("encoding.store:Store.write", 3, "encoding the data set", 0),
    "loading": ("loading:load_transformer", 1, "loading the transformer", 0),
    "forward": ("flow:loss", 7, "training", 6),
    "saving": ("training.train:State.snapshot", 2, "training", 2),
    "drawing": ("drawing.predict:Predictor.sample", 3, "drawing samples", 6),  # the base is drawn first
}
ORDER = ("same ", "round", "less detail", "less is learnt")  # what a change costs, least first


@pytest.mark.timeout(1800)
def test_memory_runs_out(lab: Lab) -> None:
    drawing = {"enabled": True, "steps": 3, "num_validation_samples": 1, "num_inference_steps": 1}
    settings = {"train": {"resume_from_checkpoint": "latest"}, "data": {"batch_size": 2}, "validation": drawing}
    expected = {}
    for family in FAMILIES:
        config = lab.config(f"enough-{family}", family, **settings)
        lab.run(config)
        expected[family] = outcome(versions(config)[0])
    lost, tried = [], 0
    cases = [(phase, kind) for phase in PHASES for kind in ("cuda", "cpu", "host")]
    few = [cases[3 * place + place % 3] for place in range(len(PHASES))]  # each phase once, each kind twice
    for number, (phase, kind) in enumerate(cases if FULL else few):
        tried += 1
        family = FAMILIES[number % 2]
        place, count, words, saved = PHASES[phase]
        config = lab.config(f"memory-{number}", family, own_cache="encod" in phase, **settings)
        said = lab.run(config, sabotage=f"no_memory:{kind},{PACKAGE}.{place},{count}", expect=2).said()
        problems = [] if f"error: memory ran out while {words} (" in said and "Traceback" not in said else ["unclear"]
        advice = [line for line in said.splitlines() if line.startswith("  - ")]
        costs = [place for line in advice for place, cost in enumerate(ORDER) if cost in line]
        if costs != sorted(costs) or len(advice) < 3:
            problems.append(f"advice out of order: {advice}")
        (version,) = versions(config)
        found = checkpoints(version)
        if max(found, default=0) != saved or any(verify_folder(folder) for folder in found.values()):
            problems.append(f"checkpoints {list(found)}")
        if half_written(config.parent):
            problems.append("half-written files")
        lab.run(config)
        different = difference(expected[family], outcome(versions(config)[-1]))
        if problems or different:
            lost.append((phase, kind, problems, different, said))
    record("out of memory, injected", tried, lost, f"phases: {', '.join(PHASES)}")
