"""The contract of `docs/numerics.md` in plain torch: slow, obvious, and the judge of every fast path.

One function per rule, one torch operation per written rounding. Nothing here dispatches, validates for users, or
knows about kernels; `halfbyte.ops` does the first two.
"""
