"""NVRTC accepts every kernel for every architecture, and its instructions are what the design asks for. No GPU needed."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import VARIANTS, Variant

from optserve.server.backends.cupy import nvrtc, source
from optserve.server.formulas import Elementwise, find
from optserve.server.formulas.language import CLIP, L1, FormulaError, Program, specialise
from optserve.wire.dtypes import state_dtype
from optserve.wire.errors import InternalError, MissingExtraError

F32, F64, F16, BF16 = (np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
PAIRS = [(F32, F32), (F64, F64), (F16, F32), (F16, F16), (BF16, F32), (BF16, BF16)]
ARCHS = (75, 80, 86, 89, 90, 100, 120)
USUAL = 90
"""The architecture for which everything is compiled in every run."""

ELEMENTWISE = [variant for variant in VARIANTS if isinstance(find(variant.optimizer), Elementwise)]
FIRST = list({variant.optimizer: variant for variant in reversed(ELEMENTWISE)}.values())
"""One variant of each optimizer, compiled for every architecture in every run."""


def program_of(variant: Variant, **also: float) -> Program:
    optimizer = find(variant.optimizer)
    return optimizer.program(optimizer.choices({**optimizer.defaults, **variant.options, **also}))


def kernels_of(program: Program) -> Iterator[tuple[str, str, Any]]:
    """Name, source and the wire and gradient dtypes of each."""
    for pair in PAIRS:
        name = source.kernel_name("it", *pair)
        yield name, source.kernel(program, name, *pair), pair


def bodies(ptx: str) -> dict[str, str]:
    """The instructions of each kernel."""
    return {found[1]: found[2] for found in re.finditer(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", ptx, re.DOTALL)}


def section(image: bytes, name: bytes) -> bytes:
    """Of an ELF file."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, of_names = struct.unpack_from("<3H", image, 58)
    headers = [struct.unpack_from("<2I4Q", image, table + size * index) for index in range(count)]
    names = headers[of_names][4]
    found = [entry for entry in headers if image[names + entry[0] :].startswith(name + b"\0")]
    assert len(found) == 1
    return image[found[0][4] : found[0][4] + found[0][5]]


def assert_no_spills(image: bytes, kernels: int) -> None:
    """By the cubin's own notes on each kernel: registers, and bytes of stack, which hold what registers do not."""
    notes = section(image, b".nv.info")
    registers, stacks = (
        [int.from_bytes(found[1], "little") for found in re.finditer(rb"\x04" + kind + rb"\x08\0.{4}(.{4})", notes, re.DOTALL)]
        for kind in (rb"\x2f", rb"\x12")
    )
    assert len(registers) == kernels
    assert max(registers) <= 128
    assert stacks == [0] * kernels


def assert_plain(name: str, body: str) -> None:
    """Nothing flushed, contracted or approximate, and no array that is not in registers."""
    for refused in (".ftz", "fma.", ".approx", ".local"):
        assert refused not in body, f"{name}: {refused}"


@pytest.mark.parametrize("variant", ELEMENTWISE, ids=str)
def test_a_kernel_computes_plainly_and_moves_16_bytes_at_a_time(variant: Variant) -> None:
    program = program_of(variant)
    kernels = list(kernels_of(program))
    found = bodies(nvrtc.find().ptx("".join([source.PRELUDE, *(text for _, text, _ in kernels)]), USUAL))
    assert set(found) == {name for name, _, _ in kernels}
    changed = 1 + len(program.slots)
    for name, _, (dtype, gradient) in kernels:
        body, wide = found[name], state_dtype(dtype) == F64
        assert_plain(name, body)
        assert wide or ".f64" not in body, name
        vectors = source.pack_size(state_dtype(dtype), gradient, dtype) * state_dtype(dtype).itemsize // source.ACCESS_BYTES
        narrow = dtype.itemsize == 2
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v(?:2\.\w64|4\.\w32)", body))
        stores = len(re.findall(r"st\.global\.v(?:2\.\w64|4\.\w32)", body))
        loops, rest = divmod(stores, changed * vectors + narrow)  # a condition on a scalar is taken out of the loop, of which
        assert loops >= 1, name  # there are two then
        assert rest == 0, name
        read = 1 if gradient.itemsize == 2 else vectors
        assert loops * read <= loads <= loops * (changed * vectors + read), name  # a slot that is only written is not read
        if narrow or gradient.itemsize == 2:
            half = r"cvt\.rn\.f16\.f32|cvt\.f32\.f16"
            assert bool(re.search(half, body)) == (dtype == F16), name


def test_folds_and_sums_compute_plainly() -> None:
    text, names = source.shared()
    found = bodies(nvrtc.find().ptx(text, USUAL))
    assert set(found) == set(names)
    assert len(names) == 14 + 2 + 2 + 1 + 3 * 3
    for name, body in found.items():
        assert_plain(name, body)
        if name.startswith("optserve_fold"):
            assert (".f64" in body) == ("_f64_" in name)
            assert "ld.global.nc.v" in body
            assert "st.global.v" in body


