"""Files of weights are read without torch as torch reads them, and what torch must not load is refused."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools.errors import UserError
from tools.weights_file import BLOCK, WeightsFile, to_bytes, write_torch


@pytest.fixture
def state():
    torch.manual_seed(0)
    shared = torch.randn(6, 5)
    return {
        "kernel": torch.randn(4, 3, 3, 3, 3),
        "channels_last": torch.randn(4, 3, 3, 3, 3).to(memory_format=torch.channels_last_3d),
        "half": torch.randn(1000).half(),
        "bfloat16": torch.randn(1000).bfloat16(),
        "double": torch.randn(7, dtype=torch.float64),
        "scalar": torch.tensor(0.25),
        "counter": torch.tensor(2**40),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "shared": shared,
        "view": shared[1:4, 2:],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }


def values(tensor):
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def test_a_torch_file_reads_as_torch_reads_it(state, tmp_path):
    for content in (state, {"model": state}):
        torch.save(content, tmp_path / "model.pt")
        file = WeightsFile(tmp_path / "model.pt")
        assert list(file.entries) == list(state)
        for name, tensor in state.items():
            assert file.entries[name].dtype == str(tensor.dtype).removeprefix("torch.")
            assert np.array_equal(file.array(name), values(tensor)), name
            assert np.array_equal(file.read(name, 0, 2), values(tensor).reshape(-1)[:2])
            assert (
                file.bytes(name).tobytes() == tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )


def test_a_network_with_its_metadata_is_read(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    file = WeightsFile(tmp_path / "model.pt")
    assert all(np.array_equal(file.array(name), tensor.numpy()) for name, tensor in network.state_dict().items())


def test_a_safetensors_file_reads_the_same(state, tmp_path):
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(whole, tmp_path / "model.safetensors", metadata={"who": "me"})
    file = WeightsFile(tmp_path / "model.safetensors")
    assert file.metadata == {"who": "me"}
    assert all(np.array_equal(file.array(name), values(tensor)) for name, tensor in whole.items())


def test_torch_reads_what_is_written(state, tmp_path):
    torch.save(state, tmp_path / "in.pt")
    file = WeightsFile(tmp_path / "in.pt")
    layout = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()} | {"again": ("float32", (6, 5))}
    layout["huge"] = ("int8", (3 * BLOCK + 1,))
    data = [(name, [file.bytes(name)]) for name in file.entries]
    data.append(("huge", [np.full(BLOCK, i, np.uint8) for i in range(3)] + [np.full(1, 9, np.uint8)]))
    write_torch(tmp_path / "out.pt", layout, data, {"again": "shared"})
    for options in ({}, {"mmap": True}):
        back = torch.load(tmp_path / "out.pt", weights_only=True, **options)
        assert list(back) == [*state, "again", "huge"]
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
        assert back["again"].data_ptr() == back["shared"].data_ptr()
    assert back["huge"][[0, BLOCK, 2 * BLOCK, 3 * BLOCK]].tolist() == [0, 1, 2, 9]
    assert zipfile.ZipFile(tmp_path / "out.pt").testzip() is None
    first = (tmp_path / "out.pt").read_bytes()
    write_torch(tmp_path / "out.pt", layout, data, {"again": "shared"})
    assert (tmp_path / "out.pt").read_bytes() == first


def test_missing_or_wrong_amounts_of_data_are_noticed(tmp_path):
    with pytest.raises(ValueError, match="no data for b"):
        write_torch(tmp_path / "x", {"a": ("float32", (1,)), "b": ("float32", (1,))}, [("a", [np.zeros(4, np.uint8)])])
    with pytest.raises(ValueError, match="3 bytes instead of 4"):
        write_torch(tmp_path / "x", {"a": ("float32", (1,))}, [("a", [np.zeros(3, np.uint8)])])


def test_rounding_to_half_precision_is_torchs():
    numbers = torch.cat([torch.randn(100_000), 2.0 ** torch.arange(-40, 40)])
    for dtype in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            ours = to_bytes(numbers.numpy(), dtype)
        assert ours.tobytes() == numbers.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused_by_name(value, dtype, tmp_path):
    tensor = torch.zeros(3, 4, dtype=dtype)
    tensor[1, 2] = value
    for name, content in (("a", tensor), ("b", tensor.t())):
        torch.save({name: content}, tmp_path / "model.pt")
        with pytest.raises(UserError, match=f"tensor {name} has NaN or infinite values"):
            WeightsFile(tmp_path / "model.pt").array(name)


def test_large_finite_values_are_not_taken_for_infinity(tmp_path):
    torch.save({"a": torch.full((100,), 3e38)}, tmp_path / "model.pt")
    assert WeightsFile(tmp_path / "model.pt").array("a").max() == np.float32(3e38)


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return (self.call, self.arguments)


def archive(path, pickled, compression=zipfile.ZIP_STORED, twice=False, **records):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("m/data.pkl", pickled)
        for name, content in records.items():
            file.writestr(f"m/{name.replace('__', '/')}", content)
            if twice:
                file.writestr(f"m/{name.replace('__', '/')}", content)


def refused(path, *words):
    with pytest.raises(UserError) as error:
        WeightsFile(path)
    for word in (*words, path.name):
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    for call in (os.system, eval, getattr, torch.load, __import__):
        archive(path, pickle.dumps({"a": Hostile(call, "touch /tmp/this-must-not-exist")}, protocol=2))
        refused(path, "asks for")
    assert not os.path.exists("/tmp/this-must-not-exist")
    torch.save({"a": torch.zeros(1000)}, path)
    whole = {i.filename: zipfile.ZipFile(path).read(i) for i in zipfile.ZipFile(path).infolist()}
    pickled, data = (next(v for k, v in whole.items() if k.endswith(end)) for end in ("data.pkl", "data/0"))
    archive(path, pickled, data__0=data)
    assert WeightsFile(path).array("a").shape == (1000,)
    archive(path, pickled, zipfile.ZIP_DEFLATED, data__0=data)
    refused(path, "is compressed")
    archive(path, pickled, data__0=data[:-4])
    refused(path, "of another size than it says")
    archive(path, pickled, data__0=data, twice=True)
    refused(path, "two records")
    archive(path, pickled)
    refused(path, "larger than its data")
    archive(path, pickled, data__0=data, byteorder=b"big")
    refused(path, "big-endian")
    archive(path, pickle.dumps({"a": [1, 2]}), data__0=data)
    refused(path, "something else than named tensors")
    archive(path, pickle.dumps([]), data__0=data)
    refused(path, "something else than named tensors")
    archive(path, b"\x80\x02}q" + b"(" * 100_000, data__0=data)
    refused(path, "not a readable file of weights")
    archive(path, b"\x80\x02}r\xff\xff\xff\x7f.", data__0=data)
    refused(path, "numbers more things than it has")
    archive(path, b"\x80\x05\x96\x08" + bytes(7) + b"AAAAAAAA.", data__0=data)
    refused(path, "an instruction BYTEARRAY8")
    bomb = b"\x80\x02}(K\x00K\x01\x86q\x00"  # a tuple of a tuple twice, and so on, to be hashed as a key
    for slot in range(60):
        bomb += b"h" + bytes([slot]) + b"\x86q" + bytes([slot + 1])
    archive(path, bomb + b"Nu.", data__0=data)
    refused(path, "a tuple larger than tensors need")
    path.write_bytes(b"")
    refused(path, "not a readable file of weights")
    refused(tmp_path / "none.pt", "not found")


def test_one_flipped_bit_in_a_torch_file_is_found(state, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(state, path)
    WeightsFile(path).verify()
    data = bytearray(path.read_bytes())
    data[WeightsFile(path).entries["view"].offset + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.pt is damaged: tensor shared is not what was written"):
        WeightsFile(path).verify()


def test_truncated_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, tmp_path / "whole.pt")
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for length in range(0, len(whole), 97):
            path = tmp_path / f"cut{name[5:]}"
            path.write_bytes(whole[:length])
            refused(path)
