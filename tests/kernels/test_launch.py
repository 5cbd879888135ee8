"""Which launches go through Triton, and which straight to the compiled kernel, seen with a stand-in for both."""

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from halfbyte.kernels import _launch

from ..check import equal

STREAM = 77  # the current one


class Compiled:
    """What Triton's launch returns, as far as the second launch needs it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *args: Any) -> None:
        equal((stream, function, metadata, args[:3]), (STREAM, "function", "metadata", (None, None, None)))
        self.seen.append(("compiled", (x, y, z), args[3:]))


class Kernel:
    """Compiles to something that notes what it is launched with."""

    arg_names = ("x_ptr", "out_ptr", "count", "seed", "A", "B")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Compiled:
            self.seen.append(("triton", grid, [a.dtype if isinstance(a, torch.Tensor) else a for a in args], options))
            return Compiled(self.seen)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    monkeypatch.setattr(_launch, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what a CPU tensor's device is
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return Kernel()


def through(kernel: Kernel) -> list[str]:
    seen = [entry[0] for entry in kernel.seen]
    kernel.seen.clear()
    return seen


def test_from_the_second_launch_on_the_kernel_is_called_directly(kernel: Kernel) -> None:
    x, out = torch.zeros(64), torch.zeros(64, dtype=torch.float8_e4m3fn)
    _launch.launch(kernel, 3, (x, out), (7,), (1,), B=True, A=5, num_warps=2)
    _launch.launch(kernel, (4, 2, 1), (x, out), (7,), (99,), B=True, A=5, num_warps=2)
    options = {"A": 5, "B": True, "num_warps": 2, "num_stages": 3, "maxnreg": None, "enable_fp_fusion": False}
    equal(kernel.seen[0], ("triton", (3, 1, 1), [torch.float32, torch.uint8, 7, 1], options))
    # Other programs and words, and constants in the order of the kernel's parameters.
    equal(kernel.seen[1], ("compiled", (4, 2, 1), (x.data_ptr(), out.data_ptr(), 7, 99, 5, True)))


def test_whatever_triton_specialises_on_goes_through_it(kernel: Kernel) -> None:
    x, out = torch.zeros(64), torch.zeros(64, dtype=torch.uint8)

    def run(x: torch.Tensor = x, number: int = 16, **options: Any) -> list[str]:
        constants = {"A": 5, "B": None, "num_warps": 4, **options}
        _launch.launch(kernel, 1, (x, out), (number,), (0,), **constants)
        return through(kernel)

    for change in ({}, {"number": 1}, {"x": x[1:]}, {"x": x.half()}, {"A": 6}, {"num_warps": 8}, {"maxnreg": 64}):
        equal((run(**change), run(**change)), (["triton"], ["compiled"]), str(change))
    equal(run(), ["compiled"])


def test_on_another_device_than_the_current_one(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    entered: list[Any] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Any:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for _ in range(2):
        _launch.launch(kernel, 1, (x, x), (1,), (0,), A=1, B=1)
    equal(through(kernel), ["triton", "triton"])
    equal(entered, [x.device, x.device])


def test_ever_new_sizes_do_not_fill_the_memory(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MOST", 10)
    x = torch.zeros(64)
    for number in range(35):
        _launch.launch(kernel, 1, (x, x), (number,), (0,), A=1, B=1)
    equal(len(_launch._COMPILED), 5)


@pytest.mark.parametrize(("a", "b", "up"), [(0, 4, 0), (1, 4, 1), (8, 4, 2), (9, 4, 3)])
def test_cdiv(a: int, b: int, up: int) -> None:
    equal(_launch.cdiv(a, b), up)


def test_next_power_of_2() -> None:
    equal([_launch.next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1023, 1024, 1025)], [1, 2, 4, 4, 8, 1024, 1024, 2048])
