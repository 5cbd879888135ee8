"""The command line: parse → call → exit code (0 fine, 1 verify found something, 2 bad input)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .checkpoint.config import Activations, KVCache
from .checkpoint.options import Options
from .checkpoint.schema import Layout
from .cli_calibrate import calibrate
from .cli_inspect import diff, inspect
from .cli_tools import Device, Json, emit, errors, examples, progress, resumable, status, usable_device, warn
from .cli_verify import verify
from .errors import FormatError
from .formats import E4M3_MAX_CHOICES, MXFP8, NVFP4, Format
from .policy import Only, Policy
from .version import __version__

app = typer.Typer(
    name="halfbyte",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="NVFP4 and MXFP8 checkpoints: convert, verify, dequantize. The same bytes on every machine.",
)


@app.command(
    epilog=examples(
        "halfbyte convert Qwen/Qwen3-0.6B out",
        "halfbyte convert ./model out --scale-rule four_over_six --layout compressed-tensors",
        "halfbyte convert ./moe out --only experts --activations constant --kv-cache fp8 --dry-run",
        "halfbyte convert ./model out --recipe nvfp4-search --set kv_cache=fp8",
        "halfbyte convert deepseek-ai/DeepSeek-V3.1 out --format mxfp8",
        "halfbyte convert ./model out --resume",
        "torchrun --nproc-per-node 8 -m halfbyte convert ./model out",
    )
)
def convert(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory, or hub id such as Qwen/Qwen3-0.6B.")],
    out_dir: Annotated[Path, typer.Argument(help="New directory for the result; must not exist.")],
    format: Annotated[str, typer.Option(help="nvfp4 or mxfp8.")] = "nvfp4",
    layout: Annotated[str, typer.Option(help="modelopt or compressed-tensors: whose tensor names.")] = "modelopt",
    recipe: Annotated[
        str | None, typer.Option(help="Name of a recipe (see `halfbyte recipes`) or its file, instead of options.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a key of the recipe. Repeatable.")
    ] = None,
    scale_rule: Annotated[str | None, typer.Option(help="amax (default), four_over_six or search.")] = None,
    error: Annotated[
        str | None, typer.Option(help="mae or mse: what four_over_six (default mae) or search (mse) minimise.")
    ] = None,
    e4m3_max: Annotated[
        int | None, typer.Option(help="E: 256, 288, 320 or 448. Default: 448; four_over_six: 256.")
    ] = None,
    error_arithmetic: Annotated[str | None, typer.Option(help="exact (default) or fp16, for four_over_six.")] = None,
    only: Annotated[str, typer.Option(help="all, mlp, experts or routed_experts: which Linear weights.")] = "all",
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Leave alone: a glob over the tensor's name, or a dotted part of it. Repeatable."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Quantize although not in the default (lm_head, vision tower). Repeatable."),
    ] = None,
    num_layers_at_start_in_bf16: Annotated[int, typer.Option(metavar="N", help="First N decoder layers stay.")] = 0,
    num_layers_at_end_in_bf16: Annotated[int, typer.Option(metavar="N", help="Last N decoder layers stay.")] = 0,
    extra_high_precision_layers_hf: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Substring of Hugging Face names that stay. Repeatable.")
    ] = None,
    extra_high_precision_layers_megatron: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Substring of Megatron names that stay. Repeatable.")
    ] = None,
    include_mtp: Annotated[bool, typer.Option("--include-mtp", help="Quantize multi-token-prediction layers.")] = False,
    kv_cache: Annotated[str, typer.Option(help="fp8 or none: declare an FP8 KV cache with unit scales.")] = "none",
    activations: Annotated[
        str, typer.Option(help="none: W4A16. constant: W4A4 with every input scale 1.0 (amax 2688).")
    ] = "none",
    device: Device = "auto",
    max_shard_gb: Annotated[float, typer.Option(help="Size of an output file, in GB.")] = 5.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left.")] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Take a source that is NVFP4: decode it and round it once more.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would become of every tensor, and why.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a Hugging Face checkpoint to NVFP4 or MXFP8.

    It may be bfloat16, float16 or float32, or be decoded first: FP8 as DeepSeek, ModelOpt and compressed-tensors write
    it, MXFP8, and MXFP4 as gpt-oss has it.
    """
    from .checkpoint.convert import convert as run
    from .checkpoint.hub import resolve
    from .checkpoint.journal import is_interrupted, working_directory
    from .checkpoint.plan import make_plan
    from .checkpoint.ranks import Ranks, join, part, share_cores
    from .checkpoint.sources import open_source
    from .report.console import plan_json, print_plan, print_report, report_json

    with errors(as_json):
        where, _ = join(usable_device(device))
        ranks = Ranks.current()
        share_cores(ranks)
    with errors(as_json, ranks), ranks.leaving(), ranks.telling():
        first = ranks.rank == 0
        options = _recipe_options(ctx, recipe, changes, layout) or Options(
            format=_format(format, scale_rule, error, e4m3_max, error_arithmetic),
            layout=cast(Layout, layout),
            policy=Policy(
                only=cast(Only, only),
                ignore=tuple(ignore or ()),
                include=tuple(include or ()),
                num_layers_at_start_in_bf16=num_layers_at_start_in_bf16,
                num_layers_at_end_in_bf16=num_layers_at_end_in_bf16,
                extra_high_precision_layers_hf=tuple(extra_high_precision_layers_hf or ()),
                extra_high_precision_layers_megatron=tuple(extra_high_precision_layers_megatron or ()),
                include_mtp=include_mtp,
            ),
            kv_cache=cast(KVCache, kv_cache),
            activations=cast(Activations, activations),
        )
        if not 0 < max_shard_gb < math.inf:
            raise FormatError(f"--max-shard-gb {max_shard_gb}: must be positive and finite")
        source = resolve(model)
        checkpoint = open_source(source, requantize=requantize)
        if dry_run:
            plan = make_plan(checkpoint, options)
            if first:
                emit(as_json, lambda: plan_json(plan, options), lambda console: print_plan(console, plan, options))
            return
        if options.activations == "constant" and first:
            warn(
                "input scale 1.0 everywhere: right for engines that scale activations per token; those with a static "
                "scale clip activations beyond 2688 and flush small ones"
            )
        with (
            resumable(working_directory(out_dir), is_interrupted, first),
            progress("convert", checkpoint.nbytes, first) as advance,
        ):
            report = run(
                source,
                out_dir,
                options,
                device=where,
                max_shard_bytes=int(max_shard_gb * 1e9),
                resume=resume,
                requantize=requantize,
                ranks=ranks,
                progress=advance,
            )
        part()
        if first:
            emit(as_json, lambda: report_json(report), lambda console: print_report(console, report))


