"""halfbyte.load: a runnable model from either layout, dense or MoE, that computes what an engine would."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import halfbyte
from halfbyte import MXFP8, NVFP4, CheckpointError, UnsupportedError, quantize
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.plan import Options
from halfbyte.checkpoint.schema import LAYOUTS, Layout
from halfbyte.formats import Format
from halfbyte.runtime import stack_experts

from .check import close, equal, same_bits, true
from .checkpoint import models
from .checkpoint.test_convert import group_amaxes

pytest.importorskip("transformers")
IDS = torch.arange(24).reshape(2, 12) % models.VOCAB
TINY = Path(halfbyte.__file__).parent / "data" / "tiny"


def make(model: models.Model, where: Path, **options: Any) -> Path:
    convert(model.save(where / "source", 2), where / "out", Options(**options))
    return where / "out"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def decoded(model: models.Model, fmt: Format) -> dict[str, Tensor]:
    """The values of every quantized weight, by name: decoder Linears under their group's maximum."""
    amaxes = group_amaxes(model)
    names = [n for n in model.tensors if n.endswith("proj.weight")]
    amax = {n: {"amax": amaxes[n.removesuffix(".weight")]} if isinstance(fmt, NVFP4) else {} for n in names}
    return {n: quantize(model.tensors[n], fmt, **amax[n]).dequantize(torch.bfloat16) for n in names}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six"), MXFP8()], ids=["amax", "4over6", "mxfp8"])
@pytest.mark.parametrize("name", ["dense", "tied"])
def test_dense_weights(tmp_path: Path, name: str, fmt: Format, layout: Layout) -> None:
    model = models.dense(tied=name == "tied")
    loaded = halfbyte.load(make(model, tmp_path, format=fmt, layout=layout, kv_cache="fp8"))
    true(not loaded.training, "still in training mode")
    wanted = model.tensors | decoded(model, fmt)
    if name == "tied":
        wanted |= {"lm_head.weight": model.tensors["model.embed_tokens.weight"]}
    found = loaded.state_dict()
    equal(set(found), set(wanted))
    for tensor, data in wanted.items():
        same_bits(found[tensor], data, tensor)
    true(logits(loaded).isfinite().all(), "not finite")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"activations": "constant"}, {"format": MXFP8()}], ids=["w4a16", "w4a4", "mxfp8"]
)
def test_stacked_and_per_expert_sources_give_one_model(tmp_path: Path, layout: Layout, options: dict[str, Any]) -> None:
    apart = halfbyte.load(make(models.moe(), tmp_path / "a", layout=layout, **options))
    stacked = halfbyte.load(make(models.stack(models.moe()), tmp_path / "b", layout=layout, **options))
    same_bits(logits(stacked), logits(apart))
    values = decoded(models.moe(), options.get("format", NVFP4()))
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        parts = [values[f"{path}.3.{leaf}.weight"] for leaf in ("gate_proj", "up_proj")]
        same_bits(apart.state_dict()[f"{path}.gate_up_proj"][3], torch.cat(parts), path)
        same_bits(apart.state_dict()[f"{path}.down_proj"][3], values[f"{path}.3.down_proj.weight"], path)


@pytest.mark.parametrize("model", [models.mixtral(), models.mla()], ids=["mixtral", "mla"])
def test_other_architectures(tmp_path: Path, model: models.Model) -> None:
    """Both layouts decode to the same values; mixtral's w1, w2, w3 find their places."""
    out = [halfbyte.load(make(model, tmp_path / layout, layout=layout)) for layout in LAYOUTS]
    same_bits(logits(out[0]), logits(out[1]))
    true(logits(out[0]).isfinite().all(), "not finite")


