"""Shuffled slabs and the heads that name their order: targets, pooling and loss against closed forms, on several networks."""

from itertools import permutations
from math import factorial, log

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import Dataset, MetaTensor
from monai.networks.nets import UNETR, SwinUNETR
from monai.transforms import Compose
from torch import nn

from tools.bundle_code.corruptions import RandMaskBlocksd
from tools.bundle_code.slab_order import (
    RandShuffleSlabsd,
    RestoreAndOrderInferer,
    SlabOrder,
    SlabOrderLoss,
    as_volume,
    order_accuracy,
    slab_features,
    slab_order,
)
from tools.bundle_code.training import SeedEpochs
from tools.bundle_code.unetr_pp import UNETRPlusPlus

NETWORKS = {
    "UNETR": (
        lambda: UNETR(1, 2, 32, feature_size=2, hidden_size=24, mlp_dim=48, proj_type="perceptron"),
        ["vit.blocks.3", "vit.blocks.6", "vit.blocks.9", "vit.norm"],
    ),
    "SwinUNETR": (
        lambda: SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
        ["swinViT.patch_embed", "swinViT.layers1.0", "swinViT.layers2.0", "swinViT.layers3.0"],
    ),
    "UNETR++": (
        lambda: UNETRPlusPlus(1, 2, (32, 32, 32), stem=(2, 2, 2), width=4, depth=1, projections=(8, 8, 8, 8)),
        [f"unetr_pp_encoder.stages.{i}" for i in range(4)],
    ),
}

SIZES = {"SwinUNETR": (32, 32, 64)}  # it cannot train on one voxel, which is what 32 of them become


def numbered(shape, axis):
    """An image whose voxels are their own coordinates along an axis."""
    return np.broadcast_to(np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)]), shape)[None]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("make", [lambda a: a.astype(np.float32), torch.Tensor, MetaTensor])
def test_slabs_change_places_as_a_whole(axis, make):
    """Place i holds slab order[i]: its voxel number j along the axis was voxel order[i] · thickness + j."""
    shape, slabs = (8, 12, 16), 4
    thickness = shape[axis] // slabs
    given = make(np.ascontiguousarray(numbered(shape, axis)))
    item = RandShuffleSlabsd(["image", "other"], slabs, axis).set_random_state(seed=3)(
        {"image": given, "other": -given}
    )
    image, order = (np.asarray(item[key]) for key in ("image", "order"))
    assert type(item["image"]) is type(given)
    assert order.shape == (1, *shape)
    line = np.moveaxis(order[0], axis, 0)[:, 0, 0]
    assert sorted(line[::thickness]) == list(range(slabs))
    assert list(line[::thickness]) != list(range(slabs))
    for place in range(slabs):
        for j in range(thickness):
            now = place * thickness + j
            assert (np.moveaxis(order[0], axis, 0)[now] == line[place * thickness]).all()
            assert (np.moveaxis(image[0], axis, 0)[now] == line[place * thickness] * thickness + j).all()
    assert (np.asarray(item["other"]) == -image).all()
    assert (np.asarray(given) == numbered(shape, axis)).all()  # what went in stays
    places = slab_order(torch.as_tensor(order)[None], slabs, axis)
    assert places.tolist() == [line[::thickness].tolist()]


def test_every_order_comes_equally_often():
    transform = RandShuffleSlabsd("image", 3, 0).set_random_state(seed=0)
    image, count = {"image": torch.zeros(1, 3, 2, 2)}, 1200
    drawn = [tuple(transform(image)["order"][0, :, 0, 0].int().tolist()) for _ in range(count)]
    assert set(drawn) == set(permutations(range(3)))
    chance = 1 / factorial(3)
    for order in set(drawn):
        assert abs(drawn.count(order) / count - chance) < 4 * (chance * (1 - chance) / count) ** 0.5


