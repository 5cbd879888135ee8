"""Whole models under batch invariance: what is decoded token by token is what a trainer's full sequences gave."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte import runtime, serving
from halfbyte.invariant import batch_invariant
from halfbyte.nn import convert, revert
from halfbyte.recipe import TrainingRecipe

from .check import close, equal, same_bits, true
from .checkpoint import models
from .test_runtime import TINY, make

ROW = hb.NVFP4(scaling="row")
FORMATS_OF_ONE_MODEL = {"a": hb.NVFP4(), "b": hb.NVFP4(scale_rule="four_over_six")}


def llama(**values: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 101, "head_dim": 16}
    return LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, **values)


def gemma2() -> Any:
    from transformers import Gemma2Config

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 101, "head_dim": 16}
    return Gemma2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6, attn_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
    )  # fmt: skip


def mixture() -> Any:
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 101, "head_dim": 16}
    return Qwen3MoeConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip


RECIPES = {
    "w4a4": (TrainingRecipe(ROW, hb.NVFP4(), batch_invariant=True), "row"),
    "weights": (TrainingRecipe(None, hb.NVFP4(scale_rule="four_over_six"), batch_invariant=True), "none"),
    "mxfp8": (TrainingRecipe(hb.MXFP8(), hb.MXFP8(), batch_invariant=True), "stored"),
}


def trained(config: Any, where: Path, recipe: TrainingRecipe) -> tuple[Any, Path]:
    """A random model in training under a recipe, and its quantized checkpoint."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    with torch.no_grad():
        for parameter in model.parameters():  # so that softmax and routers have something to choose
            parameter.mul_(4)
    model.save_pretrained(where / "source")
    convert(model, recipe)
    runtime.save_quantized(model, where / "source", where / "out", recipe.options())
    return model, where / "out"


@torch.no_grad()
def decoded(model: Any, ids: Tensor, prompt: int = 1) -> Tensor:
    """Logits (B, T, V) of a prompt in one pass and then token by token."""
    output = model(ids[:, :prompt], use_cache=True)
    steps = [output.logits]
    for i in range(prompt, ids.shape[1]):
        output = model(ids[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    return torch.cat(steps, 1)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    with batch_invariant():
        return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])


@pytest.mark.parametrize(
    ("config", "how"),
    [(llama, "w4a4"), (llama, "mxfp8"), (gemma2, "w4a4"), (mixture, "w4a4"), (mixture, "weights")],
)
def test_rollout_computes_what_the_trainer_computed(tmp_path: Path, rng, config: Any, how: str) -> None:
    recipe, activations = RECIPES[how]
    trainer, path = trained(config(), tmp_path, recipe)
    ids = torch.randint(0, 101, (3, 12), generator=rng)
    trainer_logits = trainer(ids).logits
    loss = -log_probs(trainer_logits, ids).mean()
    loss.backward()
    for parameter_name, parameter in trainer.named_parameters():
        if "experts" not in parameter_name:  # one of them may have had no token
            true(parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name)
    rollout = hb.load(path, activations=activations, batch_invariant=True)
    for row, prompt in ((slice(2, 3), 1), (slice(0, 2), 7)):
        found = decoded(rollout, ids[row], prompt)
        same_bits(found, trainer_logits.detach()[row], f"logits, prompt of {prompt}")
        same_bits(log_probs(found, ids[row]), log_probs(trainer_logits, ids).detach()[row], "log-probabilities")
    ordinary = hb.load(path, activations=activations)
    true(not torch.equal(decoded(ordinary, ids[:1]), trainer_logits[:1]), "equal without batch_invariant too")


