"""Element types on the wire and in NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.errors import DtypeMismatchError


def test_every_data_type_of_the_contract_has_its_dtype() -> None:
    assert set(dtypes.DTYPES) == set(pb.DataType.values()) - {pb.DATA_TYPE_UNSPECIFIED}


@pytest.mark.parametrize("data_type", dtypes.DTYPES)
def test_to_wire_and_from_wire_are_inverse(data_type: int) -> None:
    assert dtypes.to_wire(dtypes.from_wire(data_type)) == data_type


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.clongdouble, ">f4", ">c8", "U3", object])
def test_other_dtypes_are_refused_with_the_allowed_ones(dtype: object) -> None:
    with pytest.raises(DtypeMismatchError, match=r"gradient 'w' has dtype .*; allowed are float32, .*, complex128"):
        dtypes.to_wire(dtype, "gradient 'w'")


@pytest.mark.parametrize("data_type", [pb.DATA_TYPE_UNSPECIFIED, 99])
def test_unknown_number_is_refused(data_type: int) -> None:
    with pytest.raises(DtypeMismatchError, match="unknown data type"):
        dtypes.from_wire(data_type)


@pytest.mark.parametrize(
    ("dtype", "storage", "state"),
    [
        (np.float32, np.float32, np.float32),
        (np.float64, np.float64, np.float64),
        (np.float16, np.float16, np.float32),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float32),
        (np.complex64, np.float32, np.complex64),
        (np.complex128, np.float64, np.complex128),
    ],
)
def test_flat_arrays_are_real_and_state_of_16_bit_parameters_is_float32(dtype: object, storage: object, state: object) -> None:
    assert dtypes.storage_dtype(dtype) == storage
    assert dtypes.state_dtype(dtype) == state
    assert dtypes.is_complex(dtype) == (np.dtype(dtype).kind == "c")
