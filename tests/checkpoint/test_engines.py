"""The commands that serve a checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte import NVFP4
from halfbyte.checkpoint.engines import serve_commands
from halfbyte.checkpoint.options import Options

from ..check import equal


@pytest.mark.parametrize(
    ("kv_cache", "flags"),
    [
        ("none", ("", "", "")),
        ("fp8", (" --kv-cache-dtype fp8", " --kv-cache-dtype fp8_e4m3", " --kv_cache_dtype fp8")),
    ],
)
def test_commands(kv_cache: Any, flags: tuple[str, str, str]) -> None:
    """Ready for a shell, with the flag that each engine has for an FP8 KV cache."""
    options = Options(activations="constant", kv_cache=kv_cache)
    found = serve_commands(Path("my model"), options, {NVFP4}, has_experts=True)
    vllm, sglang, tensorrt = flags
    wanted = {
        "vLLM": f"vllm serve 'my model'{vllm}",
        "SGLang": f"python -m sglang.launch_server --model-path 'my model'{sglang}",
        "TensorRT-LLM": f"trtllm-serve 'my model'{tensorrt}",
        "halfbyte": "halfbyte.load('my model')",
    }
    equal(found, wanted)
