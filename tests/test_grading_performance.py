"""Submitted adapters: what is an adapter, what it is worth, and what a hostile file gains. And the page that compares them."""

import hashlib
import json
import os
import pickle
import random
import re
import struct
import zipfile
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
import torch
from grading_records import HOSTILE, assert_harmless
from safetensors.torch import save

from labkit.errors import UserError
from labkit.grading.assignment import PerformanceTask
from labkit.grading.leaderboard import places, pseudonym, write_leaderboard
from labkit.grading.performance import (
    ENOUGH,
    HIGHEST_RANK,
    SCALING,
    AdapterGrader,
    Refused,
    hidden_episode_seed,
    in_quarters,
    merged,
    read_adapter,
    share_of_points,
)
from labkit.grading.results import Graded, Override, Performance, read_record, write_record
from labkit.paths import DATA
from labkit.rollouts import EVALUATION_SEED, rollout, wilson
from labkit.sft import lora

SECRET, OLD = "a secret of twenty letters", ("pick", "put", "move", "beside")
TASK = PerformanceTask("stack", 8.0, OLD, episodes=12, size_mib=2.0)
LAYER = "model.language_model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{LAYER}.lora_{half}.weight" for half in "AB")


@pytest.fixture(scope="session")
def grader(shipped_policy):
    return AdapterGrader(TASK, SECRET, "weeks", shipped_policy)


@pytest.fixture(scope="session")
def trained(shipped_policy, tmp_path_factory):
    """The folder of an adapter as lesson 6 saves it, after sixty steps that mix old tasks in."""
    from labkit.demonstrations import read, samples
    from labkit.sft import fine_tune

    policy, folder = shipped_policy.copy(), tmp_path_factory.mktemp("adapters") / "few_shot"
    new, old = (samples(read(DATA / "demonstrations" / name, "train")) for name in ("stack", "replay"))
    fine_tune(policy, new, steps=60, learning_rate=1e-2, peft_config=lora(16), progress=False, mixed_with=old, alpha=0.25)
    policy.save(folder)
    return folder


def pair(rank=4, layer=LAYER, out=128, width=128, scale=0.01, dtype=torch.float32):
    drawn = torch.Generator().manual_seed(rank)
    a, b = (scale * torch.randn(shape, generator=drawn) for shape in ((rank, width), (out, rank)))
    return {f"base_model.model.{layer}.lora_A.weight": a.to(dtype), f"base_model.model.{layer}.lora_B.weight": b.to(dtype)}


def raw(header, body=b""):
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_trained_adapter_does_in_the_grader_what_it_does_with_peft(grader, trained):
    from labkit.policy import load_policy

    found = grader.grade(trained / "adapter_model.safetensors")
    with_peft = load_policy("tiny", adapter=trained, device="cpu")
    by_task = {task: rollout(with_peft, task, len(of), seed=of[0], progress=False).success.sum() for task, of in seeds_of(grader).items()}
    new = by_task.pop("stack")
    old = sum(by_task.values())
    assert abs(12 * found.success[0] - new) <= 1 and abs(12 * found.retention[0] - old) <= 1  # rounding may change one decision
    assert found.success[0] >= 0.5 and found.earned > 1 and found.episodes == 24
    assert found.success[1:] == wilson(round(12 * found.success[0]), 12) and found.retention[1:] == wilson(round(12 * found.retention[0]), 12)
    assert "rank 16 on 16 layers" in found.message and "of stack" in found.message


def seeds_of(grader):
    found = {}
    for task, seed in grader.episodes:
        found.setdefault(task, []).append(seed)
    assert all(seeds == list(range(seeds[0], seeds[0] + len(seeds))) for seeds in found.values())
    return found


def test_a_regrade_gives_the_same_bytes_whatever_was_graded_between_and_beside(grader, trained, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes((trained / path.name).read_bytes())
    before = {name: value.clone() for name, value in grader.base.model.state_dict().items()}
    first = grader.grade(path)
    grader.grade(save(pair(scale=100.0)))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1, "auto_mapping": {"base_model_class": "os.system"}}')
    torch.set_num_threads(2)
    again = AdapterGrader(TASK, SECRET, "weeks", grader.base).grade(path.read_bytes())
    assert torch.get_num_threads() == 2 and torch.tensor([1e-41]).mul(1).item() > 0
    torch.set_num_threads(1)
    assert again == first
    assert all(torch.equal(value, before[name]) for name, value in grader.base.model.state_dict().items())
    record = Graded("ann", "weeks", "r", "full", performance=first)
    assert read_record(write_record(tmp_path, record)).performance == first


