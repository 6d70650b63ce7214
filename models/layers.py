"""The blocks that several networks share (network.md, section 1), and how a chain of them is run in bands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.memory import band_rows

NORM_BAND_BYTES = 1 << 20
"""Size of the bands in which group normalisation reads a map: they fit a core's own cache."""


class Conv2d(nn.Conv2d):
    """A convolution that takes its input in the type of its kernel, which models/precision may have lowered."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return super().forward(in_type_of(self.weight, x))


def in_type_of(kernel: Tensor, x: Tensor) -> Tensor:
    """`x` in the type of `kernel`. With gradients it stays as it is: training mixes types by autocast."""
    return x if torch.is_grad_enabled() else x.to(kernel.dtype)


def conv3(inputs: int, outputs: int, stride: int = 1) -> Conv2d:
    """A 3x3 convolution with padding 1."""
    return Conv2d(inputs, outputs, 3, stride, 1)


def pointwise(inputs: int, outputs: int) -> Conv2d:
    """A 1x1 convolution. Its dilation changes nothing for a single tap, but it keeps PyTorch from choosing the
    operator, and with it the rounding, by the number of threads and of images.
    """
    return Conv2d(inputs, outputs, 1, dilation=2)


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.1, in place: every caller passes the output of a convolution that nothing else reads."""
    return functional.leaky_relu_(x, 0.1)


