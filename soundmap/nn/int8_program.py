"""The 8-bit kernel in LLVM's intermediate language."""

from __future__ import annotations

from typing import Any

LANES = 8
"""Numbers of 32 bits in a register."""
QUAD = 4
"""Bytes that make up one of them: inputs that are multiplied into the same sum."""
DEPTH = 2
"""Quads whose products are added in 16 bits before they are widened."""
REGISTERS = 2
"""Registers of outputs that a tile has side by side."""
ROWS = 3
"""Tokens that a tile has; with the registers of outputs it fits the sixteen that there are."""
ROWS_IN_CACHE = 200
"""Tokens whose inputs stay in the second-level cache while all weights pass by."""

STEP = QUAD * DEPTH
"""Inputs come in whole steps of so many."""
COLUMNS = LANES * REGISTERS
"""Outputs come in whole blocks of so many."""
RUN = 4 * LANES
"""Numbers that are rounded at a time."""

# erf(z) / z over z in [0, 4], a quotient of polynomials in z squared, fitted by least squares: off
# by 3e-6 at the most, where a step of 7 bits is some thousand times as much.
_ERF_OVER = (1.12839854, 0.14252932, 0.04413002, 0.00035757836, -1.4977606e-05)
_ERF_UNDER = (1.0, 0.459806, 0.09195699, 0.009308267, -0.00014141503)
_ERF_END = 4.0


