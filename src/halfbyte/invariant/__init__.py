"""Batch invariance: what is computed for a token depends on its sequence up to it alone, bit for bit; `docs/rl.md`."""

from .mode import batch_invariant
from .models import disable, enable

__all__ = ["batch_invariant", "disable", "enable"]
