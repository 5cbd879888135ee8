"""What engines' loaders ask of a checkpoint, as data: each rule, what an engine does when it is broken, and where that
is written in the engine's code. `judge` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from . import load_checks as check
from .load_case import ENGINES, Case, Engine, declared_for, scale_histograms
from .load_checks import Places
from .survey import Survey

CAUTION, WRONG, REFUSES = "caution", "loads wrongly", "refuses"
OUTCOMES = (CAUTION, WRONG, REFUSES)  # from harmless to worst
_MODELOPT = {
    "vllm": "vllm/model_executor/layers/quantization/modelopt.py",
    "sglang": "sglang/srt/layers/quantization/modelopt_quant.py",
    "tensorrt-llm": "tensorrt_llm/_torch/model_config.py, _torch/modules/linear.py",
    "transformers": "transformers/quantizers/auto.py, quantizer_compressed_tensors.py",
}


@dataclass(frozen=True)
class Rule:
    """One thing that loaders ask.

    Attributes:
        check: yields where it is broken, and how.
        outcomes: engine → what it does then; engines that do not ask are left out.
        source: where that is written.
    """

    name: str
    check: Callable[[Case], Places]
    outcomes: Mapping[Engine, str]
    source: str


def _all(outcome: str, *but: Engine) -> dict[Engine, str]:
    return {engine: outcome for engine in ENGINES if engine not in but}


RULES = (
    Rule("names", check.unknown_tensors, _all(REFUSES), "each engine's weight loader: dtype and shape of a parameter"),
    Rule("names", check.other_layout, _all(REFUSES), "each engine's weight loader: names of a layer's parameters"),
    Rule("names", check.wrong_tensors, _all(REFUSES), "create_weights of each engine's NVFP4 and MXFP8 Linear"),
    Rule(
        "required keys",
        check.required_keys,
        _all(REFUSES),
        "from_config of vLLM's ModelOptNvFp4Config and SGLang's ModelOptFp4Config; transformers' FineGrainedFP8Config",
    ),
    Rule(
        "input scales",
        check.no_input_scale,
        {"vllm": WRONG, "sglang": WRONG, "tensorrt-llm": REFUSES},
        "vLLM and SGLang: torch.empty of PerTensorScaleParameter; TensorRT-LLM load_weight_scales_nvfp4",
    ),
    Rule(
        "exclusion",
        check.quantized_but_excluded,
        _all(REFUSES),
        "vLLM is_layer_excluded, SGLang is_layer_excluded, TensorRT-LLM is_module_excluded_from_quantization, "
        "compressed-tensors match_name",
    ),
    Rule(
        "exclusion",
        check.kept_but_not_excluded,
        _all(REFUSES, "transformers") | {"transformers": WRONG},
        "the same; transformers then makes up the weights that it misses",
    ),
    Rule(
        "exclusion",
        check.partly_excluded,
        {"vllm": REFUSES},
        "vLLM is_layer_skipped and compressed-tensors' should_ignore_layer: some but not all shards",
    ),
    Rule(
        "fused layers",
        check.formats_differ,
        {"vllm": REFUSES, "sglang": REFUSES, "tensorrt-llm": REFUSES},
        "packed_modules_mapping of vLLM's and SGLang's models: one method for a fused layer",
    ),
    Rule(
        "fused layers",
        check.tensor_scales_differ,
        {"vllm": WRONG, "sglang": WRONG, "tensorrt-llm": REFUSES},
        "vLLM and SGLang take weight_scale_2.max() (MoE: the gate's) and rescale nothing; TensorRT-LLM asserts",
    ),
    Rule(
        "fused layers",
        check.input_scales_differ,
        {"vllm": CAUTION, "sglang": CAUTION, "tensorrt-llm": REFUSES},
        "vLLM and SGLang take input_scale.max(); TensorRT-LLM asserts",
    ),
    Rule(
        "experts",
        check.experts_incomplete,
        _all(WRONG, "tensorrt-llm") | {"tensorrt-llm": REFUSES},
        "vLLM RoutedExperts: what no file holds stays torch.empty",
    ),
    Rule(
        "experts",
        check.experts_partly_quantized,
        _all(REFUSES, "transformers") | {"transformers": WRONG},
        "FusedMoE of vLLM and SGLang, TensorRT-LLM's MoE backends: one method for all experts of a layer",
    ),
    Rule(
        "experts",
        check.stacked_experts,
        _all(REFUSES),
        "expert_params_mapping of each engine's models: one 2-D matrix per expert",
    ),
    Rule(
        "experts",
        check.fused_experts_in_transformers,
        {"transformers": WRONG},
        "transformers ≤ 5.23 fuses experts and drops weight_global_scale",
    ),
    Rule(
        "scales",
        check.bad_scales,
        _all(WRONG),
        "no engine looks: a NaN or negative scale is multiplied with",
    ),
    Rule(
        "scales",
        check.scalar_scales,
        {"transformers": REFUSES},
        "compressed-tensors initializes weight_global_scale as [1]",
    ),
    Rule(
        "KV cache",
        check.no_kv_scales,
        {"transformers": CAUTION},
        "compressed-tensors registers k_scale and v_scale; missing ones are reported and keep their initial value",
    ),
    Rule(
        "Marlin",
        check.flushed_by_marlin,
        {"vllm": CAUTION, "sglang": CAUTION},
        "marlin_utils_fp4.nvfp4_marlin_process_scales: block scales as S0E5M3, on GPUs without FP4 cores",
    ),
    Rule(
        "Marlin",
        check.mostly_flushed_by_marlin,
        {"vllm": WRONG, "sglang": WRONG},
        "marlin_utils_fp4.nvfp4_marlin_process_scales: block scales as S0E5M3, on GPUs without FP4 cores",
    ),
    Rule(
        "tensor parallelism",
        check.rows_do_not_split,
        {"vllm": REFUSES, "sglang": REFUSES, "tensorrt-llm": REFUSES},
        "divide() of ColumnParallelLinear and QKVParallelLinear; TensorRT-LLM Linear's asserts",
    ),
    Rule(
        "tensor parallelism",
        check.blocks_do_not_split,
        {"vllm": REFUSES, "sglang": REFUSES, "tensorrt-llm": REFUSES},
        "create_weights: input_size_per_partition % 16 (MXFP8: 32) must be 0",
    ),
)

# scheme, as `Declared.scheme` says it → engine → (outcome, why); an engine that is not listed loads it.
_NO_MODELOPT = (REFUSES, "has no quantizer for 'modelopt', skips it, and then finds packed weights of half the width")
_RECENT = (CAUTION, "only its releases of 2026 read this")
SCHEMES: dict[str, dict[Engine, tuple[str, str]]] = {
    "modelopt NVFP4": {"transformers": _NO_MODELOPT},
    "modelopt W4A16_NVFP4": {
        "sglang": (REFUSES, "quant_algo must be FP8 or NVFP4; use the compressed-tensors layout for weight-only"),
        "tensorrt-llm": _RECENT,
        "transformers": _NO_MODELOPT,
    },
    "modelopt MXFP8": {"tensorrt-llm": _RECENT, "transformers": _NO_MODELOPT},
    "modelopt MIXED_PRECISION": {
        "sglang": (REFUSES, "its mixed precision knows NVFP4 with FP8 only"),
        "tensorrt-llm": _RECENT,
        "transformers": _NO_MODELOPT,
    },
    "compressed-tensors NVFP4 W4A4": {"tensorrt-llm": _RECENT},
    "compressed-tensors NVFP4 W4A16": {
        "tensorrt-llm": (REFUSES, "reads input_activations.strategy, and there are no input_activations"),
    },
    "compressed-tensors MXFP8": {
        "tensorrt-llm": (REFUSES, "weights of 8 bits need strategy 'channel' or 'block'; this is 'group'"),
    },
    "compressed-tensors mixed-precision": {
        "sglang": (CAUTION, "not known to load it"),
        "tensorrt-llm": (REFUSES, "weights of 8 bits need strategy 'channel' or 'block'; this is 'group'"),
    },
    "mxfp8": {
        "vllm": (REFUSES, "knows no quant_method 'mxfp8'; it reads MXFP8 as ModelOpt's or compressed-tensors'"),
        "tensorrt-llm": _RECENT,
    },
}


@dataclass(frozen=True)
class Objection:
    """What an engine would do about one thing in a checkpoint."""

    rule: str
    outcome: str
    where: str
    what: str
    source: str

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return {"rule": self.rule, "outcome": self.outcome, "where": self.where, "what": self.what} | {
            "source": self.source
        }


@dataclass(frozen=True)
class Verdict:
    """What an engine would do with a checkpoint, and why."""

    engine: Engine
    reads: str
    scheme: str
    objections: tuple[Objection, ...]

    @property
    def outcome(self) -> str:
        """ "loads", "loads wrongly" or "refuses": the worst of the objections, cautions aside."""
        worst = max((OUTCOMES.index(o.outcome) for o in self.objections), default=0)
        return "loads" if worst == 0 else OUTCOMES[worst]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "engine": self.engine,
            "outcome": self.outcome,
            "reads": self.reads,
            "scheme": self.scheme,
            "objections": [objection.to_json() for objection in self.objections],
        }


def parse_engines(text: str) -> tuple[Engine, ...]:
    """Engines from a comma-separated list; "all" for each.

    Raises:
        CheckpointError: an unknown name.
    """
    known: dict[str, Engine] = {engine: engine for engine in ENGINES}
    wanted = [part.strip().lower() for part in text.split(",") if part.strip()]
    wanted = list(ENGINES) if wanted == ["all"] else wanted
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise CheckpointError(
            f"--for {text}: no engine {', '.join(unknown) or 'named'}; choose from {', '.join(ENGINES)}, or all"
        )
    return tuple(dict.fromkeys(known[name] for name in wanted))


def judge(
    found: Survey,
    engines: Sequence[Engine] = ENGINES,
    tensor_parallel: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    histograms: Mapping[str, Tensor] | None = None,
) -> list[Verdict]:
    """What each engine would do; reads scales, but no elements.

    histograms: of block-scale bytes, as `scale_histograms` gives them, where they are known already.

    Raises:
        CheckpointError: a tensor cannot be read, or neither config nor tensors are of NVFP4 or MXFP8.
    """
    declarations = {engine: declared_for(found, engine) for engine in engines}
    if not found.weights and not any(d is not None and d.scheme in SCHEMES for d in declarations.values()):
        schemes = ", ".join(sorted({"nothing" if d is None else d.scheme for d in declarations.values()}))
        raise CheckpointError(
            f"{found.checkpoint.directory}: declares {schemes} and has no weight in NVFP4 or MXFP8; this knows no other"
        )
    histograms = scale_histograms(found, progress) if histograms is None else histograms
    verdicts = []
    for engine in engines:
        declared = declarations[engine]
        if declared is None:
            what = "no quantization is declared, so the engine builds a model in high precision"
            objection = Objection("names", REFUSES, "config.json", what, "each engine's reader of quantization_config")
            objections: tuple[Objection, ...] = (objection,) if found.weights else ()
            verdicts.append(Verdict(engine, "config.json", "none", objections))
            continue
        case = Case(found, engine, declared, tensor_parallel, histograms)
        verdicts.append(Verdict(engine, declared.file, declared.scheme, tuple(_objections(case))))
    return verdicts


def _objections(case: Case) -> Iterator[Objection]:
    declared, source = case.declared, _MODELOPT[case.engine]
    if declared.scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        what = f"declares {declared.scheme!r}, which is none of the schemes of NVFP4 and MXFP8: {known}"
        yield Objection("scheme", REFUSES, declared.file, what, source)
        return
    if (found := SCHEMES[declared.scheme].get(case.engine)) is not None:
        outcome, why = found
        yield Objection("scheme", outcome, declared.file, f"{declared.scheme}: {case.engine} {why}", source)
        if outcome == REFUSES:
            return  # nothing is read after that
    for rule in RULES:
        if (outcome := rule.outcomes.get(case.engine, "")) != "":
            for where, what in rule.check(case):
                yield Objection(rule.name, outcome, where, what, rule.source)
