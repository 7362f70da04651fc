"""Vision transformer over patch tokens, told how large a pixel is on the ground.

After SatMAE as Sat2Sound uses it (arXiv 2505.13777): pre-norm blocks, no class token, no norm
after the last block, and a fixed sine-cosine position embedding whose argument is the patch index
times the ground sampling distance, so that one network reads imagery of several resolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """Size of the image tower."""

    window_px: int = 224
    """Side of the square input, pixels."""
    patch_px: int = 16
    """Side of a patch, pixels."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    stem: tuple[int, ...] = ()
    """Channels of the 3 x 3 convolutions before the blocks; empty: one convolution, patch-sized."""
    stem_strides: tuple[int, ...] = ()
    """Their strides; the product is ``patch_px``."""

    @property
    def patches(self) -> int:
        """Patches along one side of the window."""
        return self.window_px // self.patch_px

    @property
    def stem_reach_px(self) -> int:
        """Pixels beyond its own patch that the convolutions of a token reach, at the most."""
        step = reach = 1
        for stride in self.stem_strides:
            reach += step
            step *= stride
        return reach - 1


def position_embedding(rows: int, cols: int, width: int, gsd_m: Tensor) -> Tensor:
    """Sine-cosine position embedding scaled by the ground sampling distance.

    With ``w_k = 10000^(-4k / width)`` a token at row r and column c gets
    ``[sin(c g w), cos(c g w), sin(r g w), cos(r g w)]``, column first, as the published model does.

    Parameters
    ----------
    rows, cols
        Tokens along each side.
    width
        Channels, a multiple of four.
    gsd_m
        float[B], metres per pixel, one per image.

    Returns
    -------
    Tensor
        float32[B, rows * cols, width], row-major.
    """
    quarter = width // 4
    # float64 up to the sines: c g w reaches thousands for coarse imagery.
    step = torch.arange(quarter, dtype=torch.float64, device=gsd_m.device)
    freq = 10000.0 ** (-step / quarter)
    scaled = gsd_m.double()[:, None, None] * freq

    def axis(count: int) -> Tensor:
        index = torch.arange(count, dtype=torch.float64, device=gsd_m.device)
        angle = index[None, :, None] * scaled
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    batch = gsd_m.shape[0]
    col = axis(cols)[:, None].expand(batch, rows, cols, 2 * quarter)
    row = axis(rows)[:, :, None].expand(batch, rows, cols, 2 * quarter)
    return torch.cat([col, row], dim=-1).reshape(batch, rows * cols, width).float()


class ConvStem(nn.Sequential):
    """Convolutions that turn pixels into patch tokens; learns texture from few images."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], width: int) -> None:
        layers: list[nn.Module] = []
        previous = 3
        for out, stride in zip(channels, strides, strict=True):
            layers += [
                nn.Conv2d(previous, out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.GELU(),
            ]
            previous = out
        layers.append(nn.Conv2d(previous, width, 1))
        super().__init__(*layers)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, local: bool = False, seen: Tensor | None = None) -> Tensor:
        """Attend among tokens, or each to itself alone: float[B, N, width] to the same.

        ``seen``: bool[B, 1, 1, N], False for tokens that none may attend to.
        """
        b, n, w = x.shape
        if local:
            # Attention to oneself alone returns one's own value: queries and keys are not needed.
            own = F.linear(x, self.qkv.weight[2 * w :], self.qkv.bias[2 * w :])
            alone: Tensor = self.proj(own)
            return alone
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, seen)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(b, n, w))
        return out


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token: float[..., width] to the same."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, local: bool = False) -> Tensor:
        """Attend, then map each token: float[B, N, width] to the same."""
        x = x + self.attn(self.norm1(x), local)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Image tower: a window of normalised pixels to one token per patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        if config.stem:
            self.patch_embed: nn.Module = ConvStem(config.stem, config.stem_strides, config.width)
        else:
            self.patch_embed = nn.Conv2d(3, config.width, config.patch_px, config.patch_px)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn pixels into a grid of tokens: float[B, 3, H, W] to float[B, width, rows, cols]."""
        grid: Tensor = self.patch_embed(pixels)
        return grid

    def mix(self, grid: Tensor, gsd_m: Tensor, local: bool = False) -> Tensor:
        """Run the blocks over a grid of tokens.

        Parameters
        ----------
        grid
            float[B, width, rows, cols] from `embed`.
        gsd_m
            float[B], metres per pixel; float[1] stands for the whole batch.
        local
            False: tokens attend to each other. True: each attends to itself alone and all stand
            at one place, so that a token depends on the pixels that its convolutions saw and on
            nothing else, wherever the window lies (dense features of a contrastive model by
            their value path: Zhou et al. 2022, arXiv 2112.01071).

        Returns
        -------
        Tensor
            float[B, rows * cols, width], row-major.
        """
        rows, cols = grid.shape[-2:]
        x = grid.flatten(2).transpose(1, 2)
        width = self.config.width
        if local:
            # Index one, not zero, whose sines and cosines would not tell the sampling distance.
            place = position_embedding(2, 2, width, gsd_m)[:, -1:]
        else:
            place = position_embedding(rows, cols, width, gsd_m)
        x = x + place.to(x.dtype)
        for block in self.blocks:
            x = block(x, local)
        return x

    def forward(self, pixels: Tensor, gsd_m: Tensor, local: bool = False) -> Tensor:
        """Encode windows.

        Parameters
        ----------
        pixels
            float[B, 3, H, W], ImageNet-normalised; H and W multiples of ``patch_px``.
        gsd_m
            float[B], metres per pixel; float[1] stands for the whole batch.
        local
            See `mix`.

        Returns
        -------
        Tensor
            float[B, N, width] with N patches in row-major order.
        """
        return self.mix(self.embed(pixels), gsd_m, local)
