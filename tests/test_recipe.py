"""Recipes: what the built-in ones say, what is refused and how, and that each converts to what it says."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte import MXFP8, NVFP4, FormatError, Policy
from halfbyte.calib.gptq import GPTQ
from halfbyte.calib.observers import ObserverOptions
from halfbyte.calib.options import Calibration
from halfbyte.checkpoint.options import Options
from halfbyte.policy import FormatOverride
from halfbyte.recipe import Algorithm, Observer, builtin_recipes, load_recipe, recipe_text

from .check import equal, true

SEARCH = NVFP4(scale_rule="search", error="mse")
CAST = {"activations": "calibrated", "kv_cache": "fp8"}
BUILTIN: dict[str, Options] = {
    "mixed-mxfp8-attention-nvfp4-experts": Options(SEARCH, overrides=(FormatOverride(MXFP8(), (), ("attention",)),)),
    "mxfp8": Options(MXFP8()),
    "nvfp4": Options(NVFP4(), activations="calibrated"),
    "nvfp4-4over6": Options(NVFP4(scale_rule="four_over_six", error="mse")),
    "nvfp4-experts-search-kv-fp8": Options(SEARCH, policy=Policy(only="routed_experts"), **CAST),  # type: ignore[arg-type]
    "nvfp4-gptq": Options(SEARCH, activations="calibrated"),
    "nvfp4-mlp-search-kv-fp8": Options(SEARCH, policy=Policy(only="mlp"), **CAST),  # type: ignore[arg-type]
    "nvfp4-search": Options(SEARCH),
    "nvfp4-w4a16": Options(NVFP4()),
}
DATA_FREE = ["mixed-mxfp8-attention-nvfp4-experts", "mxfp8", "nvfp4-4over6", "nvfp4-search", "nvfp4-w4a16"]

GOOD = """\
description: mine
weights:
  format: nvfp4
  scale_rule: four_over_six
overrides:
  - match: ["*.o_proj", layers.0]
    weights: {format: nvfp4, block: [16, 16]}
  - kinds: [attention, experts]
    weights: {format: mxfp8}
activations: calibrated
observer: {method: percentile, percentile: 99.5, headroom: 1.25}
kv_cache: fp8_calibrated
algorithm: {method: gptq, damping: 0.05, activation_order: true, headroom: 1.5}
policy:
  ignore: [lm_head]
  num_layers_at_start_in_bf16: 1
