"""Group norm, with the SiLU behind it, of activations whose channels come last in memory.

torch's kernels on CUDA want the other layout, so that each norm between two convolutions in half precision, which want
this one, costs two copies. These are three passes each way over contiguous memory, and keep the input alone for the
gradient. Nothing is added atomically: a sample's output depends on no other sample, and on no chance.
"""

import torch
from torch.nn.functional import silu

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

enabled = True  # scripts/gpu_check.py measures the difference
LEAST = 2**20  # numbers in x: with fewer, three launches by Triton cost the host more than the copies do
ROWS, COLUMNS = 32, 64  # of a tile of (pixels, channels)
CHUNK = 256  # pixels of which one program adds up the moments


def norm_and_silu(norm, x):
    """silu(norm(x)) of a torch.nn.GroupNorm, x (B, C, H, W)."""
    return group_norm(norm, x, True) if applies(x) else silu(norm(x))


def norm_alone(norm, x):
    """norm(x), to be its forward."""
    if applies(x):
        return group_norm(norm, x, False)
    return torch.nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def applies(x):
    """Whether x is what they were measured on: large, on a GPU, in half precision, with its channels last. A compiler
    has its own way, and has to see through it."""
    if not enabled or triton is None or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return False
    large_halves = x.dtype in (torch.bfloat16, torch.float16) and x.numel() >= LEAST
    return x.is_cuda and large_halves and x.is_contiguous(memory_format=torch.channels_last)


def group_norm(norm, x, with_silu):
    return GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, with_silu)


