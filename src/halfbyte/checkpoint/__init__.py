"""Checkpoints on disk: plan → validate → apply, and proof of the result.

`shards` streams safetensors, `schema` and `config` hold every foreign name, `plan` decides, `convert` writes,
`verify` proves, `dequantize` goes back.
"""
