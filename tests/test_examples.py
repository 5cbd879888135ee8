"""The examples run on the shipped model, learn something, and export it; launchers start what they say."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from halfbyte.demo import DATA
from halfbyte.errors import CheckpointError

from .check import close, equal, true

ROOT = Path(__file__).parents[1]


def run(name: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    equal(done.returncode, 0, done.stderr[-3000:])
    return done.stdout


@pytest.mark.parametrize("backward", ["dequantized", pytest.param("quantized", marks=pytest.mark.slow)])
def test_qat(tmp_path: Path, backward: str) -> None:
    """What is exported is what was trained: the checkpoint's perplexity is the trained model's."""
    file = tmp_path / "qat.json"
    options = ("--steps", "2", "--window", "64", "--eval-windows", "1", "--backward", backward)
    text = run("qat_tiny", *options, "--json", str(file), "--out", str(tmp_path / "out"))
    true("27 modules converted" in text and "snr_db" in text, text)
    found = json.loads(file.read_text())
    true(1.005 < found["NVFP4"] / found["bf16"] < 1.3, str(found))
    # The checkpoint is of the weights in bfloat16, and one window decides on few tokens' experts otherwise.
    true(abs(found["exported"] / found["trained"] - 1) < 0.02, str(found))
    true((tmp_path / "out" / "halfbyte.json").is_file(), "the checkpoint")


@pytest.mark.slow
def test_qad(tmp_path: Path) -> None:
    file = tmp_path / "qad.json"
    for _ in range(2):
        steps = ("--no-control", "--steps", "1") if file.exists() else ("--steps", "20")
        run("qad_tiny", "--json", str(file), "--eval-windows", "1", *steps)
    found, again = map(json.loads, file.read_text().splitlines())
    trained, untrained, plain = (found[name]["kl"] for name in ("trained", "untrained", "plain NVFP4"))
    true(trained < 0.98 * untrained < plain, str(found))
    true(abs(found["fall"] - (1 - trained / plain)) < 1e-12, str(found))
    equal(found["teacher"]["kl"], 0.0)
    true(found["control"]["kl"] < trained, str(found))
    equal([again[name] for name in ("teacher", "plain NVFP4", "untrained")],
          [found[name] for name in ("teacher", "plain NVFP4", "untrained")])  # fmt: skip
    true("control" not in again and again["options"]["steps"] == 1, str(again))


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    text = run("trainer_hf", "--steps", "4", "--window", "64", "--out", str(tmp_path / "out"))
    true("exported at 4.50 bits" in text and " dB" in text, text)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    true(spec is not None and spec.loader is not None, name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grpo() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        return load("grpo_tiny")


def test_grpo_reward_and_advantages(grpo: ModuleType) -> None:
    tokens = torch.tensor([[5, 7, 8, 9, 10], [5, 7, 7, 8, 8], [5, 7, 9, 11, 13], [5, 6, 10, 14, 18]])
    equal(grpo.rewards(tokens, 2), torch.tensor([1.0, 1 / 3, 0.0, 1.0]))
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.9])
    found = grpo.advantages(reward, 4)
    close(found[:4], torch.tensor([1.0, -1.0, 1.0, -1.0]) * 3**0.5 / 2, 2e-4)  # the variance is of n - 1
    close(found.view(2, 4).sum(1), torch.zeros(2), 1e-6)
    close(grpo.advantages(reward + torch.tensor([5.0] * 4 + [0.0] * 4), 4), found, 1e-5, "a prompt's own level")
    equal(grpo.advantages(torch.full((4,), 0.7), 4), torch.zeros(4), "nothing to learn from equal samples")


def test_grpo_log_probs_and_clip(grpo: ModuleType, rng: torch.Generator) -> None:
    logits = torch.randn(2, 3, 11, generator=rng).bfloat16()
    tokens = torch.randint(11, (2, 3), generator=rng)
    wanted = [[logits[i, j].double().softmax(0)[tokens[i, j]].log() for j in range(3)] for i in range(2)]
    found = grpo.token_log_probs(logits, tokens)
    equal(found.dtype, torch.float32)
    close(found, torch.tensor(wanted), 1e-6)

    # one token each: inside the clip; above it; below it; both of the latter with the other sign
    ratio = torch.tensor([[1.1], [1.5], [0.5], [1.5], [0.5]])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    log_probs = ratio.log().requires_grad_()
    loss, clipped = grpo.policy_loss(log_probs, torch.zeros(5, 1), advantage)
    close(loss, torch.tensor(-(2.2 + 2 * 1.28 + 1.0 - 3.0 - 2 * 0.8) / 5), 1e-6)
    close(clipped, torch.tensor(2 / 5), 1e-6)
    loss.backward()
    close(log_probs.grad, -torch.tensor([[2.2], [0.0], [1.0], [-3.0], [0.0]]) / 5, 1e-6, "no gradient where it cuts")


def test_grpo_decodes_as_it_trains(grpo: ModuleType) -> None:
    """With a KV cache, token by token, as in one pass over whole sequences."""
    settings = grpo.Settings(variant="bf16", prompts=1, group=3, new_tokens=4, dtype=torch.float32)
    prompts = grpo.draw_prompts(grpo.text_ids(), settings, torch.Generator().manual_seed(1))
    trainer = grpo.Trainer(settings)
    tokens, log_probs = grpo.generate(trainer.model, prompts, 4, torch.Generator().manual_seed(1))
    equal(tokens[:, :8], prompts)
    close(trainer.log_probs(tokens), log_probs, 1e-4)


def test_grpo_in_two_processes(tmp_path: Path) -> None:
    """After a step that moves weights far, the rollout has them: in bf16, both sides agree on every bit."""
    run("grpo_tiny", "--short", "--lr", "3e-3", "--batch-invariant", "--out", str(tmp_path))
    (file,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    equal([line["step"] for line in lines], [0, 1])
    for line in lines:
        true(line["variant"] == "nvfp4-dequantized-invariant" and 0 < line["entropy"] < 7, str(line))
        equal((line["difference_mean"], line["difference_max"], line["clipped"]), (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    return load("rl_launch")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a trainer that notes what it was called with."""
    shutil.copytree(DATA / "tiny", tmp_path / "models" / "'; touch x'")
    (tmp_path / "train.py").write_text(
        "import json, os, sys\njson.dump([sys.argv, dict(os.environ)], open('seen', 'w'))"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVTE_NVFP4_4OVER6", "weights")
    return tmp_path


def test_launch_without_a_shell(models: Path, launcher: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    name, own = "'; touch x'", ["--a", "$(touch x)", "`touch x`", "--rollout-batch-size", "32"]
    quantized = ["--model-name", name, "--rollout-nvfp4", "--train-nvfp4", "--num-gpus-per-node", "4"]
    quantized += [
        "--num-layers-at-start-in-bf16",
        "1",
        "--extra-high-precision-layers-megatron",
        "layers.2.mlp.experts",
    ]
    equal(launcher.main([*quantized, "--dry-run", "--", *own]), 0)
    true("72 weights are quantized alike" in capsys.readouterr().out, "the comparison")
    equal(sorted(path.name for path in models.rglob("*-NVFP4")), [], "a dry run writes nothing")
    command = [sys.executable, str(ROOT / "examples" / "rl_launch.py"), *quantized, "--", *own]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    equal(done.returncode, 0, done.stderr[-3000:])
    argv, environment = json.loads((models / "seen").read_text())
    equal(argv[:5], ["train.py", "--hf-checkpoint", f"models/{name}-NVFP4", "--ref-load", f"models/{name}"])
    equal(argv[-5:], own)
    equal(list(models.rglob("x")), [], "a shell ran a name")
    equal(argv[argv.index("--rollout-num-gpus") + 1], "2")
    true((models / argv[argv.index("--te-precision-config-file") + 1]).is_file(), "the precision config")
    equal((environment["NVTE_NVFP4_4OVER6"], environment["NVTE_BACKWARD_OVERRIDE"]), ("weights", "high_precision"))
    equal(json.loads(argv[argv.index("--train-env-vars") + 1])["NVTE_NVFP4_4OVER6"], "weights")
    made = json.loads((models / "models" / f"{name}-NVFP4" / "halfbyte.json").read_text())
    equal((made["format"]["scale_rule"], made["policy"]["only"]), ("four_over_six", "routed_experts"))
    # The checkpoint is used again, unless other options are asked for.
    equal(launcher.main([*quantized, "--dry-run"]), 0)
    true("converting" not in capsys.readouterr().out, "converted twice")
    with pytest.raises(CheckpointError, match="converted with"):
        launcher.main(["--model-name", name, "--rollout-nvfp4", "--dry-run"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("../tiny",), "needs a name, not a path"),
        (("m", "--rollout-nvfp4", "--train-mxfp8"), "must compute what is served"),
        (("m", "--rollout-nvfp4", "--rollout-mxfp8"), "not allowed with"),
        (("m", "--rollout-mxfp8", "--hardware", "H200"), "need Blackwell"),
        (("m", "--rollout-nvfp4", "--num-gpus-per-node", "1"), "one GPU each"),
    ],
)
def test_launch_refuses(
    options: tuple[str, ...], message: str, launcher: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        launcher.parse(["--model-name", *options])
    true(message in capsys.readouterr().err, message)


@pytest.mark.usefixtures("models")
def test_launch_notices_policies_that_differ(launcher: ModuleType) -> None:
    """A Hugging Face name that keeps a weight in high precision says nothing to the trainer."""
    options = ["--rollout-nvfp4", "--train-nvfp4", "--extra-high-precision-layers-hf", "layers.3.mlp.experts."]
    with pytest.raises(CheckpointError, match="the trainer would quantize it, the checkpoint does not"):
        launcher.main(["--model-name", "'; touch x'", *options, "--dry-run"])
