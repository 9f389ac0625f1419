"""Optimisers: AdamW with decay towards a starting point, SGD, and AdamW for transformers, with settings by part of a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def adamw(
    network: nn.Module,
    head: list[str],
    lr: float,
    head_lr: float,
    weight_decay: float,
    head_weight_decay: float,
    pretrained: Mapping[str, Tensor] | None = None,
) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter, ICLR 2019) in two parameter groups, backbone and head.

    With ``pretrained`` the backbone decays towards those weights instead of towards zero, which is the same as AdamW on
    the task vector: the published recipe trains the difference itself (U-Net Transplant, MICCAI 2025).

    Args:
        network: its parameters are optimised.
        head: names of the head's tensors; what is no parameter, as running statistics, is not optimised.
        lr: backbone learning rate.
        head_lr: head learning rate.
        weight_decay: of the backbone, per step multiplied by its learning rate.
        head_weight_decay: of the head, always towards zero.
        pretrained: backbone weights by name.
    """
    parameters = dict(network.named_parameters())
    trained = [name for name in head if name in parameters]
    backbone = [name for name in parameters if name not in head]
    groups = [
        {"params": [parameters[name] for name in backbone], "lr": lr, "weight_decay": weight_decay},
        {"params": [parameters[name] for name in trained], "lr": head_lr, "weight_decay": head_weight_decay},
    ]
    if pretrained is None:
        return torch.optim.AdamW(groups)
    groups[0].update(weight_decay=0.0, decay_to_start=weight_decay)
    return AdamWToStart(groups, start=[[pretrained[name] for name in backbone], None])


def sgd(
    network: nn.Module, head: list[str], lr: float, head_lr: float, weight_decay: float, momentum: float = 0.99
) -> torch.optim.SGD:
    """Gradient descent with Nesterov momentum in two parameter groups, backbone and head: nnU-Net's, where their rates are equal.

    Args:
        network: its parameters are optimised.
        head: names of the head's tensors.
        lr: backbone learning rate. STU-Net's paper fine-tunes with a tenth of the head's, its published code with the same.
        head_lr: head learning rate.
        weight_decay: of all parameters, as part of the gradient.
        momentum: of the gradients.
    """
    parameters = dict(network.named_parameters())
    groups = [
        {"params": [parameter for name, parameter in parameters.items() if name not in head], "lr": lr},
        {"params": [parameters[name] for name in head if name in parameters], "lr": head_lr},
    ]
    return torch.optim.SGD(groups, momentum=momentum, nesterov=True, weight_decay=weight_decay)


def adamw_of_transformers(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay of matrices and kernels alone: not of biases, norms, scales, tokens and tables of positions.

    Args:
        network: its parameters are optimised.
        lr: learning rate.
        weight_decay: of what decays, per step multiplied by the learning rate.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        groups[parameter.dim() > 1 and not name.endswith(("token", "embeddings", "table", "pos_embed"))].append(
            parameter
        )
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}], lr=lr
    )


class AdamWToStart(torch.optim.AdamW):
    """AdamW with groups whose decoupled decay, ``decay_to_start``, pulls towards given tensors instead of zero.

    Args:
        params: parameter groups as for ``torch.optim.AdamW``.
        start: for each group, one tensor per parameter to decay towards, or None.
    """

    def __init__(self, params: list[dict], start: list[list[Tensor] | None], **defaults: float) -> None:
        super().__init__(params, **defaults)
        self.start = [
            None
            if tensors is None
            else [t.detach().to(p).clone() for t, p in zip(tensors, group["params"], strict=True)]
            for tensors, group in zip(start, self.param_groups, strict=True)
        ]

    @torch.no_grad()
    def step(self, closure=None):
        for group, start in zip(self.param_groups, self.start, strict=True):
            for parameter, tensor in zip(group["params"], start or ()):
                if parameter.grad is not None:
                    parameter.lerp_(tensor, group["lr"] * group["decay_to_start"])
        return super().step(closure)
