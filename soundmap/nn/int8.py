"""The image side with 8-bit weights, for processors: about half the time of float32.

Weights are rounded once, each output channel with its own scale. Activations are rounded on the
way, each window with its own scale and offset, so that a window's numbers do not depend on what it
is encoded together with. Norms, attention, GELU and sparsemax stay float32, as do text and audio.

Where a processor has no instructions made for them, products run in a kernel of our own, see
`int8_kernel`. Without it they run as 1 x 1 convolutions, the fastest of PyTorch's 8-bit operators.
Both multiply pairs into 16 bits there, so activations keep to 7 bits: 2 x 127 x 127 is the most
that fits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundmap.errors import UsageError
from soundmap.nn import int8_kernel
from soundmap.nn.codebook import Codebook
from soundmap.nn.model import SoundModel
from soundmap.nn.sparsemax import project_
from soundmap.nn.vit import Mlp

_MAX = 127
# Tokens that packed weights are laid out for; any number may come.
_TOKENS = 196
# Codes compared at a time, so that the logits of a window stay in a core's cache.
_CODES_AT_A_TIME = 2000


def _round(x: Tensor, spoil: bool = False) -> tuple[Tensor, float, int]:
    """Round to 7 bits: uint8 of the same shape, and the scale and offset that lead back.

    ``spoil``: whether ``x`` may be overwritten on the way.
    """
    kernel = int8_kernel.load()
    if kernel is not None and kernel.can_round(x):
        return kernel.round(x)
    low, high = (float(end) for end in x.aminmax())
    low, high = min(low, 0.0), max(high, 0.0)
    # One step less than there is: the offset may be rounded up.
    scale = (high - low) / (_MAX - 1) or 1.0
    offset = round(-low / scale)
    # int8, which is several times faster to make than uint8, has the same bits up to 127.
    place = torch.tensor(offset + 0.5)
    scaled = torch.add(place, x, alpha=1 / scale, out=x if spoil else None)
    return scaled.to(torch.int8).view(torch.uint8), scale, offset


def _activate(x: Tensor) -> tuple[Tensor, float, int]:
    """Take the GELU of numbers, which are spoilt, and round: see `_round`."""
    kernel = int8_kernel.load()
    if kernel is not None and kernel.can_round(x):
        return kernel.round(x, gelu=True)
    return _round(torch.ops.aten.gelu_(x), spoil=True)


class _Rounded:
    """A matrix float[out, in], rounded and packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach().float()
        kernel = int8_kernel.load()
        self.kernel = kernel if kernel is not None and int8_kernel.fits(weight) else None
        if self.kernel is not None:
            self.scale = int8_kernel.group_scale(weight)
        else:
            self.scale = weight.abs().amax(1).div_(_MAX)
        self.scale[self.scale == 0] = 1
        rounded = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float().clone()
        # What an offset of one in all activations adds, in units of their scale.
        self.shift = rounded.sum(1, dtype=torch.int64).float().mul_(self.scale)
        if self.kernel is not None:
            self.packed = int8_kernel.pack(rounded)
            return
        self.zero = torch.zeros(len(weight), dtype=torch.int64)
        image = rounded[..., None, None].contiguous(memory_format=torch.channels_last)
        once, none = [1, 1], [0, 0]
        self.packed = torch.ops.onednn.qconv_prepack(
            image, self.scale, 1.0, 0, once, none, once, 1, [1, weight.shape[1], _TOKENS, 1]
        )

    def times(self, x: Tensor, scale: float, offset: int = 0) -> Tensor:
        """Map rounded activations uint8[T, in] to float32[T, out]."""
        bias = self._bias(scale, offset)
        if self.kernel is not None:
            return self.kernel.multiply(x, self.packed, self.scale, bias, scale)
        once, none = [1, 1], [0, 0]
        image = x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            *(image, scale, 0, self.packed, self.scale, self.zero, bias),
            *(once, none, once, 1, 1.0, 0, torch.float32, "none", [], "none"),
        )
        return out.permute(0, 2, 3, 1).view(len(x), -1)

    def largest(self, x: Tensor, scale: float, offset: int = 0) -> Tensor:
        """Find the largest of each column of what `times` gives: float32[out]."""
        if self.kernel is None:
            return self.times(x, scale, offset).amax(0)
        return self.kernel.largest(x, self.packed, self.scale, self._bias(scale, offset), scale)

    def _bias(self, scale: float, offset: int) -> Tensor:
        # The offset goes into the bias: oneDNN would pack the weights anew for it each time.
        return torch.sub(self.bias, self.shift, alpha=scale * offset) if offset else self.bias


class Int8Linear(nn.Module):
    """A linear map with 8-bit weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weights = _Rounded(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, float32[N, in] or float32[B, N, in], each of the B with its own scale."""
        if x.ndim == 2:
            return self.weights.times(*_round(x.contiguous()))
        return _stacked([self(window) for window in x])


class Int8Mlp(nn.Module):
    """Two linear maps with 8-bit weights and a GELU between, which needs no memory."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = Int8Linear(mlp.fc1), Int8Linear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens: float32[N, width] or float32[B, N, width] to the same."""
        if x.ndim == 2:
            return self.fc2.weights.times(*_activate(self.fc1(x)))
        return _stacked([self(window) for window in x])


