"""Launch 4- or 8-bit reinforcement learning with a miles- or slime-like trainer: convert the checkpoint, start the job.

    python examples/rl_launch.py --model-name Qwen3-30B-A3B --hardware B200 --rollout-nvfp4 --train-nvfp4 --dry-run \\
        -- --rollout-batch-size 32 --n-samples-per-prompt 8 --advantage-estimator grpo ...

What comes after -- goes to the trainer as it is. Engines start from MODEL_DIR/MODEL_NAME-NVFP4 (or -MXFP8): it is
converted where it is missing, and refused where it was converted with other options. What the trainer quantizes is
written from the same policy, as a precision config for TransformerEngine, and compared with the checkpoint's plan
before anything starts, weight by weight. TransformerEngine's own switches (NVTE_NVFP4_4OVER6, …) are read from the
environment, and decide the checkpoint's scale rule too.

No shell runs anything: commands are lists, so a name can hold any character. That is why the trainer is started as
Ray's driver and not by `ray job submit`, which joins its arguments to a line for a shell. A cluster that runs already
must have been started in the environment that --dry-run prints.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

import halfbyte as hb
from halfbyte.checkpoint.convert import convert
from halfbyte.checkpoint.hub import resolve
from halfbyte.checkpoint.journal import working_directory
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.options import Options
from halfbyte.checkpoint.plan import Plan, decoder_layers, make_plan
from halfbyte.checkpoint.shards import Checkpoint
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.recipe import TrainingRecipe, TransformerEngine, read_precision_config

GPUS_PER_NODE = {"H100": 8, "H200": 8, "B200": 8, "B300": 8, "GB200": 4, "GB300": 4}
BLACKWELL = ("B200", "B300", "GB200", "GB300")
# What engines and TransformerEngine are told, so that they round as the contract says; miles sets the same.
NVFP4_ENVIRONMENT = {
    "NVTE_USE_FAST_MATH": "0",
    "TRTLLM_DISABLE_FP4_QUANT_FAST_MATH": "1",
    "FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH": "1",
    "SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION": "1",
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "1",
    "NVTE_NVFP4_DISABLE_RHT": "1",
    "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "1",
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "1",
    "NVTE_BACKWARD_OVERRIDE": "high_precision",
}
TRAIN_ARGV = {
    "nvfp4": ["--transformer-impl", "transformer_engine", "--bf16", "--fp4-format", "e2m1", "--fp4-recipe", "nvfp4"],
    "mxfp8": ["--transformer-impl", "transformer_engine", "--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"],
}
ROLLOUT_ARGV = {
    "nvfp4": ["--sglang-moe-runner-backend", "flashinfer_trtllm_routed", "--sglang-kv-cache-dtype", "bf16"],
    "mxfp8": ["--sglang-moe-runner-backend", "cutlass", "--sglang-fp8-gemm-backend", "triton"],
}
# Megatron's module paths of what a policy's `only` leaves to be quantized.
MODULES = {
    "routed_experts": ["*.mlp.experts.*"],
    "experts": ["*.mlp.experts.*", "*.mlp.shared_experts.*"],
    "mlp": ["*.mlp.*"],
    "all": ["*.mlp.*", "*.self_attention.*"],
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", required=True, help="a directory in MODEL_DIR")
    parser.add_argument("--model-dir", type=Path, default=Path("models"))
    parser.add_argument("--hf-repo", help="hub id, where MODEL_DIR/MODEL_NAME is missing; Qwen/MODEL_NAME by default")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--run-id", default="run")
    parser.add_argument("--hardware", choices=GPUS_PER_NODE, default="B200")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--num-gpus-per-node", type=int, help="by default as many as the hardware has")
    parser.add_argument(
        "--no-colocate", action="store_true", help="half of a node's GPUs train; so with --rollout-nvfp4"
    )
    for stage in ("rollout", "train"):
        one = parser.add_mutually_exclusive_group()
        one.add_argument(f"--{stage}-mxfp8", dest=stage, action="store_const", const="mxfp8")
        one.add_argument(f"--{stage}-nvfp4", dest=stage, action="store_const", const="nvfp4")
    parser.add_argument("--only", choices=MODULES, help="by default routed_experts for NVFP4, all for MXFP8")
    parser.add_argument("--num-layers-at-start-in-bf16", type=int, default=0)
    parser.add_argument("--num-layers-at-end-in-bf16", type=int, default=0)
    parser.add_argument("--extra-high-precision-layers-hf", nargs="*", default=[])
    parser.add_argument("--extra-high-precision-layers-megatron", nargs="*", default=[])
    parser.add_argument("--train-script", default="train.py")
    parser.add_argument("--device", default="cpu", help="where the checkpoint is converted")
    parser.add_argument("--dry-run", action="store_true", help="convert and start nothing; print what would be")
    own, rest = (list(argv), []) if "--" not in argv else (argv[: argv.index("--")], argv[argv.index("--") + 1 :])
    args = parser.parse_args(own)
    args.trainer_argv = list(rest)
    for name in ("model_name", "run_id"):
        if Path(getattr(args, name)).name != getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)!r}: needs a name, not a path")
    if args.rollout and args.train and args.rollout != args.train:
        parser.error(f"--rollout-{args.rollout} with --train-{args.train}: the trainer must compute what is served")
    if (args.rollout or args.train) and args.hardware not in BLACKWELL:
        parser.error(
            f"--hardware {args.hardware}: SGLang and TransformerEngine need Blackwell for this; on other GPUs train "
            "with halfbyte.nn and serve with halfbyte.load, as grpo_tiny.py does"
        )
    args.num_gpus_per_node = args.num_gpus_per_node or GPUS_PER_NODE[args.hardware]
    args.no_colocate |= args.rollout == "nvfp4"
    if args.no_colocate and args.num_gpus_per_node < 2:
        parser.error("--num-gpus-per-node 1: training and rollout need one GPU each without colocation")
    return args


def environment(args: argparse.Namespace, outer: Mapping[str, str]) -> dict[str, str]:
    """What trainer and engines are told beside their arguments; the outer environment's own choices hold."""
    if "nvfp4" not in (args.rollout, args.train):
        return {}
    chosen = {k: v for k, v in outer.items() if k.startswith(("NVTE_", "FLASHINFER_")) or k in NVFP4_ENVIRONMENT}
    return NVFP4_ENVIRONMENT | chosen


