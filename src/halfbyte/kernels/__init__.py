"""PRIVATE. Compiled implementations of `halfbyte.numerics`, equal to it bit for bit; only `halfbyte.ops` calls them."""