def test_gradients_are_ordinary(tmp_path: Path, rng) -> None:
    """As without batch_invariant, but for the forward pass's roundings; and with activation checkpointing."""
    recipe = TrainingRecipe(None, hb.NVFP4(), batch_invariant=True)
    model, _ = trained(llama(), tmp_path, recipe)
    ids = torch.randint(0, 101, (2, 5), generator=rng)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.float()(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    found = gradients()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    for name, grad in gradients().items():
        same_bits(grad, found[name], f"{name}, checkpointed")
    revert(model)
    convert(model, TrainingRecipe(None, hb.NVFP4()))
    for name, grad in gradients().items():
        close(found[name], grad, float(grad.abs().max()) * 1e-4, name)


def test_the_shipped_model(tmp_path: Path) -> None:
    """Static input scales and row scales; prompts padded on either side; transformers' own generate."""
    from halfbyte.checkpoint.convert import convert as convert_checkpoint
    from halfbyte.checkpoint.options import Options

    convert_checkpoint(TINY, tmp_path / "out", Options(activations="constant"))
    ids = torch.randint(3, 700, (3, 10), generator=torch.Generator().manual_seed(0))
    for activations in ("stored", "row"):
        model = hb.load(tmp_path / "out", activations=activations, batch_invariant=True)
        with torch.no_grad():
            whole = model(ids).logits
        same_bits(decoded(model, ids[1:2]), whole[1:2], activations)
    padded = torch.cat(
        [torch.full((1, 6), 2), ids[1:2]], 1
    )  # on the left: positions from the mask, as generate has them
    mask = (torch.arange(16) >= 6).long()[None]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    with torch.no_grad():
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        right = model(padded.roll(-6, 1), attention_mask=mask.flip(-1)).logits
        packed = torch.cat([ids[2:3, :4], ids[1:2]], 1), torch.cat([torch.arange(4), torch.arange(10)])[None]
        behind = model(packed[0], position_ids=packed[1], use_cache=False).logits
        one = model.generate(ids[1:2], output_logits=True, return_dict_in_generate=True, **options)
        two = model.generate(
            torch.cat([padded, torch.cat([ids[2:3], ids[0:1, :6]], 1)]), output_logits=True,
            attention_mask=torch.cat([mask, torch.ones_like(mask)]), return_dict_in_generate=True, **options,
        )  # fmt: skip
    same_bits(left[:, 6:], whole[1:2], "padded on the left")
    same_bits(right[:, :10], whole[1:2], "padded on the right")
    same_bits(behind[:, 4:], whole[1:2], "packed behind another sequence")
    for step, (alone, beside) in enumerate(zip(one.logits, two.logits, strict=True)):
        same_bits(beside[:1], alone, f"generated token {step}")


def test_experts_in_high_precision(tmp_path: Path) -> None:
    """A layer whose experts the policy leaves alone is batch-invariant too."""
    model = hb.load(
        make(models.moe(), tmp_path, policy=hb.Policy(ignore=("model.layers.1.mlp.experts",))), batch_invariant=True
    )
    equal([hasattr(layer.mlp.experts, "served") for layer in model.model.layers], [True, False])
    ids = torch.arange(24).view(2, 12) * 5 % models.VOCAB
    with torch.no_grad():
        whole = model(ids).logits
    same_bits(decoded(model, ids[1:]), whole[1:])


def test_bytes_written_in_place(tmp_path: Path) -> None:
    """As a weight sync does: the next forward pass has them, at the same addresses."""
    first, second = (make(models.moe(), tmp_path / name, format=fmt) for name, fmt in FORMATS_OF_ONE_MODEL.items())
    model, other = (hb.load(path, batch_invariant=True) for path in (first, second))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before, wanted = model(ids).logits, other(ids).logits
        theirs = dict(other.named_parameters())
        for name, parameter in model.named_parameters():
            if isinstance(parameter, hb.QuantizedTensor):
                for part in ("packed", "block_scale", "tensor_scale"):
                    getattr(parameter, part).copy_(getattr(theirs[name], part))
        found = model(ids).logits
    true(not torch.equal(before, wanted), "both formats give the same")
    same_bits(found, wanted)


def test_experts_of_which_some_are_quantized() -> None:
    """As another tool may leave them; halfbyte does not."""
    contents: Any = SimpleNamespace(formats={"a": hb.NVFP4()}, quantization=SimpleNamespace(activations=False))
    with pytest.raises(hb.UnsupportedError, match=r"mlp\.experts\.gate_up_proj: its experts are not all quantized"):
        serving._serve_experts("mlp.experts", SimpleNamespace(num_experts=1), {(0, "gate_proj"): "a"}, contents, "row")
