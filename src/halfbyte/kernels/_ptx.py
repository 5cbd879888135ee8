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


def e2m1_conversion_ptx(safe: bool) -> str:
    """E2M1 codes of 8 elements by the conversion instruction of sm_100 and sm_120; operands as in `e2m1_ptx`.

    The instruction keeps the sign of -0 and makes NaN +6, where the contract wants 0 for both. Adding +0 turns -0 into
    +0 and nothing else. A pair with a NaN becomes 0: a block with a NaN has NaN for its scale, so the other is one too.
    When safe, no product of a non-zero element rounds to -0, and one `fma` does both.
    """
    lines = ["{", ".reg .f32 a, b;", ".reg .b8 c<4>;", ".reg .pred p<4>;", ".reg .b32 r;"]
    for pair in range(4):
        low, high, scale = f"${1 + pair}", f"${5 + pair}", f"${9 + pair}"
        for register, element in (("a", low), ("b", high)):
            if safe:
                lines.append(f"fma.rn.f32 {register}, {element}, {scale}, 0f00000000;")
            else:
                lines.append(f"mul.rn.f32 {register}, {element}, {scale};")
                lines.append(f"add.rn.f32 {register}, {register}, 0f00000000;")
        lines.append(f"setp.nan.f32 p{pair}, a, b;")
        lines.append(f"cvt.rn.satfinite.e2m1x2.f32 c{pair}, b, a;")  # the first operand is the high nibble
    lines.append("mov.b32 r, {c0, c1, c2, c3};")
    for pair in range(4):
        lines.append(f"@p{pair} and.b32 r, r, 0x{0xFFFFFFFF ^ 0xFF << 8 * pair:08X};")
    lines += ["mov.b32 $0, r;", "}"]
    return "\n".join(lines)
