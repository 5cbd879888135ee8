"""Which weights a policy selects, and the reason that it gives."""

import dataclasses

import pytest

from halfbyte import MXFP8, FormatError, Policy, names
from halfbyte.policy import FormatOverride

from .check import equal, true

LAYERS = 12
DENSE = "model.layers.{}.mlp.up_proj.weight"
ATTENTION = "model.layers.{}.self_attn.q_proj.weight"
EXPERT = "model.layers.{}.mlp.experts.3.up_proj.weight"


def decide(policy: Policy, name: str) -> tuple[bool, str]:
    decision = policy.decide(names.parse(name, LAYERS), LAYERS)
    return decision.quantize, decision.reason


def selects(policy: Policy, name: str) -> bool:
    return decide(policy, name)[0]


@pytest.mark.parametrize(
    ("name", "quantize", "reason"),
    [
        (ATTENTION.format(0), True, "decoder attention"),
        (DENSE.format(0), True, "decoder mlp"),
        (EXPERT.format(0), True, "decoder experts"),
        ("model.layers.0.mlp.gate.weight", False, "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", False, "router"),
        ("model.layers.0.self_attn.indexer.wk.weight", False, "attention indexer"),
        ("lm_head.weight", False, "lm_head"),
        ("model.embed_tokens.weight", False, "embedding"),
        ("model.layers.0.linear_attn.conv1d.weight", False, "convolution"),
        ("model.visual.blocks.0.mlp.up_proj.weight", False, "outside the decoder's layers"),
        ("model.multi_modal_projector.linear_1.weight", False, "outside the decoder's layers"),
        ("model.layers.12.mlp.up_proj.weight", False, "multi-token prediction layer"),
        ("mtp.layers.0.mlp.up_proj.weight", False, "multi-token prediction layer"),
    ],
)
def test_default(name: str, quantize: bool, reason: str) -> None:
    equal(decide(Policy(), name), (quantize, reason))


@pytest.mark.parametrize(
    ("only", "names_in", "names_out"),
    [
        ("all", [ATTENTION, DENSE, EXPERT], []),
        ("mlp", [DENSE, EXPERT, "model.layers.{}.mlp.shared_expert.up_proj.weight"], [ATTENTION]),
        (
            "experts",
            [
                EXPERT,
                "model.layers.{}.mlp.shared_expert.up_proj.weight",
                "model.layers.{}.mlp.shared_experts.down_proj.weight",
                "model.layers.{}.block_sparse_moe.experts.0.w1.weight",
                "model.layers.{}.block_sparse_moe.experts.0.w2.weight",
            ],
            [ATTENTION, DENSE, "model.layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate.weight"],
        ),
    ],
)
def test_only(only: str, names_in: list[str], names_out: list[str]) -> None:
    policy = Policy(only=only)  # type: ignore[arg-type]
    equal([n for n in names_in if not selects(policy, n.format(3))], [])
    equal([n for n in names_out if selects(policy, n.format(3))], [])


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("layers.1", DENSE.format(1), DENSE.format(10)),
        ("layers.1", DENSE.format(1), DENSE.format(11)),
        ("model.layers.1.mlp", EXPERT.format(1), ATTENTION.format(1)),
        ("mlp", DENSE.format(1), ATTENTION.format(1)),
        ("q_proj", ATTENTION.format(1), "model.layers.1.self_attn.q_proj_2.weight"),
        (DENSE.format(1), DENSE.format(1), DENSE.format(2)),
        ("*.layers.1.*", DENSE.format(1), DENSE.format(10)),
        ("*layers.1*", DENSE.format(10), DENSE.format(2)),
        ("*.up_proj", DENSE.format(1), ATTENTION.format(1)),
        ("*.[qk]_proj", ATTENTION.format(1), "model.layers.1.self_attn.v_proj.weight"),
        ("model.layers.?.mlp.*", DENSE.format(1), DENSE.format(10)),
    ],
)
def test_patterns(pattern: str, hits: str, misses: str) -> None:
    """A dotted part is taken whole: layers.1 is not layers.10. A glob covers the whole name."""
    policy = Policy(ignore=(pattern,))
    equal(decide(policy, hits), (False, f"--ignore {pattern}"))
    true(selects(policy, misses), f"{pattern} should not hit {misses}")


def test_layers_at_either_end() -> None:
    policy = Policy(num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1, include_mtp=True)
    equal([i for i in range(LAYERS) if selects(policy, DENSE.format(i))], list(range(2, 11)))
    equal(decide(policy, DENSE.format(1))[1], "among the first 2 layers")
    equal(decide(policy, DENSE.format(11))[1], "among the last 1 layers")
    equal(decide(policy, "model.layers.12.mlp.up_proj.weight"), (True, "MTP mlp"))  # counts at neither end
    equal(decide(policy, "mtp.layers.0.mlp.up_proj.weight"), (True, "MTP mlp"))


