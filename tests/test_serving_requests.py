"""Properties of what the policy server reads: each form of a good request, and one sentence for each bad one."""

import ast
import base64
import io
import json
import tracemalloc

import json_numpy
import numpy as np
import pytest
import urllib3
from PIL import Image

from labkit.paths import ROOT
from labkit.serving.core import LARGEST_SIDE, PolicyCore, RequestError
from labkit.serving.http import Limits, PolicyServer, read_body
from tests.serving_stand_ins import JSON, Stub, ask, body, expected, picture, works

pytest_plugins = ["tests.serving_fixtures"]


def png(array, **options):
    data = io.BytesIO()
    Image.fromarray(array).save(data, format="PNG", **options)
    return base64.b64encode(data.getvalue()).decode()


def array(data=b"", dtype="|u1", shape=(0,)):
    return {"__numpy__": base64.b64encode(data).decode(), "dtype": dtype, "shape": list(shape)}


def nested(depth):
    return [nested(depth - 1)] if depth else 7


BAD = {
    "nothing": (b"", 400, "empty"),
    "no JSON": (b"{image", 400, "JSON"),
    "no text": (b"\xff\xfe{}\xff", 400, "JSON"),
    "a list": (b"[1, 2]", 400, "not list"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07", 400, "JSON"),
    "deep": (b"[" * 20_000, 400, "deep"),
    "a number of many digits": (b'{"image": ' + b"9" * 5000 + b"}", 400, "JSON"),
    "encoded and more": (json.dumps({"encoded": "{}", "image": 1}).encode(), 400, "only that"),
    "encoded, no string": (b'{"encoded": 3}', 400, "string"),
    "encoded, no JSON": (b'{"encoded": "{"}', 400, "encoded"),
    "array without shape": (b'{"image": {"__numpy__": "", "dtype": "|u1"}}', 400, "shape"),
    "array that is too short": (body(image=array(b"123", shape=(8, 8, 3))), 400, "reshape"),
    "array of objects": (body(image=array(b"12345678", "|O", (1,))), 400, "json_numpy"),
    "array of a strange type": (body(image=array(b"1234", [["a", "|O"]], (1,))), 400, "json_numpy"),
    "array of no base64": (body(image={**array(), "__numpy__": "abc"}), 400, "json_numpy"),
    "no image": (body(image=...), 422, "'image' is missing"),
    "no instruction": (body(instruction=...), 422, "'instruction' is missing"),
    "an unknown field": (body(holdin=1), 422, "'holdin'"),
    "image is null": (body(image=None), 422, "NoneType"),
    "image of floats": (body(image=picture().astype(np.float32)), 422, "float32"),
    "image without colours": (body(image=picture()[..., 0]), 422, "(8, 8)"),
    "image with alpha": (body(image=np.zeros((8, 8, 4), np.uint8)), 422, "(8, 8, 4)"),
    "no pictures": (body(image=np.zeros((0, 8, 8, 3), np.uint8)), 422, "1 to 256"),
    "too many pictures": (body(image=np.zeros((257, 2, 2, 3), np.uint8)), 422, "1 to 256"),
    "too large a picture": (body(image=np.zeros((1, LARGEST_SIDE + 1, 3), np.uint8)), 422, "pixels a side"),
    "ragged lists": (body(image=[[[1, 2, 3]], [[1, 2]]]), 422, "one length"),
    "lists of floats": (body(image=[[[1.5, 2, 3]]]), 422, "whole numbers"),
    "lists of booleans": (body(image=[[[True, True, False]]]), 422, "whole numbers"),
    "numbers that are no byte": (body(image=[[[0, 0, 256]]]), 422, "0 to 255"),
    "negative numbers": (body(image=[[[0, 0, -1]]]), 422, "0 to 255"),
    "empty lists": (body(image=[]), 422, "0 to 255"),
    "no PNG": (body(image=base64.b64encode(b"GIF89a").decode()), 422, "PNG"),
    "no base64": (body(image="a picture"), 422, "PNG"),
    "half a PNG": (body(image=png(picture(size=64))[:400]), 422, "PNG"),
    "a PNG with alpha": (body(image=png(np.zeros((8, 8, 4), np.uint8))), 422, "RGBA"),
    "a PNG that unpacks to much": (body(image=png(np.zeros((4000, 4000, 3), np.uint8))), 422, "4000 x 4000"),
    "lists 70 deep": (json.dumps({"image": nested(70), "instruction": "stack"}).encode(), 422, "whole numbers"),
    "lists of words": (body(image=[["red", "green"]]), 422, "whole numbers"),
    "instruction is half a character": (b'{"image": [[[1, 2, 3]]], "instruction": "a \\ud800"}', 422, "half a character ('\\ud800')"),
    "a field with an endless name": (body(**{"x" * 90_000: 1}), 422, "xxx..."),
    "instruction is a number": (body(instruction=7), 422, "instruction is 7"),
    "instruction is blank": (body(instruction="  "), 422, "sentence"),
    "instruction is long": (body(instruction="a" * 301), 422, "301 characters"),
    "two instructions": (body(instruction=["stack", "pick"]), 422, "2 values for 1 picture"),
    "holding is 2": (body(holding=2), 422, "holding is 2"),
    "holding is a word": (body(holding="yes"), 422, "holding is 'yes'"),
    "an unknown unnorm_key": (body(unnorm_key="bridge_orig"), 422, "bridge_orig"),
    "unnorm_key is an array": (body(unnorm_key=picture()), 422, "unnorm_key"),
    "another previous picture": (body(previous_image=picture(size=9)), 422, "alike"),
    "detail is a number": (body(detail=1), 422, "detail"),
    "too large": (b" " * (100_001) + body(), 413, "100000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong_in_one_sentence_and_the_server_goes_on(name, small_server):
    data, status, words = BAD[name]
    before = list(small_server.core.policy.sizes)
    found, answer = ask(small_server, data)
    assert (found, list(answer)) == (status, ["error"]), answer
    assert small_server.core.policy.sizes == before
    assert words in answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 400
    assert works(small_server)


@pytest.fixture(scope="module")
def small_server():
    """One server for all bad requests: whatever one of them breaks, the next will show."""
    with PolicyCore(Stub()) as core, PolicyServer(core, port=0, limits=Limits(body=100_000)).in_background() as server:
        yield server


def test_what_a_body_takes_in_memory_is_in_proportion_to_it():
    """Numpy gives every text of an array the room of the longest: as text, this one would take 40 GB."""
    data = json.dumps({"image": ["x" * 100_000, *["y"] * 100_000], "instruction": "stack"}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="whole numbers"):
            read_body(data)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(data)
    finally:
        tracemalloc.stop()


def test_every_form_of_a_picture_gives_the_same_numbers_and_the_answer_in_that_form(server):
    image, said = picture(4), expected(picture(4), "stack", 1)
    rest = {"instruction": "stack", "holding": 1}
    for plain in (image.tolist(), png(image)):
        status, answer = ask(server, json.dumps({"image": plain, **rest}).encode())
        assert status == 200 and answer == said
    status, answer = ask(server, json_numpy.dumps({"image": image, **rest}).encode())
    assert isinstance(answer, np.ndarray) and answer.dtype == np.float64 and answer.tolist() == said
    status, answer = ask(server, json.dumps({"encoded": json_numpy.dumps({"image": image, **rest})}).encode())
    assert isinstance(answer, str) and json_numpy.loads(answer).tolist() == said


def test_details_are_there_where_they_are_asked_for_and_json_has_no_nan(server):
    response = urllib3.request("POST", server.url + "/act", headers=JSON, body=json.dumps(
        {"image": picture().tolist(), "instruction": "stack", "detail": True}).encode())
    answer = json.loads(response.data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert answer == {"action": expected(picture(), "stack"), "bins": [0] * 4, "probabilities": [None] * 4, "seconds": 1e-6}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", None])
def test_only_json_is_read_so_that_no_page_in_a_browser_can_ask(server, kind):
    status, answer = ask(server, body(), headers={"Content-Type": kind} if kind else {})
    assert status == 415 and "application/json" in answer["error"]
    assert ask(server, body(), headers={"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_no_module_of_the_server_can_unpickle():
    modules = list((ROOT / "labkit" / "serving").glob("*.py"))
    assert {"core.py", "http.py", "client.py", "monitor.py"} <= {path.name for path in modules}
    for path in [*modules, ROOT / "labkit" / "commands" / "serve.py"]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        imported |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not imported & {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path.name
        assert not {n.arg for n in nodes if isinstance(n, ast.keyword)} & {"allow_pickle", "weights_only"}, path.name
        assert "torch.load" not in path.read_text(encoding="utf-8"), path.name
