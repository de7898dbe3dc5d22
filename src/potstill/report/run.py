"""Report of one distillation: student beside control beside teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.evaluate.pareto import pareto_front
from potstill.evaluate.rdf import RadialDistribution, compare_radial
from potstill.report.data import ReportData, collect
from potstill.report.page import Fact, Page, Section, write_page
from potstill.report.plots import (
    Figure,
    Look,
    Panel,
    Series,
    learning_panels,
    looks,
    plain_label,
    write_figure,
)
from potstill.report.tables import METRICS, Cell, Table, number
from potstill.report.verdicts import compare, sentence

_ERROR_COLUMNS = (
    "forces_rmse",
    "forces_mae",
    "forces_relative_rmse",
    "forces_cosine",
    "energy_per_atom_rmse",
    "energy_per_atom_mae",
    "stress_rmse",
    "atomic_energies_rmse",
    "efwt",
)
_GROUPED = ("forces_rmse", "energy_per_atom_rmse")
_KIB = 1024.0
#: What the student of the main job should stay below: relative force RMSE, NVE drift in meV/atom.
AIM_RELATIVE_FORCES, AIM_DRIFT = 0.10, 1.0
#: Elastic constants are close when none is off by more than this part of the largest.
AIM_ELASTIC = 0.2


def write_report(run: str | Path | ReportData, *, about: Mapping[str, str] | None = None) -> Path:
    """Write `report.html` and, in `report/`, its tables (CSV, Markdown) and figures.

    Parameters
    ----------
    run : path or ReportData
        The folder of a run, or what has been collected from it.
    about : mapping, optional
        What to add to the list at the top, the command for instance.

    Returns
    -------
    Path
        Of `report.html`, in the run folder.

    Raises
    ------
    DataError
        If there is no such folder, or a result in it is damaged.
    """
    data = run if isinstance(run, ReportData) else collect(run)
    parts = data.folder / "report"
    parts.mkdir(parents=True, exist_ok=True)
    known = {**looks(data.models), "front": Look("Pareto front", "#9a9a9a", "")}

    def draw(*makers: Callable[[ReportData], _Drawing | None]) -> tuple[Figure, ...]:
        drawings = [drawing for make in makers if (drawing := make(data)) is not None]
        return tuple(write_figure(parts, looks_of=known, **drawing) for drawing in drawings)

    sections = (
        Section(
            "Accuracy", _accuracy_text(data), draw(_parity, _groups), _tables(error_table(data))
        ),
        Section("Training", "", draw(_learning)),
        Section("Accuracy against cost", "", draw(_pareto, _cost), _tables(cost_table(data))),
        Section("Crystal", "", draw(_eos), _tables(property_table(data))),
        Section("Dynamics", "", draw(_nve, _rdf), _tables(nve_table(data), rdf_table(data))),
    )
    for section in sections:
        for table in section.tables:
            table.write(parts)
    page = Page(
        title=data.title,
        about=tuple({**(about or {}), **data.about}.items()),
        verdicts=verdicts(data) or ("Nothing has been evaluated yet.",),
        facts=_facts(data),
        notes=data.problems,
        sections=sections,
    )
    return write_page(page, data.folder / "report.html")


# -- the summary -------------------------------------------------------------------------------


def verdicts(data: ReportData) -> tuple[str, ...]:
    """Sentences of the summary box, from numbers."""
    makers = (_forces_verdict, _control_verdicts, _speed_verdict, _nve_verdict, _crystal_verdict)
    return tuple(text for make in makers for text in make(data))


def _forces_verdict(data: ReportData) -> list[str]:
    errors = data.errors("student")
    relative = errors.get("forces_relative_rmse", math.nan)
    if not math.isfinite(relative):
        return []
    side = "below" if relative < AIM_RELATIVE_FORCES else "above"
    whose = "the teacher's forces" if data.target == "teacher" else "the reference forces"
    return [
        f"On held-out structures the student reproduces {whose} to {number(100 * relative)} % "
        f"(RMSE over the standard deviation of the forces), {side} the "
        f"{100 * AIM_RELATIVE_FORCES:.0f} % aimed at."
    ]


def _control_verdicts(data: ReportData) -> list[str]:
    texts = []
    for control in data.controls:
        for key in ("forces_rmse", "energy_per_atom_rmse"):
            ours, theirs = (data.errors(m).get(key, math.nan) for m in ("student", control))
            comparison = compare(METRICS[key], [ours], [theirs])
            if comparison.outcome != "unknown":
                texts.append(sentence(comparison, "student", plain_label(control)))
    return texts


def speed_ratio(data: ReportData, fast: str = "student", slow: str = "teacher") -> dict[int, float]:
    """How many times less time per step `fast` takes, by number of atoms timed for both."""
    ours, theirs = _timings(data, fast), _timings(data, slow)
    return {n: theirs[n] / ours[n] for n in ours if n in theirs}


def _speed_verdict(data: ReportData) -> list[str]:
    ratios = speed_ratio(data)
    if not ratios:
        return []
    n = max(ratios)
    ours, theirs = _timings(data, "student")[n], _timings(data, "teacher")[n]
    word, ratio = ("faster", ratios[n]) if ratios[n] >= 1 else ("slower", 1 / ratios[n])
    return [
        f"In the same ASE dynamics of {n:,} atoms the student is {number(ratio)} times {word} than "
        f"the teacher ({number(1e6 * ours)} against {number(1e6 * theirs)} µs per step and atom)."
    ]


def _nve_verdict(data: ReportData) -> list[str]:
    run = data.test("nve").get("student")
    if not run:
        return []
    setting = f"{run['n_atoms']} atoms, {run['temperature']:g} K, timestep {run['timestep']:g} fs"
    if run.get("exploded_at") is not None:
        return [
            f"The student's NVE run ({setting}) broke down after {run['exploded_at']:g} ps: "
            f"{run.get('reason', '')}."
        ]
    drift, error = run["drift"], (run.get("slope_error") or math.nan) * run["duration"]
    side = "below" if abs(drift) < AIM_DRIFT else "above"
    text = (
        f"Over {run['duration']:g} ps of NVE ({setting}) the student's total energy drifts by "
        f"{_signed(drift)}{f' ± {number(error, 2)}' if math.isfinite(error) else ''} meV/atom "
        f"(fitted slope times duration), {side} the {AIM_DRIFT:g} meV/atom aimed at"
    )
    closest = _closest(run, data.trained_on)
    if closest is not None:
        pair, distance, fraction = closest
        text += (
            f"; the closest {pair} pair was {distance:.2f} Å apart, {fraction:.2f} times the "
            "shortest in training"
        )
    return [text + "."]


def _crystal_verdict(data: ReportData) -> list[str]:
    ours, theirs = (data.test("eos").get(name) for name in ("student", "teacher"))
    if not ours or not theirs:
        return []
    lengths = [r["cell_lengths"][0] for r in (ours, theirs)]
    moduli = [r["bulk_modulus"] for r in (ours, theirs)]
    texts = [
        f"Lattice constant {lengths[0]:.3f} Å (teacher {lengths[1]:.3f} Å, "
        f"{_change(*lengths)}), bulk modulus {number(moduli[0])} GPa (teacher "
        f"{number(moduli[1])} GPa, {_change(*moduli)})."
    ]
    ours, theirs = (data.test("elastic").get(name) for name in ("student", "teacher"))
    if ours and theirs:
        values = {name: (ours[name], theirs[name]) for name in ("c11", "c12", "c44")}
        pairs = ", ".join(
            f"{k.upper()} {number(a)} ({number(b)}) GPa" for k, (a, b) in values.items()
        )
        worst = max(abs(a - b) for a, b in values.values())
        far = worst > AIM_ELASTIC * max(abs(b) for _, b in values.values())
        verdict = "far from the teacher's" if far else "close to the teacher's"
        texts.append(
            f"Elastic constants from strains of {ours['strain']:g}, the teacher's in brackets: "
            f"{pairs}; {verdict}."
        )
    return texts


def _facts(data: ReportData) -> tuple[Fact, ...]:
    facts = []
    against = f"against the {data.target}"
    for model in ("student", *data.controls):
        value = data.errors(model).get("forces_rmse", math.nan)
        if math.isfinite(value):
            facts.append(Fact(number(value), "eV/Å", f"force RMSE, {plain_label(model)}", against))
    relative = data.errors("student").get("forces_relative_rmse", math.nan)
    if math.isfinite(relative):
        label = "relative force RMSE, student"
        facts.append(Fact(number(100 * relative), "%", label, against))
    ratios = speed_ratio(data)
    if ratios:
        n = max(ratios)
        facts.append(Fact(number(ratios[n]), "×", "speed over the teacher", f"{n:,} atoms"))
    run = data.test("nve").get("student")
    if run and run.get("exploded_at") is None:
        note = f"in {run['duration']:g} ps at {run['temperature']:g} K"
        facts.append(Fact(_signed(run["drift"]), "meV/atom", "NVE drift, student", note))
    elif run:
        facts.append(Fact("unstable", "", "NVE, student", f"after {run['exploded_at']:g} ps"))
    return tuple(facts)


def _accuracy_text(data: ReportData) -> str:
    n = max((r.get("n_systems", 0) for r in data.test("errors").values()), default=0)
    if not n:
        return ""
    return (
        f"Errors on {n:,} structures that took no part in training. A channel names whose "
        "prediction is compared with whose label."
    )


# -- tables ------------------------------------------------------------------------------------


def error_table(data: ReportData) -> Table | None:
    """Metrics of every model in every channel."""
    channels: dict[str, dict[str, float]] = {}
    for result in data.test("errors").values():
        for channel, metrics in result.get("channels", {}).items():
            if channel not in ("teacher-teacher", "reference-reference"):
                channels.setdefault(channel, metrics)
    keys = [k for k in _ERROR_COLUMNS if any(m.get(k) is not None for m in channels.values())]
    if not keys:
        return None
    rows: list[tuple[Cell, ...]] = []
    for channel, metrics in channels.items():
        model, _, target = channel.rpartition("-")
        row = [None if metrics.get(k) is None else metrics[k] * METRICS[k].scale for k in keys]
        rows.append((plain_label(model), target, data.n_parameters.get(model), *row))
    columns = ("Model", "Against", "Parameters", *(METRICS[k].label for k in keys))
    note = (
        "EFwT: share of structures with an energy error below 0.02 eV and no force error above "
        "0.03 eV/Å. The relative error is the RMSE over the standard deviation of the labels."
    )
    return Table("table_errors", "Errors by channel", columns, tuple(rows), note)


def cost_table(data: ReportData) -> Table | None:
    """Parameters, time and memory of every model."""
    memory = data.test("memory")
    sizes = sorted({n for model in data.models for n in _timings(data, model)})
    if not sizes and not memory:
        return None
    rows: list[tuple[Cell, ...]] = []
    for model in data.models:
        timings = _timings(data, model)
        if not timings and model not in memory:
            continue
        ratios = speed_ratio(data, model)
        ratio = ratios[max(ratios)] if ratios and model != "teacher" else None
        times = [1e6 * timings[n] if n in timings else None for n in sizes]
        row = (plain_label(model), data.n_parameters.get(model), *times, ratio)
        rows.append((*row, *_memory_cells(memory.get(model))))
    columns = ("Model", "Parameters", *(f"µs per step and atom, {n:,} atoms" for n in sizes))
    names = ("Memory per atom (KiB)", "Error of that (KiB)", "Largest system in 8 GiB")
    return Table(
        "table_cost",
        "Cost of molecular dynamics",
        (*columns, "Times faster than teacher", *names),
        tuple(rows),
        "Median time of ASE dynamics; the ratio is that of the largest size timed for both. "
        "Memory: slope of the peak of fresh processes against the number of atoms.",
    )


def _memory_cells(memory: Mapping[str, Any] | None) -> tuple[Cell, Cell, Cell]:
    slope = (memory or {}).get("bytes_per_atom")
    if memory is None or slope is None:
        return None, None, None
    error = memory.get("error")
    largest = int((8 * 2**30 - memory["baseline_bytes"]) / slope) if slope > 0 else None
    return slope / _KIB, None if error is None else error / _KIB, largest


def property_table(data: ReportData) -> Table | None:
    """Lattice constant, bulk modulus and elastic constants, with deviations from the teacher."""
    readers: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
        "Lattice constant (Å)": ("eos", lambda r: r["cell_lengths"][0]),
        "Volume per atom (Å³)": ("eos", lambda r: r["volume"]),
        "Bulk modulus, E(V) (GPa)": ("eos", lambda r: r["bulk_modulus"]),
        "dB/dp": ("eos", lambda r: r["bulk_modulus_derivative"]),
        "C11 (GPa)": ("elastic", lambda r: r["c11"]),
        "C12 (GPa)": ("elastic", lambda r: r["c12"]),
        "C44 (GPa)": ("elastic", lambda r: r["c44"]),
        "Bulk modulus, elastic (GPa)": ("elastic", lambda r: r["bulk_modulus"]),
    }
    models = [m for m in data.models if m in data.test("eos") or m in data.test("elastic")]
    models.sort(key=lambda model: model != "teacher")  # the teacher first: it is what is aimed at
    compared = [m for m in models if m != "teacher"] if "teacher" in models else []
    rows: list[tuple[Cell, ...]] = []
    for label, (test, read) in readers.items():
        values = {m: read(data.test(test)[m]) for m in models if m in data.test(test)}
        if not values:
            continue
        teacher = values.get("teacher")
        changes = [_relative(values.get(m), teacher) for m in compared]
        rows.append((label, *(values.get(m) for m in models), *changes))
    if not rows:
        return None
    columns = ("Quantity", *(plain_label(m) for m in models))
    deviations = (f"{plain_label(m)} − teacher (%)" for m in compared)
    strains = sorted({r["strain"] for r in data.test("elastic").values() if "strain" in r})
    note = "E(V): Birch-Murnaghan fit. Elastic constants: averages over the cubic axes"
    if strains:
        note += f", from strains of {' or '.join(f'{s:g}' for s in strains)}"
    note += "."
    return Table("table_crystal", "Crystal at 0 K", (*columns, *deviations), tuple(rows), note, 4)


def nve_table(data: ReportData) -> Table | None:
    """Drift of the total energy of every model."""
    rows: list[tuple[Cell, ...]] = []
    for model, run in data.test("nve").items():
        closest = _closest(run, data.trained_on)
        broken = run.get("exploded_at")
        state = "sound" if broken is None else f"broke down after {broken:g} ps"
        setting = (run["n_atoms"], run["temperature"], run["timestep"], run["duration"])
        fit = (run["slope"], run["slope_error"], run["drift"], run["fluctuation"])
        near = (None, None) if closest is None else (f"{closest[0]} {closest[1]:.2f}", closest[2])
        rows.append((plain_label(model), *setting, *fit, *near, state))
    if not rows:
        return None
    columns = ("Model", "Atoms", "T (K)", "Timestep (fs)", "Time (ps)")
    fitted = ("Slope (meV/atom/ps)", "Error of slope", "Drift (meV/atom)", "Fluctuation (meV/atom)")
    last = ("Closest pair (Å)", "Over shortest in training", "Run")
    note = (
        "Slope: least squares, with its standard error for correlated samples; drift: slope times "
        "duration; fluctuation: root mean square about the fitted line."
    )
    return Table("table_nve", "Energy at constant energy", (*columns, *fitted, *last),
                 tuple(rows), note)  # fmt: skip


def rdf_table(data: ReportData) -> Table | None:
    """Distance of every model's radial distribution from the teacher's."""
    g = {model: _radial(result) for model, result in data.test("rdf").items()}
    rows: list[tuple[Cell, ...]] = []
    for model, distribution in g.items():
        if model == "teacher" or not _same_bins(distribution, g.get("teacher")):
            continue
        difference = compare_radial(distribution, g["teacher"])
        numbers = (difference.total_absolute_error, difference.integrated_absolute_error)
        rows.append((plain_label(model), *numbers, difference.expected_from_noise))
    if not rows:
        return None
    columns = ("Model", "Sum of absolute differences", "Times bin width (Å)", "By chance (Å)")
    note = (
        "The sum over bins is what Matin et al. report; by chance: what its product with the bin "
        "width would be if both were samples of one liquid with the stated block errors."
    )
    return Table("table_rdf", "Distance from the teacher's g(r)", columns, tuple(rows), note)


# -- figures -----------------------------------------------------------------------------------

_Drawing = dict[str, Any]  # arguments of write_figure


def _parity(data: ReportData) -> _Drawing | None:
    titles = {
        "forces": ("forces", "eV/Å"),
        "energy": ("energies from their mean", "eV/atom"),
        "atomic_energies": ("atomic energies from their mean", "eV"),
    }
    stored = data.test("parity")
    names = [n for n in titles if any(points.get(n) for points in stored.values())]
    panels = []
    for model, properties in stored.items():
        for name in names:
            title, unit = titles[name]
            points = properties.get(name) or {"label": [], "prediction": []}
            label, predicted = (_floats(points[side]) for side in ("label", "prediction"))
            # large offsets would hide all structure; both sides are shifted by the same number
            zero = label.mean() if name != "forces" and len(label) else 0.0
            panels.append(
                Panel(
                    f"Label ({unit})", f"Prediction ({unit})",
                    [Series(model, label - zero, predicted - zero, kind="dots")],
                    f"{plain_label(model)}: {title}" if name == names[0] else title,
                    diagonal=True,
                )
            )  # fmt: skip
    if not panels:
        return None
    caption = (
        f"Predictions against the labels of the {data.target} on held-out structures; the line is "
        "perfect agreement. Large sets are thinned by a seeded sample."
    )
    return {
        "name": "parity", "title": "Parity", "caption": caption, "panels": panels,
        "n_columns": len(names), "legend": False,
    }  # fmt: skip


def _groups(data: ReportData) -> _Drawing | None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, result in data.test("errors").items():
        for group, channels in result.get("groups", {}).items():
            metrics = channels.get(f"{model}-{data.target}")
            if metrics and model != data.target:
                found.setdefault(group, {})[model] = metrics
    if len(found) < 2:
        return None
    panels: list[Panel] = []
    for key in _GROUPED:
        series = []
        for model in data.models:
            points = [
                (found[group][model][key] * METRICS[key].scale, k)
                for k, group in enumerate(found)
                if found[group].get(model, {}).get(key) is not None
            ]
            if points:
                x, y = np.array(points, dtype=float).T
                series.append(Series(model, x, y))
        if series:
            panels.append(
                Panel(METRICS[key].label, "", series, categories=list(found), from_zero=True,
                      hide_categories=bool(panels))
            )  # fmt: skip
    if not panels:
        return None
    caption = f"Errors against the {data.target} by group of held-out structures."
    return {
        "name": "groups", "title": "Errors by group", "caption": caption, "panels": panels,
        "height": 1.0 + 0.34 * len(found),
    }  # fmt: skip


def _learning(data: ReportData) -> _Drawing | None:
    panels = learning_panels({m: data.curves[m] for m in data.models if m in data.curves})
    caption = (
        "Force error while training: the force term of the loss on the training set (RMSE + MAE "
        "unless the loss was changed; mean of the batches), and the RMSE on the validation set "
        "(Fig. 4 of Matin et al.)."
    )
    drawing = {"name": "learning", "title": "Learning curves", "caption": caption}
    return {**drawing, "panels": panels} if panels else None


def _pareto(data: ReportData) -> _Drawing | None:
    timed = [set(_timings(data, m)) for m in data.test("speed")]
    common = set.intersection(*timed) if timed else set()
    costs: dict[str, dict[str, float]] = {"time_per_step_atom_us": {}, "memory_per_atom_kib": {}}
    for model in data.models:
        time = _timings(data, _measured_as(data, "speed", model)).get(max(common, default=0))
        if time is not None:
            costs["time_per_step_atom_us"][model] = 1e6 * time
        memory = data.test("memory").get(_measured_as(data, "memory", model), {})
        slope = memory.get("bytes_per_atom")
        if slope is not None and slope > 0:
            costs["memory_per_atom_kib"][model] = slope / _KIB
    panels = []
    for key, by_model in costs.items():
        points = {
            m: (x, _force_error(data, m)) for m, x in by_model.items()
            if math.isfinite(_force_error(data, m))
        }  # fmt: skip
        if len({x for x, _ in points.values()}) < 2:
            continue  # nothing to trade: all cost the same
        table = np.array(list(points.values()))
        front = table[pareto_front(table)]
        front = front[np.argsort(front[:, 0])]
        series = [Series(m, [x], [y]) for m, (x, y) in points.items()]
        series.append(Series("front", front[:, 0], front[:, 1], kind="front"))
        label = METRICS["forces_rmse"].label
        panels.append(Panel(METRICS[key].label, label, series, x_scale="auto", from_zero=True))
    if not panels:
        return None
    atoms = f" Times are those of {max(common):,} atoms." if common else ""
    own = " The teacher's error against itself is zero." if data.target == "teacher" else ""
    if any(_measured_as(data, "speed", control) != control for control in data.controls):
        own += " Controls have the student's architecture and are drawn at its cost."
    caption = (
        f"Force RMSE against the {data.target} over the cost of molecular dynamics; lower and "
        f"further left is better (Fig. 2 of Matin et al.).{atoms}{own}"
    )
    return {"name": "pareto", "title": "Error against cost", "caption": caption, "panels": panels}


def _cost(data: ReportData) -> _Drawing | None:
    panels = []
    timings = {model: _timings(data, model) for model in data.models}
    series = [
        Series(m, sorted(t), [1e6 * t[n] for n in sorted(t)], joined=len(t) > 1)
        for m, t in timings.items()
        if t
    ]
    if series:
        label = METRICS["time_per_step_atom_us"].label
        panels.append(Panel("Atoms", label, series, x_scale="auto", y_scale="auto"))
    memory = [
        Series(m, r["n_atoms"], np.asarray(r["peak_bytes"], dtype=float) / 2**20, joined=True)
        for m, r in data.test("memory").items()
    ]
    if memory:
        panels.append(Panel("Atoms", "Peak memory (MiB)", memory, x_scale="auto", y_scale="auto"))
    caption = (
        "Time per step and atom in ASE dynamics, and peak memory of a fresh process, against the "
        "number of atoms."
    )
    drawing = {"name": "cost", "title": "Time and memory", "caption": caption}
    return {**drawing, "panels": panels} if panels else None


def _eos(data: ReportData) -> _Drawing | None:
    results = data.test("eos")
    if not results:
        return None
    curves = {
        m: (np.asarray(r["volumes"]), 1e3 * (np.asarray(r["energies"]) - r["energy"]))
        for m, r in results.items()
    }
    series = [Series(m, v, e, joined=True) for m, (v, e) in curves.items()]
    panels = [Panel("Volume (Å³/atom)", "Energy from minimum (meV/atom)", series, "E(V)")]
    if "teacher" in curves and len(curves) > 1:
        volumes, energies = curves["teacher"]
        differences = []
        for model, (v, e) in curves.items():
            inside = (v >= volumes.min()) & (v <= volumes.max())
            change = e[inside] - np.interp(v[inside], volumes, energies)
            if model != "teacher":
                differences.append(Series(model, v[inside], change, joined=True))
        panels.append(
            Panel("Volume (Å³/atom)", "Difference (meV/atom)", differences, "Minus teacher",
                  zero_line=True)
        )  # fmt: skip
    caption = (
        "Energy under isotropic strain, each from the minimum of its own Birch-Murnaghan fit, and "
        "the difference from the teacher's curve."
    )
    return {"name": "eos", "title": "Equation of state", "caption": caption, "panels": panels}


def _nve(data: ReportData) -> _Drawing | None:
    runs = data.test("nve")
    if not runs:
        return None
    series = []
    for model, run in runs.items():
        time, energy = _floats(run["time"]), _floats(run["energy"])
        series.append(Series(model, time, energy, kind="thin"))
        if run.get("slope") is not None and len(time):
            fit = energy.mean() + run["slope"] * (time - time.mean())
            series.append(Series(model, time[[0, -1]], fit[[0, -1]], kind="line"))
    panel = Panel("Time (ps)", "Total energy from start (meV/atom)", series, zero_line=True)
    first = next(iter(runs.values()))
    caption = (
        f"Total energy in NVE dynamics of {first['n_atoms']} atoms at {first['temperature']:g} K "
        f"with a timestep of {first['timestep']:g} fs (thin), and the fitted drift (thick). Noise "
        "of constant width is the integrator's."
    )
    title = "Energy at constant energy"
    return {"name": "nve", "title": title, "caption": caption, "panels": [panel], "width": 7.0}


def _rdf(data: ReportData) -> _Drawing | None:
    g = {model: _radial(result) for model, result in data.test("rdf").items()}
    if not g:
        return None
    series = [
        Series(m, d.r, d.g, y_spread=np.nan_to_num(d.error), kind="line") for m, d in g.items()
    ]
    panels = [Panel("r (Å)", "g(r)", series, "Distribution", from_zero=True)]
    differences = []
    for model, d in g.items():
        if model != "teacher" and _same_bins(d, g.get("teacher")):
            spread = np.nan_to_num(np.hypot(d.error, g["teacher"].error))
            change = d.g - g["teacher"].g
            differences.append(Series(model, d.r, change, y_spread=spread, kind="line"))
    if differences:
        panels.append(
            Panel("r (Å)", "Difference in g(r)", differences, "Minus teacher", zero_line=True)
        )
    caption = (
        "Radial distribution in molecular dynamics, and its difference from the teacher's; bands "
        "are standard errors from blocks of the trajectories."
    )
    title = "Radial distribution"
    return {"name": "rdf", "title": title, "caption": caption, "panels": panels}


# -- small parts -------------------------------------------------------------------------------


def _tables(*tables: Table | None) -> tuple[Table, ...]:
    return tuple(table for table in tables if table is not None)


def _timings(data: ReportData, model: str) -> dict[int, float]:
    """Seconds per step and atom by number of atoms."""
    rows = data.test("speed").get(model, {}).get("rows", ())
    return {row["n_atoms"]: row["seconds_per_step"] / row["n_atoms"] for row in rows}


def _measured_as(data: ReportData, test: str, model: str) -> str:
    """Whose cost is a model's: its own, or that of the student of the same architecture."""
    sizes = data.n_parameters
    same = sizes.get(model) is not None and sizes.get(model) == sizes.get("student")
    if model not in data.test(test) and model in data.controls and same:
        return "student"
    return model


