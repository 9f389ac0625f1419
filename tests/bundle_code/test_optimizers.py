"""Decay towards the starting point equals AdamW on the task vector itself; SGD by its formula."""

import torch

from tools.bundle_code.optimizers import adamw, sgd


def test_decay_to_start_equals_adamw_on_the_difference():
    torch.manual_seed(0)
    start, target = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    net = torch.nn.Module()
    net.backbone, net.head = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    ours = adamw(net, ["head"], 0.01, 0.1, 0.1, 0.01, pretrained={"backbone": start})
    delta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.AdamW([delta], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        for optimizer, weights in ((ours, lambda: net.backbone), (theirs, lambda: start + delta)):
            optimizer.zero_grad()
            ((weights() - target) ** 2).sum().add(net.head.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(net.backbone.detach() - start, delta.detach(), rtol=1e-9, atol=1e-12)
    assert net.head[0] < 1  # the head has its own rate and decays to zero


def test_frozen_parameters_do_not_decay():
    net = torch.nn.Module()
    net.backbone, net.head = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = adamw(net, ["head"], 0.1, 0.1, 0.5, 0.0, pretrained={"backbone": torch.zeros(3)})
    net.head.sum().backward()
    optimizer.step()
    assert torch.equal(net.backbone, torch.ones(3))


def test_running_statistics_of_the_head_are_not_optimised():
    net = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": torch.nn.BatchNorm1d(2)})
    head = ["head.weight", "head.bias", "head.running_mean", "head.running_var"]
    groups = adamw(net, head, 0.1, 0.2, 0.5, 0.0).param_groups
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert groups[1]["params"][0] is net["head"].weight


def test_sgd_is_nesterovs_with_a_rate_for_the_head():
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.backbone, net.head = (torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    weights = {name: [parameter.detach().clone(), 0.0] for name, parameter in net.named_parameters()}
    optimizer = sgd(net, ["head", "head.running_mean"], lr=0.001, head_lr=0.01, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (net.backbone.square().sum() + 3 * net.head.sum()).backward()
        optimizer.step()
        for (name, state), lr in zip(weights.items(), (0.001, 0.01), strict=True):
            gradient = (2 * state[0] if name == "backbone" else 3) + 0.1 * state[0]
            state[1] = 0.9 * state[1] + gradient
            state[0] = state[0] - lr * (gradient + 0.9 * state[1])
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name][0], rtol=1e-9, atol=1e-12)