def test_epochs_are_repeated_and_differ():
    chain = Compose([RandShuffleSlabsd("image", 6, 2), RandMaskBlocksd("image", 4, 0.4)])
    dataset = Dataset([{"image": torch.rand(1, 12, 12, 12)}] * 3, chain)
    seeding, engine = SeedEpochs(5, dataset), Engine(lambda *_: None)

    def epoch(number):
        engine.state.epoch = number
        seeding(engine)
        return [torch.cat([item["image"], item["order"]]) for item in dataset]

    first, second, again = epoch(1), epoch(2), epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][1], first[1][1])  # each crop has an order of its own


def test_each_slab_is_pooled_alone():
    """A volume of coordinates: the mean of a slab is the mean of its own coordinates, along every axis."""
    shape = (4, 6, 8)
    for axis, slabs in ((0, 2), (1, 3), (2, 4)):
        volume = torch.tensor(np.stack([numbered(shape, a)[0] for a in range(3)])[None], dtype=torch.float32)
        pooled = slab_features(volume, slabs, axis, "x")
        thickness = shape[axis] // slabs
        for place in range(slabs):
            expected = [(n - 1) / 2 for n in shape]
            expected[axis] = place * thickness + (thickness - 1) / 2
            assert pooled[0, place].tolist() == expected


def test_tokens_lie_where_their_cubes_of_the_image_are():
    """Told by UNETR itself: a change of one cube changes one token of its patch embedding."""
    network = UNETR(1, 2, (32, 48, 64), feature_size=2, hidden_size=24, mlp_dim=48, proj_type="perceptron")
    embed = network.vit.patch_embedding
    image = torch.zeros(1, 1, 32, 48, 64)
    with torch.no_grad():
        before = as_volume(embed(image), image.shape[2:], "x")
        image[..., 16:32, 32:48, 48:64] = 1
        changed = (as_volume(embed(image), image.shape[2:], "x") - before).abs().sum(1)[0].nonzero()
    assert before.shape == (1, 24, 2, 3, 4)
    assert changed.tolist() == [[1, 2, 3]]


def target_of(order, thickness=2, size=(4, 4)):
    """A target with a blank image and the order entry, slabs along the last axis."""
    line = torch.tensor(order, dtype=torch.float32).repeat_interleave(thickness)
    return torch.stack([torch.zeros(*size, len(line)), line.expand(*size, -1)])[None]


def test_the_loss_in_closed_form():
    target = target_of([2, 0, 1])
    output = torch.full((1, 2, 4, 4, 6), 0.3)
    undecided = torch.zeros(4, 1, 3, 3)
    loss = SlabOrderLoss(axis=2)
    assert loss((output, undecided), target).item() == pytest.approx(0.09 + 4 * log(3))  # chance
    sure = torch.zeros(4, 1, 3, 3)
    for place, slab in enumerate([2, 0, 1]):
        sure[:, 0, place, slab] = 50
    assert loss((output, sure), target).item() == pytest.approx(0.09)
    sure[0, 0, 0] = torch.tensor(
        [0, 50.0, 0]
    )  # one head names slab 1 for place 0, which holds slab 2: a third of its places
    assert loss((output, sure), target).item() == pytest.approx(0.09 + 50 / 3, rel=1e-5)
    assert order_accuracy((output, sure), target, axis=2).item() == pytest.approx(11 / 12)
    weighted = SlabOrderLoss(axis=2, restoration=2, order=0.5)
    assert weighted((output, undecided), target).item() == pytest.approx(2 * 0.09 + 2 * log(3))
    two = torch.cat([target, target_of([0, 1, 2])])
    mean = loss((output.repeat(2, 1, 1, 1, 1), sure.repeat(1, 2, 1, 1)), two).item()
    assert mean == pytest.approx(0.09 + (50 / 3 + 4 * 50) / 2, rel=1e-5)  # all places of the second are named wrong


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_lie_beside_the_network(name):
    torch.manual_seed(0)
    make, features = NETWORKS[name]
    network = make()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    size = SIZES.get(name, (32, 32, 32))
    image = torch.rand(2, 1, *size)
    beside = SlabOrder(network, features, slabs=2, axis=0, in_channels=1, img_size=size)
    assert network.training
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    parameters = sum(p.numel() for p in beside.parameters())
    assert parameters == sum(p.numel() for p in network.parameters()) + sum(
        p.numel() for p in beside.heads.parameters()
    )
    with torch.no_grad():
        beside.eval()
        output, orders = RestoreAndOrderInferer("float32")(image, beside)
        assert torch.equal(output, network(image))
    assert orders.shape == (4, 2, 2, 2)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_reaches_the_encoder(name):
    """The cross-entropy alone trains what lies before the features, and it alone trains the heads."""
    torch.manual_seed(0)
    make, features = NETWORKS[name]
    network = make()
    size = SIZES.get(name, (32, 32, 32))
    beside = SlabOrder(network, features[:1], slabs=2, axis=1, in_channels=1, img_size=size)
    order = torch.tensor([1.0, 0.0]).repeat_interleave(16).reshape(1, 1, 1, 32, 1).expand(1, 1, *size)
    target = torch.cat([torch.rand(1, 1, *size), order], 1)
    SlabOrderLoss(axis=1, restoration=0)(beside(torch.rand(1, 1, *size)), target).backward()
    assert beside.heads[0].weight.grad.any()
    first = next(p for key, p in network.named_parameters() if key.startswith(features[0].split(".")[0]))
    assert first.grad.any()
    head = next(p for key, p in network.named_parameters() if key.startswith("out"))
    assert head.grad is None or not head.grad.any()


