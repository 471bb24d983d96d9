"""A clock that jumps a year between one run and the next, or between a run and its continuation."""

from __future__ import annotations

import pytest
from lab import FAMILIES, FULL, Lab, difference, outcome, record, versions

YEAR = 365 * 86_400


@pytest.mark.timeout(900)
def test_a_clock_that_jumps(lab: Lab) -> None:
    lost = []
    jumps = {"there and back": (YEAR, -YEAR, 0), "back": (0, -YEAR), "forward": (0, YEAR)}
    jumps = jumps if FULL else {"there and back": jumps["there and back"]}  # has a jump back and one forward
    expected = {}
    for family in FAMILIES[: len(jumps)]:
        config = lab.config(f"steady-{family}", family)
        lab.run(config)
        expected[family] = outcome(versions(config)[0])
    for number, (name, offsets) in enumerate(jumps.items()):
        family = FAMILIES[number % 2]
        config = lab.config(f"jump-{number}", family, train={"checkpoints_total_limit": 2},
                            logging={"report_to": "tensorboard"})  # fmt: skip
        for offset in offsets:
            lab.run(config, sabotage=f"clock:{offset}")
        names = [version.name for version in versions(config)]
        if names != [f"v{place}" for place in range(len(offsets))]:
            lost.append((name, names))
        # One version, continued under another clock each time: `latest` is the highest step.
        config = lab.config(
            f"continued-{number}",
            family,
            own_cache=True,
            train={"checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"},
        )
        for offset, stop in zip(offsets, (4, 8, 9), strict=False):
            trial = lab.start(config, phases=True, sabotage=f"clock:{offset}")
            trial.await_phase("step", stop if offset == offsets[0] else 2)
            trial.kill()
        lab.run(config, sabotage=f"clock:{offsets[-1]}")
        different = difference(expected[family], outcome(versions(config)[-1]))
        if different or len(versions(config)) != 1:
            lost.append((name, different, versions(config)))
    record("the clock set back or forward a year", len(jumps), lost)
