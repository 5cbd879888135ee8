"""Small random models as Hugging Face directories, in every spelling that conversion reads; no training, no network."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, WIDTH, VOCAB, EXPERTS = 64, 96, 64, 4  # the first two divisible by 32, so that MXFP8 fits too
INDEX = "model.safetensors.index.json"
COMPANIONS = {
    "tokenizer.json": '{"version": "1.0", "model": {}}',
    "tokenizer_config.json": '{"model_max_length": 512}',
    "generation_config.json": '{"eos_token_id": 1}',
    "chat_template.jinja": "{{ messages }}\n",
}
MLP_LEAVES = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    tensors: Tensors
    config: dict[str, Any]

    def save(self, directory: Path, shards: int = 1) -> Path:
        """Tensors are dealt out in turn, so that with several shards the members of a fused layer lie apart."""
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=2))
        for name, text in COMPANIONS.items():
            (directory / name).write_text(text)
        files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
        files = ["model.safetensors"] if shards == 1 else files
        for i, file in enumerate(files):
            part = {name: self.tensors[name].contiguous() for name in list(self.tensors)[i::shards]}
            save_file(part, directory / file, metadata={"format": "pt"})
        if shards > 1:
            write_index(directory)
        return directory

    def without(self, *names: str) -> "Model":
        return replace(self, tensors={name: t for name, t in self.tensors.items() if name not in names})

    def plus(self, tensors: Tensors) -> "Model":
        return replace(self, tensors=self.tensors | tensors)

    def configured(self, **values: Any) -> "Model":
        return replace(self, config=self.config | values)


def write_index(directory: Path) -> None:
    """An index of all safetensors files in a directory."""
    tensors = {file.name: load_file(file) for file in sorted(directory.glob("*.safetensors"))}
    size = sum(t.nbytes for part in tensors.values() for t in part.values())
    weight_map = {name: file for file, part in tensors.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def read_all(directory: Path) -> Tensors:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


class Draw:
    """Random weights; each tensor has a size of its own, so that fused members differ in their maximum."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.dtype = dtype
        self.rng = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        size = 0.05 + 0.1 * torch.rand((), generator=self.rng)
        return (torch.randn(shape, generator=self.rng) * size).to(self.dtype)

    def linears(self, **shapes: tuple[int, int]) -> Tensors:
        return {f"{name}.weight": self(*shape) for name, shape in shapes.items()}

    def mlp(self, width: int = WIDTH) -> Tensors:
        return self.linears(gate_proj=(width, HIDDEN), up_proj=(width, HIDDEN), down_proj=(HIDDEN, width))

    def attention(self, bias: bool = False) -> Tensors:
        rows = {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2, "o_proj": HIDDEN}
        out = self.linears(**{leaf: (n, HIDDEN) for leaf, n in rows.items()})
        return out | ({f"{leaf}.bias": self(rows[leaf]) for leaf in list(rows)[:3]} if bias else {})

    def mla(self) -> Tensors:
        """Heads of 16 + 8; latents of 32, whose normalised rest feeds the b projections."""
        down = self.linears(q_a_proj=(32, HIDDEN), kv_a_proj_with_mqa=(40, HIDDEN))
        up = self.linears(q_b_proj=(96, 32), kv_b_proj=(128, 32), o_proj=(HIDDEN, HIDDEN))
        return down | up | {"q_a_layernorm.weight": self(32), "kv_a_layernorm.weight": self(32)}

    def layer(self, attention: Tensors, mlp: Tensors, mlp_name: str = "mlp") -> Tensors:
        norms = {f"{norm}.weight": 1 + self(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")}
        return norms | under("self_attn", attention) | under(mlp_name, mlp)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _model(draw: Draw, layers: list[Tensors], tied: bool, prefix: str = "model", **config: Any) -> Model:
    tensors = {f"{prefix}.embed_tokens.weight": draw(VOCAB, HIDDEN), f"{prefix}.norm.weight": 1 + draw(HIDDEN)}
    for i, layer in enumerate(layers):
        tensors |= under(f"{prefix}.layers.{i}", layer)
    if not tied:
        tensors["lm_head.weight"] = draw(VOCAB, HIDDEN)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": len(layers)}
    return Model(tensors, {"tie_word_embeddings": tied, "dtype": "bfloat16", **heads, **sizes, **config})


def dense(layers: int = 2, bias: bool = True, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Model:
    draw = Draw(dtype)
    made = [draw.layer(draw.attention(bias), draw.mlp()) for _ in range(layers)]
    return _model(draw, made, tied, model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def moe(layers: int = 2, shared: str | None = None, tied: bool = False) -> Model:
    """Qwen3-MoE-like, one matrix per expert. shared: name of a shared expert, as Qwen2-MoE or DeepSeek has one."""
    draw = Draw(seed=1)
    made = []
    for _ in range(layers):
        mlp = {"gate.weight": draw(EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            mlp |= under(f"experts.{expert}", draw.mlp(32))
        if shared:
            mlp |= under(shared, draw.mlp(32)) | {f"{shared}_gate.weight": draw(1, HIDDEN)}
        norms = {f"{part}_norm.weight": 1 + draw(16) for part in "qk"}
        made.append(draw.layer(draw.attention() | norms, mlp))
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return _model(draw, made, tied, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], **sizes)


def mixtral(layers: int = 1) -> Model:
    """block_sparse_moe with w1 (gate), w3 (up) and w2 (down)."""
    draw = Draw(seed=2)
    made = []
    for _ in range(layers):
        mlp = {"gate.weight": draw(EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            shapes = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}
            mlp |= under(f"experts.{expert}", draw.linears(**shapes))
        made.append(draw.layer(draw.attention(), mlp, "block_sparse_moe"))
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return _model(draw, made, False, model_type="mixtral", architectures=["MixtralForCausalLM"], **sizes)


def stack(model: Model) -> Model:
    """The same model with the experts of each layer in two 3-D tensors, gate rows before up rows."""
    tensors = {name: t for name, t in model.tensors.items() if ".experts." not in name}
    for layer in range(model.config["num_hidden_layers"]):
        path = f"model.layers.{layer}.mlp.experts"
        part = {leaf: [model.tensors[f"{path}.{e}.{leaf}.weight"] for e in range(EXPERTS)] for leaf in MLP_LEAVES}
        halves = zip(part["gate_proj"], part["up_proj"], strict=True)
        tensors[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        tensors[f"{path}.down_proj"] = torch.stack(part["down_proj"])
    return replace(model, tensors=tensors)


def mla(mtp_layers: int = 0) -> Model:
    """DeepSeek-like attention; its multi-token-prediction layers follow the decoder's under the same name."""
    draw = Draw(seed=3)
    made = [draw.layer(draw.mla(), draw.mlp()) for _ in range(2)]
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    heads = {"head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 2}
    names = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    model = _model(draw, made, False, **ranks, **heads, **names)
    for i in range(2, 2 + mtp_layers):
        extra = draw.layer(draw.mla(), draw.mlp()) | {"eh_proj.weight": draw(HIDDEN, 2 * HIDDEN)}
        extra |= {"enorm.weight": draw(HIDDEN), "shared_head.head.weight": draw(VOCAB, HIDDEN)}
        model = model.plus(under(f"model.layers.{i}", extra))
    return model


def with_mtp(model: Model) -> Model:
    """Plus a layer `mtp.layers.0`, as Qwen3-Next writes it."""
    draw = Draw(seed=4)
    layer = under("layers.0", draw.layer(draw.attention(), draw.mlp()))
    return model.plus(under("mtp", layer | {"fc.weight": draw(HIDDEN, 2 * HIDDEN), "norm.weight": draw(HIDDEN)}))


def multimodal() -> Model:
    """A language model under `model.language_model`, beside a vision tower of more layers and a projector."""
    draw = Draw(seed=5)
    text = _model(draw, [draw.layer(draw.attention(), draw.mlp()) for _ in range(2)], True, "model.language_model")
    tensors = text.tensors | {"model.vision_tower.patch_embed.proj.weight": draw(HIDDEN, 3, 4, 4)}
    for i in range(3):
        tower = under("attn", draw.linears(qkv=(3 * HIDDEN, HIDDEN), proj=(HIDDEN, HIDDEN))) | under("mlp", draw.mlp())
        tensors |= under(f"model.vision_tower.blocks.{i}", tower)
    tensors |= under("model.multi_modal_projector", draw.linears(linear_1=(HIDDEN, HIDDEN)))
    config = {"model_type": "llava", "text_config": text.config, "vision_config": {"num_hidden_layers": 3}}
    return Model(tensors, config)
