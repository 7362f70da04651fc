"""8-bit matrix products for processors with AVX2 alone, made when first needed.

Such a processor has no instruction that multiplies bytes into 32 bits. What it has multiplies pairs
of bytes into 16 bits and then pairs of these into 32. The usual kernels widen after every pair.
Here four products are added in 16 bits first, which saves a quarter of the multiplications.
Weights are scaled so that no activation whatever makes such a sum overflow (`group_scale`).

The kernel is written as LLVM's intermediate language and made into machine code by llvmlite. Where
that is missing, and on processors that do have such instructions, `load` returns None and
oneDNN's kernels do the work.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from soundmap.nn.int8_program import COLUMNS, DEPTH, QUAD, RUN, STEP, Program

MAX_ACTIVATION = 127
"""Activations are 0 to 127: 7 bits."""
MAX_WEIGHT = 127

# The largest sum of weights of one sign that 16 bits hold, whatever they are multiplied with.
_MOST = (2**15 - 1) // MAX_ACTIVATION


def group_scale(weight: Tensor) -> Tensor:
    """Find the finest scale of every output at which no sum of 16 bits can overflow.

    Parameters
    ----------
    weight
        float[out, in], ``in`` a multiple of `STEP`.

    Returns
    -------
    Tensor
        float[out]; weights divided by it and rounded are from -127 to 127.
    """
    groups = _groups(weight)
    # Rounding adds at most a half to each.
    room = _MOST - groups.shape[-1] / 2
    sums = torch.maximum(groups.clamp(min=0).sum(-1), groups.clamp(max=0).sum(-1).neg())
    return torch.maximum(sums.amax(1) / room, weight.abs().amax(1) / MAX_WEIGHT)


def _groups(weight: Tensor) -> Tensor:
    """Put together the weights whose products are added in 16 bits: [out, in / 4, 4]."""
    out, inputs = weight.shape
    pairs = weight.view(out, inputs // STEP, DEPTH, 2, 2)
    return pairs.transpose(2, 3).reshape(out, inputs // 4, 4)


def fits(weight: Tensor) -> bool:
    """Tell whether a matrix [out, in] has whole steps and blocks."""
    return weight.shape[1] % STEP == 0 and weight.shape[0] % COLUMNS == 0


def pack(rounded: Tensor) -> Tensor:
    """Lay weights out in the order in which the kernel reads them.

    Parameters
    ----------
    rounded
        int8[out, in], rounded at a scale no finer than `group_scale`.

    Returns
    -------
    Tensor
        int8[out / COLUMNS, in / 4, COLUMNS, 4], contiguous.
    """
    out, inputs = rounded.shape
    blocks = rounded.view(out // COLUMNS, COLUMNS, inputs // QUAD, QUAD)
    return blocks.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Kernel:
    """The products, as machine code."""

    _write: Callable[..., None]
    _largest: Callable[..., None]
    _round: Callable[..., None]
    _gelu: Callable[..., None]
    _engine: Any
    """Keeps the machine code alive."""

    def multiply(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, unit: float
    ) -> Tensor:
        """Multiply: ``unit * scale * (x @ weights) + bias``.

        Parameters
        ----------
        x
            uint8[T, in], contiguous, 0 to 127.
        packed
            From `pack`.
        scale, bias
            float32[out].
        unit
            What one step of ``x`` stands for.

        Returns
        -------
        Tensor
            float32[T, out].
        """
        out = torch.empty(len(x), len(scale))
        self._run(self._write, x, packed, scale, bias, unit, out, len(scale))
        return out

    def largest(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, unit: float
    ) -> Tensor:
        """Find the largest of each column of what `multiply` gives: float32[out]."""
        out = torch.full((len(scale),), -torch.inf)
        self._run(self._largest, x, packed, scale, bias, unit, out, 0)
        return out

    def can_round(self, x: Tensor) -> bool:
        """Tell whether `round` takes numbers of such a kind, layout and count."""
        count = x.numel()
        return x.dtype == torch.float32 and x.is_contiguous() and count > 0 and count % RUN == 0

    def round(self, x: Tensor, gelu: bool = False) -> tuple[Tensor, float, int]:
        """Round to 7 bits.

        Parameters
        ----------
        x
            float32 of any shape for which `can_round` holds.
        gelu
            Whether to take the GELU of ``x`` first, in place; off by 5e-6 of ``x`` at the most.

        Returns
        -------
        tuple
            uint8 of the same shape, 0 to 127, and the scale and offset that lead back:
            ``x`` is about ``scale * (steps - offset)``.
        """
        assert self.can_round(x)
        out = torch.empty(x.shape, dtype=torch.uint8)
        back = (ctypes.c_float * 2)()
        function = self._gelu if gelu else self._round
        function(x.data_ptr(), out.data_ptr(), back, x.numel(), MAX_ACTIVATION)
        return out, back[0], int(back[1])

    def _run(
        self,
        function: Callable[..., None],
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor,
        unit: float,
        out: Tensor,
        stride: int,
    ) -> None:
        tokens, inputs = x.shape
        assert x.is_contiguous()
        assert packed.shape == (len(scale) // COLUMNS, inputs // QUAD, COLUMNS, QUAD)
        pointers = (t.data_ptr() for t in (x, packed, scale, bias, out))
        function(*pointers, tokens, inputs, len(packed), stride, unit)


@cache
def load() -> Kernel | None:
    """Make the kernel; None where it cannot be made or would not help."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    if not torch.cpu._is_avx2_supported() or torch.cpu._is_vnni_supported():
        return None
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):  # OSError: the package is there, its C library is not
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(Program().text())
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    product = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 4, ctypes.c_float)
    rounding = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_float)

    def function(name: str, kind: type) -> Callable[..., None]:
        made: Callable[..., None] = kind(engine.get_function_address(name))
        return made

    return Kernel(
        function("write", product),
        function("largest", product),
        function("round", rounding),
        function("gelu", rounding),
        engine,
    )