def test_published_heads():
    """18,456 parameters beside UNETR, 1,936 beside UNETR++."""
    for channels, slabs, count in (((768,) * 4, 6, 18_456), ((32, 64, 128, 256), 4, 1_936)):
        network = nn.Sequential()
        for i, c in enumerate(channels):
            network.append(nn.Conv3d(1 if i == 0 else channels[i - 1], c, 1))
        beside = SlabOrder(network, ["0", "1", "2", "3"], slabs, 0, 1, (12, 1, 1))
        assert sum(p.numel() for p in beside.heads.parameters()) == count


def test_heads_learn_the_order_of_slabs():
    """Slabs of a ramp of intensities: the mean of each one says where it was."""
    torch.manual_seed(0)
    beside = SlabOrder(nn.Conv3d(1, 2, 1), [""], 4, 2, 1, (8, 8, 8))
    ramp = torch.tensor(numbered((8, 8, 8), 2) / 8, dtype=torch.float32)
    shuffle = RandShuffleSlabsd("image", 4, 2).set_random_state(seed=0)
    optimizer, loss = torch.optim.Adam(beside.parameters(), 0.1), SlabOrderLoss(axis=2)
    for _ in range(150):
        item = shuffle({"image": ramp})
        batch, target = item["image"][None], torch.cat([item["image"], item["order"]])[None]
        optimizer.zero_grad()
        prediction = beside(batch)
        loss(prediction, target).backward()
        optimizer.step()
    assert order_accuracy(prediction, target, axis=2) == 1


@pytest.mark.parametrize(
    ("features", "slabs", "words"),
    [
        (["encoder.9"], 2, "no module 'encoder.9'"),
        (["vit.norm"], 3, "features of 'vit.norm' has length 2, which is not 3 equal slabs"),
        (["vit.norm"], 4, "has length 2, which is not 4 equal slabs"),
    ],
)
def test_what_cannot_be_is_said(features, slabs, words):
    make, _ = NETWORKS["UNETR"]
    with pytest.raises(ValueError, match=words):
        SlabOrder(make(), features, slabs, 0, 1, (32, 32, 32))


def test_what_is_neither_tokens_nor_a_volume():
    with pytest.raises(ValueError, match="returns 7 tokens"):
        as_volume(torch.zeros(1, 7, 3), (32, 32, 32), "x")
    with pytest.raises(ValueError, match="neither a volume nor tokens"):
        as_volume(torch.zeros(1, 3), (32, 32, 32), "x")
    with pytest.raises(ValueError, match="image's axis 0 has length 10, which is not 4 equal slabs"):
        RandShuffleSlabsd("image", 4, 0)({"image": torch.zeros(1, 10, 8, 8)})
