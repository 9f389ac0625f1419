"""Group normalisation with a backward pass that is fast on CPU in the channels-last memory format.

PyTorch's own backward is several times slower there than the convolutions around it; on CUDA, in the contiguous format,
in TorchScript and for forward derivatives PyTorch's is used. Measured by ``make bench``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

CHUNK_ELEMENTS = 2**18  # of a float32 temporary: it stays in a core's L2 cache


class _ChannelsLastGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, voxels = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), batch, channels, voxels, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, per_group = x.shape[0], x.shape[1], x.shape[1] // ctx.groups
        x_rows = x.permute(0, 2, 3, 4, 1).reshape(batch, -1, channels)
        grad_rows = grad.permute(0, 2, 3, 4, 1).reshape(batch, -1, channels)
        mean = mean.float().repeat_interleave(per_group, dim=1)
        rstd = rstd.float().repeat_interleave(per_group, dim=1)
        weight = weight.float()

        rows = max(1, CHUNK_ELEMENTS // channels)
        chunks = [(n, slice(low, low + rows)) for n in range(batch) for low in range(0, x_rows.shape[1], rows)]
        sum_grad, sum_grad_x = torch.zeros_like(mean), torch.zeros_like(mean)
        for n, part in chunks:
            chunk = grad_rows[n, part].float()
            sum_grad[n] += chunk.sum(0)
            sum_grad_x[n] += (chunk * x_rows[n, part]).sum(0)

        def over_group(per_channel: Tensor) -> Tensor:
            total = (per_channel * weight).view(batch, ctx.groups, per_group).sum(2)
            return total.repeat_interleave(per_group, dim=1) / (x_rows.shape[1] * per_group)

        # the gradient is linear in grad and x, with coefficients that depend on sample and channel only
        times_grad = weight * rstd
        times_x = (over_group(sum_grad) * mean - over_group(sum_grad_x)) * rstd**3
        constant = -times_x * mean - over_group(sum_grad) * rstd
        grad_x = torch.empty_like(x_rows)
        for n, part in chunks:
            chunk = torch.addcmul(constant[n], x_rows[n, part], times_x[n])
            grad_x[n, part] = chunk.addcmul_(grad_rows[n, part], times_grad[n])

        grad_weight = ((sum_grad_x - sum_grad * mean) * rstd).sum(0)
        return (
            grad_x.view(batch, *x.shape[2:], channels).permute(0, 4, 1, 2, 3),
            grad_weight,
            sum_grad.sum(0),
            None,
            None,
        )


class GroupNorm3d(nn.GroupNorm):
    """``torch.nn.GroupNorm`` for ``(N, C, D, H, W)``, with the same parameters, values and gradients."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            return nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        if forward_ad.unpack_dual(self.weight).tangent is not None:  # PyTorch has these for the contiguous format alone
            input = input.contiguous()
        elif torch.is_grad_enabled() and input.device.type == "cpu" and _is_channels_last(input):
            return _ChannelsLastGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