app.command(
    epilog=examples(
        "halfbyte calibrate Qwen/Qwen3-0.6B out --recipe nvfp4-gptq",
        "halfbyte calibrate ./moe out --recipe nvfp4-gptq --data chats.jsonl --samples 256 --every-expert",
        "torchrun --nproc-per-node 4 -m halfbyte calibrate ./model out --recipe nvfp4-gptq --data text.txt",
    )
)(calibrate)


@app.command(
    epilog=examples(
        "halfbyte recipes",
        "halfbyte recipes nvfp4-search > mine.yaml",
    )
)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's YAML instead of the list.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that ship with halfbyte, for `convert --recipe` and `calibrate --recipe`."""
    from .recipe import builtin_recipes, load_recipe, recipe_text
    from .report.recipes import print_recipes

    with errors(as_json):
        if name is None:
            found = builtin_recipes()
            rows = [{**recipe.to_json(), "needs_data": recipe.needs_data} for recipe in found.values()]
            emit(as_json, lambda: {"recipes": rows}, lambda console: print_recipes(console, found))
        else:
            recipe = load_recipe(name)
            text = recipe_text(name)
            if as_json:
                print(json.dumps({**recipe.to_json(), "needs_data": recipe.needs_data}, indent=2, ensure_ascii=False))
            else:
                print(text, end="")


app.command(
    epilog=examples(
        "halfbyte verify out",
        "halfbyte verify out --source ./model --json",
        "halfbyte verify nvidia/Qwen3-8B-NVFP4 --for vllm,sglang --tp 4",
        "halfbyte verify out --for all",
    )
)(verify)


app.command(
    epilog=examples(
        "halfbyte inspect out",
        "halfbyte inspect out --against ./model --html report.html",
        "halfbyte inspect nvidia/Qwen3-8B-NVFP4 --json",
    )
)(inspect)