def test_an_adapter_that_does_nothing_earns_nothing(grader):
    nothing = pair()
    nothing[B].zero_()
    found = grader.grade(save(nothing))
    assert (round(12 * found.success[0]), round(12 * found.retention[0])) == grader.untouched
    assert found.earned == 0 and found.retention[0] > 0.8


def test_noise_that_ruins_the_policy_earns_nothing_and_each_episode_is_reported(grader):
    everything, seen = {}, []
    for layer, (out, width) in grader.layers.items():
        everything |= pair(8, layer, out, width, scale=3.0)
    found = grader.grade(save(everything, metadata={"lora_alpha": "0"}), lambda: seen.append(1))
    assert len(seen) == len(grader.episodes) == 24
    assert found.earned == 0 and found.success[0] == 0 and found.retention[0] == 0


@pytest.mark.parametrize("config", [
    {"rank": 8}, {"rank": 4, "targets": "all"}, {"rank": HIGHEST_RANK},
], ids=["attention", "all", "highest"])  # fmt: skip
def test_merging_is_what_peft_merges_with_the_course_configuration(tiny_policy, config, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny_policy.copy().model, lora(**config))
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=drawn))
    model.save_pretrained(tmp_path)
    layers = AdapterGrader(TASK, SECRET, "weeks", tiny_policy).layers
    ours = merged(tiny_policy, read_adapter(tmp_path / "adapter_model.safetensors", layers, 16)).model.state_dict()
    theirs = model.merge_and_unload().state_dict()
    changed = [name for name, value in tiny_policy.model.state_dict().items() if not torch.equal(value, ours[name])]
    assert len(changed) == (28 if config.get("targets") == "all" else 16)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("rank", [1, 2, 8, 16, 64])
def test_the_scaling_is_that_of_the_course_configuration(rank):
    assert lora(rank).lora_alpha / rank == lora(rank, targets="all").lora_alpha / rank == SCALING


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_the_same_numbers(grader, dtype):
    made = pair(dtype=dtype)
    [(a, b)] = read_adapter(save(made), grader.layers, 1).values()
    assert a.dtype == b.dtype == torch.float32 and torch.equal(a, made[A].float()) and torch.equal(b, made[B].float())


def test_layers_of_the_vision_tower_and_different_ranks_are_accepted(grader):
    vision = next(layer for layer in grader.layers if "vision" in layer and layer.endswith("k_proj"))
    found = read_adapter(save(pair(2) | pair(HIGHEST_RANK, vision)), grader.layers, 1)
    assert {layer: len(a) for layer, (a, _) in found.items()} == {LAYER: 2, vision: HIGHEST_RANK}
    assert not any("lm_head" in layer or "embed" in layer for layer in grader.layers) and len(grader.layers) > 28


def test_without_old_tasks_success_is_all(shipped_policy):
    grader = AdapterGrader(PerformanceTask("stack", 3.0, (), episodes=2), SECRET, "weeks", shipped_policy)
    found = grader.grade(save(pair()))
    assert found.retention is None and found.episodes == len(grader.episodes) == 2


def test_a_task_that_is_solved_already_cannot_be_graded(shipped_policy):
    with pytest.raises(UserError, match="another task or more episodes"):
        AdapterGrader(PerformanceTask("pick", 3.0, (), episodes=12), SECRET, "weeks", shipped_policy).grade(save(pair(scale=0.0)))


def low(successes, episodes=100):
    return wilson(successes, episodes)[0]


