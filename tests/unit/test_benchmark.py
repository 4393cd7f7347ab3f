"""tools/benchmark.py and compare.py: what they count and calculate, and what they refuse; no test measures time.

pytest tests/unit/test_benchmark.py
"""

import json
import multiprocessing
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers.images import write_image_folder
from helpers.runs import SMALL
from torch import nn

from engine import checkpoint
from models.kernels import GELULinear
from tools import benchmark, compare
from tools.benchmarks import loop as bench_loop
from tools.benchmarks import model as bench_model
from tools.benchmarks import scaling as bench_scaling
from tools.benchmarks import traffic
from utils.bottleneck import PHASES

TINY = ["--size", "32", "--batch", "2", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    """Restore the number of threads, which a benchmark sets, for the tests that follow."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- compare --------------------------------------------------------------------------------------


def test_configurations_side_by_side_with_the_accuracies_of_their_finished_runs(tmp_path, capsys):
    for name, letters in (("one", "L"), ("two", "G")):
        model = f"{{NAME: dat_micro, ARGS: {{stages: [{letters}, L, L, L]}}}}"
        text = f"TAG: {name}\nDATA: {{IMG_SIZE: 32}}\nMODEL: {model}"
        (tmp_path / f"{name}.yaml").write_text(text)
    for seed, tag, state in ((0, "one", "done"), (1, "one", "done"), (0, "two", "running")):
        run = tmp_path / f"seed{seed}" / "dat_micro" / tag
        metadata = {
            "step": 3,
            "epoch": 1,
            "skipped": 0,
            "best": {},
            "scaler": {},
            "classes": ["a", "b"],
        }
        metadata = json.dumps(metadata).encode()
        checkpoint.write(run / "checkpoints", "step-3", {"state.json": metadata})
        (run / "status.json").write_text(json.dumps({"state": state}))
        records = (
            {"step": 1, "val/acc1": 1.0},
            {"step": 3, "val/acc1": 50.0 + seed},
            {"step": 3},
        )
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    cfgs = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    runs = [str(tmp_path / f"seed{seed}") for seed in (0, 1, 2)]
    options = ["--batch", "2", "--rounds", "2"]
    assert compare.main([*cfgs, "--runs", *runs, *options]) == 0
    one, two = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:])
    assert (one[0], one[6], one[7]) == (f"| {cfgs[0]}", "50.50 ± 6.35 (50.00 · 51.00)", "— |")
    assert (two[0], two[6], two[7]) == (f"| {cfgs[1]}", "—", "— |")
    assert float(two[1].split()[0]) - float(one[1].split()[0]) > 0.2  # 998 classes more
    assert compare.main([str(tmp_path / "three.yaml"), *options]) == 2
    assert "three.yaml" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert compare.main([cfgs[0], *options, "--device", "cuda"]) == 2


# --- model ----------------------------------------------------------------------------------------


def test_model_and_peer_side_by_side(tmp_path, monkeypatch, capsys):
    # A process of its own is needed for the peak alone, and takes long to start.
    monkeypatch.setattr(
        bench_model, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count)
    )
    monkeypatch.setitem(bench_model.PRODUCT_SIZE, "cpu", 64)
    file = tmp_path / "numbers.json"
    arguments = ["model", "dat_micro", "resnet10t", *TINY, "--json", str(file)]
    assert benchmark.main(arguments) == 0
    result = json.loads(file.read_text())
    for phase, passes in (("eval", 1), ("train", 3)):
        assert result[phase]["ratio"]["low"] <= result[phase]["ratio"]["high"]
        for name, timed in result[phase]["models"].items():
            gflop = 2 * passes * result["models"][name]["gmacs"]
            assert timed["gflops"] == pytest.approx(gflop * timed["images_per_s"]["median"])
            assert timed["of_peak"] == pytest.approx(timed["gflops"] / result[phase]["peak_gflops"])
            assert sum(timed["kinds"].values()) == pytest.approx(1)
            assert timed["kinds"]["convolutions"] > 0
    known = result["models"]["resnet10t"]
    assert known["parameters"] == 5_435_488
    assert known["peak_mib"] > known["activation_mib_per_image"] > 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("dat_micro", "resnet10t", "ratio", *bench_model.KINDS))


def linear_subject(batch: int) -> bench_model.Subject:
    """Three layers whose numbers can be worked out."""
    subject = object.__new__(bench_model.Subject)
    subject.net = nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 4))
    subject.images = torch.randn(batch, 8)
    subject.device, subject.dtype = torch.device("cpu"), torch.float32
    return subject


def test_what_is_kept_and_how_many_operations():
    # The input, and the activation before and after GELU: 8 + 256 + 256 numbers. No parameters.
    assert linear_subject(4).activation_mib() * 2**20 == 4 * (8 + 256 + 256)
    assert linear_subject(2).activation_mib() * 2**20 == 4 * (8 + 256 + 256)
    assert linear_subject(4).count_operations() == 5  # two products, GELU, two transposed weights


def test_turns_are_taken_and_the_first_does_not_count():
    order = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = bench_model.time_in_turns(steps, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_ratio_is_taken_round_by_round():
    ratio = bench_model.ratios([1.0, 10.0, 2.0], [2.0, 20.0, 3.0])  # the machine drifted tenfold
    assert ratio == {"median": 2.0, "low": 1.75, "high": 2.0}


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::_softmax_backward_data", "softmax"),
        ("aten::native_layer_norm", "normalisation"),
        ("aten::grid_sampler_2d", "gather, bilinear reads"),
        ("aten::_to_copy", "copies, layout"),
        ("aten::cat", "copies, layout"),
        ("aten::add_", "elementwise, sums"),
        ("aten::gelu_backward", "elementwise, sums"),
        ("autograd::engine::evaluate_function: AddBackward0", "other"),
    ],
)
def test_kinds_of_operations(operation, kind):
    assert bench_model.kind_of(operation) == kind


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_of_a_step_that_can_be_worked_out():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), nn.Flatten(1))
    found = traffic.count(net, batch=2, shape=(3, 8, 8), dtype=torch.float32, training=True)
    images, weight, logits = 4 * 2 * 3 * 64, 4 * 8 * 3 * 16, 4 * 2 * 32
    convolution = images + weight + logits
    # Forward and backward once; of the images no gradient.
    assert found.operations["aten.convolution.default"] == convolution
    assert found.operations["aten.convolution_backward.default"] == logits + images + 2 * weight
    assert found.flops == 2 * 2 * (2 * 32 * 48)
    assert found.kept == images + logits  # the weight is a parameter
    assert found.fused < found.moved  # squares, their sum and their gradient are few passes


def test_the_backward_pass_without_an_engine_is_the_engines():
    def loss(x, weight, bias):
        y = GELULinear.apply(x, weight, bias) + x[:1]  # broadcasts, and x is used twice
        return (y.half().float().square() * torch.ones(5, 1)).mean()

    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((5, 4), (4, 4), (4,))]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    gradients = traffic.backward(loss(*inputs))
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(gradients[tensor], gradient)


def test_bytes_by_name(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    arguments = ["bytes", "resnet10t", "--size", "32", "--batch", "2", "--top", "1"]
    assert benchmark.main([*arguments, "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())["models"].values()
    assert found["train"]["moved"] > 2 * found["eval"]["moved"]
    assert found["eval"]["kept"] == 0 < found["train"]["kept"]
    for phase in found.values():
        assert sum(phase["operations"].values()) == phase["moved"]
    printed = capsys.readouterr().out
    assert "on paper" in printed
    assert "resnet10t, train" in printed
    assert benchmark.main(["bytes", "resnet10x"]) == 2


@pytest.mark.slow
def test_bytes_of_images_that_are_not_square(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    kept = []
    for size in ("32", "32x64"):
        arguments = ["bytes", "dat_micro", "--batch", "2", "--size", size, "--json", str(file)]
        assert benchmark.main(arguments) == 0
        kept.append(json.loads(file.read_text())["models"]["dat_micro"]["train"]["kept"])
    assert "32 × 64 px" in capsys.readouterr().out
    assert 1.5 < kept[1] / kept[0] < 2.5
    with pytest.raises(SystemExit):
        benchmark.main(["bytes", "dat_micro", "--size", "1x2x3"])
    assert "expected pixels, as 224 or 800x1333" in capsys.readouterr().err


# --- loop -----------------------------------------------------------------------------------------


def test_loop_reports_the_phases_of_a_real_run(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data")
    config, file = tmp_path / "small.yaml", tmp_path / "numbers.json"
    epochs = "EPOCHS: 2, WARMUP_EPOCHS: 1"  # of one step
    config.write_text(SMALL.replace(epochs, "EPOCHS: 3, WARMUP_EPOCHS: 1"))
    arguments = ["loop", "--cfg", str(config), "--data-path", str(data), "--seconds", "600"]
    assert benchmark.main([*arguments, "--print-freq", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["records"] == 2
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert "-bound: " in capsys.readouterr().out
    # Its only record is the first.
    config.write_text(SMALL.replace(epochs, "EPOCHS: 1, WARMUP_EPOCHS: 0"))
    assert benchmark.main([*arguments, "--print-freq", "3"]) == 2
    assert "raise --seconds" in capsys.readouterr().err


def test_records_weigh_as_long_as_they_took():
    def record(speed: float, **known: float) -> dict:
        shares = {f"time/{phase}": known.get(phase, 0.0) for phase in PHASES}
        return {"time/images_per_s": speed, **shares}

    result = bench_loop.summarize(
        [
            record(1, save=1.0),  # the first is left out
            record(10, forward=0.5, other=0.5),
            record(30, forward=1.0),
        ]
    )
    assert result["images_per_s"] == pytest.approx(15)  # 2 / (1/10 + 1/30)
    assert result["shares"]["other"] == result["overhead"] == pytest.approx(0.375)


def test_images_of_noise_are_a_dataset(tmp_path):
    bench_loop.write_images(tmp_path, 5)
    assert len(list((tmp_path / "train").rglob("*.jpg"))) >= 5
    (first, *_) = (tmp_path / "train").rglob("*.jpg")
    assert 50_000 < first.stat().st_size < 200_000  # as ImageNet's
    assert all(len(list((tmp_path / "val" / label).iterdir())) == 1 for label in "01")


# --- scaling --------------------------------------------------------------------------------------


def test_needs_of_many_accelerators():
    args = Namespace(tflops=60, global_batch=1000, images_per_core=100, kilobytes=100)
    one, eight = (bench_scaling.estimate_needs(n, 1e8, 1e9, args) for n in (8, 64))
    # 60e12 / (6 · 1e9) = 10,000 images/s each.
    assert one["images_per_s"] == 80_000
    assert one["step_ms"] == 12.5
    assert one["network_gbit_per_s"] == 0  # a single machine
    assert one["cores"] == 800
    assert one["read_gb_per_s"] == 8
    # 2 · 7/8 · 100 MB in 60 % of 1.5625 ms.
    assert eight["network_gbit_per_s"] == pytest.approx(8 * 0.175 / (0.6 * 0.0015625))
    assert (eight["cores"], eight["read_gb_per_s"]) == (800, 8)  # of each machine


def test_a_step_of_a_worker(tmp_path):
    args = Namespace(model="resnet10t", size=64, batch=4, dtype="bfloat16")
    ours, theirs = multiprocessing.Pipe()
    store = str(tmp_path / "store")
    thread = threading.Thread(target=bench_scaling.run_worker, args=(0, 1, 1, store, args, theirs))
    thread.start()
    for again in (True, True, False):
        ours.send(again)
    assert min(ours.recv(), ours.recv()) > 0
    thread.join()
    assert not ours.poll()


def test_processes_against_one_process(tmp_path, monkeypatch, capsys):
    groups = []

    class Group:
        """Twice as slow at every step; one process takes 0.9 of the time of two."""

        def __init__(self, world_size, threads, store, args):
            groups.append((world_size, threads))
            self.seconds = 1.0 if world_size == 2 else 0.9

        def step(self):
            self.seconds *= 2
            return self.seconds

        def close(self):
            pass

    monkeypatch.setattr(bench_scaling, "Group", Group)
    file = tmp_path / "numbers.json"
    arguments = ["scaling", "resnet10t", "--threads", "3", "--rounds", "4", "--json", str(file)]
    assert benchmark.main(arguments) == 0
    assert groups == [(2, 3), (1, 6)]
    result = json.loads(file.read_text())
    assert result["measured"]["ratio"]["low"] == pytest.approx(0.9)
    assert result["measured"]["ratio"]["high"] == pytest.approx(0.9)
    assert [row["accelerators"] for row in result["estimate"]] == [8, 64, 512]
    row = result["estimate"][1]
    sent = row["network_gbit_per_s"] / 8 * 1e9 * bench_scaling.OVERLAP * row["step_ms"] / 1000
    parameters = sum(p.numel() for p in timm.create_model("resnet10t").parameters())
    assert sent == pytest.approx(2 * 7 / 8 * 4 * parameters)
    assert "ratio 0.900 (0.900 to 0.900)" in capsys.readouterr().out


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model", "dat_tinny"], 2, "no model 'dat_tinny'; did you mean 'dat_tiny'"),
        (["model", "dat_micro", "swim_tiny"], 2, "no model 'swim_tiny'"),
        (["scaling", "dat_tinny"], 2, "did you mean 'dat_tiny'"),
        (
            ["scaling", "dat_micro", "--batch", "7"],
            2,
            "--batch 7 is not divisible by --processes 2",
        ),
        (["loop", "--cfg", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
    ],
)
def test_bad_input_is_refused(arguments, code, message, capsys):
    assert benchmark.main(arguments) == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0


def test_a_refusal_of_main_keeps_its_exit_code(capsys):
    with pytest.raises(SystemExit, match="3"):
        benchmark.main(["loop", "--cfg", "configs/digits.yaml", "--data-path", "nowhere"])
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_available(capsys):
    assert benchmark.main(["model", "dat_micro", "--device", "cuda"]) == 2
    assert "no CUDA device is available" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--rounds=1", "--batch=0", "--dtype=int8", "--threds=2"])
def test_impossible_arguments(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["model", "dat_micro", argument])
    assert argument.split("=")[0] in capsys.readouterr().err
