"""What a merge can do and would do: the list of methods, and the plan that ``--dry_run`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from math import prod

from tools.errors import UserError, nearest
from tools.merge_engine import MergeEngine
from tools.merge_methods import METHODS, POSTPROCESSORS, SPARSIFIERS
from tools.network import part_of


def describe_methods(name: str = "") -> str:
    """All methods, sparsifiers and post-processors, one a line; or paper and parameters of one.

    Raises:
        UserError: there is none of that name.
    """
    tables = {"": METHODS, "sparsifier: ": SPARSIFIERS, "post-processor: ": POSTPROCESSORS}
    everything = {key: method for table in tables.values() for key, method in table.items()}
    if not name:
        width = max(map(len, everything))
        return "\n".join(
            f"{key.ljust(width)}  {kind}{method.summary}"
            for kind, table in tables.items()
            for key, method in table.items()
        )
    if name not in everything:
        raise UserError(f"no method {name!r}{nearest(name, everything)}; see --list")
    method = everything[name]
    lines = [f"  {parameter.name} = {parameter.default}: {parameter.help}" for parameter in method.parameters.values()]
    return "\n".join([f"{name}: {method.summary}", method.reference, *lines])


def plan_table(engine: MergeEngine, label_map: Mapping[str, object]) -> str:
    """What would be done with each part of the network, for ``--dry_run``: a line per block of layers and treatment."""
    lines = [
        f"{engine.method.name}, {len(engine.vectors)} task vectors, output channels: background, {', '.join(label_map)}"
    ]
    steps = [("first", engine.recipe.sparsify)] * bool(engine.recipe.sparsify)
    steps += [("then", step) for step in engine.recipe.postprocess]
    for when, step in steps:
        values = {**(SPARSIFIERS | POSTPROCESSORS)[step["method"]].defaults, **(step.get("parameters") or {})}
        seed = f", seed={engine.recipe.seed}" if when == "first" else ""
        lines.append(f"{when} {step['method']}: {', '.join(f'{k}={v}' for k, v in values.items())}{seed}")
    for name in ("dtype", "modulate", "heads", "other_start"):
        if value := getattr(engine.recipe, name):
            lines.append(f"{name}: {value}")
    treatments = {
        "kept": "starting point",
        "mean": "mean of the statistics",
        "scaled mean": "scaled mean (no matrices)",
        "merged": engine.method.name,
    }

    def key(name: str) -> tuple[str, str, str]:
        treatment = engine.treatment(name)
        values = engine.parameters_for(name) if treatment == "merged" else {}
        return part_of(name), treatments[treatment], ", ".join(f"{k}={v}" for k, v in values.items())

    rows = [("tensors of", "number", "entries", "treatment", "parameters")]
    for (block, treatment, values), group in groupby(sorted(engine.names, key=key), key=key):
        names = [*group]
        entries = sum(prod(engine.start.entries[name].shape) for name in names)
        rows.append((block, str(len(names)), f"{entries:,}", treatment, values))
    rows.append(("head", str(len(engine.structure.head)), "", "stacked", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            row[1].rjust(widths[1]),
            row[2].rjust(widths[2]),
            row[3].ljust(widths[3]),
            row[4],
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
