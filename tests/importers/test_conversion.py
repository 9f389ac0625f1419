"""What all importers share."""

import pytest
import torch

from tools.errors import UserError
from tools.importers.conversion import named_tensors


def test_prefixes_of_wrapped_networks_go_in_any_order():
    weight = torch.ones(2)
    for prefix in ("", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."):
        assert list(named_tensors({f"{prefix}encoder.module.weight": weight}, "a.pt", "state")) == [
            "encoder.module.weight"
        ]


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"a\.pt: state holds weight twice, once as module\.weight"):
        named_tensors({"weight": torch.ones(1), "module.weight": torch.zeros(1)}, "a.pt", "state")
