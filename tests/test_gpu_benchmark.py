"""Properties of the benchmark of large models, on the CPU with a small one: real tensors hold what the calculator says, and nothing is invented.

The judges are torch's own AdamW, bitsandbytes' objects, the calculator, and a machine that claims to be too small.
"""

import json
import re
from dataclasses import replace
from datetime import date
from importlib.metadata import version

import pytest
import torch
from transformers import LlamaConfig

from labkit import gpu_benchmark
from labkit.__main__ import main
from labkit.errors import UserError
from labkit.experiments import qlora_memory
from labkit.gpu_benchmark import SETTINGS, MasterCopyAdamW, amount, kinds_of, load_measurements, measure, random_model, run_benchmark, static_bytes
from labkit.memory import count
from labkit.memory_calculator import Training, llama_parameters
from labkit.sweeps import load_sweep

SMALL = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
                    tie_word_embeddings=False)  # fmt: skip
TIED = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, vocab_size=100,
                   tie_word_embeddings=True)  # fmt: skip
KINDS_OF_TRAINING = {
    "full": dict(method="full", moments="bfloat16"),
    "full in fp32": dict(method="full", weights="float32"),
    "full with a master copy": dict(method="full", master_copy=True),
    "LoRA": dict(method="lora"),
    "QLoRA": dict(method="qlora"),
    "QLoRA, scales in fp32": dict(method="qlora", double_quantisation=False),
}  # fmt: skip


def training(kind="QLoRA", config=SMALL, **changes):
    return Training(config, **KINDS_OF_TRAINING[kind] | dict(batch=2, sequence=16, rank=4) | changes)


every_kind = pytest.mark.parametrize("kind", KINDS_OF_TRAINING)
every_config = pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])



@every_kind
@every_config
def test_a_random_model_has_the_parameters_of_its_configuration_on_its_device(kind, config):
    setting = training(kind, config)
    model = random_model(setting, "cpu")
    counted = count(model)
    lora = 0 if "full" in kind else counted.trainable
    assert counted.total - lora == llama_parameters(config) and (lora > 0) == (setting.method != "full")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert all(bool(t.isfinite().all()) for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())


