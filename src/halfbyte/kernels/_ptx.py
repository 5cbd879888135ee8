"""Inline PTX too long to read between the functions that use it."""

from __future__ import annotations


def e2m1_ptx(safe: bool) -> str:
    """E2M1 codes of 8 elements, mostly on the FMA pipe: the ALU pipe has half its rate.

    With h = y/2 the code is rint(4·sat(h)) + rint(2·sat(|h|-1)) + rint(sat(|h|-2)): .sat clamps to 0..1 for free,
    makes NaN 0, and every sum is exact but the one that rounds. Each rounding adds to 2^23 plus sixteen times the
    previous codes, so four elements pack themselves. `h = y·0.5 + 0` turns -0 into +0 and nothing else, so that its
    sign bit is y < 0. When safe, the scale comes halved and h is one `fma`: no product rounds to -0.
    """
    lines = ["{", ".reg .f32 y, a, s, t, u, h<8>;", ".reg .b32 p, q, r, n<2>;"]
    for half in range(2):
        base = "0f4B000000"
        for i in (3, 2, 1, 0):
            element = 4 * half + i
            register = f"${1 + element // 2}" if element % 2 == 0 else f"${5 + element // 2}"
            if i != 3:
                lines.append("fma.rn.f32 u, t, 0f41800000, 0fCCF00000;")  # 16·t - 15·2^23
                base = "u"
            scale = f"${9 + element // 2}"
            if safe:
                lines.append(f"fma.rn.f32 h{element}, {register}, {scale}, 0f00000000;")
            else:
                lines.append(f"mul.rn.f32 y, {register}, {scale};")
                lines.append(f"fma.rn.f32 h{element}, y, 0f3F000000, 0f00000000;")
            lines += [
                f"abs.f32 a, h{element};",
                "add.rn.sat.f32 s, a, 0f00000000;",
                f"fma.rn.f32 t, s, 0f40800000, {base};",
                "add.rn.sat.f32 s, a, 0fBF800000;",
                "fma.rn.f32 t, s, 0f40000000, t;",
                "add.rn.sat.f32 s, a, 0fC0000000;",
                "add.rn.f32 t, s, t;",
            ]
        lines.append(f"mov.b32 n{half}, t;")
    lines.append("prmt.b32 r, n0, n1, 0x5410;")
    for parity, name in ((0, "p"), (1, "q")):  # the top bytes of the even, then of the odd elements
        low = [f"h{parity + 2 * j}" for j in range(4)]
        lines += [
            f"mov.b32 n0, {low[0]};", f"mov.b32 n1, {low[1]};", f"prmt.b32 {name}, n0, n1, 0x0073;",
            f"mov.b32 n0, {low[2]};", f"mov.b32 n1, {low[3]};", "prmt.b32 n0, n0, n1, 0x0073;",
            f"prmt.b32 {name}, {name}, n0, 0x5410;",
        ]  # fmt: skip
    lines += [
        "shr.u32 p, p, 4;",
        "and.b32 p, p, 0x08080808;",
        "and.b32 q, q, 0x80808080;",
        "or.b32 r, r, p;",
        "or.b32 $0, r, q;",
        "}",
    ]
    return "\n".join(lines)
