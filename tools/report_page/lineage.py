"""Recipe and lineage: what the merge was made of, as its metadata say, and whether the files that are there agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bundle import Bundle
from tools.card import described
from tools.report_page.page import Section
from tools.task_vector import TaskVector


def lineage_section(
    bundle: Bundle, lineage: Mapping[str, Any], vectors: Sequence[TaskVector], model_sha256: str
) -> Section:
    """The section.

    Args:
        bundle: the merge.
        lineage: of its metadata.
        vectors: those that are there; a parent whose vector is among them is marked as seen.
        model_sha256: of its weights.
    """
    seen = {vector.sha256 for vector in vectors}
    parents = [
        {
            "name": str(vector["task"]),
            "labels": [str(label) for label in vector.get("labels", [])],
            "data": described(vector.get("data", {})),
            "sha256": str(vector["sha256"]),
            "seen": vector["sha256"] in seen,
        }
        for vector in lineage["vectors"]
    ]
    recipe = bundle.path / "docs" / "recipe.yaml"
    facts = {
        "method": str(lineage["method"]),
        "parameters": [(str(name), str(value)) for name, value in lineage.get("parameters", {}).items()],
        "start": {
            "name": str(lineage["pretrained"]),
            "data": described(lineage.get("pretrained_data", {})),
            "sha256": str(lineage["pretrained_sha256"]),
        },
        "parents": parents,
        "merged": {"name": bundle.name, "labels": bundle.labels, "sha256": model_sha256},
        "tool_version": str(lineage.get("tool_version", "unknown")),
        "recipe": recipe.read_text() if recipe.is_file() else "",
        "model_file": str(Path(bundle.name) / "models" / "model.pt"),
    }
    return Section("lineage", "Recipe and lineage", facts)