def test_extra_high_precision_layers() -> None:
    """Substrings, on purpose: layers.1 is layers.10 too, as the flags of RL frameworks have it."""
    hf = Policy(extra_high_precision_layers_hf=("layers.1", "o_proj"))
    equal([i for i in range(LAYERS) if selects(hf, DENSE.format(i))], [0, *range(2, 10)])
    equal(decide(hf, DENSE.format(10))[1], "--extra-high-precision-layers-hf layers.1")
    megatron = Policy(extra_high_precision_layers_megatron=("layers.3.mlp.linear_fc1", "linear_qkv"))
    equal([i for i in range(LAYERS) if not selects(megatron, DENSE.format(i))], [3])
    equal(decide(megatron, ATTENTION.format(0)), (False, "--extra-high-precision-layers-megatron linear_qkv"))
    true(selects(megatron, "model.layers.3.mlp.down_proj.weight"), "linear_fc2 was not named")
    wrapped = Policy(extra_high_precision_layers_megatron=("module.module.decoder.layers.3.",))
    equal([i for i in range(LAYERS) if not selects(wrapped, DENSE.format(i))], [3])
    newer = Policy(include_mtp=True, extra_high_precision_layers_megatron=("mtp_model_layer.mlp",))
    true(not selects(newer, "mtp.layers.0.mlp.up_proj.weight"), "both names of an MTP layer's block are one")


@pytest.mark.parametrize(
    ("pattern", "name", "quantize"),
    [
        ("lm_head", "lm_head.weight", True),
        ("model.visual", "model.visual.blocks.0.mlp.up_proj.weight", True),
        ("*.mlp.gate", "model.layers.0.mlp.gate.weight", True),
        ("embed_tokens", "model.embed_tokens.weight", False),
        ("*norm*", "model.layers.0.input_layernorm.weight", False),
        ("*conv1d*", "model.layers.0.linear_attn.conv1d.weight", False),
    ],
)
def test_include(pattern: str, name: str, quantize: bool) -> None:
    true(not selects(Policy(), name), "left alone by default")
    equal(selects(Policy(include=(pattern,)), name), quantize)
    true(not selects(Policy(include=(pattern,), ignore=(pattern,)), name), "ignore is stronger")


def test_unmatched() -> None:
    policy = Policy(
        ignore=("up_proj", "layers.99"),
        include=("*visual*", "embed_tokens"),
        extra_high_precision_layers_hf=("q_proj", "qproj"),
        extra_high_precision_layers_megatron=("linear_fc1", "linear_fc3"),
    )
    candidates = [names.parse(name.format(1), LAYERS) for name in (DENSE, ATTENTION, "model.embed_tokens.weight")]
    wanted = [
        "--ignore layers.99",
        "--include *visual*",
        "--include embed_tokens",
        "--extra-high-precision-layers-hf qproj",
    ]
    equal(policy.unmatched(candidates), [*wanted, "--extra-high-precision-layers-megatron linear_fc3"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"only": "moe"}, "only='moe': choose one of 'all', 'mlp', 'experts', 'routed_experts'"),
        ({"num_layers_at_start_in_bf16": -1}, "num_layers_at_start_in_bf16=-1: must not be negative"),
        ({"num_layers_at_end_in_bf16": "1"}, "num_layers_at_end_in_bf16='1': must be an integer"),
        ({"extra_high_precision_layers_hf": "lm"}, "extra_high_precision_layers_hf='lm': takes several patterns"),
        ({"num_layers_at_end_in_bf16": -2}, "num_layers_at_end_in_bf16=-2: must not be negative"),
    ],
)
def test_refuses(values: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Policy(**values)


def test_json_round_trip() -> None:
    policy = Policy("mlp", ("a",), ("b", "c"), 1, 2, ("d",), ("e",), True, ("f",))
    equal(set(policy.to_json()), {field.name for field in dataclasses.fields(Policy)})
    equal(Policy.from_json(policy.to_json()), policy)
    equal(Policy.from_json({}), Policy())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"onyl": "mlp"}, "unknown onyl"),
        ({"ignore": "a"}, "ignore must be a list of strings"),
        ({"ignore": [1]}, "ignore must be a list of strings"),
        ({"include_mtp": 1}, "include_mtp must be bool"),
        ({"num_layers_at_start_in_bf16": True}, "num_layers_at_start_in_bf16 must be int"),
        ({"only": "moe"}, "only='moe'"),
    ],
)
def test_from_json_refuses(data: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Policy.from_json(data)


def test_routed_experts() -> None:
    """Shared experts are experts too, but no token is routed to them."""
    shared = "model.layers.0.mlp.shared_expert.up_proj.weight"
    for only, wanted in (
        ("mlp", [True] * 3),
        ("experts", [False, True, True]),
        ("routed_experts", [False, False, True]),
    ):
        policy = Policy(only=only)
        equal([selects(policy, name) for name in (DENSE.format(0), shared, EXPERT.format(0))], wanted)


def test_ignore_if_present() -> None:
    policy = Policy(ignore_if_present=("*visual*", "layers.0"))
    equal(decide(policy, DENSE.format(0)), (False, "ignored: layers.0"))
    equal(selects(policy, DENSE.format(1)), True)
    equal(policy.unmatched([names.parse(DENSE.format(0), LAYERS)]), [])


def test_overrides_select_by_pattern_or_kind() -> None:
    override = FormatOverride(MXFP8(), ("layers.3", "*.o_proj"), ("experts",))
    chosen = [name for name in (DENSE, ATTENTION, EXPERT) if override.selects(names.parse(name.format(1), LAYERS))]
    equal(chosen, [EXPERT])
    true(override.selects(names.parse(DENSE.format(3), LAYERS)), "by a dotted part")
    true(override.selects(names.parse("model.layers.1.self_attn.o_proj.weight", LAYERS)), "by a glob")
