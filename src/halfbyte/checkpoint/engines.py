"""Which engine loads which output, and the command that serves it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from ..formats import MXFP8
from .plan import Options


def serve_commands(output: Path, options: Options, has_experts: bool) -> dict[str, str]:
    """Engine → command, only for the engines that load this layout and compute the right numbers."""
    path = quote(str(output))
    fp8_cache = options.kv_cache == "fp8"
    vllm = f"vllm serve {path}" + (" --kv-cache-dtype fp8" if fp8_cache else "")
    sglang = f"python -m sglang.launch_server --model-path {path}" + (" --kv-cache-dtype fp8_e4m3" if fp8_cache else "")
    commands = {"vLLM": vllm}
    weight_only = options.activations == "none" and not isinstance(options.format, MXFP8)
    if options.layout == "compressed-tensors":
        commands["SGLang"] = sglang
        if not has_experts:  # transformers ignores weight_global_scale in fused experts
            commands["transformers"] = f"AutoModelForCausalLM.from_pretrained({str(output)!r})"
    elif not weight_only:  # W4A16 in ModelOpt's layout is sure in vLLM only
        commands["SGLang"] = sglang
        if not isinstance(options.format, MXFP8):
            commands["TensorRT-LLM"] = f"trtllm-serve {path}" + (" --kv_cache_dtype fp8" if fp8_cache else "")
    commands["halfbyte"] = f"halfbyte.load({str(output)!r})"
    return commands
