"""Constraints on a task vector while it is trained: the nearest allowed one, exactly."""

import json

import numpy as np
import pytest
import torch

from tools.bundle_code.task_vectors import ConstrainTaskVector
from tools.network import Structure
from tools.task_vector import Facts, save_task_vector

START = {"a": torch.full((2, 3), 2.0), "b": torch.tensor([1.0, -1.0])}
LENGTH = 26**0.5


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(tensor.clone()) for tensor in START.values())
        self.head = torch.nn.Parameter(torch.ones(2))


@pytest.fixture
def bundle(tmp_path):
    """A bundle of the starting point "start", and a writer of task vectors."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps({"lineage": {"pretrained_sha256": "start"}}))

    def write(name, start="start", **deltas):
        facts = Facts(name, [name], {name: [1]}, start, "end", {}, Structure(head={"head": 0}))
        path = tmp_path / f"{name}.safetensors"
        backbone = [(key, START[key].numpy(), START[key].numpy() + np.float32(delta)) for key, delta in deltas.items()]
        save_task_vector(path, facts, backbone, {"head": np.zeros((2, 1), np.float32)}, {})
        return str(path)

    return tmp_path, write


def moved(constraint, network):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    free = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    constraint()
    deltas = {name: (dict(network.named_parameters())[name] - START[name]).detach() for name in START}
    return free, deltas


def test_a_budget_shortens_a_task_vector_and_keeps_its_direction(bundle):
    network = Network()
    free, deltas = moved(ConstrainTaskVector(network, START, bundle[0], norm_budget=0.1), network)
    length = torch.cat([delta.reshape(-1) for delta in deltas.values()]).norm()
    torch.testing.assert_close(length, torch.tensor(0.1 * LENGTH), rtol=1e-5, atol=0)
    ratio = deltas["a"] / (free["a"] - START["a"])
    torch.testing.assert_close(ratio, ratio[0, 0].expand(2, 3), rtol=1e-3, atol=0)
    assert torch.equal(network.head, free["head"])  # the head has no budget
    constraint = ConstrainTaskVector(network, START, bundle[0], norm_budget=100.0)
    free, deltas = moved(constraint, network)
    torch.testing.assert_close(START["a"] + deltas["a"], free["a"])  # room enough


def test_a_task_vector_stays_orthogonal_to_others_in_each_tensor(bundle):
    root, write = bundle
    first, second = torch.arange(6.0).view(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, -1]])
    files = [
        write("liver", a=first, b=[1, 0]),
        write("twice", a=2 * first, b=[2, 0]),
        write("spleen", a=second, b=[3, 0]),
    ]
    network = Network()
    free, deltas = moved(ConstrainTaskVector(network, START, root, orthogonal_to=files, norm_budget=9), network)
    for other in (first, second):
        assert abs((deltas["a"] * other).sum()) < 1e-5
    basis, _ = np.linalg.qr(np.stack([first.numpy().ravel(), second.numpy().ravel()], 1))
    whole = (free["a"] - START["a"]).numpy().ravel()
    np.testing.assert_allclose(deltas["a"].numpy().ravel(), whole - basis @ (basis.T @ whole), atol=1e-5)
    np.testing.assert_allclose(deltas["b"], [0, free["b"][1] - START["b"][1]], atol=1e-6)


def test_what_cannot_be_is_said(bundle):
    root, write = bundle

    def refused(reason, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            ConstrainTaskVector(Network(), START, root, **options)

    refused("must be positive", norm_budget=-1.0)
    refused("not found", orthogonal_to=[str(root / "none.safetensors")])
    refused("another starting point", orthogonal_to=[write("foreign", start="elsewhere", a=1, b=1)])
    refused("tensor b is missing", orthogonal_to=[write("half", a=1)])
    refused("NaN", orthogonal_to=[write("broken", a=np.nan, b=1)])
    (root / "text.safetensors").write_text("no task vector")
    refused("not a readable task vector", orthogonal_to=[str(root / "text.safetensors")])