def test_points_by_hand():
    def share(new, old, new_before=0, old_before=100):
        return share_of_points(low(new), low(old), new_before / 100, low(old_before), low(100))

    assert share(100, 100) == share(90, 90) == 1 and share(89, 100) < 1 and share(100, 89) < 1
    assert share(100, 0) == 0.5
    # (0.4038 / (0.85 * 0.9630)) * (1 + 0.4038 / (0.85 * 0.9630)) / 2, Wilson's lower end of 50 of 100 being 0.4038
    assert share(50, 50) == pytest.approx(0.4933 * 1.4933 / 2, abs=1e-3)
    assert share(0, 100) == share(30, 100, new_before=30) == 0
    assert share(50, 0, old_before=0) == share(50, 100)
    assert [in_quarters(x, 8) for x in (0, 0.0312, 0.0313, 0.5, 0.9999, 1)] == [0, 0, 0.25, 4, 7.75, 8]
    assert in_quarters(1.0, 3.3) == 3.3


def test_the_rule_is_monotone_continuous_and_never_pays_for_retention_alone():
    rng = np.random.default_rng(0)
    perfect = low(100)
    for before in (0.0, 0.1, 0.5, 0.7):
        for _ in range(200):
            success, retention, kept_before = rng.uniform(0, 1, 3)
            step = rng.uniform(0, 1e-4)
            base = share_of_points(success, retention, before, kept_before, perfect)
            more = [share_of_points(success + step, retention, before, kept_before, perfect),
                    share_of_points(success, retention + step, before, kept_before, perfect)]
            slope = 1 / (ENOUGH * min(perfect - before, kept_before))
            assert 0 <= base <= 1 and all(base <= one <= base + slope * step + 1e-12 for one in more)
            assert share_of_points(before * rng.uniform(0, 1), retention, before, kept_before, perfect) == 0


@pytest.mark.parametrize("successes", range(0, 101, 7))
def test_the_untouched_policy_earns_nothing_however_good_it_is(successes):
    if low(100) - successes / 100 > 0:
        assert share_of_points(low(successes), low(99), successes / 100, low(99), low(100)) == 0


def test_hidden_seeds_belong_to_secret_assignment_and_task_and_are_nobody_elses():
    names = [(s, a, t) for s in (SECRET, "another secret of it") for a in ("weeks", "weeks 2") for t in ("stack", *OLD)]
    seeds = [hidden_episode_seed(*name) for name in names]
    assert seeds == [hidden_episode_seed(*name) for name in names]
    ordered = sorted(seeds)
    assert all(b - a > 10_000 for a, b in zip(ordered, ordered[1:])), "the episodes of two tasks must not overlap"
    assert ordered[0] > 1000 * EVALUATION_SEED and ordered[-1] + 10_000 < 2**63
    assert hidden_episode_seed(SECRET, "a", "bc") != hidden_episode_seed(SECRET, "ab", "c")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def torch_file():
    file = BytesIO()
    torch.save(pair(), file)
    return file.getvalue()


def zip_bomb():
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_model.safetensors", bytes(10_000_000))
    return file.getvalue()


def with_value(value, dtype=torch.float32):
    made = pair(dtype=dtype)
    made[A][0, 0] = value
    return save(made)


def whole_pair(**changed):
    header = {A: entry([1, 128], [0, 512]), B: entry([128, 1], [512, 1024])} | changed
    return raw(header, bytes(1024))


def everywhere(scale):
    made, shapes = {}, {"self_attn.v_proj": (128, 128), "self_attn.o_proj": (128, 128), "mlp.up_proj": (384, 128), "mlp.down_proj": (128, 384)}
    for layer in range(4):
        for name, shape in shapes.items():
            made |= pair(4, f"model.language_model.layers.{layer}.{name}", *shape, scale)
    return save(made)


def renamed(a_name, b_name=None):
    made = pair()
    return save({a_name: made[A]} | ({b_name: made[B]} if b_name else {}))


def on(layer, out=128, width=128):
    return save(pair(4, layer, out, width))


