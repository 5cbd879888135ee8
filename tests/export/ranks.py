"""Models that four ranks can share, and ranks played one after the other on one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.options import Options
from halfbyte.export import Exporter, Piece, Placement, merge
from halfbyte.export.shards import to_megatron

from ..checkpoint.models import Draw, Model, Tensors, under

HIDDEN, WIDTH, VOCAB, EXPERTS = 128, 128, 90, 4  # parts of a quarter are still divisible by 32; the vocabulary is not


def mlp(draw: Draw) -> Tensors:
    return draw.linears(gate_proj=(WIDTH, HIDDEN), up_proj=(WIDTH, HIDDEN), down_proj=(HIDDEN, WIDTH))


def layer(draw: Draw, attention: Tensors, block: Tensors) -> Tensors:
    norms = {f"{norm}.weight": 1 + draw(HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")}
    return norms | under("self_attn", attention) | under("mlp", block)


def attention(draw: Draw, bias: bool = False) -> Tensors:
    rows = {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2, "o_proj": HIDDEN}
    biases = {f"{leaf}.bias": draw(rows[leaf]) for leaf in list(rows)[:3]} if bias else {}
    norms = {f"{part}_norm.weight": 1 + draw(16) for part in "qk"}
    return draw.linears(**{leaf: (n, HIDDEN) for leaf, n in rows.items()}) | biases | norms


def moe_block(draw: Draw, shared: str) -> Tensors:
    block = {"gate.weight": draw(EXPERTS, HIDDEN)} | under(shared, mlp(draw))
    for expert in range(EXPERTS):
        block |= under(f"experts.{expert}", mlp(draw))
    return block


def _model(draw: Draw, layers: list[Tensors], tied: bool, **config: Any) -> Model:
    tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN)}
    for i, tensors_of_layer in enumerate(layers):
        tensors |= under(f"model.layers.{i}", tensors_of_layer)
    if not tied:
        tensors["lm_head.weight"] = draw(VOCAB, HIDDEN)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": VOCAB}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": len(layers)}
    return Model(tensors, {"tie_word_embeddings": tied, "dtype": "bfloat16", **heads, **sizes, **config})


def dense() -> Model:
    """Qwen2-like: biases on q, k and v; tied."""
    draw = Draw(seed=10)
    return _model(draw, [layer(draw, attention(draw, True), mlp(draw)) for _ in range(2)], True, model_type="qwen2")


def moe() -> Model:
    """Qwen2-MoE-like: a gated shared expert."""
    draw = Draw(seed=11)
    block = moe_block(draw, "shared_expert") | {"shared_expert_gate.weight": draw(1, HIDDEN)}
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH}
    return _model(draw, [layer(draw, attention(draw), block)], False, model_type="qwen2_moe", **sizes)


def deep() -> Model:
    """Four layers of experts, tied, for pipelines."""
    draw = Draw(seed=13)
    layers = [layer(draw, attention(draw), moe_block(draw, "shared_expert")) for _ in range(4)]
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH}
    return _model(draw, layers, True, model_type="qwen2_moe", **sizes)


def deepseek() -> Model:
    """MLA, a dense layer, one of experts with shared ones and a correction bias, and an MTP layer, which repeats the
    embedding and the output layer."""
    draw = Draw(seed=12)

    def mla() -> Tensors:
        down = draw.linears(q_a_proj=(32, HIDDEN), kv_a_proj_with_mqa=(40, HIDDEN))
        up = draw.linears(q_b_proj=(8 * 24, 32), kv_b_proj=(8 * 32, 32), o_proj=(HIDDEN, HIDDEN))
        return down | up | {"q_a_layernorm.weight": draw(32), "kv_a_layernorm.weight": draw(32)}

    def experts() -> Tensors:
        bias = {"gate.e_score_correction_bias": draw(EXPERTS).float()}
        return moe_block(draw, "shared_experts") | bias

    layers = [layer(draw, mla(), mlp(draw)), layer(draw, mla(), experts())]
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    more = {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH, "num_nextn_predict_layers": 1}
    model = _model(draw, layers, False, model_type="deepseek_v3", **ranks, **more)
    extra = layer(draw, mla(), experts()) | {"eh_proj.weight": draw(HIDDEN, 2 * HIDDEN)}
    extra |= {f"{name}.weight": draw(HIDDEN) for name in ("enorm", "hnorm", "shared_head.norm")}
    extra |= {"embed_tokens.weight": model.tensors["model.embed_tokens.weight"].clone()}
    extra |= {"shared_head.head.weight": model.tensors["lm_head.weight"].clone()}
    return model.plus(under("model.layers.2", extra))


def placements(tp: int, ep: int, etp: int | None = None) -> list[Placement]:
    """Of all ranks: tensor parallelism innermost; experts are dealt out over the same ranks in their own way."""
    etp = tp if etp is None else etp
    world = max(tp, etp * ep)
    return [Placement(r % tp, tp, r % etp, etp, r // etp % ep, ep) for r in range(world)]


class Ranks:
    """Ranks one after the other, twice: first to learn each one's maxima, then with those of all who share weights."""

    def __init__(self, source: Path, options: Options, ranks: list[Placement], **arguments: Any) -> None:
        self.ranks, self._calls = ranks, [[] for _ in ranks]
        self._recording = True
        self._count = [iter(range(1 << 30)) for _ in ranks]
        self._arguments = {"source": source, "options": options, **arguments}

    def exporter(self, rank: int) -> Exporter:
        def reduce(maxima: Tensor, expert: bool) -> Tensor:
            if self._recording:
                self._calls[rank].append((expert, maxima.clone()))
                return maxima
            here, call = self._group(rank, expert), next(self._count[rank])
            partners = [self._calls[r][call] for r, p in enumerate(self.ranks) if self._group(r, expert) == here]
            if {(kind, len(part)) for kind, part in partners} != {(expert, len(maxima))}:
                raise AssertionError(f"rank {rank}: its call {call} is not that of its partners")
            return torch.stack([part for _, part in partners]).amax(0)

        return Exporter.like(placement=self.ranks[rank], reduce=reduce, **self._arguments)

    def _group(self, rank: int, expert: bool) -> tuple[int, ...]:
        """Ranks that are equal here hold parts of the same weights."""
        p = self.ranks[rank]
        return (p.ep_rank,) if expert else (rank // p.tp_size,)

    def export(self, tensors: Tensors, spec: Any = "te") -> dict[str, Tensor]:
        """What all ranks send, put together."""
        exporters = [self.exporter(rank) for rank in range(len(self.ranks))]
        model = exporters[0].model
        shards = [to_megatron(model, tensors, placement, spec) for placement in self.ranks]
        pieces: list[Piece] = []
        for self._recording in (True, False):
            buckets = [bucket for e, s in zip(exporters, shards, strict=True) for bucket in e.export(s.items())]
            pieces = [piece for bucket in buckets for piece in bucket.pieces]
            if not any(self._calls):  # no rank has a part of anything
                break
        return merge(pieces, exporters[0].entries)