class _OneByOne(nn.Module):
    """Runs a part of the network window by window, so that nothing in it is put together."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, *more: object) -> Tensor:
        def cut(value: object, i: int) -> object:
            return value[i : i + 1] if isinstance(value, Tensor) and len(value) == len(x) else value

        if len(x) == 1:
            out: Tensor = self.part(x, *more)
            return out
        return torch.cat(
            [self.part(x[i : i + 1], *(cut(v, i) for v in more)) for i in range(len(x))]
        )


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


class Int8Codebook(Codebook):
    """A codebook whose products have 8-bit codes; its float32 codes are the given codebook's own.

    For queries of images: without a mask, and without gradients.

    Parameters
    ----------
    codebook
        With float32 codes.
    last
        The linear map that makes the queries. It is worked into the codes: what is called queries
        here is its input.
    """

    def __init__(self, codebook: Codebook, last: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.codes, self.scale = codebook.codes, codebook.scale
        with torch.no_grad():
            parts = self.codes.split(_CODES_AT_A_TIME)
            shifts = [self.scale * (part @ last.bias) for part in parts]
            self._parts = [
                _Rounded(part @ last.weight, shift)
                for part, shift in zip(parts, shifts, strict=True)
            ]
        self._mixed = _Rounded(self.codes.T)

    def logits(self, queries: Tensor) -> Tensor:
        """Compare queries with codes: float32[..., N, D] to float32[..., N, K]."""
        windows = queries.reshape(-1, *queries.shape[-2:])
        out = torch.stack([torch.cat(self._logits(window), -1) for window in windows])
        return out.view(*queries.shape[:-1], -1)

    def largest(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        """Find each code's largest logit over a window's tokens: float32[B, N, D] to [B, K]."""
        assert mask is None
        rows = []
        for window in queries:
            rounded, scale, offset = _round(window.contiguous())
            unit = scale * self.scale
            rows.append(torch.cat([part.largest(rounded, unit, offset) for part in self._parts]))
        return torch.stack(rows)

    def mix(self, logits: Tensor) -> Tensor:
        """Turn logits into weighted sums of codes: float32[..., K] to float32[..., D]."""
        rows = logits.reshape(-1, logits.shape[-1]).clone()
        return self._mix_(rows).view(*logits.shape[:-1], -1)

    def each(self, queries: Tensor) -> Tensor:
        """Embed every token by itself: float32[..., N, D] to unit vectors float32[..., N, D]."""
        windows = queries.reshape(-1, *queries.shape[-2:])
        out = queries.new_empty(windows.shape)
        for window, found in zip(windows, out, strict=True):
            found.copy_(self._mix_(torch.cat(self._logits(window), -1)))
        return F.normalize(out, dim=-1).view(queries.shape)

    def _mix_(self, logits: Tensor) -> Tensor:
        """Mix codes for rows float32[R, K], which are spoilt; each row has a unit of its own."""
        weights = project_(logits)
        unit = weights.amax(-1, keepdim=True) / (_MAX - 1)
        rounded = weights.div_(unit).add_(0.5).to(torch.int8).view(torch.uint8)
        return self._mixed.times(rounded, 1.0) * unit

    def _logits(self, window: Tensor) -> list[Tensor]:
        rounded, scale, offset = _round(window.contiguous())
        return [part.times(rounded, scale * self.scale, offset) for part in self._parts]


def quantise(model: SoundModel) -> None:
    """Give the image side of a model 8-bit weights, in place; from then on it only infers.

    Parameters
    ----------
    model
        With float32 weights, on a processor. Its blocks, projector, metadata fuser and image query
        map are replaced, and `SoundModel.image_codebook` is set, which the queries are for.

    Raises
    ------
    UsageError
        This build of PyTorch lacks the operators, the model is not on a processor, or it is one
        whose patches leave attention out.
    """
    if model.config.local_patches:
        raise UsageError("precision int8 is not for this model, which is small: use float32")
    if model.codebook.codes.device.type != "cpu":
        raise UsageError("precision int8 is for processors: on a GPU use bfloat16")
    if not is_available():
        raise UsageError("this build of PyTorch has no 8-bit convolutions (oneDNN): use float32")
    layers = [*model.vit.blocks, *(model.fuser.layers if model.fuser is not None else ())]
    last = model.image_query[-1]
    assert isinstance(last, nn.Linear)
    model.image_query[-1] = nn.Identity()
    for part in (*layers, model.projector, model.image_query):
        _replace(part)
    _take_one_by_one(model.vit.blocks)
    if model.fuser is not None:
        _take_one_by_one(model.fuser.layers)
    model.image_codebook = Int8Codebook(model.codebook, last)


def is_available() -> bool:
    """Tell whether this build of PyTorch can run 8-bit weights on this processor."""
    try:
        # Of a size that is left to PyTorch, whether or not there is a kernel of our own.
        linear, x = nn.Linear(12, 12), torch.linspace(-1, 1, 24).view(2, 12)
        return bool(((Int8Linear(linear)(x) - linear(x)).abs() < 0.1).all())
    except (AttributeError, RuntimeError):
        return False


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        elif isinstance(child, Mlp):
            setattr(module, name, Int8Mlp(child))
        else:
            _replace(child)


def _take_one_by_one(layers: nn.ModuleList) -> None:
    for i, layer in enumerate(layers):
        layers[i] = _OneByOne(layer)