def channels_last(x: Tensor) -> Tensor:
    """`x` (B, C, H, W) in channels-last layout, also for one channel, where PyTorch cannot tell the layouts apart."""
    if x.shape[1] == 1:
        b, _, h, w = x.shape
        return x.reshape(b, h, w, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def joined(*maps: Tensor) -> Tensor:
    """Maps (B, *, H, W) concatenated. On a GPU they are channels-last: PyTorch would leave that layout where one map
    has another, and the convolution that follows would turn all of them.
    """
    on_cpu = maps[0].device.type == "cpu"
    return torch.cat(maps if on_cpu else [channels_last(one) for one in maps], 1)


def side_by_side(window: Tensor) -> Tensor:
    """(B, N, C, H, W) -> (B, N * C, H, W). On a GPU it is channels-last, in one copy."""
    b, _, _, h, w = window.shape
    if window.device.type == "cpu":
        return window.flatten(1, 2)
    return window.permute(0, 3, 4, 1, 2).reshape(b, h, w, -1).permute(0, 3, 1, 2)


def weights_channels_last(module: nn.Module) -> None:
    """Store the kernels of all convolutions channels-last; PyTorch then gives every feature map that layout."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = channels_last(parameter.data)


def bilinear(x: Tensor, factor: float) -> Tensor:
    """Bilinear resizing of (B, C, H, W) by `factor`, with half-pixel centres (align_corners=False)."""
    return x if factor == 1 else functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def within(x: Tensor, cut: int) -> Tensor:
    """`x` (B, C, H, W) without `cut` positions on each side."""
    return x[..., cut : x.shape[-2] - cut, cut : x.shape[-1] - cut]


class Up(nn.ConvTranspose2d):
    """A 3x3 transposed convolution to twice the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W).

        On a CPU without gradients it is computed as four convolutions, one for each parity of row and column of the
        output. That takes as many multiplications and as long, but the rounding of oneDNN's transposed operator depends
        on the number of threads. Along one axis the taps are:

            output 2i: tap 1 of input i        output 2i + 1: tap 2 of input i and tap 0 of input i + 1
        """
        x = in_type_of(self.weight, x)
        if not by_hand(x):
            return super().forward(x, output_size)
        b, _, h, w = x.shape
        weight = self.weight.transpose(0, 1)
        padded = functional.pad(x, (0, 1, 0, 1))
        out = x.new_empty(b, 2 * h, 2 * w, self.out_channels).permute(0, 3, 1, 2)  # (B, C', 2H, 2W), channels-last
        for row, rows in enumerate(([1], [2, 0])):
            for column, columns in enumerate(([1], [2, 0])):
                kernel = channels_last(weight[:, :, rows][:, :, :, columns])
                single = len(rows) * len(columns) == 1
                read = x if single else padded[:, :, : h - 1 + len(rows), : w - 1 + len(columns)]
                out[:, :, row::2, column::2] = functional.conv2d(read, kernel, self.bias, dilation=2 if single else 1)
        return out


class Narrow(Conv2d):
    """A k x k convolution to fewer channels than the 16 that a processor computes at once."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, 1, size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W).

        On a CPU without gradients several columns are computed as one: a convolution with a stride of `columns` gives
        the channels of that many neighbouring columns, whose kernels are the same one, moved on by a column each.
        oneDNN would pad C' to 16 channels and multiply zeros. Channels-last, the result's memory is that of (B, H, W,
        C').
        """
        if not by_hand(x):
            return super().forward(x)
        x = in_type_of(self.weight, x)
        (b, _, h, w), size = x.shape, self.kernel_size[0]
        columns = min(8, 16 // self.out_channels)
        windows = functional.pad(self.weight, (columns - 1, columns - 1)).unfold(3, size + columns - 1, 1)
        kernel = channels_last(windows.flip(3).permute(3, 0, 1, 2, 4).flatten(0, 1))  # (columns * C', C, k, k + ...)
        if w % columns:
            x = functional.pad(x, (0, -w % columns))
        bias = self.bias.repeat(columns)  # type: ignore[union-attr]
        out = functional.conv2d(x, kernel, bias, (1, columns), size // 2)
        return out.permute(0, 2, 3, 1).reshape(b, h, -1, self.out_channels)[:, :, :w].permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with an epsilon of 1e-6, in at most as many groups as there are channels. Moments and affine
    parameters are float32 whatever the type of the map.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(min(groups, width), width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) of the same type."""
        if torch.is_grad_enabled():
            return super().forward(x)
        if x.device.type != "cpu":
            return self.by_channels(x)
        return self._in_bands(x)

    def after(self, conv: Conv2d, x: Tensor) -> Tensor:
        """The normalised result of a convolution of `x` (B, C, H, W)."""
        if torch.is_grad_enabled() or x.device.type == "cpu":
            return self(conv(x))  # type: ignore[no-any-return]
        assert conv.bias is not None
        x = functional.conv2d(in_type_of(conv.weight, x), conv.weight, None, conv.stride, conv.padding)
        return self.by_channels(x, conv.bias)

    def by_channels(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The normalised `x` + `bias` (C,), for inference on a GPU.

        PyTorch's operator would turn a channels-last map to channels-first and back, and give each group of each image
        to one block of threads. Here the moments of channels are put together, and a bias is added to their means: it
        costs no pass over the map.
        """
        b, c, h, w = x.shape
        if x.dtype == torch.float32:
            of_channels, means = torch.var_mean(x, (2, 3), correction=0)  # (B, C) each
        else:
            means = x.mean((2, 3), dtype=torch.float32)
            squares = torch.linalg.vector_norm(x, 2, (2, 3), dtype=torch.float32).square_().div_(h * w)
            of_channels = torch.addcmul(squares, means, means, value=-1)
        groups = (b, self.num_groups, c // self.num_groups)
        bias = means.new_zeros(c) if bias is None else bias.float()
        spread, mean = torch.var_mean((means + bias).view(groups), -1, correction=0, keepdim=True)  # (B, G, 1)
        variance = of_channels.view(groups).mean(-1, keepdim=True).add_(spread)
        scale = variance.add_(self.eps).rsqrt_() * self.weight.view(groups[1:])  # (B, G, C/G)
        shift = torch.addcmul(self.bias.view(groups[1:]), mean - bias.view(groups[1:]), scale, value=-1)
        return _affine(x, scale, shift)

    def _in_bands(self, x: Tensor) -> Tensor:
        """The same for inference on a CPU.

        PyTorch's operator adds up per thread, so that its rounding depends on their number, and channels-last it loses
        the variance of maps whose mean is large. Each band of rows is centred on its own mean before it is squared, and
        the bands' moments are then put together (Chan, Golub and LeVeque, 1979). A band stays in the cache, so this
        takes no longer than sums over whole maps.
        """
        b, c, h, w = x.shape
        groups, in_group = self.num_groups, c // self.num_groups
        bands = torch.split(x, max(1, NORM_BAND_BYTES // (x.element_size() * c * w)), 2)
        share = torch.tensor([band.shape[2] / h for band in bands], dtype=torch.float64).view(-1, 1, 1)
        means, variances = [], []
        for band in bands:
            values = in_group * band.shape[2] * w
            mean = band.sum((2, 3), dtype=torch.float32).double().view(b, groups, -1).sum(-1) / values
            centred = band - mean.float().repeat_interleave(in_group, 1).view(b, c, 1, 1)
            means.append(mean)
            variances.append(centred.square_().sum((2, 3)).double().view(b, groups, -1).sum(-1) / values)
        of_bands = torch.stack(means)
        mean = (share * of_bands).sum(0)
        variance = (share * (torch.stack(variances) + (of_bands - mean).square())).sum(0)
        scale = self.weight.view(groups, -1) / (variance + self.eps).sqrt()[..., None]
        shift = self.bias.view(groups, -1) - mean[..., None] * scale
        return _affine(x, scale.float(), shift.float())


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (B, C, H, W) times `scale` plus `shift`, B x C float32 numbers each, in the type of `x`."""
    size = (*x.shape[:2], 1, 1)
    return torch.addcmul(shift.view(size), x, scale.view(size), out=torch.empty_like(x))


def by_hand(x: Tensor) -> bool:
    """Whether an operator of our own is used, whose result does not depend on the number of threads: on a CPU without
    gradients. Training and other devices use PyTorch's operators.
    """
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def plus(y: Tensor, x: Tensor) -> Tensor:
    """y + x, in the place of `y` where both are of one type, else in the wider of both."""
    return y.add_(x) if y.dtype == x.dtype else x + y


class Residual(nn.Module):
    """The residual block of stage III, without normalisation. Its first weights are small: it begins near the
    identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv3(width, width)
        self.conv2 = conv3(width, width)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return plus(self.conv2(functional.relu_(self.conv1(x))), x)


class NormResidual(nn.Module):
    """The residual block of stages I and II, with group normalisation. Its last ReLU comes before the sum, none
    after.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv1 = conv3(inputs, outputs)
        self.norm1 = GroupNorm(outputs, groups)
        self.conv2 = conv3(outputs, outputs)
        self.norm2 = GroupNorm(outputs, groups)
        self.skip = pointwise(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        y = functional.relu_(self.norm1.after(self.conv1, x))
        y = functional.relu_(self.norm2.after(self.conv2, y))
        return y + self.skip(x)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Self-attention with one head over all positions of a tile, added to the input. The matrix of all pairs of
    positions is never stored whole.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(width, groups)
        self.q = pointwise(width, width)
        self.k = pointwise(width, width)
        self.v = pointwise(width, width)
        self.project = pointwise(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (conv(y).permute(0, 2, 3, 1).reshape(b, 1, h * w, c) for conv in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return x + self.project(y.reshape(b, h, w, c).permute(0, 3, 1, 2))  # type: ignore[no-any-return]


def in_bands(chain: Callable[..., Tensor], *maps: Tensor, halo: int, peak: int) -> Tensor:
    """`chain(*maps)`, on a CPU computed in bands of rows where the whole would not fit into memory.BAND_BYTES.

    `maps` are (B, *, H, W) of one size. A row of the result may depend on rows of the input that are at most `halo`
    away (a multiple of the chain's stride). Each band is therefore computed with `halo` rows on both sides, which are
    cut off from its result. `peak` is the size of the largest intermediate map in values per input position: its
    channels times the square of its enlargement.

        |..halo..|----------band----------|..halo..|
    """
    b, _, height, width = maps[0].shape
    rows = band_rows(b, peak, width)
    if rows >= height or maps[0].device.type != "cpu":
        return chain(*maps)
    parts = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        low, high = max(0, start - halo), min(height, stop + halo)
        part = chain(*(m[:, :, low:high] for m in maps))
        scale = part.shape[2] / (high - low)
        parts.append(part[:, :, int((start - low) * scale) : int((stop - low) * scale)])
    return torch.cat(parts, 2)