def test_stack_experts() -> None:
    """Twelve experts in order of their numbers, gate rows first, in either spelling; others pass through."""
    spellings = [models.MLP_LEAVES, ("w1", "w3", "w2")]
    for gate, up, down in spellings:
        state = {
            f"m.experts.{e}.{leaf}.weight": torch.full((2, 2), 10.0 * e + i)
            for i, leaf in enumerate((gate, up, down))
            for e in range(12)
        }
        other = {"m.shared.w1.weight": torch.ones(1), "n.experts.0.w1.weight": torch.ones(1)}
        found = stack_experts(state | other, {"m.experts.gate_up_proj", "m.experts.down_proj"})
        equal(set(found), {"m.experts.gate_up_proj", "m.experts.down_proj", *other})
        first = 10.0 * torch.arange(12)
        equal(found["m.experts.gate_up_proj"][:, :, 0], torch.stack([first, first, first + 1, first + 1], 1))
        equal(found["m.experts.down_proj"][:, :, 0], torch.stack([first + 2, first + 2], 1))


def fake(x: Tensor, fmt: Format) -> Tensor:
    """Activations as an engine sees them: under the constant scale 1.0, or per block for MXFP8."""
    amax = {"amax": torch.tensor(2688.0)} if isinstance(fmt, NVFP4) else {}
    return quantize(x, fmt, **amax).dequantize(x.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()], ids=["w4a4", "mxfp8"])
def test_activations_of_linears(tmp_path: Path, layout: Layout, fmt: Format, rng: torch.Generator) -> None:
    activations = "constant" if isinstance(fmt, NVFP4) else "none"
    loaded = halfbyte.load(make(models.moe(), tmp_path, format=fmt, layout=layout, activations=activations))
    modules = dict(loaded.named_modules())
    x = torch.randn(3, models.HIDDEN, generator=rng).bfloat16()
    for name in ("q_proj", "o_proj"):
        linear = modules[f"model.layers.0.self_attn.{name}"]
        same_bits(linear(x), nn.functional.linear(fake(x, fmt), linear.weight, linear.bias), name)
    head = modules["lm_head"]
    same_bits(head(x), nn.functional.linear(x, head.weight))  # not quantized, so its input is not either


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", [NVFP4(), MXFP8()], ids=["w4a4", "mxfp8"])
def test_activations_of_experts(tmp_path: Path, layout: Layout, fmt: Format, rng: torch.Generator) -> None:
    """Token by token, expert by expert: the input of each of its two matmuls is quantized."""
    activations = "constant" if isinstance(fmt, NVFP4) else "none"
    loaded = halfbyte.load(make(models.moe(), tmp_path, format=fmt, layout=layout, activations=activations))
    experts = dict(loaded.float().named_modules())["model.layers.1.mlp.experts"]
    x = torch.randn(5, models.HIDDEN, generator=rng)
    index = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 2], [0, 3]])
    weights = torch.rand(5, 2, generator=rng)
    wanted = torch.zeros(5, models.HIDDEN)
    for token in range(5):
        for k in range(2):
            gate_up = experts.gate_up_proj[index[token, k]] @ fake(x[token], fmt)
            hidden = nn.functional.silu(gate_up[:32]) * gate_up[32:]
            wanted[token] += weights[token, k] * (experts.down_proj[index[token, k]] @ fake(hidden, fmt))
    found = experts(x, index, weights)
    # Float32 sums in another order; a hidden value at the edge of a code may fall on its other side, but none does.
    close(found, wanted, 1e-5)


def test_activations_as_asked(tmp_path: Path, rng: torch.Generator) -> None:
    """Row-scaled though the checkpoint says nothing of activations, or left alone though it does."""
    x = torch.randn(3, models.HIDDEN, generator=rng).bfloat16()
    by_row = halfbyte.load(make(models.moe(), tmp_path / "a"), activations="row")
    linear = dict(by_row.named_modules())["model.layers.0.self_attn.q_proj"]
    wanted = quantize(x, NVFP4(scaling="row")).dequantize(x.dtype)
    same_bits(linear(x), nn.functional.linear(wanted, linear.weight))
    for options in ({"activations": "constant"}, {"format": MXFP8()}):
        alone = halfbyte.load(make(models.moe(), tmp_path / next(iter(options)), **options), activations="none")
        linear = dict(alone.named_modules())["model.layers.0.self_attn.q_proj"]
        same_bits(linear(x), nn.functional.linear(x, linear.weight))
    with pytest.raises(CheckpointError, match="activations='rows': choose 'stored', 'none' or 'row'"):
        halfbyte.load(tmp_path / "a", activations="rows")  # type: ignore[arg-type]


