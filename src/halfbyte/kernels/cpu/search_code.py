"""The compiled part of the scale rule `search`: sixteen blocks at a time, by the bounds of `docs/search.md`.

Every lane goes down from its own last candidate, until what it would clip is already worse than the best found. A
later one that is as good wins, for it has the smaller code. About fourteen candidates are tried of 126, each in a dozen
operations an element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from .._curvature import LEAST, curvature, doubled
from .compile import jit, jit_apart
from .elements import F32_MAX, MAGNITUDE, e2m1_magnitude, e4m3, e4m3_value
from .group import ENCODE, MAGNITUDES, TARGETS, WEIGHTS, element_scales, sum_of_rows
from .vector import bits, from_bits, int_lanes, item, load, maximum_of, store, to_float, transpose, where

_ZERO, _SIX, _SIXTH, _LEAST = (np.float32(v) for v in (0, 6, 1 / 6, LEAST))
_TO_ZERO = np.float32(24.1)  # where 6·v is this times the largest target, all codes are zero
_SIGN = -(2**31)
_DISTANCES = WEIGHTS  # of the Hessian search, which has no weights


class Search(NamedTuple):
    """The rule `search` with error mse or mae."""

    six_e: Any  # 6·E, float32
    squared: bool
    weights: Any  # (16 · pitch) float32: column i of block b has weights[i · pitch + b]
    pitch: int


class HessianSearch(NamedTuple):
    """The rule `search` with error hessian."""

    six_e: Any
    hessian: Any  # (B · 256) float32, what is above the diagonal doubled
    curvature: Any  # (B · 16) float32: an error is at least this times d² of any element


def search_rule(
    six_e: Any, squared: bool, blocks: int, importance: Tensor | None, hessian: Tensor | None
) -> Search | HessianSearch:
    """The rule's arrays; without importance its weights are one, and a product with one rounds nothing."""
    if hessian is not None:
        h = hessian.detach().float()
        return HessianSearch(six_e, doubled(h).view(-1).numpy(), curvature(h).reshape(-1).numpy())
    pitch = blocks + 15  # the last blocks of a row are read sixteen at a time
    weights = torch.ones(16, pitch)
    if importance is not None:
        weights[:, :blocks] = importance.detach().view(blocks, 16).T
    return Search(six_e, squared, weights.view(-1).numpy(), pitch)


def only_down(rule: Any) -> bool:
    """Whether the sixteen blocks must share their columns."""
    raise NotImplementedError  # compiled code only


@overload(only_down, jit_options={"forceinline": True})
def _only_down(rule: Any) -> Any:
    shared = rule.instance_class is HessianSearch

    def code(rule: Any) -> Any:
        return shared

    return code


@jit_apart
def best_scales(g: Any, maxima: Any, tile: bool, rule: Any, block: int, across: bool) -> Any:
    """Scale bytes of sixteen blocks, of a tile the same in every lane; arguments as `block_scales`."""
    _prepare(g, rule, block, across)
    largest = maxima * load(g, ENCODE)
    unknown = (bits(largest) & MAGNITUDE) > 0x7F800000
    last = _last(largest, rule)
    going = where(maxima > _ZERO, where(unknown, 0, 1), 0)
    best = to_float(int_lanes(0)) + F32_MAX  # an infinite error never wins
    chosen = int_lanes(1)
    for step in range(126):
        code = last - step
        going = where(code > 0, going, 0)
        if maximum_of(going) == 0:
            break
        value = e4m3_value(where(code > 0, code, 1))
        if step > 7:
            going = where(_clipped(g, value, tile, rule, block) > best, 0, going)
        total = _error(g, value, tile, rule, block)
        better = where(total <= best, where(total < -F32_MAX, 0, going), 0) > 0
        best, chosen = where(better, total, best), where(better, code, chosen)
    return where(unknown, 0x7F, where(maxima > _ZERO, chosen, 0))


@jit
def _first(t: Any) -> Any:
    """The smallest code for which 6·v reaches t, from 1 on; 126 if none does."""
    t = where(t > _ZERO, t, _ZERO)
    near = e4m3(t * _SIXTH)  # this one or the one before
    code = where(e4m3_value(near) * _SIX < t, near + 1, near)
    return where(code > 126, 126, where(code < 1, 1, code))


def _prepare(g: Any, rule: Any, block: int, across: bool) -> None:
    """Elements, targets and weights with blocks as lanes."""
    raise NotImplementedError  # compiled code only


