"""Many tensors copied in two launches; run as `test_triton_kernels.py` is."""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from halfbyte.export import Bucket, Piece, Receiver, Sender
from halfbyte.kernels import copies
from halfbyte.ops import copies as ops_copies

from ..check import equal, same_bits, true
from ..export.links import links, together
from .test_triton_kernels import DEVICE, INTERPRETING, pytestmark  # noqa: F401

SIZES = (4, 8, 12, 16, 20, 64, 4 * copies.CHUNK, 4 * copies.CHUNK + 4, 12 * copies.CHUNK - 16)  # bytes


def test_every_byte_and_no_other(rng: torch.Generator) -> None:
    """Also from one address to several places, and again with other bytes."""
    sources = [torch.randint(256, (size,), generator=rng, dtype=torch.uint8).to(DEVICE) for size in SIZES]
    room = [torch.full((size + 32,), 0xA5, dtype=torch.uint8, device=DEVICE) for size in (*SIZES, SIZES[0])]
    targets = [each[16:-16] for each in room]
    sources.append(torch.arange(48, dtype=torch.uint8, device=DEVICE)[4:44])  # aligned to 4 only
    room.append(torch.full((72,), 0xA5, dtype=torch.uint8, device=DEVICE))
    targets.append(room[-1][20:-12])
    pairs = list(zip(targets, [*sources[:-1], sources[0], sources[-1]], strict=True))
    true(all(copies.supports(*pair) for pair in pairs), "these are supported")
    copy = copies.Copies(*zip(*pairs, strict=True))
    for step in range(2):
        copy()
        for (target, source), around in zip(pairs, room, strict=True):
            same_bits(target.cpu(), source.cpu(), f"{len(source)} bytes, step {step}")
            equal(int((around == 0xA5).sum() - (target == 0xA5).sum()), 32, "a byte beside a target was written")
        for source in sources:
            source += 1


def test_what_it_leaves_to_others() -> None:
    x = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    equal(copies.supports(x[1:33], x[32:]), False)
    equal(copies.supports(torch.zeros(512, device=DEVICE)[1:101], torch.zeros(100, device=DEVICE)), False)
    equal(copies.supports(x[:6], x[16:22]), False)
    equal(copies.supports(x[:32:2], x[32:48]), False)


@pytest.mark.skipif(not INTERPRETING, reason="a link on the CPU, whose tensors kernels write to")
def test_a_sync_gives_parameters_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which `reuse_weights` sees that what it keeps is old; kernels leave versions alone."""
    monkeypatch.setattr(ops_copies, "pick", lambda *_: "triton")
    model, pair = nn.Linear(16, 4), links()
    sender, receiver = Sender(pair[0]), Receiver(model)
    for step in range(1, 3):
        new = {name: torch.full_like(x, step).detach() for name, x in model.named_parameters()}
        bucket = Bucket(0, tuple(Piece(*named) for named in new.items()))
        before = {name: x._version for name, x in model.named_parameters()}
        send, receive = partial(sender.send, [bucket], step), partial(receiver.receive, pair[1])
        equal(together(send, receive), [None, step])
        for name, x in model.named_parameters():
            same_bits(x.detach(), new[name], name)
            true(x._version > before[name], f"version of {name} after step {step}")
