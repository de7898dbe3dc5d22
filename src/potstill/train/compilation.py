"""Training by backpropagation with the network compiled by torch.compile.

What is compiled takes parameters, index tensors and pair vectors to the terms of the atomic
energies and dE/dr_ij, which `torch.func.grad_and_value` takes inside; the loss' backward pass comes
outside. (`torch.autograd.grad` with `create_graph` around a compiled network fails.) Everything
whose size depends on values is looked up before, by `Potential.prepare`, so that one compilation
serves batches of all sizes. Sums over pairs and the loss stay outside: they cost little.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config
from torch.utils._pytree import tree_leaves

from potstill.errors import ConfigError
from potstill.models import Potential
from potstill.models.graph import forces_from_pairs, stress_from_virial, virial_from_pairs
from potstill.structures import NeighborList, Structures
from potstill.train.force_gradient import FIRST_ORDER, ForceGradient, NetworkPasses, Point, energies


def network_passes(
    network: Potential,
    force_gradient: ForceGradient,
    *,
    compiled: bool,
    say: Callable[[str], None] | None = None,
) -> NetworkPasses:
    """The passes of a network, compiled if they are to be and native kernels do not serve.

    Raises
    ------
    ConfigError
        If the network has no compiled form, or the gradient is not taken by backpropagation.
    """
    if not compiled:
        return NetworkPasses(network)
    if force_gradient.takes_compact_lists:
        if say is not None:
            say(f"nothing is compiled: {network.kind} runs on native kernels")
        return NetworkPasses(network)
    if force_gradient.method != "backpropagation":
        raise ConfigError(
            "compile = true is for force_gradient.method = backpropagation, not for "
            f"{force_gradient.method}"
        )
    if not network.compilable:
        raise ConfigError(f"{network.kind} cannot be compiled: leave the setting 'compile' out")
    return CompiledPasses(network, say)


class CompiledPasses(NetworkPasses):
    """The passes of a network, its prediction with a graph by compiled code.

    The first batch is compiled for, which takes a minute; where that fails, a warning says why and
    the network goes on without. So do, without a word, batches that lack something (pairs, atoms of
    a species) or have one of it, since torch.compile makes code of its own for sizes 0 and 1.
    """

    def __init__(self, network: Potential, say: Callable[[str], None] | None = None) -> None:
        super().__init__(network)
        self.works = True
        self._say = say or (lambda text: None)
        self._functions = {way: _compiled(network, derivative=way) for way in (False, True)}
        self._compiled: set[bool] = set()

    def _predict(
        self, structures: Structures, neighbors: NeighborList, wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        if self.works and set(wanted) <= set(FIRST_ORDER):
            point = Point.of(self.network, structures, neighbors)
            structures = point.structures
            arguments = (structures.species, point.edges, point.r_ij, structures.n_atoms)
            prepared = self.network.prepare(*arguments)
            if all(size > 1 for tensor in tree_leaves(prepared) for size in tensor.shape):
                derivative = not {"forces", "stress"}.isdisjoint(wanted)
                found = self._run(derivative, prepared, point.r_ij)
                if found is not None:
                    values = energies(found[0], structures)
                    if "forces" in wanted:
                        n_atoms = structures.n_atoms
                        values["forces"] = forces_from_pairs(found[1], point.edges, n_atoms)
                    if "stress" in wanted:
                        virial = virial_from_pairs(found[1], point.r_ij, point.edges, structures)
                        values["stress"] = stress_from_virial(virial, structures)
                    return {name: values[name] for name in wanted}
        return super()._predict(structures, neighbors, wanted)

    def _run(self, derivative: bool, prepared: Any, r_ij: Tensor) -> tuple[Tensor, Tensor] | None:
        """Terms and dE/dr_ij; None if there is no compiled code."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        arguments = (parameters, prepared, r_ij)
        try:
            # Graphs are not cut for data-parallel training, which torch.func does not stand; sizes
            # that happen to be equal in the first batch are not taken to be equal in all.
            with (
                torch._dynamo.config.patch(optimize_ddp=False),
                shape_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
            ):
                if derivative not in self._compiled:
                    self._compile(derivative, *arguments)
                    self._compiled.add(derivative)
                return self._functions[derivative](*arguments)
        except Exception as error:  # compilers fail in many ways
            self.works = False
            warnings.warn(
                f"torch.compile failed, and training continues without it: {_reason(error)}",
                stacklevel=2,
            )
            return None

    def _compile(
        self, derivative: bool, parameters: dict[str, Tensor], prepared: Any, r_ij: Tensor
    ) -> None:
        """Run both passes once, so that what fails fails here."""
        self._say(
            f"compiling {self.network.kind}: about a minute the first time (code is kept in "
            f"{cache_folder()})"
        )
        started = time.perf_counter()
        terms, gradient = self._functions[derivative](parameters, prepared, r_ij)
        trained = [p for p in parameters.values() if p.requires_grad]
        torch.autograd.grad(terms.sum() + gradient.sum(), trained, allow_unused=True)
        self._say(f"compiled in {time.perf_counter() - started:.0f} s")


class _PreparedEnergy(nn.Module):
    """The sum of all terms, and the terms, of a prepared batch."""

    def __init__(self, network: Potential) -> None:
        super().__init__()
        self.network = network

    def forward(self, prepared: Any, r_ij: Tensor) -> tuple[Tensor, Tensor]:
        terms = self.network.prepared_terms(prepared, r_ij)
        return terms.sum(), terms


def _compiled(network: Potential, *, derivative: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """What `torch.compile` makes of terms and dE/dr_ij as a function of all they depend on."""
    module = _PreparedEnergy(network)

    def evaluate(
        parameters: dict[str, Tensor], prepared: Any, r_ij: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, T) terms, and (E, 3) dE/dr_ij; r_ij in its place if it is not asked for."""

        def energy(r_ij: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(module, parameters, (prepared, r_ij))

        if not derivative:
            return energy(r_ij)[1], r_ij
        gradient, (_, terms) = torch.func.grad_and_value(energy, has_aux=True)(r_ij)
        return terms, gradient

    # torch.compile gives up after some compilations of the same code object: every network and way
    # has its own.
    evaluate.__code__ = evaluate.__code__.replace()
    return torch.compile(evaluate, fullgraph=True, dynamic=True)


def _reason(error: Exception) -> str:
    """The first line of an error's text, without torch.compile's wrapping."""
    error = getattr(error, "inner_exception", error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cache_folder() -> str:
    """Where torch keeps compiled code; the variable TORCHINDUCTOR_CACHE_DIR changes it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def compiler_state() -> str:
    """Say in a few words whether torch.compile finds what it needs on this machine."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception as error:  # its type is private
        return f"no compiler, and training continues without it: {_reason(error)}"
    return f"by {compiler}, code is kept in {cache_folder()}"