@pytest.mark.parametrize("arch", ARCHS)
def test_a_cubin_of_every_optimizer_for_every_architecture(arch: int) -> None:
    texts = [text.replace("_it_", f"_{index}_") for index, v in enumerate(FIRST) for _, text, _ in kernels_of(program_of(v))]
    image = nvrtc.find().image("".join([source.shared()[0], *texts]), arch)
    assert image.startswith(b"\x7fELF")
    assert_no_spills(image, len(source.shared()[1]) + len(texts))
    for pair in PAIRS:
        assert source.kernel_name("0", *pair).encode() in image


def test_no_kernel_spills_registers() -> None:
    programs: list[Program] = []
    for variant in ELEMENTWISE:
        if program_of(variant) not in programs:
            programs.append(program_of(variant))
    texts = [text.replace("_it_", f"_{index}_") for index, program in enumerate(programs) for _, text, _ in kernels_of(program)]
    assert_no_spills(nvrtc.find().image("".join([source.PRELUDE, *texts]), USUAL), len(texts))


def test_clipping_and_a_penalty_compute_plainly_and_spill_nothing() -> None:
    """In every optimizer: both come before the formula."""
    texts: list[str] = []
    for index, variant in enumerate(FIRST):
        program = program_of(variant, clip_grad_value=0.5, l1=0.1)
        assert {CLIP, L1} <= set(program.scalars)
        texts += [text.replace("_it_", f"_{index}_") for _, text, _ in kernels_of(program)]
    whole = "".join([source.PRELUDE, *texts])
    assert_no_spills(nvrtc.find().image(whole, USUAL), len(texts))
    for name, body in bodies(nvrtc.find().ptx(whole, USUAL)).items():
        assert_plain(name, body)


def test_a_spill_would_be_seen() -> None:
    kernel = """
        extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* a, int n) {
          float x[64];
          #pragma unroll
          for (int i = 0; i < 64; ++i) x[i] = a[i * n];
          #pragma unroll
          for (int i = 0; i < 64; ++i) a[i * n + 1] = x[i] / x[63 - i];
        }"""
    with pytest.raises(AssertionError):
        assert_no_spills(nvrtc.find().image(kernel, USUAL), 1)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", ELEMENTWISE, ids=str)
def test_a_cubin_of_every_variant_for_every_architecture(variant: Variant, arch: int) -> None:
    image = nvrtc.find().image("".join([source.PRELUDE, *(text for _, text, _ in kernels_of(program_of(variant)))]), arch)
    assert_no_spills(image, len(PAIRS))


def test_sm_70_needs_the_nvrtc_of_cuda_12() -> None:
    try:
        older = nvrtc.find(12)
    except MissingExtraError:
        with pytest.raises(
            MissingExtraError, match=r"NVRTC 13\.\d+ compiles for sm_75 and later; the device has sm_70.*cuda12"
        ):
            nvrtc.find(13).image(source.shared()[0], 70)
    else:
        assert older.image(source.shared()[0], 70).startswith(b"\x7fELF")


def test_a_device_newer_than_nvrtc_gets_instructions_that_its_driver_compiles() -> None:
    found = nvrtc.find()
    text = found.image(source.shared()[0], found.archs[-1] + 1)
    assert f".target sm_{found.archs[-1]}".encode() in text
    assert text.endswith(b"\0")


def test_nvrtcs_refusal_has_its_log() -> None:
    with pytest.raises(InternalError, match=r"NVRTC refuses a kernel for -arch=sm_90: optserve\.cu\(1\): error"):
        nvrtc.find().image("not C++", 90)


def test_a_missing_nvrtc_says_what_to_install() -> None:
    with pytest.raises(
        MissingExtraError, match=r"NVRTC \(libnvrtc\.so\.11\) is not installed: pip install 'optserve\[cuda11\]'"
    ):
        nvrtc.find(11)


def test_names_say_the_dtypes() -> None:
    assert source.kernel_name("Adam", F32, F32) == "optserve_adam_f32_g_f32"
    assert source.kernel_name("AdamW", BF16, BF16) == "optserve_adamw_f32_g_bf16_w_bf16"
    assert source.kernel_name("SGD", F64, F64) == "optserve_sgd_f64_g_f64"


def unwritable(p, g, lr):  # type: ignore[no-untyped-def]
    return p - lr * g * 1e999


def test_a_literal_beyond_float64_is_refused() -> None:
    with pytest.raises(FormulaError, match="the literal inf cannot be written"):
        source.kernel(specialise(unwritable, (), {}), "it", F32, F32)