class GroupNorm(torch.autograd.Function):
    """x, dense with channels last, (B, C, H, W); weight, bias (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, with_silu):
        count, channels, height, width = x.shape
        pixels, size = height * width, channels // groups
        chunks = triton.cdiv(pixels, CHUNK)
        sums = torch.empty(2, count, chunks, channels, device=x.device, dtype=torch.float32)
        stats = torch.empty(2, count, groups, device=x.device, dtype=torch.float32)  # mean, 1 / std
        y = torch.empty_like(x)
        tiles = count, chunks, triton.cdiv(channels, COLUMNS)
        _sum[tiles](x, sums, sums[1], pixels, channels, chunks, CHUNK, ROWS, COLUMNS)
        _moments[count, groups](
            x, sums, sums[1], stats, stats[1], pixels, channels, groups, eps, chunks, size,
            triton.next_power_of_2(chunks), triton.next_power_of_2(size),
        )  # fmt: skip
        _normalise[tiles](
            x, y, stats, stats[1], weight, bias, pixels, channels, groups, size, with_silu, CHUNK, ROWS, COLUMNS
        )
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups, ctx.with_silu = groups, with_silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, stats = ctx.saved_tensors
        groups, with_silu = ctx.groups, ctx.with_silu
        count, channels, height, width = x.shape
        pixels, size = height * width, channels // groups
        chunks = triton.cdiv(pixels, CHUNK)
        dy = dy.contiguous(memory_format=torch.channels_last)
        sums = torch.empty(2, count, chunks, channels, device=x.device, dtype=torch.float32)
        means = torch.empty(2, count, groups, device=x.device, dtype=torch.float32)
        tiles = count, chunks, triton.cdiv(channels, COLUMNS)
        _sum_gradient[tiles](
            x, dy, sums, sums[1], stats, stats[1], weight, bias, pixels, channels, groups, size, chunks, with_silu,
            CHUNK, ROWS, COLUMNS,
        )  # fmt: skip
        _mean_gradient[count, groups](
            sums, sums[1], means, means[1], weight, pixels, channels, groups, chunks, size,
            triton.next_power_of_2(chunks), triton.next_power_of_2(size),
        )  # fmt: skip
        dx = torch.empty_like(x)
        _gradient[tiles](
            x, dy, dx, stats, stats[1], means, means[1], weight, bias, pixels, channels, groups, size, with_silu,
            CHUNK, ROWS, COLUMNS,
        )  # fmt: skip
        dbias, dweight = sums.sum((1, 2)).to(weight.dtype) if ctx.needs_input_grad[1] else (None, None)
        return dx, dweight, dbias, None, None, None


if triton:

    @triton.jit
    def _sum(
        x, sums, squares, pixels, channels, chunks, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """Of the first pixel's difference to each pixel of a chunk, per channel: sum, and sum of squares."""
        sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        x += sample * pixels * channels
        first = tl.load(x + c, mask=c < channels, other=0.0).to(tl.float32)
        total, square = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, CHUNK, ROWS):
            p = chunk * CHUNK + start + tl.arange(0, ROWS)
            inside = (p < pixels)[:, None] & (c < channels)[None, :]
            value = tl.load(x + p[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - first[None, :], 0.0)
            total += value
            square += value * value
        place = (sample * chunks + chunk) * channels + c
        tl.store(sums + place, tl.sum(total, 0), mask=c < channels)
        tl.store(squares + place, tl.sum(square, 0), mask=c < channels)

    @triton.jit
    def _moments(
        x, sums, squares, mean, inverse, pixels, channels, groups, eps, chunks, size,
        CHUNKS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """Mean and 1 / std of a group, from those sums. Summed up by Chan's formula, since E x^2 - (E x)^2 loses all
        digits where the mean is large."""
        sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        k, i = tl.arange(0, CHUNKS), tl.arange(0, SIZE)
        c = group * size + i
        inside = (k < chunks)[:, None] & (i < size)[None, :]
        place = (sample * chunks + k[:, None]) * channels + c[None, :]
        total = tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0)
        square = tl.sum(tl.load(squares + place, mask=inside, other=0.0), 0)
        first = tl.load(x + sample * pixels * channels + c, mask=i < size, other=0.0).to(tl.float32)
        channel_mean = first + total / pixels
        group_mean = tl.sum(tl.where(i < size, channel_mean, 0.0), 0) / size
        apart = channel_mean - group_mean
        variance = tl.sum(tl.where(i < size, (square - total * total / pixels) / pixels + apart * apart, 0.0), 0) / size
        tl.store(mean + sample * groups + group, group_mean)
        tl.store(inverse + sample * groups + group, 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps))

    @triton.jit
    def _parameters(mean, inverse, weight, bias, group, c, within):
        """Of channels c: mean and 1 / std of their groups, weight and bias of the norm."""
        m, r = tl.load(mean + group, mask=within, other=0.0), tl.load(inverse + group, mask=within, other=0.0)
        w = tl.load(weight + c, mask=within, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=within, other=0.0).to(tl.float32)
        return m, r, w, b

    @triton.jit
    def _normal_and_gradient(x, dy, place, inside, m, r, w, b, SILU: tl.constexpr):
        """The normalised x, and the gradient of the norm's output, of a tile."""
        normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            output = normal * w[None, :] + b[None, :]
            s = tl.sigmoid(output)
            gradient *= s * (1 + output * (1 - s))
        return normal, gradient

    @triton.jit
    def _normalise(
        x, y, mean, inverse, weight, bias, pixels, channels, groups, size,
        SILU: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        x += sample * pixels * channels
        y += sample * pixels * channels
        within = c < channels
        m, r, w, b = _parameters(mean, inverse, weight, bias, sample * groups + c // size, c, within)
        for start in range(0, CHUNK, ROWS):
            p = chunk * CHUNK + start + tl.arange(0, ROWS)
            inside = (p < pixels)[:, None] & within[None, :]
            place = p[:, None] * channels + c[None, :]
            value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
            value = value * w[None, :] + b[None, :]
            if SILU:
                value = value * tl.sigmoid(value)
            tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_gradient(
        x, dy, sums, products, mean, inverse, weight, bias, pixels, channels, groups, size, chunks,
        SILU: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Of a chunk, per channel: the sum of the gradient of the norm's output, and of it times the normalised x."""
        sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        x += sample * pixels * channels
        dy += sample * pixels * channels
        within = c < channels
        m, r, w, b = _parameters(mean, inverse, weight, bias, sample * groups + c // size, c, within)
        total, product = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, CHUNK, ROWS):
            p = chunk * CHUNK + start + tl.arange(0, ROWS)
            inside = (p < pixels)[:, None] & within[None, :]
            place = p[:, None] * channels + c[None, :]
            normal, gradient = _normal_and_gradient(x, dy, place, inside, m, r, w, b, SILU)
            total += gradient
            product += gradient * normal
        place = (sample * chunks + chunk) * channels + c
        tl.store(sums + place, tl.sum(total, 0), mask=within)
        tl.store(products + place, tl.sum(product, 0), mask=within)

    @triton.jit
    def _mean_gradient(
        sums, products, mean_gradient, mean_product, weight, pixels, channels, groups, chunks, size,
        CHUNKS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """Of a group: the means of the normalised x's gradient, and of it times the normalised x."""
        sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        k, i = tl.arange(0, CHUNKS), tl.arange(0, SIZE)
        c = group * size + i
        inside = (k < chunks)[:, None] & (i < size)[None, :]
        place = (sample * chunks + k[:, None]) * channels + c[None, :]
        w = tl.load(weight + c, mask=i < size, other=0.0).to(tl.float32)
        total = tl.sum(w * tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0), 0)
        product = tl.sum(w * tl.sum(tl.load(products + place, mask=inside, other=0.0), 0), 0)
        tl.store(mean_gradient + sample * groups + group, total / (pixels * size))
        tl.store(mean_product + sample * groups + group, product / (pixels * size))

    @triton.jit
    def _gradient(
        x, dy, dx, mean, inverse, mean_gradient, mean_product, weight, bias, pixels, channels, groups, size,
        SILU: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        x += sample * pixels * channels
        dy += sample * pixels * channels
        dx += sample * pixels * channels
        within = c < channels
        group = sample * groups + c // size
        m, r, w, b = _parameters(mean, inverse, weight, bias, group, c, within)
        mean_g = tl.load(mean_gradient + group, mask=within, other=0.0)
        mean_p = tl.load(mean_product + group, mask=within, other=0.0)
        for start in range(0, CHUNK, ROWS):
            p = chunk * CHUNK + start + tl.arange(0, ROWS)
            inside = (p < pixels)[:, None] & within[None, :]
            place = p[:, None] * channels + c[None, :]
            normal, gradient = _normal_and_gradient(x, dy, place, inside, m, r, w, b, SILU)
            value = r[None, :] * (gradient * w[None, :] - mean_g[None, :] - normal * mean_p[None, :])
            tl.store(dx + place, value.to(dx.dtype.element_ty), mask=inside)