def test_w4a16_leaves_activations_alone(tmp_path: Path, rng: torch.Generator) -> None:
    loaded = halfbyte.load(make(models.dense(), tmp_path))
    linear = dict(loaded.named_modules())["model.layers.0.mlp.down_proj"]
    x = torch.randn(3, models.WIDTH, generator=rng).bfloat16()
    same_bits(linear(x), nn.functional.linear(x, linear.weight))


@pytest.mark.parametrize("fmt", [NVFP4(), NVFP4(scale_rule="four_over_six"), MXFP8()], ids=["amax", "4over6", "mxfp8"])
def test_the_shipped_model_still_predicts(tmp_path: Path, fmt: Format) -> None:
    """Trained weights: most next tokens stay the most likely ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The while statement is used for repeated execution as long as an expression is true. " * 3
    ids = AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt").input_ids
    convert(TINY, tmp_path / "out", Options(format=fmt))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)(ids).logits
        found = halfbyte.load(tmp_path / "out", dtype=torch.float32)(ids).logits
    agree = float((found.argmax(-1) == wanted.argmax(-1)).double().mean())
    true(agree > 0.75, f"{agree:.1%} of the predictions agree")
    true(not torch.equal(found, wanted), "not quantized")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = halfbyte.load(make(models.moe(), tmp_path), dtype=dtype, device="cpu")
    equal({p.dtype for p in loaded.parameters()}, {dtype})
    equal(logits(loaded).dtype, dtype)


def spoil(out: Path, without: str) -> Path:
    tensors = load_file(out / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith(without)}, out / "model.safetensors")
    return out


def test_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no quantization_config"):
        halfbyte.load(models.dense().save(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="no such"):
        halfbyte.load(tmp_path / "nowhere")
    out = make(models.moe(), tmp_path)
    with pytest.raises(CheckpointError, match=r"dtype=torch\.int8: choose torch\.bfloat16"):
        halfbyte.load(out, dtype=torch.int8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(UnsupportedError, match=r"pip install 'halfbyte\[hf\]'"):
            halfbyte.load(out)
    spoil(out, "model.norm")
    with pytest.raises(CheckpointError, match=r"does not fit Qwen3MoeForCausalLM: .*model\.norm\.weight"):
        halfbyte.load(out)
    spoil(out, "model.layers.1.mlp.experts.2.up_proj")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts: an expert lacks its up_proj"):
        halfbyte.load(out)


@pytest.mark.parametrize("options", [{"format": MXFP8()}, {"activations": "constant"}], ids=["mxfp8", "w4a4"])
def test_mixtral_with_quantized_activations(tmp_path: Path, options: dict[str, Any]) -> None:
    halfbyte.load(make(models.mixtral(), tmp_path, **options))


def test_mtp_layers_are_left_out(tmp_path: Path) -> None:
    """transformers has no place for them, and runs the model without."""
    with_mtp = logits(halfbyte.load(make(models.with_mtp(models.moe()), tmp_path / "a")))
    same_bits(with_mtp, logits(halfbyte.load(make(models.moe(), tmp_path / "b"))))


@pytest.mark.parametrize("model", [models.multimodal(), models.dense().configured(intermediate_size=32)])
def test_what_transformers_refuses(tmp_path: Path, model: models.Model) -> None:
    with pytest.raises(halfbyte.HalfbyteError):
        halfbyte.load(make(model, tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("device", "said"), [("cuda", "no CUDA GPU is usable here; use device='cpu'"), ("gpu", "not a device")]
)
def test_devices_that_are_not_here(device: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        halfbyte.load("anything", device=device)