@overload(_prepare, jit_options={"forceinline": True})
def _prepare_lanes(g: Any, rule: Any, block: Any, across: Any) -> Any:
    magnitude = -1 if rule.instance_class is HessianSearch else MAGNITUDE
    weighted = rule.instance_class is Search

    def code(g: Any, rule: Any, block: Any, across: Any) -> Any:
        for i in range(16):
            store(g, MAGNITUDES + i * 16, load(g, i * 16))
        transpose(g, MAGNITUDES)
        encode = from_bits(bits(load(g, ENCODE)) & magnitude)
        for i in range(16):
            x = from_bits(bits(load(g, MAGNITUDES + i * 16)) & magnitude)
            store(g, MAGNITUDES + i * 16, x)
            store(g, TARGETS + i * 16, x * encode)
            if weighted:
                if across:
                    store(g, WEIGHTS + i * 16, load(rule.weights, i * rule.pitch + block))
                else:
                    one = to_float(int_lanes(1))
                    store(g, WEIGHTS + i * 16, one * item(rule.weights, i * rule.pitch + block))

    return code


def _last(largest: Any, rule: Any) -> Any:
    """The largest code that may win."""
    raise NotImplementedError  # compiled code only


@overload(_last, jit_options={"forceinline": True})
def _last_code(largest: Any, rule: Any) -> Any:
    def bounded(largest: Any, rule: Any) -> Any:
        last = _first(largest) + 7
        return where(last > 126, 126, where(last < 15, 15, last))

    def first_zero(largest: Any, rule: Any) -> Any:
        return _first(from_bits(bits(largest) & MAGNITUDE) * _TO_ZERO)

    return first_zero if rule.instance_class is HessianSearch else bounded


def _clipped(g: Any, value: Any, tile: bool, rule: Any, block: int) -> Any:
    """What any scale up to this value costs at least, for its clipping alone."""
    raise NotImplementedError  # compiled code only


@overload(_clipped, jit_options={"forceinline": True})
def _clipped_error(g: Any, value: Any, tile: Any, rule: Any, block: Any) -> Any:
    def by_weights(g: Any, value: Any, tile: Any, rule: Any, block: Any) -> Any:
        total = to_float(int_lanes(0))
        for i in range(16):
            d = load(g, TARGETS + i * 16) - value * _SIX
            d = where(d > _ZERO, d, _ZERO)
            total = total + load(g, WEIGHTS + i * 16) * (d * d if rule.squared else d)
        return sum_of_rows(total) if tile else total

    def by_hessian(g: Any, value: Any, tile: Any, rule: Any, block: Any) -> Any:
        most = to_float(int_lanes(0))
        for i in range(16):
            d = from_bits(bits(load(g, TARGETS + i * 16)) & MAGNITUDE) - value * _SIX
            d = where(d > _ZERO, d, _ZERO)
            cost = d * (d * item(rule.curvature, block * 16 + i))  # d · d may overflow where this does not
            most = where(cost > most, cost, most)
        total = sum_of_rows(most) if tile else most
        return where(total > _LEAST, total, -F32_MAX)

    return by_hessian if rule.instance_class is HessianSearch else by_weights


def _error(g: Any, value: Any, tile: bool, rule: Any, block: int) -> Any:
    """Error of each block, or of the tile, for block scales of these values."""
    raise NotImplementedError  # compiled code only


@overload(_error, jit_options={"forceinline": True})
def _error_of(g: Any, value: Any, tile: Any, rule: Any, block: Any) -> Any:
    def by_weights(g: Any, value: Any, tile: Any, rule: Any, block: Any) -> Any:
        e = from_bits(bits(element_scales(g, value)) & MAGNITUDE)
        total = to_float(int_lanes(0))
        for i in range(16):
            d = e2m1_magnitude(load(g, MAGNITUDES + i * 16) * e) * value - load(g, TARGETS + i * 16)
            term = d * d if rule.squared else from_bits(bits(d) & MAGNITUDE)
            total = total + load(g, WEIGHTS + i * 16) * term
        return sum_of_rows(total) if tile else total

    def by_hessian(g: Any, value: Any, tile: Any, rule: Any, block: Any) -> Any:
        e = element_scales(g, value)
        for i in range(16):
            y = bits(load(g, MAGNITUDES + i * 16) * e)
            q = from_bits(bits(e2m1_magnitude(from_bits(y & MAGNITUDE))) | (y & _SIGN))
            store(g, _DISTANCES + i * 16, q * value - load(g, TARGETS + i * 16))
        total = to_float(int_lanes(0))
        for i in range(16):
            d = load(g, _DISTANCES + i * 16)
            row = d * item(rule.hessian, block * 256 + i * 17)
            for j in range(i + 1, 16):
                row = row + load(g, _DISTANCES + j * 16) * item(rule.hessian, block * 256 + i * 16 + j)
            total = total + d * row
        return sum_of_rows(total) if tile else total

    return by_hessian if rule.instance_class is HessianSearch else by_weights