def training_recipe(args: argparse.Namespace, env: Mapping[str, str]) -> TrainingRecipe | None:
    """What a trainer started with `environment` and `train_argv` quantizes, but for its precision config."""
    layers = hb.Policy(
        num_layers_at_start_in_bf16=args.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=args.num_layers_at_end_in_bf16,
    )
    if "nvfp4" in (args.rollout, args.train):
        return TransformerEngine.from_env(env, layers)
    if "mxfp8" in (args.rollout, args.train):
        return TrainingRecipe(hb.MXFP8(), hb.MXFP8(), hb.MXFP8(), backward="quantized", policy=layers)
    return None


def checkpoint_options(args: argparse.Namespace, recipe: TrainingRecipe | None) -> Options | None:
    """What the engines' checkpoint is converted to: the weights of the training recipe; None for bf16."""
    if args.rollout is None or recipe is None:
        return None
    policy = replace(
        recipe.policy,
        only=args.only or ("routed_experts" if args.rollout == "nvfp4" else "all"),
        extra_high_precision_layers_hf=tuple(args.extra_high_precision_layers_hf),
        extra_high_precision_layers_megatron=tuple(args.extra_high_precision_layers_megatron),
    )
    return replace(recipe.options(), policy=policy, activations="constant" if args.rollout == "nvfp4" else "none")


def resolve_checkpoint(args: argparse.Namespace, options: Options | None) -> tuple[Path, Path]:
    """(the model in high precision, the checkpoint that engines start from), which is converted where it is missing.

    Raises:
        CheckpointError: there is no such model, or the checkpoint was converted with other options.
    """
    source = args.model_dir / args.model_name
    if not source.is_dir() and not args.dry_run:
        source = resolve(args.hf_repo or f"Qwen/{args.model_name}")
    if options is None:
        return source, source
    target = args.model_dir / f"{args.model_name}-{args.rollout.upper()}"
    if target.is_dir():
        found = read_manifest(target)
        if found is None or found[0] != options:
            raise CheckpointError(
                f"{target}: {'no halfbyte checkpoint' if found is None else f'converted with {found[0]}'}; wanted is "
                f"{options}: remove it, or use the same options"
            )
    elif not args.dry_run:
        print(f"converting {source} to {target}", flush=True)
        convert(source, target, options, device=args.device, resume=working_directory(target).exists())
    return source, target


