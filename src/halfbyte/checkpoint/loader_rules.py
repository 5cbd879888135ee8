"""What engines' loaders ask of a checkpoint, as data: each rule, what an engine does when it is broken, and where the
engine's code says so. Read from the versions in `READ`, in November 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import load_checks as check
from . import load_values as values
from .load_case import Case, Engine
from .load_checks import Places

CAUTION, WRONG, REFUSES = "caution", "loads wrongly", "refuses"
OUTCOMES = (CAUTION, WRONG, REFUSES)  # from harmless to worst
READ: dict[Engine, str] = {
    "vllm": "vllm 0.33.0",
    "sglang": "sglang 0.5.23",
    "tensorrt-llm": "TensorRT-LLM, main of 2026",  # where a file names a commit, that version of it was read
    "transformers": "transformers 5.23.0, compressed-tensors 0.20.0",
}


@dataclass(frozen=True)
class Answer:
    """What an engine does when a rule is broken, or about a scheme, and the function that does it."""

    outcome: str
    source: str
    why: str = ""


@dataclass(frozen=True)
class Rule:
    """One thing that loaders ask.

    Attributes:
        check: yields where it is broken, and how.
        answers: "engine", or "engine method" where it depends on the layout → what it does then; others do not ask.
    """

    name: str
    check: Callable[[Case], Places]
    answers: Mapping[str, Answer]

    def answer(self, engine: Engine, method: str) -> Answer | None:
        """What this engine does with a checkpoint whose quant_method is `method`."""
        return self.answers.get(f"{engine} {method}", self.answers.get(engine))


# vLLM, under vllm/model_executor/
_V = "layers/quantization/modelopt.py: "
_V_CT = "layers/quantization/compressed_tensors/"
_V_LOADER = "models/utils.py: AutoWeightsLoader (an unknown name); parameter.py (shapes)"
_V_UNTRACKED = "model_loader/default_loader.py: load_weights (quantized models may miss tensors)"
_V_MOE = _V + "ModelOptNvFp4FusedMoE.create_weights (torch.empty)"
_V_MARLIN = "layers/quantization/utils/marlin_utils_fp4.py: nvfp4_marlin_process_scales"
# SGLang, under sglang/srt/
_S = "layers/quantization/modelopt_quant.py: "
_S_CT = "layers/quantization/compressed_tensors/"
_S_SKIP = "models/*.py: load_weights (a name without a parameter is skipped with a warning)"
_S_SHAPE = "layers/parameter.py (shapes)"
_S_CAST = "layers/parameter.py (copy_ casts); " + _S_SKIP
_S_MARLIN = "layers/quantization/marlin_utils_fp4.py: nvfp4_marlin_process_scales (no rescaling)"
# TensorRT-LLM, under tensorrt_llm/
_T = "_torch/modules/linear.py@00bbf71: "
_T_SCALES = _T + "NVFP4LinearMethod.load_weight_scales"
_T_MOE = "_torch/modules/fused_moe/quantization.py: NVFP4FusedMoEMethod"
_T_CAST = _T + "copy_weight (casts)"
_T_MARLIN = "quantization/utils/marlin_utils.py@e4bef7f: nvfp4_marlin_process_scales (no rescaling)"
_T_CT = "models/quant_config_utils.py@21156a7: _quant_config_from_config_group"
# transformers
_H_MISSING = "from_pretrained makes up what is missing, and reports it; run"
_H_SHAPE = "from_pretrained: ignore_mismatched_sizes; run"
_H_CAST = "from_pretrained casts elements and reports their scales as unexpected; run"


def _answers(outcome: str, **sources: str) -> dict[str, Answer]:
    """One outcome for several; underscores stand for what a keyword cannot hold."""
    engines = {"tensorrt": "tensorrt-llm", "hf": "transformers"}
    methods = {"ct": " compressed-tensors"}
    found = {}
    for key, source in sources.items():
        engine, _, method = key.partition("_")
        found[engines.get(engine, engine) + (methods.get(method, f" {method}") if method else "")] = source
    return {key: Answer(outcome, source) for key, source in found.items()}


RULES = (
    Rule(
        "names",
        check.unknown_tensors,
        _answers(REFUSES, vllm=_V_LOADER, sglang=_S_SHAPE, tensorrt=_T_CAST + " and shapes", hf_mxfp8=_H_SHAPE)
        | _answers(WRONG, sglang_ct=_S_SKIP, transformers=_H_MISSING),
    ),
    Rule("names", check.other_formats, _answers(CAUTION, vllm="", sglang="", tensorrt="", transformers="")),
    Rule(
        "names",
        check.other_layout,
        _answers(REFUSES, vllm=_V_LOADER, tensorrt=_T + "load_weights_vanilla_helper")
        | _answers(WRONG, sglang=_S_SKIP, transformers=_H_MISSING),
    ),
    Rule(
        "names",
        check.other_format,
        _answers(REFUSES, vllm=_V_LOADER, sglang=_S_SHAPE, tensorrt=_T + "copy_weight (shapes)")
        | _answers(WRONG, sglang_ct=_S_SKIP, transformers=_H_MISSING)
        | _answers(REFUSES, hf_modelopt=_H_SHAPE),
    ),
    Rule("names", check.surplus_scales, _answers(REFUSES, vllm=_V_LOADER)),
    Rule(
        "names",
        check.no_tensor_scale,
        _answers(WRONG, vllm=_V + "KNvfp4Static.create_weights (torch.empty); " + _V_UNTRACKED)
        | _answers(WRONG, sglang=_S + "_make_per_tensor_scale_parameter (torch.empty)", transformers=_H_MISSING)
        | _answers(REFUSES, tensorrt=_T_SCALES),
    ),
    Rule(
        "names",
        check.no_scalars,
        _answers(REFUSES, vllm="parameter.py: PerTensorScaleParameter._load_into_shard_id", sglang=_S_SHAPE)
        | _answers(REFUSES, tensorrt=_T_SCALES, transformers=_H_SHAPE),
    ),
    Rule(
        "names",
        check.rounded_scalars,
        _answers(CAUTION, vllm="parameter.py (copy_ casts)", sglang=_S_CAST, tensorrt=_T_SCALES, transformers=_H_CAST),
    ),
    Rule(
        "required keys",
        check.required_keys,
        _answers(REFUSES, vllm=_V + "ModelOptQuantConfigBase.from_config and _from_config of NVFP4, MXFP8, mixtures")
        | _answers(
            REFUSES, sglang=_S + "ModelOptFp4Config.from_config, common_group_size; fp8.py: Fp8Config.from_config"
        )
        | _answers(REFUSES, tensorrt="_torch/model_config.py@008e0af: load_hf_quant_config")
        | _answers(REFUSES, transformers="utils/quantization_config.py: FineGrainedFP8Config (128×128 unless said)"),
    ),
    Rule(
        "names",
        check.mixture_without_nvfp4,
        _answers(REFUSES, sglang="configs/model_config.py: _parse_modelopt_quant_config (takes it for w4afp8)"),
    ),
    Rule(
        "names",
        check.mxfp8_groups,
        _answers(REFUSES, sglang=_S_CT + "compressed_tensors.py: _get_scheme_from_parts, get_moe_scheme"),
    ),
    Rule(
        "names",
        values.mxfp8_in_llama,
        _answers(
            WRONG, sglang="models/llama.py: load_weights (weight_scale_inv → weight_scale; fp8.py has the former)"
        ),
    ),
    Rule(
        "names",
        values.mxfp8_in_mixture,
        _answers(
            WRONG, sglang="model_loader/loader.py (adds _inv to names for mxfp8 alone); fp8.py: create_fp8_weight_"
        ),
    ),
    Rule(
        "input scales",
        check.no_input_scale,
        _answers(WRONG, vllm=_V + "KNvfp4Dynamic.create_weights (torch.empty); " + _V_UNTRACKED)
        | _answers(WRONG, sglang_ct=_S_CT + "schemes/compressed_tensors_w4a4_nvfp4.py (torch.empty)")
        | _answers(WRONG, tensorrt=_T + "NVFP4LinearMethod._input_prepare (static unless force_dynamic_quantization)")
        | _answers(WRONG, transformers="compressed_tensors/quantization/lifecycle/initialize.py (torch.empty); run")
        | _answers(CAUTION, sglang=_S + "ModelOptFp4LinearMethod.create_weights (1.0 until loaded)"),
    ),
    Rule(
        "exclusion",
        check.packed_but_excluded,
        _answers(REFUSES, vllm=_V + "is_layer_excluded; " + _V_LOADER, sglang=_S + "is_layer_excluded; " + _S_SHAPE)
        | _answers(REFUSES, vllm_ct=_V_CT + "utils.py: should_ignore_layer; " + _V_LOADER)
        | _answers(WRONG, sglang_ct=_S_CT + "utils.py: should_ignore_layer; " + _S_SKIP, transformers=_H_MISSING)
        | _answers(REFUSES, tensorrt="models/modeling_utils.py: is_module_excluded_from_quantization"),
    ),
    Rule(
        "exclusion",
        check.mxfp8_but_excluded,
        _answers(REFUSES, vllm=_V + "is_layer_excluded; " + _V_LOADER)
        | _answers(WRONG, sglang="layers/quantization/utils.py: is_layer_skipped; " + _S_CAST)
        | _answers(WRONG, tensorrt=_T_CAST, transformers=_H_CAST),
    ),
    Rule(
        "exclusion",
        check.kept_for_packed,
        _answers(REFUSES, vllm=_V_LOADER, sglang=_S_SHAPE, tensorrt=_T + "copy_weight (shapes)")
        | _answers(WRONG, sglang_ct=_S_SKIP, transformers=_H_MISSING),
    ),
    Rule(
        "exclusion",
        check.kept_for_mxfp8,
        _answers(WRONG, vllm="parameter.py (copy_ casts); " + _V_UNTRACKED, sglang=_S_CAST, transformers=_H_MISSING)
        | _answers(REFUSES, tensorrt=_T + "load_weight_scales (KeyError)"),
    ),
    Rule(
        "exclusion",
        check.routers_not_named,
        _answers(CAUTION, vllm="models/*.py: GateLinear", sglang="models/*.py: ReplicatedLinear")
        | _answers(CAUTION, tensorrt="_torch/models/*.py"),
    ),
    Rule(
        "exclusion",
        check.partly_excluded,
        _answers(REFUSES, vllm="layers/quantization/utils/quant_utils.py: is_layer_skipped")
        | _answers(REFUSES, vllm_ct=_V_CT + "utils.py: should_ignore_layer")
        | _answers(REFUSES, sglang="layers/quantization/utils.py: is_layer_skipped")
        | _answers(REFUSES, sglang_ct=_S_CT + "utils.py: should_ignore_layer"),
    ),
    Rule(
        "exclusion",
        check.tied_lm_head,
        _answers(
            REFUSES, vllm="layers/quantization/base_config.py: tie_weights; modelopt.py: KNvfp4Static.process (NaN)"
        )
        | _answers(REFUSES, hf_ct="compressed-tensors compresses the tied Linear (AttributeError); run"),
    ),
    Rule(
        "fused layers",
        values.formats_differ,
        _answers(REFUSES, vllm=_V + "ModelOptMixedPrecisionConfig._resolve_quant_algo")
        | _answers(REFUSES, vllm_ct=_V_CT + "utils.py: _match_fused_layer; " + _V_LOADER)
        | _answers(REFUSES, sglang=_S + "ModelOptMixedPrecisionConfig._resolve_quant_algo")
        | _answers(REFUSES, tensorrt="_torch/models/modeling_utils.py: apply_layerwise_quant_config"),
    ),
    Rule(
        "fused layers",
        values.tensor_scales_differ,
        _answers(WRONG, vllm=_V + "KNvfp4Static.process (max), ModelOptNvFp4FusedMoE (the gate's); both only warn")
        | _answers(WRONG, vllm_ct=_V_CT + "schemes/compressed_tensors_w4a4_nvfp4.py (largest divisor); only warns")
        | _answers(WRONG, sglang=_S + "process_weights_after_loading (max; experts: the gate's under Marlin)")
        | _answers(REFUSES, tensorrt=_T_SCALES + "; " + _T_MOE + ".load_expert_fc31_alpha_nvfp4 (asserts)"),
    ),
    Rule(
        "fused layers",
        values.weight_only_scales_differ,
        _answers(REFUSES, sglang=_S_CT + "schemes/compressed_tensors_w4a16_nvfp4.py: process_weights_after_loading"),
    ),
    Rule(
        "fused layers",
        values.input_scales_differ,
        _answers(CAUTION, vllm=_V + "KNvfp4Dynamic.process (max)", sglang=_S + "process_weights_after_loading (max)")
        | _answers(REFUSES, tensorrt=_T_SCALES + " (asserts)"),
    ),
    Rule(
        "experts",
        values.experts_incomplete,
        _answers(WRONG, vllm=_V_MOE + "; " + _V_UNTRACKED, sglang=_S + "ModelOptNvFp4FusedMoEMethod.create_weights")
        | _answers(WRONG, transformers=_H_MISSING)
        | _answers(REFUSES, tensorrt=_T_MOE + ".load_quant_scales (KeyError)"),
    ),
    Rule(
        "experts",
        values.experts_without_input_scale,
        _answers(CAUTION, sglang=_S + "ModelOptNvFp4FusedMoEMethod (1.0 until loaded; the maximum of all experts)"),
    ),
    Rule(
        "experts",
        values.experts_partly_quantized,
        _answers(
            REFUSES, vllm="layers/fused_moe: RoutedExperts", sglang="layers/moe: FusedMoE (shapes)", tensorrt=_T_MOE
        )
        | _answers(WRONG, sglang_ct=_S_SKIP, transformers=_H_MISSING),
    ),
    Rule(
        "experts",
        values.stacked_experts,
        _answers(REFUSES, vllm="models/*.py: expert_params_mapping", sglang="models/*.py: expert_params_mapping")
        | _answers(REFUSES, tensorrt="_torch/models/*.py: expert weights by number", transformers=_H_SHAPE),
    ),
    Rule(
        "experts",
        values.fused_experts_in_transformers,
        _answers(WRONG, transformers="core_model_loading: experts are stacked without weight_global_scale; run"),
    ),
    Rule(
        "experts",
        values.mxfp8_experts_in_transformers,
        _answers(REFUSES, transformers="core_model_loading: conversion of stacked experts; run"),
    ),
    Rule(
        "experts",
        values.marlin_tiles,
        _answers(CAUTION, vllm="layers/quantization/utils/marlin_utils_fp4.py: prepare_nvfp4_moe_layer_for_marlin"),
    ),
    Rule(
        "scales",
        values.bad_scales,
        _answers(WRONG, vllm="multiplied with", sglang="multiplied with", tensorrt="multiplied with")
        | _answers(WRONG, transformers="multiplied with; run"),
    ),
    Rule(
        "scales",
        values.nan_scales,
        _answers(REFUSES, vllm_modelopt=_V + "KNvfp4Static.process"),
    ),
    Rule(
        "scales",
        values.scalar_scales,
        _answers(REFUSES, transformers="compressed_tensors/quantization/lifecycle/initialize.py ([1]); run"),
    ),
    Rule(
        "KV cache",
        values.no_kv_scales,
        _answers(WRONG, transformers="compressed_tensors/quantization/lifecycle/initialize.py (torch.empty); run"),
    ),
    Rule(
        "KV cache",
        values.one_kv_scale,
        _answers(WRONG, vllm="layers/quantization/kv_cache.py: process_weights_after_loading (one for both)")
        | _answers(WRONG, vllm_ct=_V_CT + "compressed_tensors.py: CompressedTensorsKVCacheMethod (1.0)")
        | _answers(WRONG, sglang="layers/quantization/kv_cache.py: process_weights_after_loading (one for both)")
        | _answers(REFUSES, tensorrt=_T + "load_weights_fused_qkv_linear (asserts)"),
    ),
    Rule("Marlin", values.flushed_by_marlin, _answers(CAUTION, vllm=_V_MARLIN, sglang=_S_MARLIN, tensorrt=_T_MARLIN)),
    Rule(
        "Marlin", values.mostly_flushed_by_marlin, _answers(WRONG, vllm=_V_MARLIN, sglang=_S_MARLIN, tensorrt=_T_MARLIN)
    ),
    Rule(
        "tensor parallelism",
        values.rows_do_not_split,
        _answers(REFUSES, vllm="layers/linear.py: divide", sglang="layers/linear.py: divide", tensorrt=_T + "Linear"),
    ),
    Rule(
        "tensor parallelism",
        values.blocks_do_not_split,
        _answers(REFUSES, vllm=_V + "KNvfp4Static.create_weights (16), KMxfp8Static.create_weights (32)")
        | _answers(REFUSES, vllm_ct="kernels/linear: no check on loading; kernels need whole blocks")
        | _answers(REFUSES, sglang=_S + "ModelOptFp4LinearMethod.create_weights; fp8.py: validate_block_quant_shapes")
        | _answers(REFUSES, tensorrt=_T + "NVFP4LinearMethod.create_weights"),
    ),
)

_NO_MODELOPT = Answer(
    REFUSES,
    "quantizers/auto.py: supports_quant_method; run",
    "has no quantizer for 'modelopt', skips it, and then finds packed weights of half the width",
)
_RECENT = Answer(CAUTION, "_torch/model_config.py@008e0af", "only its releases of 2026 read this")
_BLACKWELL = Answer(
    CAUTION, "layers/quantization/fp8.py: Fp8Config.get_min_capability", "runs MXFP8 on Blackwell, and on no older GPU"
)
# scheme, as `Declared.scheme` says it → engine → what it does with it; an engine that is not listed loads it.
SCHEMES: dict[str, dict[Engine, Answer]] = {
    "modelopt NVFP4": {"transformers": _NO_MODELOPT},
    "modelopt W4A16_NVFP4": {
        "sglang": Answer(
            CAUTION, _S + "ModelOptNvFp4A16LinearMethod", "reads this in recent releases only; 0.5.23 does"
        ),
        "tensorrt-llm": _RECENT,
        "transformers": _NO_MODELOPT,
    },
    "modelopt MXFP8": {
        "sglang": _BLACKWELL,
        "tensorrt-llm": _RECENT,
        "transformers": Answer(
            WRONG,
            "quantizers/auto.py: supports_quant_method; run",
            "has no quantizer for 'modelopt', skips it, and casts the elements without their scales",
        ),
    },
    "modelopt MIXED_PRECISION": {"tensorrt-llm": _RECENT, "transformers": _NO_MODELOPT},
    "compressed-tensors NVFP4 W4A4": {
        "tensorrt-llm": Answer(
            REFUSES,
            _T + "load_weights_vanilla_helper (asks for weight)",
            "reads the config, but looks for ModelOpt's names; only loaders of a few models rename weight_packed",
        )
    },
    "compressed-tensors NVFP4 W4A16": {
        "tensorrt-llm": Answer(REFUSES, _T_CT, "reads input_activations.strategy, and there are no input_activations"),
    },
    "compressed-tensors MXFP8": {
        "tensorrt-llm": Answer(
            REFUSES, _T_CT, "asks of weights of 8 bits for strategy 'channel' or 'block'; this is 'group'"
        ),
    },
    "compressed-tensors mixed-precision": {
        "tensorrt-llm": Answer(
            REFUSES, _T_CT + ", _build_layer_quant_configs", "reads neither groups of MXFP8 nor targets by class"
        ),
    },
    "mxfp8": {
        "vllm": Answer(
            REFUSES,
            "layers/quantization/__init__.py; modelopt.py: ModelOptMxFp8Config.from_config",
            "looks for weight_scale and ignored_layers; only its MiniMax models rename weight_scale_inv",
        ),
        "sglang": _BLACKWELL,
        "tensorrt-llm": _RECENT,
    },
}
