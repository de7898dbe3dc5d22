"""Write study_runs.json: the training settings of every run of every config in `studies/`

    python tests/golden/make_study_runs.py

It was run with commit 78dd2a4, where studies of sizes and of features had an engine each, from
whose modules it imports; it stays to say where the file comes from. What runs of one study have in
common is written once, losses and models are numbered. A run is [model, loss, whom it learns from,
whose liquid its own is compared with, other settings].
"""

import json
from pathlib import Path

from potstill.workflows.feature_study import FeatureStudyConfig, _teacher_cell
from potstill.workflows.study import _is_ready, _settings  # noqa: F401

from potstill.config import load_study

ROOT = Path(__file__).parents[2]


def settings_of(config, cell):
    if isinstance(config, FeatureStudyConfig):
        return config.settings_of(cell)
    return _settings(config, cell, config.strategy(cell.strategy))


def teachers_of(config, cell):
    """The run or label set that a run learns from, and the one that its liquid stands beside."""
    if isinstance(config, FeatureStudyConfig):
        if cell.pair is None:
            return None, None
        own = _teacher_cell(config, cell)
        return (own.name if own else config.models[config.pairs[cell.pair].teacher].spec), None
    compared = config.teacher_of(cell)
    if config.strategy(cell.strategy).role != "student":
        return None, compared and compared.name
    return config.data.atomic_energies_from or compared.name, compared.name


def tests_of(config):
    if isinstance(config, FeatureStudyConfig):
        return {k: [t.file.path, t.forces_only] for k, t in config.tests.items()}
    return {k: [path, False] for k, path in config.data.tests.items()}


def numbered(table, value):
    if value not in table:
        table.append(value)
    return table.index(value)


def main():
    found = {}
    for path in sorted(ROOT.glob("studies/*/*.yaml")):
        if path.stem in ("chgnet_n2n", "ani_table1"):
            continue  # of `potstill train`, and of a script
        config = load_study(path)
        cells = [c for c in config.cells() if getattr(config, "models", None) is None or c.model]
        dumps = {cell.name: settings_of(config, cell).model_dump(mode="json") for cell in cells}
        common = dict(next(iter(dumps.values())))
        models, losses, runs = [], [], {}
        for cell in cells:
            own = dumps[cell.name]
            learns, beside = teachers_of(config, cell)
            changes = {
                key: value
                for key, value in own.items()
                if key not in ("model", "loss") and value != common[key]
            }
            where = numbered(models, own["model"]), numbered(losses, own["loss"])
            runs[cell.name] = [*where, learns, beside, changes]
        del common["model"], common["loss"]
        found[str(path.relative_to(ROOT))] = {
            "tests": tests_of(config),
            "common": common,
            "models": models,
            "losses": losses,
            "runs": runs,
        }
    lines = [
        f'"{name}": {{\n'
        + ",\n".join(
            f'"{key}": '
            + (
                "[\n" + ",\n".join(json.dumps(v) for v in value) + "]"
                if isinstance(value, list)
                else "{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in value.items()) + "}"
                if key == "runs"
                else json.dumps(value)
            )
            for key, value in study.items()
        )
        + "}"
        for name, study in found.items()
    ]
    text = "{" + ",\n".join(lines) + "}\n"
    assert json.loads(text) == found
    Path(__file__).with_name("study_runs.json").write_text(text)
    print({name: len(study["runs"]) for name, study in found.items()})


if __name__ == "__main__":
    main()
