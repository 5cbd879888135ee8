"""Calibration: scales and codes chosen by what a model's layers compute on a little text.

`data` makes token windows, `runner` takes a model through them one decoder layer at a time, `observers` collect,
`gptq` rounds. The result is what `checkpoint.convert` writes; nothing is recomputed there.
"""