app.command(
    epilog=examples(
        "halfbyte diff out other-out",
        "halfbyte diff out nvidia/Qwen3-8B-NVFP4 --source Qwen/Qwen3-8B",
    )
)(diff)


@app.command(
    epilog=examples(
        "halfbyte dequantize out decoded",
        "halfbyte dequantize deepseek-ai/DeepSeek-V3.1 bf16",
    )
)
def dequantize(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint: directory or hub id.")],
    out_dir: Annotated[Path, typer.Argument(help="New directory for the decoded model; must not exist.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write the values that a quantized checkpoint decodes to as an ordinary model: NVFP4, or what `convert` reads."""
    from .checkpoint.dequantize import dequantize as run
    from .checkpoint.hub import resolve
    from .report.console import size

    with errors(as_json):
        source = resolve(model)
        with progress("dequantize", None) as advance:
            written = run(source, out_dir, dtype=dtype, device=usable_device(device), progress=advance)
        data = {"output": str(out_dir), "bytes": written, "dtype": dtype}
        emit(as_json, lambda: data, lambda console: console.print(f"[bold]{out_dir}[/]: {size(written)} in {dtype}"))


@app.command(epilog=examples("halfbyte demo"))
def demo(
    out_dir: Annotated[
        Path | None, typer.Argument(help="Keep the converted checkpoints here; by default they are removed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert the tiny model that ships with halfbyte in several ways, load each result, and compare."""
    from .demo import print_demo, run_demo

    with errors(as_json), status("loading the shipped model") as update:
        rows = run_demo(out_dir, update)
    emit(as_json, lambda: {"rows": [row.to_json() for row in rows]}, lambda console: print_demo(console, rows))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"halfbyte {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `halfbyte` command."""
    app()


def _format(
    name: str, scale_rule: str | None, error: str | None, e4m3_max: int | None, error_arithmetic: str | None
) -> Format:
    if name == "mxfp8":
        given = {"--scale-rule": scale_rule, "--error": error, "--e4m3-max": e4m3_max}
        given["--error-arithmetic"] = error_arithmetic
        if used := [option for option, value in given.items() if value is not None]:
            raise FormatError(f"{', '.join(used)}: MXFP8 has one rule and nothing to choose; leave it out")
        return MXFP8()
    if name != "nvfp4":
        raise FormatError(f"--format {name}: choose nvfp4 or mxfp8")
    if e4m3_max is not None and e4m3_max not in E4M3_MAX_CHOICES:
        raise FormatError(f"--e4m3-max {e4m3_max}: choose one of {', '.join(map(str, E4M3_MAX_CHOICES))}")
    values: dict[str, Any] = {"scale_rule": scale_rule, "error": error, "e4m3_max": e4m3_max}
    values["error_arithmetic"] = error_arithmetic
    return NVFP4(**{key: value for key, value in values.items() if value is not None})


_BESIDE_RECIPE = (
    "model",
    "out_dir",
    "recipe",
    "changes",
    "layout",
    "device",
    "max_shard_gb",
    "resume",
    "requantize",
    "dry_run",
    "as_json",
)


def _recipe_options(ctx: typer.Context, name: str | None, changes: list[str] | None, layout: str) -> Options | None:
    """What a recipe asks for; it excludes the options that say the same."""
    if name is None:
        if changes:
            raise FormatError(f"--set {changes[0]}: changes a recipe's key; give --recipe as well")
        return None
    from .recipe import load_recipe

    given = [p for p in ctx.params if p not in _BESIDE_RECIPE and "DEFAULT" not in str(ctx.get_parameter_source(p))]
    if given:
        options = ", ".join(f"--{parameter.replace('_', '-')}" for parameter in given)
        raise FormatError(f"--recipe {name} and {options}: the recipe says that; change its keys with --set instead")
    recipe = load_recipe(name, changes or ())
    if recipe.needs_data:
        remedy = f"use `halfbyte calibrate MODEL OUT_DIR --recipe {name} --data FILE`"
        raise FormatError(f"--recipe {name}: {', '.join(recipe.reasons_for_data)} needs calibration data: {remedy}")
    return recipe.options(cast(Layout, layout))


if __name__ == "__main__":
    main()
