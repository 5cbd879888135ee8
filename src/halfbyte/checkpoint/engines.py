"""Which engine loads which output, and the command that serves it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from ..formats import MXFP8, Format
from .options import Options

SGLANG_LOSES_MXFP8 = frozenset({"llama", "phi3", "internlm3", "iquestcoder", "ministral3"})
"""Families whose loader in SGLang drops the scales of MXFP8 (`load_values.mxfp8_in_llama`)."""


def serve_commands(
    output: Path, options: Options, formats: set[type[Format]], has_experts: bool, model_type: str = ""
) -> dict[str, str]:
    """Engine → command, only for the engines that load this layout and compute the right numbers.

    formats: those of the weights; of a mixture only vLLM, and transformers for dense models, are known to load it.
    model_type: the model's family, by its config.
    """
    path = quote(str(output))
    fp8_cache = options.kv_cache != "none"
    vllm = f"vllm serve {path}" + (" --kv-cache-dtype fp8" if fp8_cache else "")
    sglang = f"python -m sglang.launch_server --model-path {path}" + (" --kv-cache-dtype fp8_e4m3" if fp8_cache else "")
    commands = {"vLLM": vllm}
    mixed = len(formats) > 1
    weight_only = options.activations == "none" and MXFP8 not in formats
    if options.layout == "compressed-tensors":
        if MXFP8 not in formats:  # SGLang has no scheme for MXFP8 in this layout
            commands["SGLang"] = sglang
        if not has_experts:  # transformers ignores weight_global_scale in fused experts, and fails on MXFP8's
            commands["transformers"] = f"AutoModelForCausalLM.from_pretrained({str(output)!r})"
    elif not weight_only and not mixed:  # W4A16 in ModelOpt's layout is sure in vLLM only
        if MXFP8 not in formats or model_type not in SGLANG_LOSES_MXFP8:
            commands["SGLang"] = sglang
        if MXFP8 not in formats:
            commands["TensorRT-LLM"] = f"trtllm-serve {path}" + (" --kv_cache_dtype fp8" if fp8_cache else "")
    commands["halfbyte"] = f"halfbyte.load({str(output)!r})"
    return commands
