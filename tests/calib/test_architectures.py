"""Random small models of transformers' own classes: calibrated and proven, or refused with what is needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte import CheckpointError
from halfbyte.calib.activations import _Recorder
from halfbyte.calib.calibrate import calibrate
from halfbyte.calib.data import Windows
from halfbyte.calib.options import Calibration
from halfbyte.calib.runner import Summary
from halfbyte.checkpoint.recompute import verify_source
from halfbyte.checkpoint.verify import verify_structure
from halfbyte.recipe import load_recipe

from ..check import close, equal, true
from ..checkpoint import models

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
GEMMA = {**GROUPED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def gemma_with_vision() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION)
    text = transformers.Gemma3TextConfig(**GEMMA)
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def llava(vision_layers: int) -> Any:
    vision = transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": vision_layers})
    return transformers.LlavaConfig(text_config=transformers.LlamaConfig(**GROUPED), vision_config=vision)


# Name of the class → its config, the weights that are quantized, and names of some.
MODELS: dict[str, tuple[Any, int, str]] = {
    "LlamaForCausalLM": (lambda: transformers.LlamaConfig(**GROUPED), 14, "self_attn.q_proj"),
    "Phi3ForCausalLM": (lambda: transformers.Phi3Config(**GROUPED), 8, "self_attn.qkv_proj"),
    "OPTForCausalLM": (
        lambda: transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
        12,
        "decoder.layers.0.fc1",
    ),
    "Gemma3ForCausalLM": (lambda: transformers.Gemma3TextConfig(**GEMMA), 14, "mlp.down_proj"),
    "Qwen3MoeForCausalLM": (lambda: transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS), 32, "mlp.experts.3.up_proj"),
    "MixtralForCausalLM": (lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4), 32, ".experts.3.w2"),
    "DeepseekV3ForCausalLM": (
        lambda: transformers.DeepseekV3Config(**{**SIZES, **DEEPSEEK}),
        28,
        "self_attn.kv_b_proj",
    ),
    "Gemma3ForConditionalGeneration": (gemma_with_vision, 14, "language_model.model.layers.1.mlp.up_proj"),
    "LlavaForConditionalGeneration": (lambda: llava(3), 14, "language_model.model.layers.1.mlp.up_proj"),
}


def saved(where: Path, name: str, config: Any) -> Path:
    torch.manual_seed(0)
    getattr(transformers, name)(config).to(torch.bfloat16).save_pretrained(where)
    return where


def run(source: Path, out: Path, every_expert: bool = False, layers_path: str | None = None) -> Summary:
    """nvfp4-gptq, with activations calibrated, as `halfbyte calibrate` does it; all that can be verified is."""
    recipe = load_recipe("nvfp4-gptq")
    ids = torch.randint(3, 50, (8, 16), generator=torch.Generator().manual_seed(0))
    calibration = Calibration.of(recipe, every_expert=every_expert, layers_path=layers_path)
    report, summary = calibrate(source, out, recipe.options("modelopt"), calibration, Windows(ids, "random"))
    equal([str(finding) for finding in (*verify_structure(out), *verify_source(out, source))], [])
    true(report is not None and report.unequal_fused_scales == 0, "fused scales")
    return summary


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_and_proven(tmp_path: Path, name: str) -> None:
    config, count, some = MODELS[name]
    summary = run(saved(tmp_path / "source", name, config()), tmp_path / "out")
    names = [name for group in summary.groups for name in group["names"]]
    equal(len(names), count)
    true(any(some in name for name in names), f"no {some} among {names}")
    equal({group["method"] for group in summary.groups if group["tokens"]}, {"gptq"})


class ListedExperts(nn.Module):
    """Experts one by one, as models of others still have them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

        self.gate = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList(Qwen3MLP(config) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        weight, index = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(index == i)
            if len(token):
                out[token] += expert(x[token]) * weight[token, place, None]
        return out.view_as(hidden_states)


@pytest.fixture
def listed(tmp_path: Path) -> Iterator[Path]:
    class ListedConfig(transformers.Qwen3Config):
        model_type = "listed_moe"

    class ListedForCausalLM(transformers.Qwen3ForCausalLM):
        config_class = ListedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = ListedExperts(config)

    transformers.AutoConfig.register("listed_moe", ListedConfig)
    transformers.AutoModelForCausalLM.register(ListedConfig, ListedForCausalLM)
    torch.manual_seed(0)
    ListedForCausalLM(ListedConfig(**GROUPED)).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    yield tmp_path / "source"
    transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop("listed_moe")
    transformers.AutoModelForCausalLM._model_mapping._extra_content.pop(ListedConfig)


@pytest.mark.parametrize("every_expert", [False, True])
def test_experts_one_by_one(tmp_path: Path, listed: Path, every_expert: bool) -> None:
    summary = run(listed, tmp_path / "out", every_expert)
    counts = summary.routed["model.layers.1.mlp.experts"]
    equal((len(counts), sum(counts)), (4, 2 * 8 * 16))
    tokens = {g["names"][0]: g["tokens"] for g in summary.groups if ".1.mlp.experts." in g["names"][0]}
    equal(len(tokens), 8)
    for name, seen in tokens.items():
        expert = int(name.split(".experts.")[1][0])
        equal(seen, counts[expert] + (8 * 16 if every_expert else 0), name)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])  # Gemma 2 has no attention but its own
