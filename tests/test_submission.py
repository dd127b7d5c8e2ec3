"""Properties of the way from a saved notebook to its verdicts: the wire, the cells that count, the worker with its limits, the receipt.

The judges are struct and bytes, autograd, and processes that really hang, grow, die and write junk.
"""

import io
import json
import os
import pickle
import random
import struct
import sys
import threading
import types

import numpy as np
import psutil
import pytest
import torch

from labkit.errors import UserError
from labkit.exercises.asking import answer
from labkit.exercises.exercise import Case, Exercise, Raised, all_exercises
from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG, judge
from labkit.submission import absent, apart, cells, wire
from labkit.submission import receipt as receipts
from labkit.submission.apart import Limits, Worker, WorkerLost, examine
from labkit.submission.cells import Cells, cells_of, exercise_ids_of, read_notebook
from labkit.submission.receipt import make_receipt
from labkit.submission.wire import WireError, decode, encode, receive, send
from labkit.submission.worker import run_cell, without_magics

CARRIED = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]
# Without those that torch makes no tensor of.
EVERY_DTYPE = [dtype for dtype in sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
               if not str(dtype).startswith(("torch.q", "torch.bits"))]


def bits(value):
    """A value as tuples of types and bytes: tells 1 from True and 1.0, -0.0 from 0.0, one nan from another, a tuple from a list."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return "tensor", value.dtype, tuple(value.shape), dense.view(torch.uint8).numpy().tobytes()
    if isinstance(value, (np.ndarray, np.generic)):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return "dict", *((name, bits(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple", *map(bits, value)
    return type(value).__name__, struct.pack(">d", value) if isinstance(value, float) else value


def random_tensor(dtype, shape, seed=0):
    """Every bit drawn, so that nan, infinities and denormal numbers are among the values."""
    width = torch.empty((), dtype=dtype).element_size()
    drawn = torch.randint(0, 2 if dtype == torch.bool else 256, (int(np.prod(shape)) * width,), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8).view(dtype).reshape(shape)


def drawn(rng, depth=0):
    """A value of anything that can be sent, nested at random."""
    plain = [
        None, True, False, 0, -1, 2**64, -(10**400), 0.0, -0.0, 1e-320, 1.7976931348623157e308, float("nan"), float("inf"), -float("inf"),
        "", "é\n\x00\u2028\U0001f916", "\ud800", "0", "nan", torch.tensor(2.5), torch.zeros(0, 3), np.float32(1.5), np.bool_(True),
        np.arange(3)[::-1],
    ]
    kind = rng.random()
    if depth > 4 or kind < 0.4:
        return rng.choice(plain)
    inside = [drawn(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.6:
        return inside
    if kind < 0.75:
        return tuple(inside)
    return dict(zip(rng.sample(["tensor", "array", "tuple", "dict", "float", "", "\ud800", "0"], len(inside)), inside))


def packed(text: bytes, tensors: bytes) -> bytes:
    return struct.pack(">QQ", len(text), len(tensors)) + text + tensors


def safetensors_of(header, body=b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def parts_of(message):
    text, tensors = struct.unpack(">QQ", message[:16])
    assert len(message) == 16 + text + tensors
    return message[16 : 16 + text], message[16 + text :]


SOME_VALUE = {"loss": [1, 2.5, "é", None, True, float("nan")], "logits": torch.arange(6.0).reshape(2, 3), "mask": torch.tensor([True, False]),
              "empty": torch.zeros(0, 3), "array": np.arange(3), "pair": (1, (torch.tensor(5),)), "tensor": {"tensor": "0"}}


def test_what_is_sent_arrives_bit_for_bit():
    rng, seen = random.Random(1), set()
    for _ in range(400):
        value = drawn(rng)
        seen.add(type(value))
        assert bits(decode(encode(value))) == bits(value)
    assert {list, tuple, dict, float, str, torch.Tensor} <= seen


@pytest.mark.parametrize("dtype", CARRIED, ids=str)
def test_tensors_of_every_usual_dtype_arrive_bit_for_bit(dtype):
    for shape in [(), (1,), (0,), (2, 0, 3), (5, 7)]:
        tensor = random_tensor(dtype, shape, seed=len(shape))
        assert bits(decode(encode(tensor))) == bits(tensor)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_a_tensor_of_any_dtype_arrives_or_is_refused_by_name(dtype):
    tensor = torch.zeros(16, dtype=torch.uint8).view(dtype)
    try:
        message = encode({"answer": tensor})
    except WireError as refusal:
        assert "answer" in str(refusal) and dtype not in CARRIED
    else:
        assert bits(decode(message)["answer"]) == bits(tensor)


def some_views():
    base, complex_base = torch.arange(12.0).reshape(3, 4), torch.tensor([1 + 2j, -3j], dtype=torch.complex64)
    return {
        "transposed": base.T, "every other column": base[:, ::2], "expanded": base[:1].expand(5, 4), "0-d of a row": base[1, 2],
        "shared memory": base[0], "conjugate": complex_base.conj(), "negative view": complex_base.conj().imag,
        "requires grad": torch.ones(2, requires_grad=True), "with a graph": torch.ones(2, requires_grad=True) * 2,
        "parameter": torch.nn.Parameter(torch.ones(3)), "inference": torch.inference_mode()(torch.ones)(2),
    }


@pytest.mark.parametrize("name", some_views())
def test_views_and_parameters_arrive_as_their_values(name):
    tensor = some_views()[name]
    received = decode(encode(tensor))
    assert bits(received) == bits(tensor) and not received.requires_grad and type(received) is torch.Tensor


def test_tensors_that_share_memory_arrive_apart():
    base = torch.arange(4.0)
    whole, part, again = decode(encode([base, base[1:3], base]))
    whole += 10
    assert part.tolist() == [1, 2] and again.tolist() == [0, 1, 2, 3] and base.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("array", [
    np.arange(6).reshape(2, 3).T, np.arange(6)[::-2], np.array(3.5), np.zeros((0, 2), np.float32), np.array([True, False]), np.float16(-0.0),
    np.uint8(7), np.bool_(False), np.array([np.nan, -np.inf]), np.array([1j], np.complex64), np.broadcast_to(np.int16(4), (2, 2)),
], ids=repr)
def test_numpy_arrays_arrive_bit_for_bit_and_scalars_as_arrays_without_dimensions(array):
    received = decode(encode(array))
    assert isinstance(received, np.ndarray) and bits(received) == bits(array)


@pytest.mark.parametrize("value", [
    {"tensor": "0"}, {"array": "0"}, {"tuple": [1, 2]}, {"dict": {"a": 1}}, {"float": "nan"}, {}, {"tensor": {"dict": {"tensor": "0"}}},
    [{"float": "inf"}],
], ids=str)
def test_dicts_that_look_like_the_wire_s_own_words_stay_dicts(value):
    assert bits(decode(encode([torch.ones(1), value]))[1]) == bits(value)


class Opaque:
    def __repr__(self):
        raise AssertionError("nobody looks into the value")


REFUSED = {
    "set": lambda: {1, 2}, "object": Opaque, "function": lambda: len, "complex": lambda: 1j, "bytes": lambda: b"1", "dtype": lambda: torch.float32,
    "module": lambda: torch.nn.Linear(1, 1), "number as key": lambda: {1: 2}, "None as key": lambda: {None: 2},
    "sparse": lambda: torch.eye(2).to_sparse(), "meta": lambda: torch.ones(2, device="meta"), "objects in an array": lambda: np.array([None]),
    "strings in an array": lambda: np.array(["a"]), "string of numpy": lambda: np.str_("a"), "dates": lambda: np.zeros(2, "datetime64[s]"),
    "records": lambda: np.zeros(2, [("a", "f4")]), "128-bit complex": lambda: np.zeros(2, np.complex128),
    "128-bit complex tensor": lambda: torch.zeros(2, dtype=torch.complex128),
    "foreign byte order": lambda: np.arange(2).astype(np.dtype(np.int32).newbyteorder("S")),
    "number of 5000 digits": lambda: 10**5000, "parameter without a shape": torch.nn.UninitializedParameter,
    "4 TiB that take up 4 bytes": lambda: torch.zeros(1).expand(2**40), "8 TiB that take up 8 bytes": lambda: np.broadcast_to(np.zeros(1), (2**40,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sent_is_refused_with_its_place(name):
    with pytest.raises(WireError, match="given, number 1"):
        encode({"given": [0, REFUSED[name]()]})


def nested(depth, around):
    value = 0
    for _ in range(depth):
        value = around(value)
    return value


@pytest.mark.parametrize("around", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"a": inner}], ids=["list", "tuple", "dict"])
def test_what_may_be_sent_may_be_read_down_to_the_same_depth(around):
    deepest = max(depth for depth in range(40) if depth == 0 or can_be_sent(nested(depth, around)))
    assert 8 <= deepest < 39
    assert decode(encode(nested(deepest, around))) == nested(deepest, around)
    with pytest.raises(WireError, match="deep"):
        encode(nested(10_000, around))


def can_be_sent(value):
    try:
        return bool(encode(value))
    except WireError:
        return False


def test_a_list_that_contains_itself_is_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(WireError, match="deep"):
        encode(endless)


@pytest.mark.parametrize("value", [
    [0] * (wire.MAX_ITEMS + 1), (None,) * (wire.MAX_ITEMS + 1), {str(i): 0 for i in range(wire.MAX_ITEMS + 1)}, "x" * (wire.MAX_JSON + 1),
    torch.zeros(wire.MAX_TENSORS + 1, dtype=torch.uint8), [torch.zeros(wire.MAX_TENSORS // 2 + 1, dtype=torch.uint8)] * 2,
], ids=["list", "tuple", "dict", "string", "tensor", "two tensors"])
def test_what_is_too_large_is_refused(value):
    with pytest.raises(WireError, match="at most"):
        encode(value)


def test_what_is_as_large_as_allowed_arrives():
    for value in ([0] * wire.MAX_ITEMS, "x" * (wire.MAX_JSON - 2), torch.ones(wire.MAX_TENSORS, dtype=torch.uint8)):
        received = receive(io.BytesIO(encode(value)))
        assert len(received) == len(value) and bits(received[-1]) == bits(value[-1])


def test_messages_follow_one_another_on_a_stream_until_it_ends():
    stream = io.BytesIO()
    for number in range(3):
        send(stream, [number, torch.tensor(number)])
    with pytest.raises(WireError):
        send(stream, [object()])
    stream.seek(0)
    assert [receive(stream)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(EOFError):
        receive(stream)


def test_a_message_that_is_cut_off_anywhere_is_refused():
    message = encode(SOME_VALUE)
    for length in range(len(message)):
        with pytest.raises(WireError):
            decode(message[:length])
        with pytest.raises(EOFError):
            receive(io.BytesIO(message[:length]))


class Watched(io.BytesIO):
    """A stream that remembers how many bytes it was asked for."""

    wanted = 0

    def read(self, count=-1):
        self.wanted += count
        return super().read(count)


@pytest.mark.parametrize("lengths", [(2**63, 0), (0, 2**64 - 1), (wire.MAX_JSON + 1, 8), (2, 2**40), (2**32, 2**32)])
def test_a_header_that_promises_too_much_is_refused_before_anything_is_read_for_it(lengths):
    stream = Watched(struct.pack(">QQ", *lengths) + b"[]")
    with pytest.raises(WireError, match="more than is read"):
        receive(stream)
    assert stream.wanted == 16


def flipped(rng, message):
    changed = bytearray(message)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def shifted(rng, message):
    """The same bytes with other lengths in front."""
    lengths = [rng.choice([0, 1, 7, len(message), 2**20, 2**63, 2**64 - 1, rng.randrange(len(message))]) for _ in range(2)]
    return struct.pack(">QQ", *lengths) + message[16:]


def with_other_words(rng, message, depth=0):
    """The tensors of the message under JSON that uses the wire's own words at random."""
    def word(depth=0):
        if depth > 5 or rng.random() < 0.3:
            return rng.choice([None, True, 0, -1, 2**70, 1.5, float("nan"), "0", "1", "9", "nan", "1e5", "", [], {}])
        if rng.random() < 0.3:
            return [word(depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(["tensor", "array", "tuple", "dict", "float", "set"]): word(depth + 1) for _ in range(rng.choice([1, 1, 1, 2]))}

    return packed(json.dumps(word()).encode(), parts_of(message)[1])


def with_other_tensors(rng, message):
    """JSON that asks for one tensor, over a safetensors part whose dtypes, shapes and offsets are drawn."""
    body = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 4, 8, 24])))
    sizes = [0, 0, 1, 2, 3, 4, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.5]
    header = {"0": {"dtype": rng.choice(["F64", "F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "F8_E8M0", "X", None]),
                    "shape": [rng.choice(sizes) for _ in range(rng.randrange(4))],
                    "data_offsets": [rng.choice([0, 0, 0, 1]), rng.choice([len(body), len(body), 0, 2**64 - 1])]}}
    return packed(json.dumps(rng.choice([{"tensor": "0"}, {"array": "0"}])).encode(), safetensors_of(header, body))


def bytes_of(value):
    """Of all tensors and arrays in a value."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.nbytes
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return max((bytes_of(item) for item in inside), default=0)


@pytest.mark.parametrize("mutate", [flipped, shifted, with_other_words, with_other_tensors], ids=lambda mutate: mutate.__name__)
def test_bytes_of_a_stranger_are_a_value_no_larger_than_they_or_a_wire_error(mutate):
    """Any exception but WireError, or EOFError at the end of a stream, fails the test by itself."""
    rng, message, outcomes = random.Random(2), encode(SOME_VALUE), set()
    for _ in range(4000):
        changed = mutate(rng, message)
        for read in (decode, lambda data: receive(io.BytesIO(data))):
            try:
                assert bytes_of(read(changed)) <= len(changed)
                outcomes.add("value")
            except (WireError, EOFError) as refusal:
                outcomes.add(type(refusal).__name__)
    assert "WireError" in outcomes and ("value" in outcomes or mutate is shifted)


# A tensor of no values in a shape whose strides overflow: safetensors lets it pass, and torch raises a RuntimeError.
OVERFLOWING = packed(b'{"tensor": "0"}', safetensors_of({"0": {"dtype": "F32", "shape": [0, 2, 2**62], "data_offsets": [0, 0]}}))


@pytest.mark.parametrize("message", [
    b"", b"\x00" * 15, b"\x00" * 16, b"\xff" * 64, OVERFLOWING, packed(b"[]", b""), packed(b"[]", safetensors_of({})[:-1]),
    *(packed(text, safetensors_of({})) for text in (
        b"", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"a": 1}', b'{"tensor": ["0"]}', b'{"tuple": {}}', b'{"dict": {}, "tuple": []}',
        b'{"float": "1"}', b"[] []")),
    packed(b"[]", safetensors_of({"0": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"abcd")),
], ids=range(18))
def test_what_is_no_message_is_a_wire_error(message):
    with pytest.raises(WireError):
        decode(message)


class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_never_executed(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "made"))
    text, tensors = parts_of(encode([1]))
    for message in (bomb, packed(bomb, tensors), packed(text, bomb), packed(json.dumps(bomb.decode("latin-1")).encode(), bomb)):
        with pytest.raises(WireError):
            decode(message)
    with pytest.raises(WireError):
        encode([Bomb(tmp_path / "made")])
    assert not (tmp_path / "made").exists()
    pickle.loads(bomb)
    assert (tmp_path / "made").exists(), "the bomb is a real one"



def cell(source, exercise=None, tags=(), kind="code", **changes):
    nbgrader = {"nbgrader": {"grade_id": exercise, "solution": True}} if exercise else {}
    return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags), **nbgrader}, "outputs": [], "execution_count": None, **changes}


def page(*inside):
    return {"cells": list(inside), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def saved(folder, notebook, name="homework.ipynb"):
    path = folder / name
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


LESSON = page(
    cell("# Title", kind="markdown"), cell("import torch", tags=["setup"]), cell("scratch = 1"), cell("def f(x):\n    return x\n", "f"),
    cell("check(f)", "f-check", tags=["check"]), cell("def g(x):\n    return 2 * x\n", "g"),
)


def test_the_set_up_cell_and_the_exercises_cells_are_found_and_no_others():
    found = cells_of(LESSON, ["g", "f"])
    assert found.setup == "import torch"
    assert found.exercises == {"f": "def f(x):\n    return x\n", "g": "def g(x):\n    return 2 * x\n"} and not found.problems


def rewritten(change):
    """LESSON with every cell's source rewritten."""
    return page(*({**c, "source": change(c["source"])} for c in LESSON["cells"]))


@pytest.mark.parametrize("change", [
    lambda text: text.splitlines(keepends=True), lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r\n").splitlines(keepends=True), list, lambda text: text.replace("\n", "\r"),
], ids=["list of lines", "Windows", "list of Windows lines", "list of letters", "old Macintosh"])
def test_the_digest_does_not_depend_on_how_lines_are_kept(change):
    assert cells_of(rewritten(change), ["f", "g"]) == cells_of(LESSON, ["f", "g"])
    assert cells_of(rewritten(change), ["f", "g"]).digest == cells_of(LESSON, ["f", "g"]).digest


def test_the_digest_depends_on_what_is_run_and_on_nothing_else():
    digest = cells_of(LESSON, ["f", "g"]).digest
    assert len(digest) == 12 and int(digest, 16) >= 0
    for place in range(len(LESSON["cells"])):
        changed = json.loads(json.dumps(LESSON))
        changed["cells"][place]["source"] += " "
        assert (cells_of(changed, ["f", "g"]).digest != digest) == (place in (1, 3, 5)), place
    executed = page(*({**c, "outputs": [{"output_type": "stream"}], "execution_count": 3} for c in LESSON["cells"]), cell("more = 1"))
    assert cells_of(executed, ["f", "g"]).digest == digest


def test_missing_and_repeated_cells_are_problems_of_their_exercise_alone():
    found = cells_of(page(*LESSON["cells"], cell("def f(x): return 3", "f"), cell("def f(x): return 4", "f")), ["f", "g", "h"])
    assert set(found.problems) == {"f", "h"} and "two cells" in found.problems["f"] and "missing" in found.problems["h"]
    assert list(found.exercises) == ["g"]


def test_an_exercise_in_a_markdown_cell_is_missing():
    assert "missing" in cells_of(page(cell("def f(x): return 3", "f", kind="markdown")), ["f"]).problems["f"]


HOSTILE = [
    *({"metadata": metadata} for metadata in (None, [], "x", {"nbgrader": []}, {"nbgrader": "f"})),
    *({"metadata": {"tags": tags}} for tags in (3, True, {"a": 1}, [1, None, ["setup"]], "a set of setups", None)),
    *({"metadata": {"nbgrader": {"grade_id": id}}} for id in (5, ["f"], {"f": 1}, None, True)),
    {"cell_type": 3}, {"cell_type": ["code"]}, {"cell_type": None}, {"source": None}, {"source": 5}, {"source": [1, None]}, {"source": {"a": 1}},
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
def test_cells_with_strange_metadata_are_passed_over(hostile):
    strange = {**cell("scratch"), **hostile}
    for notebook in (page(strange, *LESSON["cells"]), page(*LESSON["cells"], strange, {})):
        assert cells_of(notebook, ["f", "g"]) == cells_of(LESSON, ["f", "g"])
        assert exercise_ids_of(notebook) == []


def test_strange_text_in_an_exercise_s_own_cell_is_text():
    for source in (None, 5, [1, None], {"a": 1}):
        assert isinstance(cells_of(page({**cell("", "f"), "source": source}), ["f"]).exercises["f"], str)


def test_a_notebook_with_a_byte_order_mark_and_any_text_is_read(tmp_path):
    path = tmp_path / "homework.ipynb"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(page(cell("x = 'é\U0001f916'", "f")), ensure_ascii=False).encode("utf-8"))
    assert cells_of(read_notebook(path), ["f"]).exercises["f"] == "x = 'é\U0001f916'"


BROKEN = {
    "empty": b"", "no JSON": b"# a script", "a list": b"[]", "a number": b"3", "null": b"null", "a string": b'"cells"', "no cells": b"{}",
    "cells null": b'{"cells": null}', "cells a dict": b'{"cells": {}}', "cells of strings": b'{"cells": ["x = 1"]}', "binary": bytes(range(256)) * 8,
    "UTF-16": '{"cells": []}'.encode("utf-16"), "deeply nested": b'{"cells": ' + b"[" * 200_000, "cut off": json.dumps(LESSON).encode()[:-20],
    "huge number": b'{"cells": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_that_names_it(name, tmp_path):
    path = tmp_path / "homework.ipynb"
    path.write_bytes(BROKEN[name])
    with pytest.raises(UserError) as raised:
        read_notebook(path)
    assert_one_sentence(raised.value, path)


@pytest.mark.parametrize("name", ["missing.ipynb", "folder", "folder/x.ipynb", "with\x00zero.ipynb", "x" * 300 + ".ipynb"], ids=range(5))
def test_a_file_that_is_not_there_is_one_sentence_that_names_it(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as raised:
        read_notebook(tmp_path / name)
    assert_one_sentence(raised.value, tmp_path / name)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "MAX_NOTEBOOK", 100)
    with pytest.raises(UserError, match="clear its outputs") as raised:
        read_notebook(saved(tmp_path, LESSON))
    assert_one_sentence(raised.value, tmp_path / "homework.ipynb")


def test_a_file_that_may_not_be_read_is_one_sentence_that_names_it(tmp_path, monkeypatch):
    path = saved(tmp_path, LESSON)

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "read_text", refused)
    with pytest.raises(UserError) as raised:
        read_notebook(path)
    assert_one_sentence(raised.value, path)


def assert_one_sentence(error, path):
    text = str(error)
    assert str(path) in text and text.endswith(".") and "\n" not in text



@pytest.mark.parametrize("source", [
    "x = 1", "text = '''\n%time\n!ls\nreally?\n'''", "x = 7 \\\n  % 4", "# why?\nx = 1  # is it?", "", "def f():\n    return 5\n",
])
def test_plain_python_is_not_touched(source):
    assert without_magics(source) == source


@pytest.mark.parametrize("source, line", [
    ("%matplotlib inline\nx = 1\nprint?\n!ls\ny = 2", 5), ("%%time\nx = 1\ny = 2", 3), ("import math\nif True:\n    %time math.sqrt(2)\ny = 2", 4),
    ("%time\nx = 1  # is it?\ny = 1 + x", 3), ("?print\n??print\nprint??\ny = 2", 4),
])
def test_magics_disturb_neither_the_other_lines_nor_their_numbers(source, line):
    namespace = {}
    assert run_cell("cell", source, namespace) is None and namespace["y"] == 2
    assert run_cell("cell", source + "\n1 / 0", {}) == Raised("ZeroDivisionError", "division by zero", line + 1)


@pytest.mark.parametrize("source", [
    "x = (", "x = 1\x00", "x = '\ud800'", "(" * 400, "x = " + "9" * 5000, "return 5", "def f():\n\tif 1:\n        pass",
], ids=["open", "zero", "surrogate", "parentheses", "number", "return", "tabs"])
def test_text_that_is_no_python_is_something_that_the_cell_raised(source):
    raised = run_cell("cell", source, {})
    assert isinstance(raised, Raised) and raised.kind.endswith("Error")


def test_an_exception_whose_words_cannot_be_read_is_still_one_that_the_cell_raised():
    raised = run_cell("cell", "class Mine(Exception):\n    def __str__(self):\n        raise ValueError\n\nraise Mine", {})
    assert (raised.kind, raised.line) == ("Mine", 5)


def test_a_cell_is_compiled_as_a_notebook_compiles_it():
    """Without `from __future__ import annotations`: a name that an annotation misspells is an error in both."""
    assert run_cell("cell", "def f(x: torhc.Tensor): pass", {}).kind == "NameError"



@pytest.fixture(scope="module")
def worker():
    """One worker for all tests that leave it alive; they share its names, as cells do."""
    with Worker() as worker:
        yield worker


def asked(worker, source, *arguments, **case):
    """What the function or class `entry` that `source` defines answers."""
    assert worker.run("cell", source) is None
    return worker.ask("entry", Case({str(i): value for i, value in enumerate(arguments)}, "", "", **case))


def test_the_kinds_of_values_survive_the_way_there_and_back(worker):
    values = (None, True, 3, -0.0, "é", [1, (2,)], {"a": torch.tensor([1, -100])}, torch.ones(2, dtype=torch.bfloat16), torch.tensor([True]))
    assert bits(asked(worker, "def entry(*values): return values", *values)) == bits(values)
    assert asked(worker, "def entry(*values): return [str(getattr(v, 'dtype', type(v))) for v in values]", *values) == [
        "<class 'NoneType'>", "<class 'bool'>", "<class 'int'>", "<class 'float'>", "<class 'str'>", "<class 'list'>", "<class 'dict'>",
        "torch.bfloat16", "torch.bool",
    ]


ADAPTER = """
import torch


class entry(torch.nn.Module):
    def __init__(self, width, rank):
        super().__init__()
        self.down, self.up = torch.nn.Linear(width, rank, bias=False), torch.nn.Linear(rank, width, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.scale + self.up(self.down(x))
"""


def test_a_class_gives_the_same_answer_through_the_worker_and_in_process(worker):
    """With its gradients as the chain rule has them, its state after the call, and its trainable parameters."""
    generator = torch.Generator().manual_seed(3)
    down, up, scale, x, cotangent = (torch.randn(*shape, generator=generator) for shape in [(2, 5), (5, 2), (5,), (3, 5), (3, 5)])
    case = dict(
        asks=("output", "gradients", "state", "trainable"), gradients=("0", "down.weight", "up.weight", "scale"), cotangent=cotangent,
        build={"width": 5, "rank": 2}, state={"down.weight": down, "up.weight": up, "scale": scale, "calls": torch.tensor(6.0)},
    )  # fmt: skip
    given, namespace = asked(worker, ADAPTER, x, **case), {}
    exec(ADAPTER, namespace)
    assert bits(given) == bits(answer(namespace["entry"], Case({"0": x}, "", "", **case)))
    assert torch.allclose(given["output"], x * scale + x @ down.T @ up.T, atol=1e-5)
    by_hand = {"0": cotangent * scale + cotangent @ up @ down, "down.weight": up.T @ cotangent.T @ x, "up.weight": cotangent.T @ x @ down.T}
    for name, gradient in by_hand.items():
        assert torch.allclose(given["gradients"][name], gradient, atol=1e-5), name
    assert given["gradients"]["scale"] is None and given["state"]["calls"] == 7
    assert given["trainable"] == {"down.weight": 10, "up.weight": 10}


def test_a_stub_raises_not_implemented_error(worker):
    assert asked(worker, "def entry(x):\n    # YOUR CODE HERE\n    raise NotImplementedError()", 1) == Raised("NotImplementedError", "", 3)


def test_cells_share_their_names(worker):
    assert worker.run("first", "shared = 21") is None and worker.run("second", "def helper(x): return x * shared") is None
    assert asked(worker, "def entry(x): return helper(x)", 2) == 42


def test_a_name_that_no_cell_defines_is_a_name_error(worker):
    assert asked(worker, "def entry(x):\n    return not_defined_here(x)", 1) == Raised("NameError", "name 'not_defined_here' is not defined", 2)
    missing = worker.ask("nobody_defines_this", Case({}, "", ""))
    assert missing.kind == "NameError" and "nobody_defines_this" in missing.message


def test_what_raises_is_reported_with_the_line_of_the_student_s_cell(worker):
    raised = asked(worker, "import torch\ndef entry(x):\n    y = x\n    return torch.cat([y, torch.ones(1, 2, 3)])", torch.ones(2))
    assert (raised.kind, raised.line) == ("RuntimeError", 4)
    assert worker.run("cell", "a = 1\n\nb = a + undefined").line == 3
    assert worker.run("cell", "a = 1\nb = (").kind == "SyntaxError"


NOISE = """
%matplotlib inline
import os, sys
display("a picture")
get_ipython()
print("x" * 300_000)
print("y" * 300_000, file=sys.stderr)
os.write(1, b"junk on what was standard output" * 1000)
os.system("echo junk of a child")
!ls
print?
try:
    input("your name? ")
    said = "something was read"
except EOFError:
    said = "nothing to read"
rest = sys.stdin.read()


def entry(x):
    print("in the case")
    sys.stdout.flush()
    return [said, rest, x]
"""


def test_what_cells_print_and_read_and_show_disturbs_nothing(worker):
    assert asked(worker, NOISE, 5) == ["nothing to read", "", 5]


def test_a_named_tuple_is_answered_as_a_tuple(worker):
    source = "from collections import namedtuple\nPair = namedtuple('Pair', 'first second')\ndef entry(x): return Pair(x.max(0), [x])"
    assert bits(asked(worker, source, torch.tensor([1, 5]))) == bits(((torch.tensor(5), torch.tensor(1)), [torch.tensor([1, 5])]))


def test_a_function_may_read_its_own_source_and_make_dataclasses(worker):
    own = "def entry(x): return inspect.getsource(entry), Point(x).x\n"
    assert asked(worker, "import inspect\nfrom dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n" + own, 4) == (own, 4)


def test_the_student_s_code_cannot_change_a_case_for_the_next_question(worker):
    case = Case({"x": torch.zeros(3)}, "", "")
    assert worker.run("cell", "def entry(x): return x.add_(1)") is None
    assert worker.ask("entry", case).tolist() == worker.ask("entry", case).tolist() == [1, 1, 1] and case.arguments["x"].tolist() == [0, 0, 0]


LOOK_AROUND = """
def entry(x):
    import sys
    frame, seen = sys._getframe(), []
    while frame:
        seen += [repr(value) for value in frame.f_locals.values()]
        frame = frame.f_back
    return "".join(seen)[:1_000_000]
"""


def test_what_a_case_says_in_words_never_reaches_the_worker(worker):
    assert worker.run("cell", LOOK_AROUND) is None
    seen = worker.ask("entry", Case({"x": "the argument itself"}, "spoken words", "what must hold", facts={"a_fact": "of the answer"}))
    assert "the argument itself" in seen
    for secret in ("spoken words", "what must hold", "a_fact", "of the answer"):
        assert secret not in seen


def test_the_worker_s_program_loads_no_lesson(worker):
    loaded = asked(worker, "import sys\ndef entry(x): return [name for name in sys.modules if name.startswith('labkit.exercises.')]", 1)
    assert sorted(loaded) == ["labkit.exercises.asking", "labkit.exercises.exercise", "labkit.exercises.judging"]


WAYS_IN = [
    "import labkit.sft", "from labkit.sft import lora", "from labkit import action_token_loss", "import labkit; labkit.action_token_loss",
    "from labkit import sft", "import labkit; labkit.sft", "import importlib; importlib.import_module('labkit.sft')", "__import__('labkit.sft')",
    "import importlib; importlib.import_module('.sft', 'labkit')", "import sys; sys.modules['labkit.sft']", "labkit_s_loss", "labkit_s_module",
]
LOADED = "import labkit.sft\nfrom labkit import action_token_loss as labkit_s_loss, fine_tune, sft as labkit_s_module"


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_withheld_module_cannot_be_reached_and_another_exercise_reaches_it(worker, way):
    assert worker.run("before", LOADED) is None
    refused = worker.run("cell", way, ("labkit.sft",))
    assert refused is not None and refused.kind in ("ImportError", "AttributeError", "KeyError", "NameError")
    assert worker.run("other", way) is None and worker.run("other again", "import labkit.sft\n" + way) is None


def test_withholding_a_module_withholds_what_is_in_it_and_nothing_else(worker):
    assert worker.run("cell", "import labkit.sftp", ("labkit.sft",)).message == "No module named 'labkit.sftp'"
    assert worker.run("cell", "from labkit.tabletop import Tabletop\nfrom labkit import batches, Samples", ("labkit.sft",)) is None
    assert "not offered" in worker.run("cell", "import labkit.tabletop.arm", ("labkit.tabletop",)).message


def function(name, body):
    return f"def {name}(x):\n" + "\n".join("    " + line for line in body.splitlines())


class Double(Exercise):
    """Twice the number."""

    def __init__(self, entry, withheld=()):
        self.id, self.entry, self.withheld, self.points, self.minutes = entry, entry, withheld, 2, 1

    def cases(self, rng, hidden):
        for x in (3, 4):
            yield Case({"x": x}, says="x = {x}", must="It must be twice {x}.", facts={"x": x})

    def expected(self, case):
        return 2 * case.arguments["x"]


def judged(sources, setup="", withheld=None, limits=Limits()):
    """entry -> its verdict, with `sources` (entry -> source of its cell) run in that order."""
    exercises = [Double(entry, (withheld or {}).get(entry, ())) for entry in sources]
    return {v.exercise: v for v in examine(Cells(setup, sources, {}), exercises, limits=limits)}


def test_the_absent_libraries_are_those_that_some_exercise_withholds():
    withheld = {name.partition(".")[0] for exercise in all_exercises().values() for name in exercise.withheld}
    assert set(absent.LIBRARIES) == withheld - {"labkit"}


@pytest.mark.parametrize("source", ["import peft", "import peft.tuners.lora.layer as layer", "from peft import LoraConfig, get_peft_model",
                                    "import sklearn.svm, bitsandbytes.functional", "from peft import PeftModel\nassert not isinstance(1, PeftModel)"])
def test_importing_an_absent_library_costs_nothing(worker, source):
    assert worker.run("cell", source) is None


@pytest.mark.parametrize("source", ["import peft\npeft.LoraConfig(r=2)", "from peft import LoraConfig\nLoraConfig.from_pretrained('.')",
                                    "import sklearn.metrics\nsklearn.metrics.roc_curve([1], [1])",
                                    "import sys\nsys.modules.pop('peft', None)\nimport peft\npeft.LoraConfig()"])
def test_using_an_absent_library_says_why_it_cannot_be_used(worker, source):
    raised = worker.run("cell", source)
    assert raised.kind == "ImportError" and "it is the answer to an exercise" in raised.message


def test_a_process_that_has_a_library_cannot_make_it_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", types.ModuleType("peft"))
    with pytest.raises(RuntimeError, match="is imported already"):
        absent.make_absent()


def test_a_withheld_module_is_out_of_reach_of_the_function_too_and_other_exercises_keep_it():
    found = judged(
        {"imports_when_called": function("imports_when_called", "from labkit import action_token_loss\nreturn 2 * x"),
         "uses_the_set_up_s": function("uses_the_set_up_s", "action_token_loss\nreturn 2 * x"),
         "other": function("other", "from labkit.sft import fine_tune\nreturn 2 * x if action_token_loss else fine_tune")},
        setup="from labkit import action_token_loss", withheld={"imports_when_called": ("labkit.sft",), "uses_the_set_up_s": ("labkit.sft",)},
    )  # fmt: skip
    assert found["other"].status == CORRECT
    assert found["imports_when_called"].status == WRONG and "ImportError" in found["imports_when_called"].sentence
    assert found["uses_the_set_up_s"].status == WRONG and "NameError" in found["uses_the_set_up_s"].sentence


def test_a_lesson_s_own_module_with_its_right_answers_is_out_of_reach():
    found = {}
    for place, source in {"in the cell": "from labkit.exercises.sft_loss_masking import _gradient as logit_gradient",
                          "in the function": "def logit_gradient(*given):\n    from labkit.exercises import sft_loss_masking\n"
                                             "    return sft_loss_masking._gradient(*given)"}.items():
        (found[place],) = examine(Cells("", {"sft-logit-gradient": source}, {}), [all_exercises()["sft-logit-gradient"]])
    assert [(v.status, "ImportError" in v.sentence) for v in found.values()] == [(WRONG, True)] * 2


WRITE_TO_PIPES = """
import os, stat
for fd in range(3, 64):
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.write(fd, {junk!r})
    except OSError:
        pass
"""


def writes_junk(junk):
    return WRITE_TO_PIPES.format(junk=junk) + "import time\ntime.sleep(60)"


# entry -> its cell, and words of the sentence about it; the empty word where the exercise is to be correct all the same.
ACCIDENTS = {
    "right_before": (function("right_before", "return 2 * x"), ""),
    "cell_hangs": ("while True:\n    pass", "Its cell was stopped: it took longer"),
    "cell_ends_the_process": ("import os\nos._exit(0)", "Its cell was stopped: the process ended"),
    "cell_exits": ("exit()", "Its cell raises SystemExit in line 1"),
    "cell_is_no_python": ("def (", "Its cell raises SyntaxError in line 1"),
    "cell_lacks_the_function": ("x = 1", "defines no function or class called cell_lacks_the_function"),
    "case_hangs": (function("case_hangs", "while True:\n    pass"), "`case_hangs` was stopped: it took longer"),
    "case_ends_the_process": (function("case_ends_the_process", "import os\nos._exit(0)"), "was stopped: the process ended"),
    "case_crashes": (function("case_crashes", "import ctypes\nctypes.string_at(0)"), "was stopped: the process ended"),
    "case_grows": (function("case_grows", "import time\nkept = b'x' * 2**30\ntime.sleep(600)"), "it used more than 700 MiB of memory"),
    "case_exits": (function("case_exits", "exit()"), "raises SystemExit in line 2"),
    "case_recurses": (function("case_recurses", "return case_recurses(x)"), "raises RecursionError in line 2"),
    "case_sends_a_set": (function("case_sends_a_set", "return {x}"), "the answer cannot be read: the value, answer is a set"),
    "case_sends_too_much": (function("case_sends_too_much", "import torch\nreturn torch.zeros(2**25)"), "67,108,864 are sent"),
    "case_sends_a_long_number": (function("case_sends_a_long_number", "return 10**5000"), "the answer cannot be read"),
    "case_writes_junk": (function("case_writes_junk", writes_junk(b"\xff" * 64)), "was stopped: a message of"),
    "case_writes_worse_junk": (function("case_writes_worse_junk", writes_junk(OVERFLOWING)), "was stopped: not a message"),
    "case_leaves_children": ("", ""),
    "right_after": (function("right_after", "return 2 * x"), ""),
}
LEAVE_CHILDREN = """
import subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
with open({path!r}, "a") as file:
    for new_session in (False, True):
        print(subprocess.Popen(sleep, start_new_session=new_session).pid, file=file)
return 2 * x
"""


@pytest.fixture(scope="module")
def accidents(tmp_path_factory):
    """The verdicts on one notebook with all of them, and the children that were left behind."""
    path = tmp_path_factory.mktemp("children") / "pids"
    sources = {entry: source for entry, (source, _) in ACCIDENTS.items()}
    sources["case_leaves_children"] = function("case_leaves_children", LEAVE_CHILDREN.format(path=str(path)))
    found = judged(sources, limits=Limits(cell_seconds=3, case_seconds=3, memory_mib=700))
    return found, [int(pid) for pid in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ACCIDENTS)
def test_an_accident_costs_its_own_exercise_and_no_other(accidents, entry):
    verdict, words = accidents[0][entry], ACCIDENTS[entry][1]
    assert verdict.status == (WRONG if words else CORRECT), verdict.sentence
    assert words in verdict.sentence and "\n" not in verdict.sentence


@pytest.mark.slow
def test_no_process_that_the_cells_started_is_left(accidents):
    assert len(accidents[1]) >= 4
    assert [pid for pid in accidents[1] if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("setup", ["import os\nos._exit(3)", "while True:\n    pass"], ids=["ends", "hangs"])
def test_a_set_up_cell_that_is_stopped_is_run_once_and_named_by_every_exercise(setup, monkeypatch):
    started = []

    class Counted(Worker):
        def __init__(self, limits):
            started.append(self)
            assert len(started) <= 3, "the set-up cell is run again and again"
            super().__init__(limits)

    monkeypatch.setattr(apart, "Worker", Counted)
    sources = {entry: function(entry, "return 2 * x") for entry in ("one", "two")}
    found = judged(sources, setup=setup, limits=Limits(setup_seconds=2))
    assert all(v.status == WRONG and "set-up cell was stopped" in v.sentence for v in found.values()) and len(started) == 1


def test_a_set_up_cell_that_raises_is_named_where_a_cell_fails_and_costs_nobody_else():
    found = judged({"needs_it": "numbers[0]\n" + function("needs_it", "return 2 * x"), "does_not": function("does_not", "return 2 * x")},
                   setup="import math\nnumbers = math.no_such_name")
    assert found["does_not"].status == CORRECT
    assert "NameError in line 1" in found["needs_it"].sentence and "the set-up cell raised AttributeError in line 2" in found["needs_it"].sentence


JUNK_REPLIES = [
    {}, {"raised": 5}, {"raised": [1]}, {"raised": torch.ones(2)}, {"raised": np.ones(2)}, {"raised": {"kind": "x"}}, {"missing": None},
    {"raised": {"kind": None, "message": torch.ones(3), "line": "no number"}}, {"raised": {"kind": "x", "message": "y", "line": float("inf")}},
    {"raised": {"kind": "x", "message": "y", "line": None}}, {"raised": {"kind": "x" * 10**6, "message": "y" * 10**6, "line": 2**100}},
]


def replies_with(value):
    """A function that writes a reply of its own onto the wire, which is read in the place of the worker's."""
    return function("entry", WRITE_TO_PIPES.format(junk=encode(value)))


def test_a_worker_that_makes_replies_up_gives_a_verdict_all_the_same():
    with Worker() as worker:
        for junk in JUNK_REPLIES:
            assert worker.run("cell", replies_with(junk)) is None
            verdict = judge(Double("entry"), lambda case: worker_answer(worker, case))
            assert verdict.status == WRONG and len(str(verdict)) < 1000, junk
        assert worker.run("cell", replies_with([1])) is None
        with pytest.raises(WorkerLost, match="no answer"):
            worker.ask("entry", Case({"x": 1}, "", ""))
        with pytest.raises(WorkerLost, match="no answer"):
            worker.run("cell", "x = 1")


def worker_answer(worker, case):
    """The made-up reply; the worker's own, which comes after it, is thrown away."""
    found = worker.ask("entry", case)
    worker.replies.get(timeout=60)
    return found


def test_a_worker_that_stops_reading_is_stopped_at_the_time_limit_like_any_other():
    """The question is larger than what a pipe holds, so writing it cannot come to an end."""
    with Worker(Limits(case_seconds=2)) as worker:
        too_late = threading.Timer(20, worker.process.kill)
        too_late.start()
        assert worker.run("cell", WRITE_TO_PIPES.format(junk=encode({"raised": None})) + "import time\ntime.sleep(600)") is None
        with pytest.raises(WorkerLost, match="took longer than 2 s"):
            worker.ask("entry", Case({"x": torch.zeros(2**18)}, "", ""))
        too_late.cancel()


SENDABLE = [
    None, True, -1, 1.5, float("nan"), -float("inf"), 2**2000, "", "{a}", "\ud800", [], (), {}, {"output": 1}, [None], [[1], [1, 2]], [1, "a"],
    [2**2000], [torch.ones(2), torch.ones(3)], (torch.ones(2), None), (torch.ones(5), "x"), [1.0] * 100_000, torch.ones(0), torch.zeros(0, 2**40),
    torch.ones(1, dtype=torch.complex64), np.complex64(1j), np.ones(2, np.complex64), torch.zeros(3, dtype=torch.uint64), np.array(True),
    torch.ones(2, dtype=torch.bfloat16), torch.ones(2, 2, 2, 2).bool(), {"output": None, "gradients": None},
    {"output": torch.ones(()), "gradients": {"logits": torch.ones(2, dtype=torch.complex64)}},
    Raised("", ""), Raised("IndexError", "{x} {} %s"), Raised("Unusable", "{"),
]


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("id", all_exercises())
def test_whatever_a_worker_may_send_is_judged(id):
    for value in SENDABLE:
        verdict = judge(all_exercises()[id], lambda case: value)  # noqa: B023
        assert verdict.status == WRONG and len(str(verdict)) < 1000, value


RIGHT_GRADIENT = """def logit_gradient(logits, labels):
    logits = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return torch.autograd.grad(loss, logits)[0]
"""
WRONG_LABELS = """def training_sequence(prompt_ids, action_ids):
    ids = torch.cat([prompt_ids, action_ids])
    return ids, ids.clone()
"""
HELPER_ELSEWHERE = "def masked_loss(logits, labels):\n    return my_helper(logits, labels)\n"
STUB = "def masked_loss(logits, labels):\n    # YOUR CODE HERE\n    raise NotImplementedError()\n"


def homework(**cells_by_id):
    given = {"sft-labels": WRONG_LABELS, "sft-masked-loss": STUB, "sft-logit-gradient": RIGHT_GRADIENT}
    given.update({name.replace("_", "-"): source for name, source in cells_by_id.items()})
    return page(
        cell("import torch\n", tags=["setup"]), cell("def my_helper(logits, labels):\n    return logits.sum()\n"),
        *(cell(source, id) for id, source in given.items() if source), cell("receipt('homework.ipynb')", tags=["receipt"]),
    )


@pytest.fixture(scope="module")
def first_receipt(tmp_path_factory):
    return make_receipt(saved(tmp_path_factory.mktemp("receipt"), homework()), progress=False)


def test_a_receipt_tells_stub_wrong_and_right_apart(first_receipt):
    assert [(v.exercise, v.status) for v in first_receipt.verdicts] == [
        ("sft-labels", WRONG), ("sft-masked-loss", NOT_ATTEMPTED), ("sft-logit-gradient", CORRECT)]
    assert "not predicted: their label is -100" in first_receipt.verdicts[0].sentence
    text = str(first_receipt)
    assert text.startswith("homework.ipynb, saved 20") and "2 of 3 exercises attempted, 1 pass the public checks, 4 of 11 points" in text
    assert first_receipt.digest in text and "save the notebook" not in text


def test_a_receipt_of_a_copy_elsewhere_with_windows_lines_is_the_same(first_receipt, tmp_path, monkeypatch):
    """And the folder holds files that are called like libraries, the environment's working directory being that folder."""
    for name in ("numpy.py", "torch.py", "json.py", "labkit.py"):
        (tmp_path / name).write_text("raise RuntimeError('the wrong file was imported')")
    monkeypatch.chdir(tmp_path)
    windows = homework()
    for one in windows["cells"]:
        one["source"] = one["source"].replace("\n", "\r\n").splitlines(keepends=True)
    again = make_receipt(saved(tmp_path, windows), progress=False)
    assert again.verdicts == first_receipt.verdicts and again.digest == first_receipt.digest


def test_a_lesson_s_notebook_that_lacks_a_cell_or_keeps_a_helper_elsewhere_is_told(tmp_path):
    lesson = homework(sft_labels=None, sft_masked_loss=HELPER_ELSEWHERE)
    found = {v.exercise: v for v in make_receipt(saved(tmp_path, lesson, "01_sft_loss_masking.ipynb"), progress=False).verdicts}
    assert found["sft-labels"].status == WRONG and "its cell is missing" in found["sft-labels"].sentence
    assert "NameError in line 2 of your cell: name 'my_helper' is not defined" in found["sft-masked-loss"].sentence
    assert found["sft-logit-gradient"].status == CORRECT


@pytest.fixture
def nothing_is_run(monkeypatch):
    monkeypatch.setattr(receipts, "examine", lambda *arguments, **options: [])


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A notebook's shell, in which cells are run as Jupyter runs them; it leaves this process's __main__ and the home directory alone."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell(user_module=types.ModuleType("notebook_of_a_student"), ipython_dir=str(tmp_path_factory.mktemp("ipython")))
    shell.run_cell("import torch", store_history=False)
    return shell


@pytest.mark.parametrize("ran, stale", [
    (RIGHT_GRADIENT, ()), (RIGHT_GRADIENT.replace("[0]", "[-1]"), ("sft-logit-gradient",)), ("x = 1\n\n\n" + RIGHT_GRADIENT + "\n# done\n", ()),
    ("def logit_gradient(logits, labels):\n    raise NotImplementedError()", ("sft-logit-gradient",)), ("", ()),
], ids=["as saved", "one letter", "among other lines", "the stub", "never"])
def test_a_cell_that_was_changed_after_saving_is_told(nothing_is_run, shell, tmp_path, ran, stale):
    shell.user_ns.pop("logit_gradient", None)
    shell.run_cell(ran, store_history=False)
    found = make_receipt(saved(tmp_path, homework()), running=shell.user_ns, progress=False)
    assert found.stale == stale
    assert ("logit-gradient" in str(found) and "Ctrl+S" in str(found)) == bool(stale)


def test_a_class_that_was_changed_after_saving_is_told(nothing_is_run, shell, tmp_path):
    source = "class logit_gradient:\n    def __call__(self, logits, labels):\n        return logits\n"
    path = saved(tmp_path, homework(sft_logit_gradient=source))
    for ran, stale in ((source, ()), (source.replace("return logits", "return labels"), ("sft-logit-gradient",))):
        shell.run_cell(ran, store_history=False)
        assert make_receipt(path, running=shell.user_ns, progress=False).stale == stale


def test_a_notebook_without_exercises_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "Worker", None)
    found = make_receipt(saved(tmp_path, page(cell("x = 1"))), progress=False)
    assert found.verdicts == [] and "0 of 0" in str(found)


def test_the_receipt_cell_prints_the_receipt_of_the_saved_file_or_says_what_is_missing(nothing_is_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, homework())
    receipts.receipt("homework.ipynb")
    assert "homework.ipynb, saved" in capsys.readouterr().out
    with pytest.raises(UserError, match="hamework.ipynb does not exist"):
        receipts.receipt("hamework.ipynb")
