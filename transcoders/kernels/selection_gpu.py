# pyright: reportMissingImports=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""The k largest values on a GPU, in Triton: by radix selection, without sorting.

A floating-point number's bits, its lower ones flipped where it is negative, are an integer of the same order. Of these
the k-th largest is found digit by digit, 8 bits at a time: a histogram of the digit among the values that share the
digits before it says which digit the k-th largest has. float32 takes four digits, bfloat16 two. Of equal values the
first are taken, so that there are exactly k; atomic additions are of whole numbers, so every run gives the same.

`rows`: one program for each row, which reads it once per digit and once to write, from memory the first time and from
the cache then: a row of 12,288 float32 takes 48 KB. `groups`: many programs for each group, of which all read once per
digit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 1024
"""Values that a program holds at a time."""
_TILES = 8
"""How many of these a program counts before it adds to what others have counted."""
_DIGIT = 256


@triton.jit
def _ordered(x, bits: tl.constexpr):
    """Integers of the order of x: 32 bits wide, 64 for float64."""
    if bits == 64:
        number = x.to(tl.int64, bitcast=True)
        flipped = number ^ ((number >> 63) & 0x7FFFFFFFFFFFFFFF)
    elif bits == 32:
        number = x.to(tl.int32, bitcast=True)
        flipped = number ^ ((number >> 31) & 0x7FFFFFFF)
    else:
        number = x.to(tl.int16, bitcast=True).to(tl.int32)
        flipped = number ^ ((number >> 15) & 0x7FFF)
    return tl.where(flipped == -1, 0, flipped)  # −0 is 0


@triton.jit
def _histogram(key, inside, prefix, digit: tl.constexpr, bits: tl.constexpr):
    """Of the values that share the digits before: how many have each value of this one, smallest first."""
    shift: tl.constexpr = bits - 8 - 8 * digit
    place = ((key >> shift) & 255).to(tl.int32)
    if digit == 0:
        place ^= 128  # the sign
    else:
        inside &= (key >> (shift + 8)) == (prefix >> (shift + 8))
    return tl.histogram(place, 256, mask=inside)


@triton.jit
def _narrow(histogram, prefix, left, digit: tl.constexpr, bits: tl.constexpr):
    """The prefix with the digit of the `left`-th largest of these, and how many of those that have it are wanted."""
    shift: tl.constexpr = bits - 8 - 8 * digit
    spare: tl.constexpr = prefix.dtype.primitive_bitwidth - bits
    number = tl.arange(0, 256)
    reached = tl.cumsum(histogram, 0, reverse=True) >= left
    found = tl.max(tl.where(reached, number, 0), axis=0)
    left -= tl.sum(tl.where(number > found, histogram, 0), axis=0)
    if digit == 0:
        found ^= 128
    moved = ((found.to(prefix.dtype) << shift) << spare) >> spare  # with the sign
    return prefix | moved, left


