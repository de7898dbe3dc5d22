"""ANI-Al: the published ensemble of eight networks for aluminium, as a potstill potential."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from potstill.errors import TeacherError
from potstill.models import ANI, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable

N_MEMBERS = 8
N_LAYERS = 4

#: What its authors say of it, in the shape of a checkpoint's information.
INFO = {
    "license": "none stated in the authors' repository (github.com/atomistic-ml/ani-al); "
    "the paper is CC BY 4.0",
    "citation": "Smith et al., Nat. Commun. 12, 1257 (2021), doi:10.1038/s41467-021-21376-0",
    "level_of_theory": "PBE",
}


def load_ani_al(path: str | Path) -> SumPotential:
    """Read `ani_al_weights.npz`: the NeuroChem weights and AEV constants as plain arrays.

    Parameters
    ----------
    path : path
        The archive, or the folder that holds it. Keys: `m<i>_W<l>` and `m<i>_b<l>` (layer l of
        member i, torch's layout), `Rcr Rca EtaR ShfR EtaA Zeta ShfA ShfZ sae_hartree hartree_eV`.

    Returns
    -------
    SumPotential
        `offsets` (the atomic energy) and `network` (ANI with eight members), float64, eV.

    Raises
    ------
    TeacherError
        If the file is missing or is something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ani_al_weights.npz"
    if not path.is_file():
        raise TeacherError(f"{path}: no such file; `path=` must name ani_al_weights.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return _build({key: archive[key].astype(np.float64) for key in archive.files})
    except (KeyError, ValueError, OSError) as error:
        raise TeacherError(f"{path}: not the weights of ANI-Al ({error})") from error


def _build(arrays: dict[str, np.ndarray]) -> SumPotential:
    table = SpeciesTable.from_symbols(["Al"])
    hartree = float(arrays["hartree_eV"])
    network = ANI(
        table,
        radial_cutoff=float(arrays["Rcr"]),
        angular_cutoff=float(arrays["Rca"]),
        eta_r=float(arrays["EtaR"]),
        shifts_r=arrays["ShfR"].tolist(),
        eta_a=float(arrays["EtaA"]),
        zeta=float(arrays["Zeta"]),
        shifts_a=arrays["ShfA"].tolist(),
        shifts_z=arrays["ShfZ"].tolist(),
        hidden_widths=[len(arrays[f"m0_b{k}"]) for k in range(N_LAYERS - 1)],
        n_members=N_MEMBERS,
    ).double()
    state = {}
    for k in range(N_LAYERS):
        unit = hartree if k == N_LAYERS - 1 else 1.0
        weights = np.stack([arrays[f"m{m}_W{k}"].T for m in range(N_MEMBERS)])
        biases = np.stack([arrays[f"m{m}_b{k}"][None] for m in range(N_MEMBERS)])
        state[f"networks.0.weights.{k}"] = torch.from_numpy(unit * weights)
        state[f"networks.0.biases.{k}"] = torch.from_numpy(unit * biases)
    network.load_state_dict(state)
    offsets = SpeciesOffsets(table, [float(arrays["sae_hartree"]) * hartree])
    return SumPotential({"offsets": offsets, "network": network})