def _force_error(data: ReportData, model: str) -> float:
    if model == data.target:
        return 0.0
    return data.errors(model).get("forces_rmse", math.nan)


def _closest(
    run: Mapping[str, Any], trained_on: Mapping[str, Any]
) -> tuple[str, float, float] | None:
    """Pair, closest approach (Å), and its ratio to the shortest in training: the worst pair."""
    trained = trained_on.get("shortest_distances") or {}
    found = [
        (pair, distance, distance / trained[pair])
        for pair, distance in (run.get("shortest_distances") or {}).items()
        if distance is not None and trained.get(pair)
    ]
    return min(found, key=lambda entry: entry[2]) if found else None


def _relative(value: float | None, reference: float | None) -> float | None:
    """Deviation in percent."""
    if value is None or reference is None or reference == 0:
        return None
    return 100.0 * (value - reference) / reference


def _change(value: float, reference: float) -> str:
    return f"{_signed(100.0 * (value - reference) / reference, 2)} %"


def _signed(value: float, digits: int = 2) -> str:
    sign = "−" if value < 0 else "+"
    return f"{sign}{number(abs(value), digits)}"


def _radial(result: Mapping[str, Any]) -> RadialDistribution:
    arrays = {key: _floats(result[key]) for key in ("r", "g", "error", "coordination")}
    return RadialDistribution(**{**result, **arrays})


def _same_bins(first: RadialDistribution, second: RadialDistribution | None) -> bool:
    same = second is not None and len(first.r) == len(second.r)
    return same and np.allclose(first.r, second.r)  # type: ignore[union-attr]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=float)
