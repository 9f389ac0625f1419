"""MONAI's 2D ViT and Swin transformer as encoders of slices: features of four depths, with the names of MONAI's tensors.

With timm's weights (``python -m tools inflate`` knows its names) they give what timm's networks give.
"""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from monai.networks.nets.vit import ViT
from torch import Tensor, cat, nn
from torch.nn import functional as F


class ViTEncoder(ViT):
    """The outputs of four blocks of a ViT, without a norm (published for DINO's ViT-B/16: blocks 3, 5, 7, 11, counted from 0).

    ``norm``, and MONAI's ``norm_cross_attn``, have no part in them.

    Args:
        in_channels: of the image.
        img_size: for which there are position embeddings; for another, they are resized (bicubic).
        patch_size: of a token, pixels.
        hidden_size: channels of a token.
        num_heads: of the attention.
        features: the four blocks; the last one is the last of the network.
        class_token: whether there is one beside those of the image, which its attention sees.

    Shapes:
        ``(N, in_channels, H, W)``, both multiples of ``patch_size``, to four maps ``(N, hidden_size, H/patch, W/patch)``.
    """

    is_pyramid = False

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int],
        patch_size: int = 16,
        hidden_size: int = 768,
        num_heads: int = 12,
        features: Sequence[int] = (3, 5, 7, 11),
        class_token: bool = True,
    ) -> None:
        super().__init__(
            in_channels, img_size, patch_size, hidden_size, 4 * hidden_size, num_layers=features[-1] + 1,
            num_heads=num_heads, classification=class_token, spatial_dims=2, qkv_bias=True,
        )  # fmt: skip
        if class_token:
            del self.classification_head
        self.grid = [side // patch_size for side in img_size]
        self.features = tuple(features)
        self.channels = [hidden_size] * len(features)
        self.apply(_initialise)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # timm's; MONAI's is 1e-5

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embedding.patch_embeddings(x)
        grid = x.shape[2:]
        x = x.flatten(2).mT + self._positions(grid)
        if self.classification:
            x = cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.features:
                maps.append(x[:, int(self.classification) :].mT.unflatten(2, grid))
        return maps

    def _positions(self, grid: Sequence[int]) -> Tensor:
        positions = self.patch_embedding.position_embeddings
        if list(grid) == self.grid:
            return positions
        table = positions.mT.unflatten(2, self.grid)
        return F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False).flatten(2).mT


class SwinEncoder(SwinTransformer):
    """The outputs of the four stages of a Swin transformer before their patches are merged, each with a norm of its own.

    Args:
        in_channels: of the image.
        patch_size: of a token, pixels.
        embed_dim: channels of a token in the first stage; they double from stage to stage.
        depths: blocks of each stage.
        num_heads: of the attention, for each stage.
        window_size: of the attention, tokens.
        drop_path: chance that the last block is left out in training; it grows from 0 with the depth.

    Shapes:
        ``(N, in_channels, H, W)`` to four maps ``(N, embed_dim · 2^s, H/patch/2^s, W/patch/2^s)``. Where windows do not divide a
        map, MONAI fills it up with zeros.
    """

    is_pyramid = True

    def __init__(
        self,
        in_channels: int,
        patch_size: int = 4,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        drop_path: float = 0.3,
    ) -> None:
        super().__init__(
            in_channels, embed_dim, (window_size,) * 2, (patch_size,) * 2, depths, num_heads, drop_path_rate=drop_path,
            patch_norm=True, spatial_dims=2, downsample=_LaterMerging,
        )  # fmt: skip
        self.layers4[0].downsample = None
        self.channels = [embed_dim * 2**stage for stage in range(len(depths))]
        self.norms = nn.ModuleList([nn.LayerNorm(count) for count in self.channels])
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for (stage,), norm in zip((self.layers1, self.layers2, self.layers3, self.layers4), self.norms, strict=True):
            x = stage(x.contiguous())
            maps.append(norm(x.movedim(1, -1)).movedim(-1, 1))
            if stage.downsample is not None:
                x = stage.downsample.merge(x.movedim(1, -1)).movedim(-1, 1)
        return maps


class _LaterMerging(PatchMergingV2):
    """A patch merging that does nothing where MONAI's stage calls it, so that the stage's own output can be had."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def merge(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _initialise(module: nn.Module) -> None:
    """As the published program does without pre-training, and timm always."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
