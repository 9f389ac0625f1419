"""What all importers share."""

import pytest
import torch

from tools.errors import UserError
from tools.importers.conversion import check_geometry, named_tensors, read_checkpoint


def test_prefixes_of_wrapped_networks_go_in_any_order():
    weight = torch.ones(2)
    for prefix in ("", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."):
        assert list(named_tensors({f"{prefix}encoder.module.weight": weight}, "a.pt", "state")) == [
            "encoder.module.weight"
        ]


def test_an_archive_with_a_changed_byte_is_refused_though_pytorch_reads_it(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"state_dict": {"w": torch.ones(1000)}}, path)
    content = bytearray(path.read_bytes())
    place = content.find(torch.ones(1000).numpy().tobytes())
    content[place + 7] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["state_dict"]["w"], torch.ones(1000))
    with pytest.raises(UserError, match=r"c\.pth is damaged: c/data/0 in it is not what was written"):
        read_checkpoint(path)
    path.write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r"c\.pth cannot be read \(it is no file that torch\.save wrote, or damaged\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("patch_size", "spacing", "strides", "message"),
    [
        ([32, 32, 32], [1, 1, 0], [[2, 2, 2]], "spacing must be above 0"),
        ([32, 32, 32], [1, float("inf"), 1], [[2, 2, 2]], "spacing must be above 0"),
        ([32, 32, 32], [1, 1, 1], [[2, 0, 2]], "strides must be whole numbers from 1 on"),
        ([32, 32, 30], [1, 1, 1], [[2, 2, 2], [2, 2, 2]], "a multiple of the strides' product, 4"),
        ([0, 32, 32], [1, 1, 1], [[2, 2, 2]], "a multiple of the strides' product, 2"),
    ],
)
def test_sizes_that_there_cannot_be_are_refused(patch_size, spacing, strides, message):
    check_geometry("plans", [32, 32, 64], [1, 1.5, 3], [[2, 2, 2], [1, 2, 2]])
    with pytest.raises(UserError, match=message):
        check_geometry("plans", patch_size, spacing, strides)


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"a\.pt: state holds weight twice, once as module\.weight"):
        named_tensors({"weight": torch.ones(1), "module.weight": torch.zeros(1)}, "a.pt", "state")
