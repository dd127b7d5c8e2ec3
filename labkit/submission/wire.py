"""Messages between two processes: values as JSON, tensors beside it as safetensors. Nothing is pickled, evaluated or imported.

A message is a header of two lengths (JSON, safetensors; 8 bytes each, big-endian), then the two parts. Both sides may read what a stranger
wrote: everything is checked and size-capped, and whatever is wrong is a `WireError`.
"""

from __future__ import annotations

import json
import math
import struct
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import load, save

MAX_JSON = 4 * 2**20
MAX_TENSORS = 64 * 2**20
MAX_ITEMS = 100_000
_MAX_HEADER = 256 * 2**10  # bytes in which safetensors describes its tensors: some thousand of them
_MAX_DEPTH = 16
_MAX_BITS = 8192
_HEADER = struct.Struct(">QQ")
HEADER_BYTES = _HEADER.size
_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
}  # fmt: skip
# A value that JSON has no word for is an object with one of these keys.
_TENSOR, _ARRAY, _TUPLE, _DICT, _FLOAT = "tensor", "array", "tuple", "dict", "float"


class WireError(ValueError):
    """A value that cannot be sent, or bytes that are no message."""


def encode(value) -> bytes:
    """One message.   value: None, booleans, numbers, strings, tensors and arrays (dense), in lists, tuples and dicts with string keys.

    Raises WireError, with the place, for anything else and beyond the caps.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_to_json(value, tensors, "the value", 0), allow_nan=False).encode()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(text) > MAX_JSON or size > MAX_TENSORS:
        raise WireError(f"the value has {len(text):,} bytes of text and {size:,} of tensors; at most {MAX_JSON:,} and {MAX_TENSORS:,} are sent")
    data = save(tensors)
    return _HEADER.pack(len(text), len(data)) + text + data


def decode(message: bytes):
    """The value of one message.   Raises WireError."""
    if len(message) < _HEADER.size:
        raise WireError(f"a message of {len(message)} bytes has no header")
    text_length, _ = _lengths(message[: _HEADER.size])
    body = message[_HEADER.size :]
    try:
        if int.from_bytes(body[text_length : text_length + 8], "little") > _MAX_HEADER:
            raise WireError(f"more than {_MAX_HEADER:,} bytes that describe tensors")
        return _Reader(load(body[text_length:])).read(json.loads(body[:text_length]), 0)
    except WireError:
        raise
    except Exception as error:  # what a stranger's bytes make safetensors, torch and json raise is no closed list
        raise WireError(f"not a message: {type(error).__name__}: {str(error)[:200]}") from None


def send(stream: BinaryIO, value) -> None:
    """Write one message.   Raises WireError before anything is written."""
    message = encode(value)
    stream.write(message)
    stream.flush()


def receive(stream: BinaryIO):
    """Read one message.   Raises EOFError where the other side has gone, WireError for what is no message."""
    header = _exactly(stream, _HEADER.size)
    return decode(header + _exactly(stream, sum(_lengths(header))))


def _lengths(header):
    text, data = _HEADER.unpack(header)
    # safetensors' own header comes on top of the tensors' bytes.
    if text > MAX_JSON or data > MAX_TENSORS + MAX_JSON:
        raise WireError(f"a message of {text:,} and {data:,} bytes is more than is read")
    return text, data


def length_of(header: bytes) -> int:
    """Bytes of the whole message that begins with this header.   Raises WireError beyond the caps."""
    return HEADER_BYTES + sum(_lengths(header))


def _exactly(stream, count):
    parts, missing = [], count
    while missing:
        part = stream.read(missing)
        if not part:
            raise EOFError("the other process ended")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _to_json(value, tensors, where, depth):
    if depth > _MAX_DEPTH:
        raise WireError(f"{where} is nested more than {_MAX_DEPTH} deep")
    if type(value) is int and value.bit_length() > _MAX_BITS:
        raise WireError(f"{where} is a number of {value.bit_length():,} bits; at most {_MAX_BITS:,} are sent")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, torch.Tensor):
        return {_TENSOR: _keep(value, tensors, where)}
    if isinstance(value, (np.ndarray, np.generic)):
        return {_ARRAY: _keep(_tensor_of(value, where), tensors, where)}
    if isinstance(value, (list, tuple)):
        _counted(value, where)
        items = [_to_json(item, tensors, f"{where}, number {i}", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        _counted(value, where)
        if not all(type(name) is str for name in value):
            raise WireError(f"{where} has a key that is no string")
        return {_DICT: {name: _to_json(item, tensors, f"{where}, {name}", depth + 1) for name, item in value.items()}}
    raise WireError(f"{where} is a {type(value).__name__}; only tensors, numbers, strings, lists and dicts can be sent")


def _counted(value, where):
    if len(value) > MAX_ITEMS:
        raise WireError(f"{where} has {len(value):,} items; at most {MAX_ITEMS:,} are sent")


def _keep(tensor, tensors, where):
    shapeless = isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)
    if shapeless or tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in _DTYPES:
        raise WireError(f"{where} is a tensor without plain values, or of an unusual kind ({tensor.dtype})")
    name = str(len(tensors))
    _fits(tensor.numel() * tensor.element_size(), where)
    try:
        # A copy of its own: safetensors refuses tensors that share memory, and subclasses stay behind.
        tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach().cpu().resolve_conj().resolve_neg())
    except RuntimeError:  # a tensor inside torch.func, say
        raise WireError(f"{where} is a tensor without plain values") from None
    return name


def _fits(size, where):
    """Before anything is copied: a view may be larger than the memory it shows."""
    if size > MAX_TENSORS:
        raise WireError(f"{where} has {size:,} bytes; at most {MAX_TENSORS:,} are sent")


def _tensor_of(array, where):
    _fits(array.nbytes, where)
    try:
        return torch.from_numpy(np.ascontiguousarray(array).copy()).reshape(np.shape(array))
    except (TypeError, ValueError):
        raise WireError(f"{where} is an array of {array.dtype}") from None


class _Reader:
    """Makes the value of parsed JSON. What it costs to look at a value stays within what it cost to send: every tensor stands in it once."""

    def __init__(self, tensors):
        self.tensors, self.items = tensors, 0

    def read(self, value, depth):
        self.items += 1
        if depth > _MAX_DEPTH or self.items > 2 * MAX_ITEMS:
            raise WireError(f"the message is nested more than {_MAX_DEPTH} deep, or has more than {2 * MAX_ITEMS:,} items")
        if isinstance(value, list):
            return [self.read(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        (kind, inside), = value.items()
        if kind == _TENSOR:
            return self.tensors.pop(inside)
        if kind == _ARRAY:
            return self.tensors.pop(inside).numpy()
        if kind == _TUPLE and isinstance(inside, list):
            return tuple(self.read(item, depth + 1) for item in inside)
        if kind == _DICT and isinstance(inside, dict):
            return {name: self.read(item, depth + 1) for name, item in inside.items()}
        if kind == _FLOAT and inside in ("nan", "inf", "-inf"):
            return float(inside)
        raise WireError(f"an object of kind {kind!r}")