def test_the_quantised_layers_are_bitsandbytes_own_and_hold_what_was_drawn():
    drawn, quantised = random_model(training("LoRA"), "cpu", seed=3), random_model(training("QLoRA"), "cpu", seed=3)
    layers = {name: m for name, m in quantised.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == 7 * SMALL.num_hidden_layers and not any("lm_head" in name for name in layers)
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in layers.items():
        original = drawn.get_submodule(name).weight.float()
        restored = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        # 8.5e-3 of the variance is NF4's error on normal numbers.
        assert 4e-3 < float((restored - original).square().mean() / original.square().mean()) < 1.3e-2, name


def test_the_seed_decides_the_weights():
    a, b, c = (random_model(training("LoRA"), "cpu", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert all(torch.equal(value, c[name]) == ("norm" in name or "lora_B" in name) for name, value in a.items())


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_lora_gets_a_gradient_and_the_base_none(kind):
    """bitsandbytes' packed weights would give LoRA gradients of zero, without a word."""
    run = gpu_benchmark._Run(training(kind), torch.device("cpu"), 0)
    run.step()
    run.step()
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    assert all((g is not None and bool(g.abs().sum() > 0)) == ("lora_" in name) for name, g in gradients.items())


@pytest.mark.parametrize("kind", ["full", "LoRA", "QLoRA"])
def test_checkpointing_changes_no_gradient(kind):
    found = []
    for checkpointing in (False, True):
        run = gpu_benchmark._Run(training(kind, checkpointing=checkpointing), torch.device("cpu"), 0)
        run.step()
        assert run.model.get_decoder().is_activation_checkpointing == checkpointing
        found.append({name: p.grad.float() for name, p in run.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all(torch.allclose(found[1][name], g, atol=1e-6) for name, g in found[0].items())



@every_kind
@every_config
def test_real_tensors_hold_the_calculated_bytes_of_every_static_kind(kind, config):
    setting = training(kind, config)
    measured, calculated = static_bytes(setting), setting.bytes()
    assert measured["buffers"] < 1000
    for kind_of_bytes, expected in calculated.items():
        if kind_of_bytes != "activations":
            # Each tensor's AdamW counts its steps in four bytes.
            assert measured.get(kind_of_bytes, 0) == pytest.approx(expected, rel=2e-3, abs=64), kind_of_bytes


def test_the_stored_bytes_of_large_models_are_the_calculated_ones():
    for point in load_sweep("qlora_memory").points:
        which, calculated = (point["model"], point["method"]), replace(qlora_memory.setting(point), batch=0).bytes()
        assert calculated == point["calculated"], f"{which} was stored with another calculator: run the sweep again"
        assert sum(point["measured"].values()) == pytest.approx(sum(calculated.values()), rel=1e-3), which
        assert all(point["measured"].get(kind, 0) == pytest.approx(size, rel=2e-3) for kind, size in calculated.items()), which


def test_the_largest_stored_model_has_7_billion_parameters_and_was_held_by_a_machine_of_24_gb():
    point = max(load_sweep("qlora_memory").points, key=lambda point: point["parameters"])
    assert point["parameters"] == 6_738_415_616 and point["method"] == "qlora" and sum(point["measured"].values()) < 24e9



def steps_of(make, dtype, count=20):
    """A parameter after some steps on fixed gradients."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50).bfloat16().to(dtype))
    optimiser, generator = make(parameter), torch.Generator().manual_seed(0)
    for _ in range(count):
        optimiser.zero_grad()
        parameter.grad = torch.randn(50, generator=generator).to(dtype)
        optimiser.step()
    return parameter.detach().float(), optimiser


def test_on_float32_parameters_the_master_copy_changes_nothing():
    found, _ = steps_of(lambda p: MasterCopyAdamW([p], 1e-3), torch.float32)
    expected, _ = steps_of(lambda p: torch.optim.AdamW([p], lr=1e-3), torch.float32)
    assert torch.equal(found, expected)


def test_a_master_copy_keeps_the_steps_that_bfloat16_loses():
    rate = 1e-4  # less than half the distance between two bfloat16 numbers near 1
    exact, _ = steps_of(lambda p: torch.optim.AdamW([p], lr=rate), torch.float32)
    (alone, _), (copied, optimiser) = (steps_of(make, torch.bfloat16) for make in (
        lambda p: torch.optim.AdamW([p], lr=rate), lambda p: MasterCopyAdamW([p], rate)))
    master = optimiser.masters[0].detach()
    assert (master - exact).abs().mean() < 0.3 * (alone - exact).abs().mean() and torch.equal(copied, master.bfloat16().float())



@every_kind
def test_a_measurement_on_the_cpu_has_bytes_and_speed_and_no_invented_peak(kind):
    found = measure(kind, training(kind), "cpu", steps=1, warm_up=1)
    assert found.peak is None and "not counted" in found.note and found.tokens_per_second > 0
    assert found.calculated == training(kind).bytes() and sum(found.measured.values()) > 0
    assert kind in str(found) and "tokens/s" in str(found) and "not counted" in str(found)
    assert kinds_of(found)["weights"] == (found.measured["weights"], found.calculated["weights"]) and kinds_of(found)["activations"][0] is None


def test_the_peak_is_that_of_the_measured_steps_alone(monkeypatch):
    happened = []
    monkeypatch.setattr(gpu_benchmark._Run, "step", lambda self: happened.append("step"))
    monkeypatch.setattr(gpu_benchmark, "_reset_peak", lambda device: happened.append("reset"))
    monkeypatch.setattr(gpu_benchmark, "_peak", lambda device: happened.append("peak") or 7_000_000)
    found = measure("x", training(), "cpu", steps=3, warm_up=2)
    assert happened == ["step"] * 2 + ["reset"] + ["step"] * 3 + ["peak"]
    assert found.peak == 7_000_000 and found.note == "" and "peak 7 MB" in str(found)


def test_what_does_not_fit_is_not_tried_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu_benchmark, "_free_host_memory", lambda: 100_000)
    monkeypatch.setattr(gpu_benchmark, "_run", lambda *_: pytest.fail("it was tried"))
    found = measure("x", training("full"), "cpu")
    assert (found.measured, found.peak, found.tokens_per_second) == (None, None, None)
    assert re.fullmatch(r"x: not run: 3\.41 MB static, 0\.1 MB free on this cpu", str(found))


def test_a_device_that_runs_out_of_memory_is_a_result(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_benchmark, "_run", run_out)
    found = measure("x", training(), "cpu")
    assert (found.measured, found.peak, found.tokens_per_second) == (None, None, None) and str(found) == "x: out of memory on this cpu"


@pytest.mark.parametrize("changes, warm_up, said", [
    (dict(batch=0), 1, "batch of at least 1"),
    (dict(), 0, "warm_up is at least 1"),
    (dict(method="full", moments="float32"), 1, "keeps moments in bfloat16"),
    (dict(moments="bfloat16"), 1, "keeps moments in float32"),
    (dict(method="full", moments="bfloat16", gradients="float32"), 1, "gradients in the dtype of the parameters"),
])
def test_a_setting_that_would_measure_something_else_is_refused(changes, warm_up, said):
    with pytest.raises(ValueError, match=said):
        measure("x", training(**changes), "cpu", warm_up=warm_up)


def test_every_setting_that_is_measured_on_a_gpu_can_run():
    for label, setting in SETTINGS.items():
        gpu_benchmark._refuse_what_cannot_run(setting, gpu_benchmark.WARM_UP)
        assert setting.parameters == 6_738_415_616, label
    assert {setting.method for setting in SETTINGS.values()} == {"full", "lora", "qlora"}


@pytest.mark.parametrize("size, said", [
    (12_345_678, "12.3 MB"), (999_000_000, "999 MB"), (4_127_000_000, "4.13 GB"), (107_814_649_856, "108 GB"), (1.1e12, "1.1 TB"),
])
def test_bytes_are_said_in_powers_of_ten(size, said):
    assert amount(size) == said



@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_measurements_are_stored_with_where_they_come_from(tmp_path):
    path, reported = tmp_path / "deeper" / "found.json", []
    settings = {"one": training("LoRA"), "two": training("QLoRA")}
    assert run_benchmark("cpu", settings, path, reported.append) == path and [m.label for m in reported] == ["one", "two"]
    about = json.loads(path.read_text())["about"]
    assert about["command"] == "python3 -m labkit benchmark --gpu" and about["device"]["type"] == "cpu"
    assert abs((date.fromisoformat(about["date"]) - date.today()).days) <= 1
    assert all(about["versions"][name] == version(name) for name in ("torch", "transformers", "peft", "bitsandbytes"))
    found, said = load_measurements(path)
    assert found == reported and "(cpu)" in said and about["date"] in said and [p.name for p in path.parent.iterdir()] == ["found.json"]


def test_without_a_gpu_nothing_is_stored(tmp_path, without_gpu):
    with pytest.raises(UserError, match="no CUDA GPU"):
        run_benchmark("cuda", {"one": training()}, tmp_path / "gpu.json")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_was_measured_one_line_says_so(tmp_path, without_gpu):
    for read in (load_measurements, gpu_benchmark.measured_here_or_stored):
        found, said = read(tmp_path / "gpu.json")
        assert found == [] and said.startswith("Not measured here") and "python3 -m labkit benchmark --gpu" in said and "\n" not in said


def test_with_a_gpu_a_notebook_measures_and_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_benchmark, "measure", lambda label, training, device: (label, training, device))
    monkeypatch.setattr(gpu_benchmark, "provenance", lambda device: {"device": {"name": "a GPU", "type": device.type}, "date": "d",
                                                                     "versions": {"torch": "t"}})
    found, said = gpu_benchmark.measured_here_or_stored(path=tmp_path / "gpu.json")
    assert found == [(label, setting, "cuda") for label, setting in SETTINGS.items()] and list(tmp_path.iterdir()) == []
    assert said == "Measured here, on a GPU (cuda), d, torch t."


def test_the_command_without_a_gpu_is_one_line(capsys, monkeypatch, without_gpu):
    monkeypatch.setenv("LABKIT_NO_INSTALL", "1")
    assert main(["benchmark", "--gpu"]) == 2
    assert re.fullmatch(r"labkit: there is no CUDA GPU .*\n", capsys.readouterr().err)


@pytest.mark.skipif(not gpu_benchmark.STORED.exists(), reason="no GPU was at hand when the course was made")
def test_what_is_stored_was_measured_on_a_gpu_with_these_settings():
    found, _ = load_measurements()
    assert json.loads(gpu_benchmark.STORED.read_text())["about"]["device"]["type"] == "cuda"
    assert [m.label for m in found] == list(SETTINGS)
    for m in found:
        assert m.measured is None or m.peak > sum(m.calculated.values()) - m.calculated["activations"] - m.calculated["gradients"]
