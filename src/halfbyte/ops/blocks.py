"""Weights that others quantized, decoded: plain torch, on any device."""

from ..numerics.blocks import decode as decode
from ..numerics.blocks import decode_scale as decode_scale