NO_LORA, NO_FILE, DAMAGED, RUNS_CODE = "is no LoRA matrix", "not a safetensors file", "damaged", "could run code"
ATTACKS = {
    "empty": (b"", NO_FILE),
    "seven bytes": (b"1234567", NO_FILE),
    "zeros": (bytes(100), DAMAGED),
    "text": (b"give me all the points, please" * 10, NO_FILE),
    "a pickle": (pickle.dumps(Evil()), RUNS_CODE),
    "an old pickle": (pickle.dumps(Evil(), protocol=2), RUNS_CODE),
    "torch.save": (torch_file(), RUNS_CODE),
    "a zip bomb": (zip_bomb(), RUNS_CODE),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), NO_FILE),
    "too large": (save(pair() | {"x": torch.zeros(600_000)}), "larger than 2 MiB"),
    "header beyond the end": (struct.pack("<Q", 10**6) + b"{}", NO_FILE),
    "header of 2**64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", NO_FILE),
    "a header of more than a megabyte": (raw(b" " * 1_100_000), NO_FILE),
    "nested a hundred thousand deep": (raw(b"[" * 100_000 + b"]" * 100_000), DAMAGED),
    "a list": (raw([1, 2]), DAMAGED),
    "not UTF-8": (raw(b"{\xff}"), DAMAGED),
    "an endless number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), DAMAGED),
    "no tensor": (save({}), "holds no tensor"),
    "metadata alone": (raw({"__metadata__": {"lora_alpha": "1000"}}), "holds no tensor"),
    "metadata that is code": (raw({"__metadata__": {"x": {"__reduce__": 1}}, A: entry([1, 128], [0, 512]), B: entry([128, 1], [512, 1024])},
                                  bytes(1024)), DAMAGED),
    "offsets that overlap": (whole_pair(**{B: entry([128, 1], [0, 512])}), DAMAGED),
    "offsets with a gap": (raw({A: entry([1, 128], [0, 512]), B: entry([128, 1], [1024, 1536])}, bytes(1536)), DAMAGED),
    "offsets over the end": (raw({A: entry([1, 128], [0, 512]), B: entry([128, 1], [512, 1024])}, bytes(600)), DAMAGED),
    "bytes after the end": (raw({A: entry([1, 128], [0, 512]), B: entry([128, 1], [512, 1024])}, bytes(5000)), DAMAGED),
    "offsets backwards": (whole_pair(**{A: entry([1, 128], [512, 0])}), DAMAGED),
    "offsets of 2**70": (whole_pair(**{A: entry([1, 128], [2**70, 2**70 + 512])}), DAMAGED),
    "no offsets": (whole_pair(**{A: {"dtype": "F32", "shape": [1, 128]}}), DAMAGED),
    "offsets that do not fit the shape": (whole_pair(**{A: entry([2, 128], [0, 512]), B: entry([128, 2], [512, 1024])}), DAMAGED),
    "a name twice": (raw(f'{{"{A}": {json.dumps(entry([1, 128], [0, 512]))}, "{A}": {json.dumps(entry([1, 128], [0, 512]))}}}'.encode(), bytes(512)),
                     DAMAGED),
    "a negative shape": (whole_pair(**{A: entry([-1, -128], [0, 512])}), "no shape"),
    "a shape of fractions": (whole_pair(**{A: entry([1.0, 128], [0, 512])}), "no shape"),
    "a shape of bools": (whole_pair(**{A: entry([True, 128], [0, 512])}), "no shape"),
    "a shape that is a word": (whole_pair(**{A: entry("1x128", [0, 512])}), "no shape"),
    "an entry that is a number": (whole_pair(**{A: 3}), "no shape"),
    "a shape of 10**300": (whole_pair(**{A: entry([10**300, 128], [0, 512])}), "trained on another model"),
    "a shape of ten thousand numbers": (whole_pair(**{A: entry([1] * 10_000, [0, 512])}), "trained on another model"),
    "rank 0": (raw({A: entry([0, 128], [0, 0]), B: entry([128, 0], [0, 0])}), "rank"),
    "rank 65": (save(pair(HIGHEST_RANK + 1)), "accepted are 1 to 64"),
    "a rank above the matrix": (save(pair(200)), "accepted are 1 to 64"),
    "two ranks in a pair": (save({A: pair(2)[A], B: pair(3)[B]}), "shapes `(2, 128)` and `(128, 3)`"),
    "A and B swapped": (save({A: pair()[B], B: pair()[A]}), "trained on another model"),
    "three dimensions": (save({A: torch.zeros(4, 128, 1), B: torch.zeros(128, 4)}), "trained on another model"),
    "no dimension": (save({A: torch.tensor(1.0), B: torch.tensor(1.0)}), "trained on another model"),
    "another base's width": (save(pair(4, LAYER, 4096, 4096)), "trained on another model"),
    "another base's layers": (on("model.layers.0.self_attn.q_proj"), NO_LORA),
    "a layer too many": (on("model.language_model.layers.4.self_attn.q_proj"), NO_LORA),
    "A alone": (renamed(A), f"no lora_B for {LAYER}"),
    "B alone": (save({B: pair()[B]}), f"no lora_A for {LAYER}"),
    "integers": (save({name: value.int() for name, value in pair().items()}), "`I32`"),
    "bools": (save({name: value.bool() for name, value in pair().items()}), "`BOOL`"),
    "complex": (save({name: value.to(torch.complex64) for name, value in pair().items()}), "`C64`"),
    "eight-bit floats": (save(pair(dtype=torch.float8_e4m3fn)), "`F8_E4M3`"),
    "a dtype that is a list": (whole_pair(**{A: entry([1, 128], [0, 512], ["F32"])}), "dtype"),
    "NaN": (with_value(float("nan")), "NaN or infinity"),
    "infinity": (with_value(float("inf")), "NaN or infinity"),
    "1e300 in float64": (with_value(1e300, torch.float64), "NaN or infinity"),
    "1e38": (save({name: torch.full_like(value, 1e38) for name, value in pair().items()}), "merged weight is not finite"),
    "1e15 in many layers": (everywhere(1e15), "numbers that are not finite"),
    "the output layer": (on("lm_head", 626, 128), NO_LORA),
    "the embeddings": (on("model.language_model.embed_tokens", 626, 128), NO_LORA),
    "peft's embeddings": (save(pair() | {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.zeros(4, 626)}), NO_LORA),
    "a norm": (on("model.language_model.layers.0.input_layernorm", 128, 1), NO_LORA),
    "the base's own weight": (save(pair() | {f"base_model.model.{LAYER}.weight": torch.zeros(128, 128)}), NO_LORA),
    "the base's own weight without prefix": (save({f"{LAYER}.weight": torch.zeros(128, 128)}), NO_LORA),
    "a module to save": (save(pair() | {"base_model.model.lm_head.weight": torch.zeros(626, 128)}), NO_LORA),
    "a bias": (save(pair() | {f"base_model.model.{LAYER}.lora_B.bias": torch.zeros(128)}), NO_LORA),
    "DoRA": (save(pair() | {f"base_model.model.{LAYER}.lora_magnitude_vector": torch.ones(128)}), NO_LORA),
    "alpha as a tensor": (save(pair() | {f"base_model.model.{LAYER}.alpha": torch.tensor(1e6)}), NO_LORA),
    "a bottleneck adapter": (save({"model.language_model.layers.0.bottleneck_adapters.x.down.weight": torch.zeros(4, 128)}), NO_LORA),
    "a name with a path": (renamed("../../../etc/passwd"), NO_LORA),
    "a path around a layer": (renamed(f"base_model.model./{LAYER}.lora_A.weight"), NO_LORA),
    "an adapter of another name": (renamed(f"base_model.model.{LAYER}.lora_A.default.weight"), NO_LORA),
    "a class's attribute": (on("__class__"), NO_LORA),
    "the suffix alone": (renamed(".lora_A.weight"), NO_LORA),
    "an empty name": (renamed(""), NO_LORA),
    "an escape sequence": (renamed("\x1b[31m<script>alert(1)</script>\u202e" + "n" * 5000), NO_LORA),
    "half a character": (raw(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), NO_LORA),
    "thousands of tensors": (save({f"t{i}": torch.zeros(1) for i in range(5000)}), "5,000 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_one_clear_sentence_and_no_points(grader, name, tmp_path, monkeypatch):
    data, said = ATTACKS[name]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    found = grader.grade(path)
    assert said in found.message, found.message
    assert found == grader.grade(data) == Performance("stack", 8.0, 0.0, found.message)
    assert found.message.isprintable() and len(found.message) < 450 and found.message.count(". ") == 0
    json.dumps(asdict(found)).encode()
    assert os.listdir() == ["adapter_model.safetensors"], "something was executed"


def test_damaged_copies_of_a_good_adapter_never_raise(grader):
    """Random bytes of header and body changed, cut off and doubled: refused, or read as complete pairs of finite numbers."""
    rng, good, read = random.Random(0), save(pair()), 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(rng.choice((8, 300, len(data))))] = rng.randrange(256)
        data = bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data)))) or 1])
        try:
            pairs = read_adapter(data, grader.layers, 1)
        except Refused as refused:
            assert str(refused)
            continue
        read += 1
        assert all(a.isfinite().all() and b.isfinite().all() and a.shape[0] == b.shape[1] for a, b in pairs.values())
    assert 0 < read < 600