@triton.jit
def _rows_kernel(
    h, value, index, kept, n, width, outer, k, bits: tl.constexpr, block: tl.constexpr,
    apart: tl.constexpr, dense: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * width
    prefix = tl.zeros([], tl.int64 if bits == 64 else tl.int32)
    left = k
    for digit in tl.static_range(bits // 8):
        histogram = tl.zeros([256], tl.int32)
        for begin in range(0, n, block):
            at = begin + tl.arange(0, block)
            offset = base + ((at // width).to(tl.int64) * outer + at % width if apart else at)
            key = _ordered(tl.load(h + offset, mask=at < n, other=0.0), bits)
            histogram += _histogram(key, at < n, prefix, digit, bits)
        prefix, left = _narrow(histogram, prefix, left, digit, bits)
    ties = 0
    written = 0
    for begin in range(0, n, block):
        at = begin + tl.arange(0, block)
        offset = base + ((at // width).to(tl.int64) * outer + at % width if apart else at)
        x = tl.load(h + offset, mask=at < n, other=0.0)
        key = _ordered(x, bits)  # above 0 where x is
        equal = ((key == prefix) & (at < n)).to(tl.int32)
        chosen = ((key > prefix) & (at < n)) | ((equal > 0) & (ties + tl.cumsum(equal, 0) <= left))
        if dense:
            tl.store(kept + offset, tl.where(chosen & (key > 0), x, 0.0), mask=at < n)
        else:
            place = row * k + written + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(value + place, x, mask=chosen)
            tl.store(index + place, at.to(tl.int64), mask=chosen)
        ties += tl.sum(equal, axis=0)
        written += tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _count_kernel(h, prefix, histogram, n, digit: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, tiles):
    group = tl.program_id(1).to(tl.int64)
    known = tl.load(prefix + group)
    counts = tl.zeros([256], tl.int32)
    for tile in range(tiles):
        at = (tl.program_id(0).to(tl.int64) * tiles + tile) * block + tl.arange(0, block)
        key = _ordered(tl.load(h + group * n + at, mask=at < n, other=0.0), bits)
        counts += _histogram(key, at < n, known, digit, bits)
    tl.atomic_add(histogram + group * 256 + tl.arange(0, 256), counts)


@triton.jit
def _narrow_kernel(histogram, prefix, left, digit: tl.constexpr, bits: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    places = histogram + group * 256 + tl.arange(0, 256)
    known, wanted = _narrow(tl.load(places), tl.load(prefix + group), tl.load(left + group), digit, bits)
    tl.store(prefix + group, known)
    tl.store(left + group, wanted)
    tl.store(places, tl.zeros([256], tl.int32))


@triton.jit
def _tally_kernel(h, prefix, over, equal, n, bits: tl.constexpr, block: tl.constexpr):
    group, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    at = chunk * block + tl.arange(0, block)
    key = _ordered(tl.load(h + group * n + at, mask=at < n, other=0.0), bits)
    known = tl.load(prefix + group)
    place = group * tl.num_programs(0) + chunk
    tl.store(over + place, tl.sum(((key > known) & (at < n)).to(tl.int32), axis=0))
    tl.store(equal + place, tl.sum(((key == known) & (at < n)).to(tl.int32), axis=0))


@triton.jit
def _list_kernel(
    h, prefix, left, over_before, ties_before, value, index, n, k, bits: tl.constexpr, block: tl.constexpr
):
    group, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    at = chunk * block + tl.arange(0, block)
    x = tl.load(h + group * n + at, mask=at < n, other=0.0)
    key = _ordered(x, bits)
    known, wanted = tl.load(prefix + group), tl.load(left + group)
    ties = tl.load(ties_before + group * tl.num_programs(0) + chunk)
    before = tl.load(over_before + group * tl.num_programs(0) + chunk) + tl.minimum(ties, wanted)
    equal = ((key == known) & (at < n)).to(tl.int32)
    chosen = ((key > known) & (at < n)) | ((equal > 0) & (ties + tl.cumsum(equal, 0) <= wanted))
    place = group * k + before + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(value + place, x, mask=chosen)
    tl.store(index + place, at, mask=chosen)


@triton.jit
def _keep_kernel(h, prefix, kept, n, bits: tl.constexpr, block: tl.constexpr):
    group, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    at = chunk * block + tl.arange(0, block)
    x = tl.load(h + group * n + at, mask=at < n, other=0.0)
    key = _ordered(x, bits)
    tl.store(kept + group * n + at, tl.where((key >= tl.load(prefix + group)) & (key > 0), x, 0.0), mask=at < n)


def rows_listed(h: Float[Tensor, "row n"], k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k ≤ n largest values of every row, and their places in ascending order."""
    h = h.contiguous()
    value = h.new_empty(len(h), k)
    index = torch.empty(len(h), k, dtype=torch.int64, device=h.device)
    if value.numel():
        n = h.shape[1]
        _launch(_rows_kernel, (len(h),), h, value, index, value, n, n, 0, k, apart=False, dense=False)
    return value, index


def tokens_listed(
    h: Float[Tensor, "layer batch feature"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest values of every token in all layers; their places `layer · n_features + feature`, ascending."""
    h = h.contiguous()
    n_layers, batch, width = h.shape
    value = h.new_empty(batch, k)
    index = torch.empty(batch, k, dtype=torch.int64, device=h.device)
    if value.numel():
        sizes = (n_layers * width, width, batch * width, k)
        _launch(_rows_kernel, (batch,), h, value, index, value, *sizes, apart=True, dense=False)
    return value, index


def rows_kept(
    h: Float[Tensor, "layer batch feature"], k: int, *, over_layers: bool
) -> Float[Tensor, "layer batch feature"]:
    """`max(h, 0)` for the k largest of a token's features in a layer, or in all layers; 0 for the rest.

    Moves h once and the result once.
    """
    h = h.contiguous()
    kept = torch.empty_like(h)
    n_layers, batch, width = h.shape
    n, rows = (n_layers * width, batch) if over_layers else (width, n_layers * batch)
    if h.numel():
        sizes = (n, width, batch * width, min(k, n))
        _launch(_rows_kernel, (rows,), h, kept, kept, kept, *sizes, apart=over_layers, dense=True)
    return kept


def groups_kept(h: Float[Tensor, "group n"], k: int) -> Float[Tensor, "group n"]:
    """`max(h, 0)` where h is at least the k-th largest of its group, k ≤ n; 0 for the rest."""
    h = h.contiguous()
    kept = torch.empty_like(h)
    if h.numel():
        prefix, _ = _kth_of_groups(h, k)
        _launch(_keep_kernel, _grid(h), h, prefix, kept, h.shape[1])
    return kept


def groups_listed(h: Float[Tensor, "group n"], k: int) -> tuple[Float[Tensor, "group k"], Int[Tensor, "group k"]]:
    """The k ≤ n largest values of every group, and their places in ascending order."""
    h = h.contiguous()
    prefix, left = _kth_of_groups(h, k)
    grid, n = _grid(h), h.shape[1]
    over, equal = torch.zeros(2, len(h), grid[0], dtype=torch.int64, device=h.device)
    _launch(_tally_kernel, grid, h, prefix, over, equal, n)
    value = h.new_empty(len(h), k)
    index = torch.empty(len(h), k, dtype=torch.int64, device=h.device)
    before = (counts.cumsum(dim=1) - counts for counts in (over, equal))
    _launch(_list_kernel, grid, h, prefix, left, *before, value, index, n, k)
    return value, index


def _kth_of_groups(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest of each group as an integer, and how many of those equal to it are among the k."""
    bits = 8 * h.element_size()
    prefix = torch.zeros(len(h), dtype=torch.int64 if bits == 64 else torch.int32, device=h.device)
    left = torch.full((len(h),), k, dtype=torch.int32, device=h.device)
    histogram = torch.zeros(len(h), _DIGIT, dtype=torch.int32, device=h.device)
    grid, narrow = _grid(h, _TILES), _narrow_kernel[(len(h),)]
    for digit in range(bits // 8):
        _launch(_count_kernel, grid, h, prefix, histogram, h.shape[1], digit=digit, tiles=_TILES)
        narrow(histogram, prefix, left, digit=digit, bits=bits)
    return prefix, left


def _grid(h: Tensor, tiles: int = 1) -> tuple[int, int]:
    """Programs of so many blocks of a group each, and groups."""
    return -(-h.shape[1] // (tiles * _BLOCK)), len(h)


def _launch(kernel: Any, grid: tuple[int, ...], h: Tensor, *arguments: Any, **options: Any) -> None:
    block = min(_BLOCK, triton.next_power_of_2(h.shape[-1]))
    kernel[grid](h, *arguments, bits=8 * h.element_size(), block=block, **options)