"""


def written(directory: Path, text: str) -> str:
    path = directory / "x.yaml"
    path.write_text(text)
    return str(path)


def refused(name: str, *changes: str) -> str:
    with pytest.raises(FormatError) as error:
        load_recipe(name, changes)
    return str(error.value)


def test_builtin() -> None:
    found = builtin_recipes()
    equal({name: recipe.options() for name, recipe in found.items()}, BUILTIN)
    equal([name for name, recipe in found.items() if not recipe.needs_data], DATA_FREE)
    equal(found["nvfp4-gptq"].algorithm.method, "gptq")
    for name, recipe in found.items():
        equal((recipe.name, recipe.to_json()["name"]), (name, name))
        true(recipe_text(name).startswith("description:"), name)
        equal(recipe.options("compressed-tensors").layout, "compressed-tensors")


def test_every_key(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD))
    options = recipe.options("compressed-tensors")
    overrides = (
        FormatOverride(NVFP4(block=(16, 16)), ("*.o_proj", "layers.0")),
        FormatOverride(MXFP8(), (), ("attention", "experts")),
    )
    wanted = Options(
        format=NVFP4(scale_rule="four_over_six"),
        layout="compressed-tensors",
        policy=Policy(ignore=("lm_head",), num_layers_at_start_in_bf16=1),
        kv_cache="fp8_calibrated",
        activations="calibrated",
        overrides=overrides,
    )
    equal(options, wanted)
    equal(recipe.observer, Observer(method="percentile", percentile=99.5, headroom=1.25))
    equal(recipe.algorithm, Algorithm(method="gptq", damping=0.05, activation_order=True, headroom=1.5))
    equal(len(recipe.reasons_for_data), 3)
    wanted = Calibration(GPTQ(0.05, True, 1.5), ObserverOptions("percentile", 99.5, 1.25))
    equal(Calibration.of(recipe), wanted)
    record = options.recipe or {}
    equal((record["name"], record["algorithm"]["damping"]), (str(tmp_path / "x.yaml"), 0.05))


def test_frozen() -> None:
    recipe = load_recipe("nvfp4")
    with pytest.raises(ValueError, match="frozen"):
        recipe.kv_cache = "fp8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "get"),
    [
        ("kv_cache=fp8", lambda recipe: recipe.kv_cache == "fp8"),
        ("activations=none", lambda recipe: not recipe.needs_data),
        ("weights={format: mxfp8}", lambda recipe: False),  # activations are calibrated
        ("weights.e4m3_max=256", lambda recipe: recipe.options().format == NVFP4(e4m3_max=256)),
        ("weights.block=[16, 16]", lambda recipe: recipe.options().format == NVFP4(block=(16, 16))),
        ("weights.error=hessian", lambda recipe: False),  # amax measures none
        ("policy.ignore=[a, b]", lambda recipe: recipe.policy.ignore == ("a", "b")),
        ("policy.include_mtp=true", lambda recipe: recipe.policy.include_mtp is True),
        ("description=a=b", lambda recipe: recipe.description == "a=b"),
    ],
)
def test_set(change: str, get: Any) -> None:
    try:
        changed = load_recipe("nvfp4", [change])
    except FormatError as error:
        true(f"recipes/nvfp4.yaml with --set {change}: " in str(error), str(error))
        changed = None
    equal(changed is not None and get(changed), "mxfp8" not in change and "hessian" not in change)


def test_set_in_a_list_and_twice() -> None:
    name = "mixed-mxfp8-attention-nvfp4-experts"
    recipe = load_recipe(name, ["overrides.0.kinds=[mlp]", "kv_cache=none", "kv_cache=fp8"])
    equal((recipe.overrides[0].kinds, recipe.kv_cache), (("mlp",), "fp8"))
    for item in ("1", "-1", "²"):
        found = refused(name, f"overrides.{item}={{}}")
        equal(found, f"--set overrides.{item}={{}}: overrides is a list of 1, which has no {item!r}")


def test_hessian_needs_data() -> None:
    equal(load_recipe("nvfp4-search", ["weights.error=hessian"]).reasons_for_data, ["weights.error: hessian"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  scale_rule:", "  scale_rul:", "x.yaml:4: weights.scale_rul: unknown key; did you mean scale_rule?"),
        ("four_over_six", "four_over_sx", "x.yaml:4: weights.scale_rule: 'four_over_sx' is not known; did you mean"),
        ("kv_cache:", "kvcache:", "x.yaml:12: kvcache: unknown key; did you mean kv_cache?"),
        ("kv_cache: fp8_calibrated", "kv_cache: int8", "kv_cache: 'int8' is not known; choose one of none, fp8, "),
        ("kv_cache: fp8_calibrated", "zzz: 1", "x.yaml:12: zzz: unknown key; choose one of description, weights, "),
        ("experts]", "expert]", "x.yaml:8: overrides.1.kinds.1: 'expert' is not known; did you mean experts?"),
        ("match:", "matches:", "x.yaml:6: overrides.0.matches: unknown key; did you mean match?"),
        ("  - kinds: [attention, experts]\n    ", "  - ", "x.yaml:8: overrides.1: selects nothing"),
        ("  ignore: [lm_head]", "  ignor: []", "x.yaml:15: policy.ignor: unknown key; did you mean ignore?"),
        ("  ignore: [lm_head]", "  ignore: lm_head", "x.yaml:15: policy.ignore: must be a valid list; got 'lm_head'"),
        ("bf16: 1", "bf16: -1", "x.yaml:14: policy: num_layers_at_start_in_bf16=-1: must not be negative"),
        ("bf16: 1", "bf16: true", "x.yaml:16: policy.num_layers_at_start_in_bf16: must be a valid integer; got True"),
        ("99.5", "101", "x.yaml:11: observer.percentile: must be less than or equal to 100; got 101"),
        ("method: percentile", "method: max", "x.yaml:11: observer: percentile has no meaning for method max"),
        ("method: gptq", "method: nearest", "x.yaml:13: algorithm: activation_order, damping, headroom: for"),
        ("headroom: 1.5", "headroom: .nan", "x.yaml:13: algorithm.headroom: "),
        ("headroom: 1.25", "headroom: .inf", "x.yaml:11: observer.headroom: "),
        ("{format: mxfp8}", "{format: mxfp8, error: mse}", "x.yaml:9: overrides.1.weights: error: MXFP8 has one rule"),
        ("[16, 16]", "[16, 32]", "x.yaml:7: overrides.0.weights.block.1: 32 is not known; choose one of 16"),
        ("{format: mxfp8}", "3", "x.yaml:9: overrides.1.weights: must be a mapping; got 3"),
        ("description: mine\n", "", "x.yaml:1: description: is missing"),
        ("description: mine", "description: 3", "x.yaml:1: description: must be a valid string; got 3"),
        ("kv_cache: fp8_calibrated", "weights: 3", "x.yaml:12: weights: is there twice; remove one"),
        ("[lm_head]", "[lm_head", "x.yaml:16: not YAML: "),
        ("[lm_head]", "&a [*a]", "x.yaml: not YAML: Circular reference"),
        ("description: mine", "description: mine\n2020-01-01: 3", "x.yaml: not YAML: keys must be str"),
        (GOOD, "", "x.yaml: has 0 YAML documents; a recipe is one"),
        (GOOD, "- 1\n", "x.yaml:1: must be a mapping of keys to values"),
        (GOOD, "a: 1\n---\nb: 2\n", "x.yaml: has 2 YAML documents; a recipe is one"),
    ],
)  # fmt: skip
def test_bad_recipes(tmp_path: Path, old: str, new: str, message: str) -> None:
    true(old in GOOD, f"{old!r} is not in the recipe")
    found = refused(written(tmp_path, GOOD.replace(old, new)))
    true(message in found, f"{message!r} is not in {found!r}")


def test_all_errors_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("  scale_rule:", "  scale_rul:").replace("kv_cache:", "kvcache:")
    equal(len(refused(written(tmp_path, text)).splitlines()), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights.scale_rul=x", "--set weights.scale_rul=x: weights.scale_rul: unknown key; did you mean scale_rule?"),
        ("polcy.only=mlp", "with --set polcy.only=mlp: polcy: unknown key; did you mean policy?"),
        ("kv_cache", "--set kv_cache: write it as key=value"),
        ("=1", "--set =1: write it as key=value"),
        ("kv_cache=[", "--set kv_cache=[: the value is not YAML"),
        ("activations.x=1", "--set activations.x=1: activations is 'calibrated', which has no 'x'"),
        ("overrides.0.weights=1", "overrides"),
    ],
)  # fmt: skip
def test_bad_changes(change: str, message: str) -> None:
    found = refused("nvfp4", change)
    true(message in found, f"{message!r} is not in {found!r}")


def test_not_found(tmp_path: Path) -> None:
    equal(refused("nvfp4-serch"), "recipe nvfp4-serch: not found; did you mean nvfp4-search?")
    true("built in are mixed-" in refused("zzz"), "no list")
    equal(refused(str(tmp_path / "a.yaml")), f"recipe {tmp_path / 'a.yaml'}: no such file")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    true("cannot be read" in refused(str(tmp_path / "b.yaml")), "reads it")


def test_the_documentation(tmp_path: Path) -> None:
    """Its table lists all that ship, and its example has every key."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, recipe in builtin_recipes().items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        equal(row.endswith("| yes |"), recipe.needs_data, name)
    example = load_recipe(written(tmp_path, text.split("```yaml\n")[1].split("```")[0]))
    equal(example.model_fields_set, set(type(example).model_fields))