def test_scales_of_the_kv_cache_are_those_of_its_maxima(tmp_path: Path, name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**GROUPED, layer_types=["full_attention"] * 2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for projection in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.v_proj):
        projection.weight.data *= 2.0**14  # beyond what FP8 holds without a scale
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe = load_recipe("nvfp4", ["kv_cache=fp8_calibrated"])
    ids = torch.randint(3, 50, (8, 16), generator=torch.Generator().manual_seed(0))
    options = recipe.options("modelopt")
    calibrate(tmp_path / "source", tmp_path / "out", options, Calibration.of(recipe), Windows(ids, "random"))
    found = models.read_all(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values.layers[0]
    for part, seen in (("k", cache.keys), ("v", cache.values)):
        wanted = seen.abs().amax() / 448
        true(wanted > 2, f"{part}: {wanted} needs no scale")
        close(found[f"model.layers.0.self_attn.{part}_proj.{part}_scale"], wanted, 1e-5 * float(wanted), part)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "GPTNeoForCausalLM",
            lambda: transformers.GPTNeoConfig(
                hidden_size=64, num_layers=2, num_heads=4, vocab_size=64, attention_types=[[["global"], 2]]
            ),
            "GPTNeoModel: its layers cannot be run one by one",
        ),
        (
            "GptOssForCausalLM",
            lambda: transformers.GptOssConfig(**GROUPED, num_local_experts=4),
            "how 'gpt_oss' stacks its experts is not known",
        ),
        (
            "T5ForConditionalGeneration",
            lambda: transformers.T5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=64),
            "nothing to quantize",
        ),
    ],
)
def test_refused(tmp_path: Path, name: str, config: Any, message: str) -> None:
    source = saved(tmp_path / "source", name, config())
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "out")
    equal([path.name for path in tmp_path.iterdir()], ["source"])


def test_a_layer_with_positional_arguments_is_refused() -> None:
    recorder = _Recorder(nn.Linear(2, 2), [])
    with pytest.raises(CheckpointError, match="Linear: transformers calls this layer with positional arguments"):
        recorder(torch.zeros(1, 2), None)


def test_the_layer_path_settles_which_of_two_towers(tmp_path: Path) -> None:
    """A vision tower with as many layers as the language model."""
    source = saved(tmp_path / "source", "LlavaForConditionalGeneration", llava(2))
    with pytest.raises(CheckpointError, match=r"say so with --layers-path.*model\.language_model\.layers \(2\)"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", layers_path="model.language_model.layers")