@pytest.mark.parametrize("made", ["nothing", "folder", "pipe", "dangling link", "null byte"])
def test_what_is_no_file_is_refused_and_never_waited_for(grader, made, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    if made == "folder":
        path.mkdir()
    elif made == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no named pipes")
        os.mkfifo(path)
    elif made == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif made == "null byte":
        path = tmp_path / "a\0b"
    found = grader.grade(path)
    assert found.earned == 0 and ("not a file" if made in ("folder", "pipe") else "No adapter was handed in") in found.message
    assert str(tmp_path) not in found.message
    assert "No adapter was handed in" in grader.grade(None).message


def rolled_out(student, new=None, old=None, earned=0.0, **other):
    if new is None:
        return Graded(student, "weeks", "r", "full", performance=Performance("stack", 8.0, 0.0, "No adapter was handed in."))
    spans = [(x / 100, *wilson(x, 100)) if x is not None else None for x in (new, old)]
    return Graded(student, "weeks", "r", "full", performance=Performance("stack", 8.0, earned, "It learned.", *spans, 200), **other)


def board_of(path):
    """The page without its pictures, which hold nothing but numbers and lines."""
    html = path.read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", html, re.S)
    for picture in pictures:
        assert re.fullmatch(r"[\s\w\".,%#=/<>-]*", picture), picture
        assert set(re.findall(r"<(\w+)", picture)) <= {"svg", "line", "circle", "rect", "text"}
        assert not re.search(r"\b(on\w+|href|style)=", picture) and "aria-label=" in picture
    page = assert_harmless(re.sub(r"<svg.*?</svg>", "", html, flags=re.S))
    return page.text, pictures, html


CLASS = [rolled_out("e", 50, 80, 3.75), rolled_out("a", 99, 97, 8), rolled_out("d", 97, 66, 6.75), rolled_out("b", 97, 95, 8), rolled_out("f"),
         rolled_out("c", 93, 90, 8), Graded("g", "weeks", "r", "full")]  # fmt: skip


def test_the_board_is_in_order_with_intervals_and_ties(tmp_path):
    text, pictures, _ = board_of(write_leaderboard(tmp_path, CLASS, "shown"))
    rows = re.findall(r"((?:\d+ to )?\d+) ([a-g]) ([\d.]+) (\d+ %) \(", text)
    # a, b, c overlap in both; d's retention (56 to 75 %) lies below c's (83 to 94 %); e's success (40 to 60 %) below d's.
    assert rows == [("1 to 3", "a", "8", "99 %"), ("1 to 3", "b", "8", "97 %"), ("1 to 3", "c", "8", "93 %"), ("4", "d", "6.75", "97 %"),
                    ("5", "e", "3.75", "50 %")]
    assert "97 % (91.5 % to 99 %)" in text and "is no adapter: 1." in text and "new task, stack" in text
    assert len(pictures) == 6 and all("circle" in picture and "rect" in picture for picture in pictures[1:])
    # 12 pixels of margin and 200 for the scale: a's success, 0.9455 to 0.9982
    assert 'x1="201.1" y1="11" x2="211.6"' in pictures[1] and 'cx="210.0"' in pictures[1]


def test_ties_are_symmetric_and_places_hold_the_position():
    rng = np.random.default_rng(1)
    records = [rolled_out(str(i), int(new), int(old), float(new) / 20) for i, (new, old) in enumerate(rng.integers(0, 101, (40, 2)))]
    records.sort(key=lambda one: (-one.performance.earned, -one.performance.success[1]))
    found = places(records)
    assert all(first <= position <= last for position, (first, last) in enumerate(found, 1))
    same = [rolled_out(str(i), 90, 90, 8) for i in range(5)]
    assert places(same) == [(1, 5)] * 5
    assert places([rolled_out("a", 100, 50, 8), rolled_out("b", 10, 50, 1)]) == [(1, 1), (2, 2)]


def test_the_board_depends_on_the_records_alone(tmp_path):
    first = write_leaderboard(tmp_path / "a", CLASS, secret=SECRET).read_bytes()
    assert write_leaderboard(tmp_path / "b", reversed(CLASS), secret=SECRET).read_bytes() == first
    assert write_leaderboard(tmp_path / "b", CLASS, secret=SECRET + "x").read_bytes() != first
    ties = [rolled_out(name, 90, 90, 8) for name in ("zoe", "ann", "kim", "bob", "eve", "tom")]
    hidden = [re.findall(r"Robot \w+", board_of(write_leaderboard(tmp_path / "c", some, secret=SECRET))[0]) for some in (ties, ties[::-1])]
    assert hidden[0] == hidden[1] == sorted(hidden[0]), "the order of ties must not be the order of the hidden names"


def test_hidden_names_are_pseudonyms_that_need_the_secret(tmp_path):
    records = [rolled_out(name, 90, 90, 8) for name in ("Ann-Kathrin", "Jérôme", "\ud800")]
    text, _, html = board_of(write_leaderboard(tmp_path, records, secret=SECRET))
    assert not any(one.student in html for one in records[:2])
    assert all(pseudonym(SECRET, "weeks", one.student) in text for one in records)
    # HMAC by its definition, RFC 2104: H(K xor opad, H(K xor ipad, text)).
    key = SECRET.encode().ljust(64, b"\0")
    inner = hashlib.sha256(bytes(k ^ 0x36 for k in key) + b'["pseudonym", "weeks", "Ann-Kathrin"]').digest()
    assert pseudonym(SECRET, "weeks", "Ann-Kathrin") == "Robot " + hashlib.sha256(bytes(k ^ 0x5C for k in key) + inner).hexdigest()[:8]
    several = [pseudonym(SECRET, assignment, student) for assignment in ("weeks", "others") for student in ("ann", "bob", "kim")]
    assert len(set(several)) == 6
    with pytest.raises(ValueError, match="secret"):
        write_leaderboard(tmp_path, records)
    with pytest.raises(ValueError, match="hidden"):
        write_leaderboard(tmp_path, records, "real", SECRET)


def test_hostile_names_are_shown_as_text(tmp_path):
    text, _, _ = board_of(write_leaderboard(tmp_path, [rolled_out(name, 90, 90, 8) for name in HOSTILE], "shown"))
    assert "<script>alert(1)</script>" in text and text.count("90 % (82.6 % to 94.5 %)") == 2 * len(HOSTILE)


def test_an_override_moves_an_adapter(tmp_path):
    records = [rolled_out("a", 99, 97, 8, overrides=(Override("performance", 0.0, "not the student's own"),)), rolled_out("b", 50, 50, 2)]
    text, _, _ = board_of(write_leaderboard(tmp_path, records, "shown"))
    assert text.index(" b 2 ") < text.index(" a 0 ")


def test_a_board_without_results_says_so(tmp_path):
    assert "No adapter was rolled out. Without a result" in board_of(write_leaderboard(tmp_path, [rolled_out("f")], secret=SECRET))[0]
    assert board_of(write_leaderboard(tmp_path, [], secret=SECRET))[0].endswith("No adapter was rolled out.")


def test_a_board_without_old_tasks_draws_success_alone(tmp_path):
    text, pictures, _ = board_of(write_leaderboard(tmp_path, [rolled_out("a", 99, None, 8)], secret=SECRET))
    assert "rect" not in pictures[1] and "square" not in text and "0 %" not in text.split("Places")[0].split("99 %")[0]
