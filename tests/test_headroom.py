"""Molecular dynamics above the temperatures of the training."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from potstill.evaluate.base import Bench, BenchSettings, Candidate, Findings
from potstill.evaluate.headroom import Headroom, HeadroomRuns
from potstill.structures import Structures


class Brittle(EMT):
    """Copper that loses energy wherever atoms are pushed harder than they are at 300 K."""

    lost = 0.0

    def calculate(self, *arguments, **named):
        super().calculate(*arguments, **named)
        self.lost += 10.0 * bool(np.abs(self.results["forces"]).max() > 2.0)
        self.results["energy"] -= self.lost


def run(calculator: str, factor: float, **settings: object) -> HeadroomRuns:
    bench = Bench(
        BenchSettings(n_atoms=4, temperature=300.0, timestep=2.0),
        Structures.from_ase(bulk("Cu", cubic=True)),
    )
    candidate = Candidate("student", calculator)
    return Headroom(factor=factor, duration=0.1, **settings).run(bench, candidate)


def test_a_sound_potential_stays_sound_when_it_is_hot() -> None:
    found = run("ase.calculators.emt:EMT", 4.0 / 3.0, runs=2)
    assert (found.temperature, found.n_sound, found.n_runs) == (pytest.approx(400.0), 2, 2)
    assert (found.broke_at, found.reason) == (None, "")
    assert HeadroomRuns.from_json(found.to_json()) == found
    (verdict,) = Headroom.verdicts(Findings({"headroom": {"student": found}}))
    assert verdict.met
    assert "2 of the student's 2 NVE runs of 0.1 ps stay sound." in verdict.text


def test_what_breaks_only_when_it_is_hot_is_said() -> None:
    assert run("test_headroom:Brittle", 0.5, runs=1).n_sound == 1
    found = run("test_headroom:Brittle", 10.0, runs=1)
    assert found.n_sound == 0
    (verdict,) = Headroom.verdicts(Findings({"headroom": {"student": found}}))
    assert not verdict.met
    assert verdict.bar == "stable NVE MD from 3000 K (0 of 1 runs)"
    assert "broke down after" in verdict.text
    (row,) = Headroom.rows(Findings({"headroom": {"student": found}}))
    assert row.label == "Sound NVE runs from 3000 K"
