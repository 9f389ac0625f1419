"""``linearize``: a starting point whose specialists are linear in their task vectors, so that these do not disturb each other."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tools.bundle import Bundle
from tools.convert import write_conversion
from tools.errors import UserError
from tools.importers.monai import read
from tools.instantiate import without_compiling
from tools.network import LINEARIZED
from tools.output import complete_output
from tools.vendor import SOURCE, with_imports

CODE = ("tangent", "group_norm")  # what forward derivatives need


def linearize(bundle: str, output: str, overwrite: bool = False) -> None:
    """Make a starting point of a bundle's weights whose backbone is linearised around them.

    It segments as the bundle does. What ``new_task`` fine-tunes from it, ``merge`` merges and everything else uses is the
    network's first-order expansion (see ``scripts/tangent.py``; Ortiz-Jimenez et al., NeurIPS 2023): two to four times the time,
    and a model.pt of twice the size; task vectors are as large as ever. They fit no other starting point, the bundle's own
    neither.

    Args:
        bundle: with weights; its network must have no running statistics.
        output: folder of the new bundle.
        overwrite: replace the output if it exists.

    Raises:
        UserError: the bundle has no weights, or its network cannot be linearised.
    """
    source = Bundle(bundle)
    structure = source.structure()
    definition = source.network_def()
    if definition["_target_"] == LINEARIZED:
        raise UserError(f"{bundle} is linearised already")
    if structure.statistics or structure.constants:
        name = (structure.statistics + structure.constants)[0]
        raise UserError(f"{bundle} cannot be linearised: {name} is no parameter (running statistics, for example)")
    with complete_output(output, overwrite, inputs=[bundle]) as folder, tempfile.TemporaryDirectory() as temporary:
        conversion = read(source.path)
        conversion.scripts = Path(temporary)
        if (own := source.path / "scripts").is_dir():  # MONAI's networks need none
            shutil.copytree(own, temporary, dirs_exist_ok=True)
        for name, text in with_imports(set(CODE), SOURCE).items():
            (conversion.scripts / name).write_text(text)
        heads = list(structure.head)
        arguments = {name: value for name, value in definition.items() if name != "_target_"}
        conversion.values["network_def"] = {
            "_target_": LINEARIZED, "of": definition["_target_"], "head": heads, **arguments
        }  # fmt: skip
        tensors = conversion.tensors
        moved = {f"network.{name}": tensor for name, tensor in tensors.items()}
        point = {
            f"point.{name}": tensor.clone()
            for name, tensor in tensors.items()
            if name not in {*heads, *structure.aliases}
        }
        conversion.tensors = moved | point
        conversion.origins = {name: f"`{name.partition('.')[2]}`" for name in conversion.tensors}
        conversion.metadata |= {"name": f"{source.name}, linearised"}
        conversion.metadata["lineage"] |= {"data": source.data} if source.data else {}
        write_conversion(folder, "linearize", "a bundle, linearised around its weights", source.model_file, conversion)
        without_compiling(folder)
    print(f"{output}: linearised in {len(point)} tensors of the backbone; fine-tune it by new_task")
