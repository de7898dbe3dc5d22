"""Time per frame of labeling a store with a teacher that costs nothing, by the number of frames.

One store is filled with frames of 8 atoms and labeled in chunks of 8 frames. The time between marks
on the way is the time per frame at that size: it stays the same where labeling is linear, and grows
where work is repeated. Processor time is what other jobs on the machine change little.

    python benchmarks/store_scaling.py --frames 10000 30000 100000 --out \
        benchmarks/results/store_scaling.json

`--labels-hash` adds a hash over all labels and structures that are read back, to compare versions,
`--commit-seconds 0` commits every chunk on its own, as format 1 did, and `--resume-at 99000` labels
the frames before at once, so that the cost at the end of a large store is seen without the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ase
import numpy as np
import torch

import potstill.store
from potstill.label import label_store
from potstill.structures import Properties, Structures
from potstill.teachers.base import Teacher, TeacherInfo

N_ATOMS = 8
NAMES = ("energy", "forces", "stress")


class Trivial(Teacher):
    """Numbers that depend on the positions and take no time."""

    batch_atoms = 10**9

    def __init__(self) -> None:
        self.info = TeacherInfo("trivial", "fingerprint-of-trivial")
        self.properties = frozenset(NAMES)

    def compute(self, structures, properties):
        """Energies, forces and stresses that mean nothing."""
        n = structures.n_systems
        energy = torch.zeros(n, dtype=torch.float64)
        energy.index_add_(0, structures.system_index, structures.positions.sum(1))
        stress = energy[:, None, None] * torch.eye(3, dtype=torch.float64)
        return {"energy": energy, "forces": -structures.positions, "stress": stress}


def frames(start: int, stop: int, table) -> Structures:
    """Rattled cells of 8 atoms, each from a seed of its own."""
    n = stop - start
    positions = np.concatenate(
        [np.random.default_rng(k).normal(0.0, 2.0, (N_ATOMS, 3)) for k in range(start, stop)]
    )
    return Structures(
        positions=torch.from_numpy(positions),
        species=torch.zeros(n * N_ATOMS, dtype=torch.int64),
        system_index=torch.arange(n).repeat_interleave(N_ATOMS),
        cell=9.0 * torch.eye(3, dtype=torch.float64).repeat(n, 1, 1),
        pbc=torch.ones(n, 3, dtype=torch.bool),
        species_table=table,
        group=tuple(f"group {k % 7}" for k in range(start, stop)),
        frame_id=tuple(f"frames.xyz:{k}" for k in range(start, stop)),
    )


def measure(marks: list[int], folder: Path, options: dict, *, hashed: bool) -> dict:
    """Fill and label a store of as many frames as the last mark."""
    module = vars(potstill.store)
    store_class = module.get("LabeledStore") or module["LabelledStore"]  # as it was once called
    table = Structures.from_ase(ase.Atoms("Al")).species_table
    store = store_class.create(folder / "store")
    begun = time.perf_counter()
    for start in range(0, marks[-1], 10_000):
        store.append(frames(start, min(start + 10_000, marks[-1]), table))
    result: dict = {"append_ms_per_frame": 1e3 * (time.perf_counter() - begun) / marks[-1]}
    begin = options.pop("resume_at", 0)
    if begin:  # everything before is written at once, which takes no time to speak of
        teacher, structures = Trivial(), store.structures(0, begin)
        facts = {"fingerprint": teacher.info.fingerprint, "properties": sorted(NAMES)}
        store.begin_labels(teacher.info.name, facts)
        labels = Properties(teacher.compute(structures, NAMES))
        store.write_labels(teacher.info.name, 0, labels, structures)
    reached: dict[int, tuple[float, float]] = {}

    def note(done: int, total: int) -> None:
        reached[done] = (time.perf_counter(), time.process_time())

    report = label_store(store, Trivial(), NAMES, progress=note, **options)
    assert report.n_failed == 0, report
    rows, before = [], begin
    for mark in marks:
        (wall0, cpu0), (wall, cpu) = reached[before], reached[mark]
        rows.append(
            {
                "frames": mark,
                "label_ms_per_frame": 1e3 * (wall - wall0) / (mark - before),
                "label_cpu_ms_per_frame": 1e3 * (cpu - cpu0) / (mark - before),
            }
        )
        before = mark
    files = [f for f in (folder / "store").rglob("*") if f.is_file()]
    result |= {
        "rows": rows,
        "label_seconds": report.seconds,
        "store_mb": sum(f.stat().st_size for f in files) / 1e6,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "fingerprint": store.fingerprint(),
    }
    if hashed:
        digest = hashlib.blake2b(digest_size=16)
        labels, structures = store.labels("trivial"), store.structures()
        for value in (*labels.values.values(), structures.positions, structures.cell):
            digest.update(value.numpy().tobytes())
        result["labels_hash"] = digest.hexdigest()
    return result


def main() -> None:
    """Measure and write what was measured, with the machine and the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--labels-hash", action="store_true")
    parser.add_argument("--commit-seconds", type=float)
    parser.add_argument("--resume-at", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="store_scaling_"))
    try:
        wait = arguments.commit_seconds
        options: dict = {} if wait is None else {"commit_seconds": wait}
        options["resume_at"] = arguments.resume_at
        result = measure(sorted(arguments.frames), folder, options, hashed=arguments.labels_hash)
    finally:
        shutil.rmtree(folder)
    result["command"] = "python " + " ".join(sys.argv)
    result["machine"] = {"cpu": platform.processor() or platform.machine(), "os": platform.system()}
    print(json.dumps(result, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
