"""Conversions that go wrong where they are told to: a process that forks one child for each.

Run as `python -m tests.checkpoint.faults`; reads one JSON object a line and answers each with one. A child has all
imports and compiled kernels from its parent, so that hundreds take seconds.

The system calls that change a disk are counted; `at` says at which of them what `fault` names happens:
    kill        SIGKILL before the call
    kill_after  SIGKILL after it
    torn        half of a write, then SIGKILL
    ENOSPC, EIO the call fails; with "for_good", all after it as well
    SIGTERM, SIGINT   sent to the process itself before the call
    short       every write writes a part only
    zero        every write writes nothing
With "ranks", as many processes carry one conversion out, and what goes wrong does so on the one named "faulty"; it may
also be an error ("error") at the tensor that "raises" begins the name of. With "calibrate", the size of a vocabulary,
it is a calibration, by the random tokens numbered "data".
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

CALLS = ("pwrite", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "truncate", "ftruncate", "open")


class Faults:
    """A process that carries conversions out. Close it."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def __call__(self, **order: Any) -> Any:
        """{"status": how the child ended, as `os.waitpid` says it, "result": its words, "calls": their names}."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("no pipes")
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def main() -> None:
    import torch

    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    import halfbyte.cli
    from halfbyte.checkpoint import convert

    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "warm":
            run(convert, halfbyte.cli, order)
            answer: Any = {}
        elif order["do"] == "pair":
            answer = [finish(child) for child in [start(convert, halfbyte.cli, order) for _ in range(2)]]
        elif order["do"] == "ranks":
            children = [start(convert, halfbyte.cli, of_rank(order, rank)) for rank in range(order["ranks"])]
            if "kill_after_seconds" in order:
                time.sleep(order["kill_after_seconds"])
                os.kill(children[order["faulty"]][0], signal.SIGKILL)
            answer = [finish(child) for child in children]
        else:
            child = start(convert, halfbyte.cli, order)
            if "kill_after_seconds" in order:
                time.sleep(order["kill_after_seconds"])
                os.kill(child[0], signal.SIGKILL)
            answer = finish(child)
        print(json.dumps(answer), flush=True)


def of_rank(order: dict[str, Any], rank: int) -> dict[str, Any]:
    """What is told to all, but for what goes wrong, which does so on one."""
    changed = order | {"rank": rank}
    if rank != order.get("faulty"):
        changed = {k: v for k, v in changed.items() if k not in ("fault", "at", "raises")}
    return changed


def start(convert: Any, cli: Any, order: dict[str, Any]) -> tuple[int, int]:
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    try:
        calls = inject(order)
        code = run(convert, cli, order)
        print(json.dumps({"calls": calls}), flush=True)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)


def finish(child: tuple[int, int]) -> dict[str, Any]:
    with open(child[1]) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child[0], 0)
    *lines, last = text.splitlines() or [""]
    counted = last.startswith('{"calls"')
    calls = json.loads(last)["calls"] if counted else None
    return {"status": status, "result": "\n".join(lines if counted else [*lines, last]), "calls": calls}


def run(convert: Any, cli: Any, order: dict[str, Any]) -> int:
    if "cli" in order:
        sys.argv = ["halfbyte", *order["cli"]]
        try:
            cli.app(order["cli"])
        except SystemExit as error:
            return int(error.code or 0)
        return 0
    from halfbyte import CheckpointError

    if "calibrate" in order:
        return calibrate(order)
    if "quantize_seconds" in order:
        original = convert.quantize_groups
        convert.quantize_groups = lambda *a: (time.sleep(order["quantize_seconds"]), original(*a))[1]
    if "raises" in order:
        original_read = convert.fetch_group

        def read(checkpoint: Any, group: Any, **keywords: Any) -> Any:
            if group[0].name.full.startswith(order["raises"]):
                raise {"source": CheckpointError, "memory": MemoryError}[order["error"]]("no luck")
            return original_read(checkpoint, group, **keywords)

        convert.fetch_group = read
    try:
        convert.convert(
            Path(order["source"]),
            Path(order["output"]),
            convert.Options(kv_cache="fp8"),
            max_shard_bytes=order["max_shard_bytes"],
            resume=order.get("resume", False),
            requantize=order.get("requantize", False),
            ranks=meet(order) if "rank" in order else None,
        )
    except CheckpointError as error:
        print(error, flush=True)
        return 2
    return 0


def calibrate(order: dict[str, Any]) -> int:
    """With windows of random tokens."""
    import torch

    from halfbyte import NVFP4, CheckpointError, calib
    from halfbyte.calib.calibrate import calibrate as run_calibration
    from halfbyte.calib.data import Windows
    from halfbyte.checkpoint.options import Options

    ids = torch.randint(order["calibrate"], (8, 16), generator=torch.Generator().manual_seed(order.get("data", 0)))
    try:
        run_calibration(
            Path(order["source"]),
            Path(order["output"]),
            Options(format=NVFP4(scale_rule="search"), activations="calibrated", kv_cache="fp8_calibrated"),
            calib.options.Calibration(spill=0),
            Windows(ids, "random"),
            max_shard_bytes=order["max_shard_bytes"],
            resume=order.get("resume", False),
            ranks=calib.ranks.Ranks(order["rank"], order["ranks"], meet(order)) if "rank" in order else None,
            progress=lambda text, share: time.sleep(order.get("layer_seconds", 0)),
        )
    except CheckpointError as error:
        print(error, flush=True)
        return 2
    return 0


def meet(order: dict[str, Any]) -> Any:
    import socket

    from torch import distributed as dist

    from halfbyte.checkpoint.ranks import Ranks

    if "hosts" in order:
        socket.gethostname = lambda: order["hosts"][order["rank"]]
    world = {"rank": order["rank"], "world_size": order["ranks"]}
    dist.init_process_group("gloo", init_method=f"file://{order['meet']}", **world)
    return Ranks.current()


def inject(order: dict[str, Any]) -> list[str]:
    """Replace the calls in this process; returns the names of those that were made, which grows."""
    made: list[str] = []
    fault, at = order.get("fault"), order.get("at")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def replaced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return original(*arguments, **keywords)
            if name == "pwrite" and fault in ("short", "zero"):
                data = arguments[1]
                return 0 if fault == "zero" else original(arguments[0], data[: len(data) // 2 + 1], arguments[2])
            number = len(made)
            made.append(name)
            failing = number == at or (order.get("for_good") and at is not None and number >= at)
            if failing and fault in ("ENOSPC", "EIO"):
                if name == "pwrite":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                code = getattr(errno, fault)
                raise OSError(code, os.strerror(code))
            if number != at:
                return original(*arguments, **keywords)
            if fault == "kill":
                die()
            if fault == "torn" and name == "pwrite":
                original(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                die()
            if fault in ("SIGTERM", "SIGINT"):
                os.kill(os.getpid(), getattr(signal, fault))
            result = original(*arguments, **keywords)
            if fault in ("kill_after", "torn"):
                die()
            return result

        return call

    for name in CALLS:
        setattr(os, name, replaced(name, getattr(os, name)))
    return made


if __name__ == "__main__":
    main()