class Program:
    """Functions ``write`` and ``largest`` over tiles of tokens and outputs, ``round`` and ``gelu``.

    What they take stands in `soundmap.nn.int8_kernel.Kernel`.
    """

    def __init__(self) -> None:
        from llvmlite import ir

        self.ir = ir
        self.module = ir.Module("int8")
        self.byte, self.word, self.long = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        self.single = ir.FloatType()
        self.bytes32 = ir.VectorType(self.byte, 4 * LANES)
        self.shorts16 = ir.VectorType(ir.IntType(16), 2 * LANES)
        self.words8 = ir.VectorType(self.word, LANES)
        self.singles8 = ir.VectorType(self.single, LANES)
        self.pairs_of_bytes = ir.Function(
            self.module,
            ir.FunctionType(self.shorts16, [self.bytes32, self.bytes32]),
            "llvm.x86.avx2.pmadd.ub.sw",
        )
        self.pairs_of_shorts = ir.Function(
            self.module,
            ir.FunctionType(self.words8, [self.shorts16, self.shorts16]),
            "llvm.x86.avx2.pmadd.wd",
        )

    def text(self) -> str:
        """Write all functions."""
        self._function("write", largest=False)
        self._function("largest", largest=True)
        self._rounding("round", gelu=False)
        self._rounding("gelu", gelu=True)
        return str(self.module)

    def _at(self, value: int) -> Any:
        return self.ir.Constant(self.long, value)

    def _load(self, b: Any, pointer: Any, kind: Any) -> Any:
        return b.load(b.bitcast(pointer, kind.as_pointer()), align=1)

    def _spread(self, b: Any, word: Any) -> Any:
        """Repeat four bytes over a register."""
        ir = self.ir
        none = ir.Constant(self.words8, ir.Undefined)
        first = b.insert_element(none, word, ir.Constant(self.word, 0))
        zeros = ir.Constant(ir.VectorType(self.word, LANES), [0] * LANES)
        return b.bitcast(b.shuffle_vector(first, none, zeros), self.bytes32)

    def _tile(self, name: str, rows: int, largest: bool) -> Any:
        """One block of outputs of a few tokens: a loop over all inputs, then the result."""
        ir = self.ir
        pointer, floats = self.byte.as_pointer(), self.single.as_pointer()
        arguments = [pointer, pointer, floats, floats, floats]
        arguments += [self.long, self.long, self.long, self.single]
        f = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), f"{name}{rows}")
        f.linkage = "internal"
        f.attributes.add("alwaysinline")
        x, weights, scale, bias, out, inputs, steps, stride, unit = f.args
        entry, loop, end = (f.append_basic_block() for _ in range(3))
        b = ir.IRBuilder(entry)
        tokens = [b.gep(x, [b.mul(inputs, self._at(row))]) for row in range(rows)]
        b.branch(loop)

        b.position_at_end(loop)
        step = b.phi(self.long)
        step.add_incoming(self._at(0), entry)
        sums = [[b.phi(self.words8) for _ in range(REGISTERS)] for _ in range(rows)]
        at_x = b.mul(step, self._at(STEP))
        at_weights = b.gep(weights, [b.mul(step, self._at(STEP * COLUMNS))])
        parts = [
            self._load(b, b.gep(at_weights, [self._at(32 * i)]), self.bytes32)
            for i in range(DEPTH * REGISTERS)
        ]
        fresh = []
        for token, row in zip(tokens, sums, strict=True):
            start = b.gep(token, [at_x])
            shorts: list[Any] = [None] * REGISTERS
            for depth in range(DEPTH):
                quad = self._load(b, b.gep(start, [self._at(QUAD * depth)]), self.word)
                spread = self._spread(b, quad)
                for i in range(REGISTERS):
                    products = [spread, parts[depth * REGISTERS + i]]
                    products = b.call(self.pairs_of_bytes, products)
                    shorts[i] = products if depth == 0 else b.add(shorts[i], products)
            ones = ir.Constant(self.shorts16, [1] * 2 * LANES)
            fresh.append(
                [
                    b.add(total, b.call(self.pairs_of_shorts, [short, ones]))
                    for total, short in zip(row, shorts, strict=True)
                ]
            )
        following = b.add(step, self._at(1))
        step.add_incoming(following, loop)
        zero = ir.Constant(self.words8, [0] * LANES)
        for row, new in zip(sums, fresh, strict=True):
            for total, value in zip(row, new, strict=True):
                total.add_incoming(zero, entry)
                total.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, steps), loop, end)

        b.position_at_end(end)
        units = b.bitcast(self._spread(b, b.bitcast(unit, self.word)), self.singles8)
        for i, new in enumerate(fresh):
            target = b.gep(out, [b.mul(stride, self._at(i))])
            for register, total in enumerate(new):
                place = [self._at(LANES * register)]
                scales = b.fmul(self._load(b, b.gep(scale, place), self.singles8), units)
                offsets = self._load(b, b.gep(bias, place), self.singles8)
                value = b.fadd(b.fmul(b.sitofp(total, self.singles8), scales), offsets)
                cell = b.gep(target, place)
                if largest:
                    before = self._load(b, cell, self.singles8)
                    value = b.select(b.fcmp_ordered(">", value, before), value, before)
                b.store(value, b.bitcast(cell, self.singles8.as_pointer()), align=1)
        b.ret_void()
        return f

    def _function(self, name: str, largest: bool) -> None:
        """Go through tokens, as many as fit the cache, and for each lot through all outputs."""
        ir = self.ir
        tiles = {rows: self._tile(f"{name}_tile", rows, largest) for rows in range(1, ROWS + 1)}
        pointer, floats = self.byte.as_pointer(), self.single.as_pointer()
        arguments = [pointer, pointer, floats, floats, floats, *[self.long] * 4, self.single]
        f = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), name)
        x, weights, scale, bias, out, tokens, inputs, blocks, stride, unit = f.args
        names = ("entry", "lot", "block", "row", "whole", "rest", "next_block", "next_lot", "done")
        at = {n: f.append_basic_block(n) for n in names}
        b = ir.IRBuilder(at["entry"])
        steps = b.sdiv(inputs, self._at(STEP))
        block_size = b.mul(inputs, self._at(COLUMNS))
        b.branch(at["lot"])

        b.position_at_end(at["lot"])
        first = b.phi(self.long)
        first.add_incoming(self._at(0), at["entry"])
        whole_lot = b.add(first, self._at(ROWS_IN_CACHE))
        last = b.select(b.icmp_signed("<", whole_lot, tokens), whole_lot, tokens)
        b.branch(at["block"])

        b.position_at_end(at["block"])
        block = b.phi(self.long)
        block.add_incoming(self._at(0), at["lot"])
        own = b.gep(weights, [b.mul(block, block_size)])
        column = [b.mul(block, self._at(COLUMNS))]
        own_scale, own_bias = b.gep(scale, column), b.gep(bias, column)
        b.branch(at["row"])

        b.position_at_end(at["row"])
        row = b.phi(self.long)
        row.add_incoming(first, at["block"])
        start = b.gep(x, [b.mul(row, inputs)])
        target = b.gep(b.gep(out, [b.mul(row, stride)]), column)
        given = [start, own, own_scale, own_bias, target, inputs, steps, stride, unit]
        left = b.sub(last, row)
        b.cbranch(b.icmp_signed(">=", left, self._at(ROWS)), at["whole"], at["rest"])

        b.position_at_end(at["whole"])
        b.call(tiles[ROWS], given)
        row.add_incoming(b.add(row, self._at(ROWS)), at["whole"])
        b.branch(at["row"])

        b.position_at_end(at["rest"])
        choice = b.switch(left, at["next_block"])
        for rows in range(1, ROWS):
            case = f.append_basic_block(f"rest{rows}")
            choice.add_case(self._at(rows), case)
            b.position_at_end(case)
            b.call(tiles[rows], given)
            b.branch(at["next_block"])

        b.position_at_end(at["next_block"])
        following = b.add(block, self._at(1))
        block.add_incoming(following, at["next_block"])
        b.cbranch(b.icmp_signed("<", following, blocks), at["block"], at["next_lot"])

        b.position_at_end(at["next_lot"])
        first.add_incoming(last, at["next_lot"])
        b.cbranch(b.icmp_signed("<", last, tokens), at["lot"], at["done"])

        b.position_at_end(at["done"])
        b.ret_void()

    def _many(self, value: float) -> Any:
        return self.ir.Constant(self.singles8, [value] * LANES)

    def _polynomial(self, b: Any, at: Any, coefficients: tuple[float, ...]) -> Any:
        value = self._many(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            product = b.fmul(value, at, flags=["contract"])
            value = b.fadd(product, self._many(coefficient), flags=["contract"])
        return value

    def _lesser(self, b: Any, x: Any, y: Any) -> Any:
        return b.select(b.fcmp_ordered("<", x, y), x, y)

    def _greater(self, b: Any, x: Any, y: Any) -> Any:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    def _gelu(self, b: Any, x: Any) -> Any:
        """``x / 2 (1 + erf(x / sqrt 2))``."""
        z = b.fmul(x, self._many(0.5**0.5))
        z = self._greater(b, self._lesser(b, z, self._many(_ERF_END)), self._many(-_ERF_END))
        square = b.fmul(z, z)
        over, under = (self._polynomial(b, square, c) for c in (_ERF_OVER, _ERF_UNDER))
        erf = b.fmul(z, b.fdiv(over, under))
        half = b.fmul(x, self._many(0.5))
        return b.fadd(half, b.fmul(half, erf))

    def _extreme(self, b: Any, vector: Any, choose: Any) -> Any:
        """One number of the lanes of a register, kept in all of them."""
        none = self.ir.Constant(self.singles8, self.ir.Undefined)
        lanes = self.ir.VectorType(self.word, LANES)
        for distance in (4, 2, 1):
            order = self.ir.Constant(lanes, [i ^ distance for i in range(LANES)])
            vector = choose(b, vector, b.shuffle_vector(vector, none, order))
        return vector

    def _rounding(self, name: str, gelu: bool) -> None:
        """Two passes over numbers: their range, after GELU if asked for, and their steps in it."""
        ir = self.ir
        floats, octets = self.single.as_pointer(), self.byte.as_pointer()
        # Numbers, steps, what leads back; how many numbers, highest step.
        kinds = [floats, octets, floats, self.long, self.single]
        f = ir.Function(self.module, ir.FunctionType(ir.VoidType(), kinds), name)
        x, out, back, count, most = f.args
        entry, ranging, between, stepping, done = (f.append_basic_block() for _ in range(5))
        b = ir.IRBuilder(entry)
        b.branch(ranging)

        b.position_at_end(ranging)
        at = b.phi(self.long)
        ends = [b.phi(self.singles8) for _ in range(8)]
        at.add_incoming(self._at(0), entry)
        fresh = []
        for lane in range(4):
            place = b.gep(x, [b.add(at, self._at(LANES * lane))])
            value = self._load(b, place, self.singles8)
            if gelu:
                value = self._gelu(b, value)
                b.store(value, b.bitcast(place, self.singles8.as_pointer()), align=1)
            fresh.append(self._lesser(b, value, ends[lane]))
            fresh.append(self._greater(b, value, ends[4 + lane]))
        after = b.add(at, self._at(RUN))
        at.add_incoming(after, ranging)
        for i, phi in enumerate(ends):
            # Zero is always in the range.
            phi.add_incoming(self._many(0.0), entry)
            phi.add_incoming(fresh[2 * (i % 4) + i // 4], ranging)
        b.cbranch(b.icmp_signed("<", after, count), ranging, between)

        b.position_at_end(between)
        low, high = fresh[0], fresh[1]
        for i in range(1, 4):
            low, high = self._lesser(b, low, fresh[2 * i]), self._greater(b, high, fresh[2 * i + 1])
        low = self._extreme(b, low, self._lesser)
        high = self._extreme(b, high, self._greater)
        steps = b.bitcast(self._spread(b, b.bitcast(most, self.word)), self.singles8)
        # One step less than there is: the offset may be rounded up.
        scale = b.fdiv(b.fsub(high, low), b.fsub(steps, self._many(1.0)))
        scale = b.select(b.fcmp_ordered(">", scale, self._many(0.0)), scale, self._many(1.0))
        inverse = b.fdiv(self._many(1.0), scale)
        half = self._many(0.5)
        offset = b.fptosi(b.fadd(b.fmul(b.fneg(low), inverse), half), self.words8)
        offset = b.sitofp(offset, self.singles8)
        place = b.fadd(offset, half)
        zero = ir.Constant(self.word, 0)
        b.store(b.extract_element(scale, zero), back)
        b.store(b.extract_element(offset, zero), b.gep(back, [self._at(1)]))
        b.branch(stepping)

        b.position_at_end(stepping)
        at = b.phi(self.long)
        at.add_incoming(self._at(0), between)
        whole = []
        for lane in range(4):
            start = b.gep(x, [b.add(at, self._at(LANES * lane))])
            value = self._load(b, start, self.singles8)
            whole.append(b.fptosi(b.fadd(b.fmul(value, inverse), place), self.words8))
        # Trunc of all 32 at once, so that the registers are packed and not taken apart.
        for length in (16, 32):
            order = ir.Constant(ir.VectorType(self.word, length), list(range(length)))
            pairs = zip(whole[::2], whole[1::2], strict=True)
            whole = [b.shuffle_vector(one, other, order) for one, other in pairs]
        octets32 = b.trunc(whole[0], self.bytes32)
        b.store(octets32, b.bitcast(b.gep(out, [at]), self.bytes32.as_pointer()), align=1)
        after = b.add(at, self._at(RUN))
        at.add_incoming(after, stepping)
        b.cbranch(b.icmp_signed("<", after, count), stepping, done)

        b.position_at_end(done)
        b.ret_void()