def precision_config(args: argparse.Namespace, only: str) -> str:
    """A --te-precision-config-file by which TransformerEngine quantizes what the policy does, as text."""
    key = "fp4_quantization_recipe" if args.train == "nvfp4" else "fp8_quantization_recipe"
    kind = "transformer_engine_config_type"
    configs = {
        args.train: {kind: "TEQuantizationParams", "training_recipe": {key: args.train}},
        "bf16": {kind: "TEQuantizationParams", "training_recipe": {}},
    }
    patterns = [(f"*{part}*", "bf16") for part in args.extra_high_precision_layers_megatron]
    patterns += [(pattern, args.train) for pattern in MODULES[only]] + [("*", "bf16")]
    matchers = {
        f"{index:02}_{config}": {"type": "glob", "enabled": True, "pattern": pattern, "config": config}
        for index, (pattern, config) in enumerate(patterns)
    }
    return yaml.safe_dump({"configs": configs, "matchers": matchers}, sort_keys=False)


def check_agreement(plan: Plan, layers: int, recipe: TrainingRecipe, config: str) -> int:
    """The trainer quantizes the weights that the checkpoint has quantized, and no others; how many there are.

    Raises:
        CheckpointError: it does not.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "precision.yaml"
        file.write_text(config, encoding="utf-8")
        trained = read_precision_config(file, recipe)
    count = 0
    for item in plan:
        quantizes = item.linear and trained.policy.decide(item.name, layers).quantize and bool(trained.layer(item.name))
        if quantizes is not (item.format is not None):
            raise CheckpointError(
                f"{item.name.full}: the trainer would {'' if quantizes else 'not '}quantize it, the checkpoint does"
                f"{' not' if quantizes else ''} ({item.decision.reason}): give --extra-high-precision-layers-hf and "
                "-megatron that mean the same"
            )
        count += quantizes
    return count


def train_argv(args: argparse.Namespace, source: Path, checkpoint: Path, env: Mapping[str, str]) -> list[str]:
    """The trainer's command."""
    run = args.output_dir / args.run_id
    trains = args.num_gpus_per_node // 2 if args.no_colocate else args.num_gpus_per_node
    argv = [sys.executable, args.train_script, "--hf-checkpoint", str(checkpoint), "--ref-load", str(source)]
    argv += ["--megatron-to-hf-mode", "bridge", "--load", str(run / "checkpoints"), "--save", str(run / "checkpoints")]
    argv += ["--actor-num-nodes", str(args.num_nodes), "--num-gpus-per-node", str(args.num_gpus_per_node)]
    argv += ["--actor-num-gpus-per-node", str(trains)]
    if args.no_colocate:
        argv += ["--rollout-num-gpus", str((args.num_gpus_per_node - trains) * args.num_nodes)]
    else:
        argv.append("--colocate")
    if args.num_layers_at_start_in_bf16 or args.num_layers_at_end_in_bf16:
        argv += ["--first-last-layers-bf16", "--num-layers-at-start-in-bf16", str(args.num_layers_at_start_in_bf16)]
        argv += ["--num-layers-at-end-in-bf16", str(args.num_layers_at_end_in_bf16)]
    for side in ("hf", "megatron"):
        if parts := getattr(args, f"extra_high_precision_layers_{side}"):
            argv += [f"--extra-high-precision-layers-{side}", *parts]
    argv += ROLLOUT_ARGV.get(args.rollout, [])
    if args.train:
        argv += [*TRAIN_ARGV[args.train], "--te-precision-config-file", str(run / "precision.yaml")]
    if env:
        argv += ["--train-env-vars", json.dumps(env)]
    return argv + args.trainer_argv


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    env = environment(args, os.environ)
    recipe = training_recipe(args, env)
    options = checkpoint_options(args, recipe)
    source, checkpoint = resolve_checkpoint(args, options)
    only = options.policy.only if options else args.only or ("routed_experts" if args.train == "nvfp4" else "all")
    config = precision_config(args, only) if args.train else None
    if config and options and recipe and source.is_dir():
        opened = Checkpoint(source)
        count = check_agreement(make_plan(opened, options), decoder_layers(opened), recipe, config)
        print(f"{count} weights are quantized alike in training and rollout")
    command = train_argv(args, source, checkpoint, env)
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(command), flush=True)
    if args.dry_run:
        return 0
    if config:
        run = args.output_dir / args.run_id
        run.mkdir(parents=True, exist_ok=True)
        (run / "precision.yaml").write_text(config, encoding="utf-8")
    return subprocess.run(command, env={**os.environ, **env}, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HalfbyteError as error:
        sys.exit(f"error: {error}")
