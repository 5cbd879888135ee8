"""What is counted equals the definitions, per layer, also in a compiled graph; and the distillation loss."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.errors import FormatError, ShapeError
from halfbyte.nn import Rule, Watcher, convert, distillation_loss, read_rules
from halfbyte.nn.statistics import sums
from halfbyte.recipe import TrainingRecipe

from ..check import close, equal, same_bits, true


def model() -> nn.Module:
    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 32)})})
    found = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    convert(found, TrainingRecipe())
    return found


def fc1(m: nn.Module) -> nn.Module:
    return m.layers[0].mlp.fc1


def test_sums_by_hand() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1], x[0, 2] = 6.0, 1e-3, 3.0  # the first block: scale 448; 1e-3 underflows
    x[0, 16], x[0, 17] = 0.999 * 6 * 7.5 / 448, 0.01  # 7.4925 → E4M3 7.5; nothing underflows, nothing saturates
    got = sums(x, hb.NVFP4())
    decoded = hb.fake_quantize(x, hb.NVFP4())
    equal(got[:4].tolist(), [32.0, 5.0, 1.0, 0.0])
    close(got[4:], torch.stack((x.double().square().sum(), (x - decoded).double().square().sum())), 1e-5)
    x[0, 16] = 6 * 7.7 / 448  # 7.7 → 7.5: 6.16 is cut off
    equal(sums(x, hb.NVFP4())[3].item(), 1.0)
    equal(sums(torch.full((1, 32), 500.0), hb.MXFP8())[:4].tolist(), [32.0, 32.0, 0.0, 0.0])
    equal(sums(x, hb.NVFP4(), torch.tensor(3.0))[3].item(), 2.0, "under a smaller maximum 6 decodes to 3")


def test_logging(rng, tmp_path: Path) -> None:
    file = tmp_path / "statistics.yaml"
    file.write_text("statistics:\n  - {match: [fc1], every: 2}\n  - {match: ['*'], operands: [activations]}\n")
    m = model()
    watcher = Watcher(m, read_rules(file))
    logged: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            logged.append((tag, value, step))

    for _ in range(3):
        m.layers[0].mlp.fc2(torch.relu(fc1(m)(torch.randn(8, 32, generator=rng))))
        watcher.step(Writer())
    tags = [(tag, step) for tag, _, step in logged if "snr_db" in tag]
    first = [("halfbyte/snr_db/layers.0.mlp.fc1/activations", 0), ("halfbyte/snr_db/layers.0.mlp.fc1/weights", 0)]
    second = "halfbyte/snr_db/layers.0.mlp.fc2/activations"
    equal(tags, [*first, (second, 0), (second, 1), *((tag, 2) for tag, _ in first), (second, 2)])
    true(all(10 < value < 30 for tag, value, _ in logged if "snr_db" in tag), str(logged))
    watcher.remove()
    equal(fc1(m).quantization.statistics, None)


def test_a_weight_is_counted_as_it_is_multiplied(rng) -> None:
    """Under the maximum that it shares with its partner."""
    mlp = nn.ModuleDict({"gate_proj": nn.Linear(32, 32), "up_proj": nn.Linear(32, 32)})
    m = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})
    with torch.no_grad():
        mlp.gate_proj.weight[0, 0] = 1e6
    convert(m, TrainingRecipe())
    watcher = Watcher(m)
    mlp.up_proj(torch.randn(4, 32, generator=rng))
    equal(watcher.step()["layers.0.mlp.up_proj"]["weights"]["underflow"], 1.0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while tracing
def test_compiled(rng) -> None:
    torch._dynamo.reset()
    x = torch.randn(8, 32, generator=rng)
    m = model()
    watcher = Watcher(m)
    y = fc1(m)(x)
    wanted = watcher.step()
    compiled = torch.compile(fc1(m), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        same_bits(compiled(x), y)
        got = watcher.step()
        equal(got["layers.0.mlp.fc1"], wanted["layers.0.mlp.fc1"])
    equal(got["layers.0.mlp.fc2"], {}, "never ran")
    q = hb.fake_quantize(x, hb.NVFP4())
    snr = 10 * math.log10(float(x.double().square().sum() / (x - q).double().square().sum()))
    true(abs(got["layers.0.mlp.fc1"]["activations"]["snr_db"] - snr) < 1e-4, str(got))


def test_bad_rules(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    for text, message in (
        ("rules: []", "needs one key, statistics"),
        ("statistics: [{matches: [a]}]", "unknown matches; known are"),
        ("statistics: [{every: 0}]", "every=0"),
        ("statistics: [{match: fc1}]", "match='fc1': needs a list"),
        ("statistics: [{operands: [gradients]}]", "unknown gradients"),
        ("statistics: [", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(FormatError, match=message):
            read_rules(file)
    with pytest.raises(FormatError, match="no rule selects"):
        Watcher(model(), (Rule(("attention",)),))
    with pytest.raises(FormatError, match="no rule selects"):
        Watcher(nn.Linear(4, 4))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss(rng, temperature: float) -> None:
    student = torch.randn(3, 7, 33, generator=rng).requires_grad_()
    teacher = torch.randn(3, 7, 33, generator=rng).requires_grad_()
    mask = torch.rand(3, 7, generator=rng) < 0.6
    for chosen in (None, mask):
        student.grad = None
        loss = distillation_loss(student, teacher, mask=chosen, temperature=temperature, chunk=4)
        loss.backward()
        grad, student.grad = student.grad, None
        equal(teacher.grad, None, "the teacher is left alone")
        log_s, log_t = ((t / temperature).double().log_softmax(-1) for t in (student, teacher.detach()))
        kl = (log_t.exp() * (log_t - log_s)).sum(-1)
        wanted = temperature**2 * (kl.mean() if chosen is None else kl[chosen].mean())
        wanted.backward()
        close(loss, wanted.detach(), 1e-5)
        close(grad, student.grad, 1e-6)
    equal(distillation_loss(teacher, teacher).item(), 0.0)


def test_what_a_teacher_rules_out(rng) -> None:
    """Logits of -inf, as a padded vocabulary has, in the teacher alone and in both."""
    student, teacher = torch.randn(2, 4, 8, generator=rng)
    teacher[:, 6:] = -torch.inf
    for ruled_out in (slice(8, 8), slice(6, 8)):
        student = student.detach().index_fill(1, torch.arange(8)[ruled_out], -torch.inf).requires_grad_()
        loss = distillation_loss(student, teacher)
        loss.backward()
        log_s = student.detach().double().log_softmax(-1)[:, :6]
        log_t = teacher.double().log_softmax(-1)[:, :6]
        close(loss, (log_t.exp() * (log_t - log_s)).sum(-1).mean(), 1e-6)
        close(student.grad * 4, student.detach().double().softmax(-1) - teacher.double().softmax(-1), 1e-6)


def test_distillation_errors() -> None:
    a = torch.zeros(2, 3, 8)
    for call, message in (
        (lambda: distillation_loss(a, a[:1]), "need the same"),
        (lambda: distillation_loss(a, a, mask=torch.zeros(2, 3)), "needs torch.bool"),
        (lambda: distillation_loss(a, a, mask=torch.zeros(2, 3, dtype=torch.bool)), "no token counts"),
        (lambda: distillation_loss(a, a, temperature=0.0), "must be positive"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()
