"""Everything that must hold on a GPU, checked against the CPU and against its aims, in one run.

    python benchmarks/gpu_check.py                      # one GPU of 80 GB, under 8 minutes
    python benchmarks/gpu_check.py --device cpu --small # the script itself; part of `make test`
    python benchmarks/gpu_check.py --only exact golden  # some of the checks

Prints a table (what, value, expected, verdict), writes it as JSON, goes on after a check that
fails, and ends with status 1 if any did. It needs torch, transformers, timm, torchvision, numpy,
pyarrow, pandas, pillow, pyyaml, safetensors and tqdm. Recomputation is checked where fairscale is;
on a machine without a network, bring it along:

    pip install --no-deps --target brought fairscale    # where there is a network
    PYTHONPATH=.:brought python benchmarks/gpu_check.py # where there is none

A row of speed is a failure on an H100 or H200, for which the aims were set; on other devices it is
only measured. What one GPU cannot show: NCCL between ranks, and nodes.
"""

import contextlib
import cProfile
import importlib
import importlib.util
import json
import logging
import os
import platform
import pstats
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import infogrowth.threads  # noqa: F401 - before torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or products are not deterministic

import numpy as np
import torch
from torch.nn import functional

from infogrowth import distributed
from infogrowth.cli import main, run_script
from infogrowth.config import option
from infogrowth.files import atomic_write_json
from infogrowth.randomness import generator

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden"
AIMED_AT = ("H100", "H200")
PASS, FAIL, MEASURED, NOT_RUN = "pass", "FAIL", "measured", "not run"


@dataclass(frozen=True)
class Config:
    """Options of the check."""

    device: str = option("auto", help="auto, cuda, cuda:N or cpu")
    small: bool = option(False, help="sizes of seconds, to test this script")
    only: list[str] = option([], help="names of the checks to run; none: all of them")
    json: str = option("output/gpu_check.json", help="where the table goes as JSON")
    seconds: float = option(460, help="no check is begun after so many")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    what: str
    value: str
    expected: str
    verdict: str


@dataclass
class Machine:
    """What the checks run on and how large they are; makes the rows."""

    device: torch.device
    small: bool
    folder: Path
    check: str = ""

    @cached_property
    def name(self) -> str:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else platform.processor() or "cpu"

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def holds(self, what: str, true: bool, value: object, expected: str) -> Row:
        return Row(self.check, what, str(value), expected, PASS if true else FAIL)

    def within(self, what: str, error: float, bound: float) -> Row:
        return self.holds(what, error <= bound, f"{error:.2e}", f"<= {bound:.0e}")

    def aim(self, what: str, value: float, aim: float, unit: str, at_most: bool = False) -> Row:
        met = value <= aim if at_most else value >= aim
        binding = not self.small and any(name in self.name for name in AIMED_AT)
        sign = "<=" if at_most else ">="
        verdict = (PASS if met else FAIL) if binding else MEASURED
        return Row(self.check, what, f"{value:,.4g} {unit}", f"{sign} {aim:,g} {unit}", verdict)

    def measured(self, what: str, value: object) -> Row:
        return Row(self.check, what, str(value), "", MEASURED)

    def not_run(self, what: str, reason: str) -> Row:
        return Row(self.check, what, reason, "", NOT_RUN)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Check = Callable[[Machine], Iterator[Row]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Add a function to the checks, under its name."""
    CHECKS[function.__name__] = function
    return function


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked
        return False


@check
def versions(machine: Machine) -> Iterator[Row]:
    """What is installed, and whether everything that the checks need can be imported."""
    needed = ("torch", "torchvision", "transformers", "timm", "numpy", "pyarrow", "PIL", "tqdm")
    for name in needed:
        module = importlib.import_module(name)
        yield machine.measured(name, getattr(module, "__version__", "?"))
    for name in ("lmdb", "faiss", "fairscale", "pycocotools"):
        yield machine.measured(name, "yes" if installed(name) else "no")
    for name in ("growth.engine", "encoders.embedding", "encoders.loading", "training.epoch",
                 "evaluation.retrieval", "blip.pretrain"):  # fmt: skip
        importlib.import_module(f"infogrowth.{name}")
    newer = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
    yield machine.holds("torch has the new precision switches", newer, newer, "True")
    yield machine.measured("device", machine.name)
    if machine.device.type == "cuda":
        memory = torch.cuda.get_device_properties(machine.device).total_memory
        yield machine.measured("memory", f"{memory / 2**30:.0f} GiB")
        yield machine.measured("CUDA, NCCL", f"{torch.version.cuda}, {torch.cuda.nccl.version()}")


# --- search and growth ----------------------------------------------------------------------------


def features(kind: str, count: int, dimension: int, seed: int = 0) -> np.ndarray:
    """``(count, dimension) float32`` unit rows: random, clustered, or copies that differ by noise
    of the given length."""
    random = generator(seed, "gpu check", kind)
    if kind == "random":
        rows = random.standard_normal((count, dimension), np.float32)
    elif kind == "clustered":
        centers = random.standard_normal((max(1, count // 50), dimension), np.float32)
        noise = random.standard_normal((count, dimension), np.float32)
        rows = centers[random.integers(len(centers), size=count)] + 0.3 * noise
    else:
        originals = random.standard_normal((max(1, count // 8), dimension), np.float32)
        originals /= np.linalg.norm(originals, axis=1, keepdims=True)
        noise = random.standard_normal((count, dimension), np.float32) / np.sqrt(dimension)
        rows = originals[random.integers(len(originals), size=count)] + float(kind) * noise
    from infogrowth.rows import unit_rows

    return unit_rows(rows)[0]


@contextlib.contextmanager
def loose_precision(device: torch.device) -> Iterator[None]:
    """Every switch on by which a user may trade precision for speed, and autocast around it."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    switches = [
        (cuda, "fp32_precision", "tf32"),
        (cpu, "fp32_precision", "bf16"),
        (cuda, "allow_fp16_accumulation", True),
        (cuda, "allow_fp16_reduced_precision_reduction", True),
        (cuda, "allow_bf16_reduced_precision_reduction", True),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in switches]
    for owner, name, value in switches:
        setattr(owner, name, value)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    try:
        with torch.autocast(device.type, dtype=half):
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def searched(index: Any, queries: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cosines of all queries, looked up ``batch`` at a time."""
    parts = []
    for start in range(0, len(queries), batch):
        part = queries[start : start + batch]
        parts.append(index.search(part, np.full(len(part), index.count)))
    return tuple(np.concatenate([getattr(p, n) for p in parts]) for n in ("positions", "products"))


def same_bits(found: tuple[np.ndarray, ...], truth: tuple[np.ndarray, ...], k: int) -> bool:
    """Whether both have the same positions and the same bits of the cosines."""
    rows = len(found[0])
    positions, products = (part[:rows, :k] for part in truth)
    return np.array_equal(found[0], positions) and found[1].tobytes() == products.tobytes()


def new_index(kind: str, dimension: int, k: int, device: torch.device, rows: np.ndarray) -> Any:
    from infogrowth.neighbors import create_index

    index = create_index(kind, dimension, k, device, 256, sharded=False)
    for start in range(0, len(rows), 65536):
        index.extend(rows[start : start + 65536])
    return index


@check
def exact(machine: Machine) -> Iterator[Row]:
    """Exact lookups: the CPU's positions and float64 bits, whatever precision the user allows."""
    count, lookups = machine.size(200_000, 2000), machine.size(20_000, 200)
    dimension, most = machine.size(256, 64), machine.size(100, 20)
    batches = (machine.size(8192, 150), machine.size(4096, 64), 1)
    for kind in ("random", "clustered", "1e-4", "1e-7"):
        rows = features(kind, count + lookups, dimension)
        stored, queries = rows[:count], rows[count:]
        truth = searched(new_index("exact", dimension, most, torch.device("cpu"), stored),
                         queries, 8192)  # fmt: skip
        few = queries[:32].astype(np.float64)
        best = -np.sort(-(few @ stored.T.astype(np.float64)), axis=1)[:, :most]
        yield machine.within(f"{kind}: the CPU against float64 sums",
                             float(np.abs(best - truth[1][:32]).max()), 1e-12)  # fmt: skip
        for k in (4, most):
            index = new_index("exact", dimension, k, machine.device, stored)
            for batch in batches:
                asked = queries[: 32 if batch == 1 else None]
                with loose_precision(machine.device):
                    found = searched(index, asked, batch)
                same = same_bits(found, truth, k)
                yield machine.holds(f"{kind}: k {k}, batches of {batch}", same, same, "True")


@check
def certificate(machine: Machine) -> Iterator[Row]:
    """Products of codes: the CPU's bits, and how much of its proven bound their error uses."""
    from infogrowth.neighbors.codes import Coder, full_precision, multiply

    dimension = machine.size(256, 64)
    for kind in ("random", "clustered", "1e-4"):
        rows = torch.from_numpy(features(kind, machine.size(65_536, 512), dimension))
        few = rows[: machine.size(1024, 128)]
        found = []
        for device in (torch.device("cpu"), machine.device):
            coder = Coder(dimension, device)
            with loose_precision(device), full_precision():
                codes, error = coder.encode(rows.to(device))
                product = multiply(codes[: len(few)], codes)
            found.append((codes.cpu(), error.cpu().double(), product.cpu()))
        (codes, error, product), (codes_there, _, product_there) = found
        same = torch.equal(codes, codes_there) and torch.equal(product, product_there)
        yield machine.holds(f"{kind}: bits of codes and products", same, same, "True")
        bound = error[: len(few), None] + error * (1 + error[: len(few), None])
        off = few.double() @ rows.double().T - product.double() / coder.unit
        worst = float((off.abs() / bound).max())
        yield machine.holds(f"{kind}: share of the bound", worst <= 1, f"{worst:.3f}", "<= 1")


@check
def grow(machine: Machine) -> Iterator[Row]:
    """`infogrowth grow` on the device and on the CPU: the same bytes in every file."""
    from infogrowth.data.feature_writer import write_shard

    count, dimension = machine.size(60_000, 600), machine.size(256, 32)
    image = features("clustered", count, dimension)
    noise = features("random", count, dimension, seed=1)
    ids, captions = [f"{n:08d}" for n in range(count)], [f"caption {n}" for n in range(count)]
    table = machine.folder / "recaptions"
    write_shard(table, "0", ids[::5], captions[::5], None, (image + noise)[::5])
    mixed = image + np.linspace(0.2, 4, count, dtype=np.float32)[:, None] * noise
    for shard, part in enumerate(np.array_split(np.arange(count), 4)):
        rows = slice(part[0], part[-1] + 1)
        arrays = image[rows], mixed[rows]
        write_shard(machine.folder / "features", f"{shard}", ids[rows], captions[rows], *arrays)
    for index in ("exact", "approximate"):
        trees = {}
        for name, device, batch in (("cpu", "cpu", 8192), ("device", machine.device.type, 3000)):
            growth = machine.folder / f"{index}_{name}"
            output = growth.with_suffix(".json")
            arguments = [
                "grow", "--features", str(machine.folder / "features"), "--recaptions", str(table),
                "--growth", str(growth), "--output", str(output), "--device", device,
                "--index", index, "--batch-size", str(batch), "--quiet",
            ]  # fmt: skip
            status, seconds = timed(lambda arguments=arguments: main(arguments))
            paths = [*sorted(growth.rglob("*")), output] if status == 0 else []
            trees[name] = {
                str(path.relative_to(growth)) if path != output else "output": path.read_bytes()
                for path in paths
                if path.is_file()
            }
            yield machine.measured(f"{index}: {count:,} pairs, {name}", f"{seconds:.1f} s")
        kept = len(json.loads(trees["cpu"]["output"]))
        yield machine.holds(f"{index}: some are kept", 0 < kept < count, kept, f"< {count:,}")
        names = trees["cpu"].keys() | trees["device"].keys()
        different = sorted(n for n in names if trees["cpu"].get(n) != trees["device"].get(n))
        shown = ", ".join(different) or "none"
        yield machine.holds(f"{index}: files that differ", not different, shown, "none")


@check
def cells(machine: Machine) -> Iterator[Row]:
    """Approximate lookups: the same cells, positions and bits as on the CPU."""
    from infogrowth.neighbors.index import NeighborIndex

    count, dimension = machine.size(200_000, 3000), machine.size(256, 32)
    rows = features("clustered", count + machine.size(8192, 200), dimension)
    found = []
    for device in (torch.device("cpu"), machine.device):
        index = NeighborIndex(dimension, 4, device, cells_from=machine.size(65_536, 1000))
        index.extend(rows[:count])
        with loose_precision(machine.device):
            found.append(searched(index, rows[count:], 4096))
        report = index.report()
    same = same_bits(found[1], found[0], 4)
    yield machine.holds("positions and bits", same, same, "True")
    yield machine.holds("cells are in use", report["search"] == "cells", report["search"], "cells")
    yield machine.measured("gain error", report["gain_error"])


@check
def scale(machine: Machine) -> Iterator[Row]:
    """Growth of CC3M's size from nothing, against the matrix products that it needs."""
    from infogrowth import InfoGrowth

    size, dimension = machine.size(2_700_000, 3000), machine.size(256, 32)
    random = torch.Generator(device=machine.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dimension, generator=random, device=machine.device)

    centers = normal(max(1, size // 20))
    growth = InfoGrowth(min_align=-1.0, device=str(machine.device))
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
    total = 0.0
    for start in range(0, size, 65536):
        number = min(65536, size - start)
        picked = torch.randint(len(centers), (number,), generator=random, device=machine.device)
        meaning = centers[picked]
        image, text = (functional.normalize(meaning + 0.9 * normal(number)).cpu().numpy()
                       for _ in range(2))  # fmt: skip
        ids = [f"{n:08d}" for n in range(start, start + number)]

        def process(i: list[str] = ids, a: np.ndarray = image, b: np.ndarray = text) -> Any:
            return growth.process(i, i, a, b)

        if start <= size // 3 < start + number:
            operations = 4 * number * (start + number / 2) * dimension
            rows, seconds = breakdown(machine, process, operations)
            yield from rows
        else:
            seconds = timed(process)[1]
        total += seconds
        if start < 1_000_000 <= start + number:
            yield machine.measured("a million pairs", f"{total:.1f} s")
    yield machine.aim(f"{size:,} pairs x {dimension} x 2", total, 40, "s", at_most=True)
    bound = _seconds_per_product(machine, dimension) * size * size  # two spaces, half of all pairs
    yield machine.measured("share of the matrix bound", f"{bound / total:.0%}")
    if machine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(machine.device) / 2**30
        yield machine.aim("peak memory", peak, 24, "GiB", at_most=True)


def breakdown(
    machine: Machine, action: Callable[[], Any], operations: float
) -> tuple[list[Row], float]:
    """What the processor and the device do in ``action``, whose products are ``operations``; and
    its seconds, the profiler's work included."""
    from train_step import profiled

    python = cProfile.Profile()
    figures, table = profiled(lambda: python.runcall(action), machine.device)
    print(table, flush=True)
    pstats.Stats(python).strip_dirs().sort_stats("tottime").print_stats(20)
    rows = [
        machine.measured(f"a batch's {name.replace('_', ' ')}, profiled", f"{value:,.4g}")
        for name, value in figures.items()
    ]
    rate = operations / figures["seconds"] / 1e12
    rows.append(machine.measured("a batch's products, profiled", f"{rate:.3g} TFLOP/s"))
    return rows, figures["seconds"]


def _seconds_per_product(machine: Machine, dimension: int) -> float:
    half = torch.float16 if machine.device.type == "cuda" else torch.float32
    left, right = (
        torch.randn(n, dimension, device=machine.device).to(half)
        for n in (machine.size(4096, 64), machine.size(32768, 512))
    )
    for repeats in (3, 20):
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right.T
        machine.synchronize()
        seconds = time.perf_counter() - start
    return seconds / 20 / (len(left) * len(right))


# --- models ---------------------------------------------------------------------------------------


@check
def embedding(machine: Machine) -> Iterator[Row]:
    """Features in half precision against float32, and pairs per second."""
    import embed as benchmark

    from infogrowth.encoders.embedding import workers_for
    from infogrowth.encoders.loading import load_encoder

    (machine.folder / "models").mkdir()
    name = "tiny" if machine.small else benchmark.random_base(machine.folder / "models", 384)
    encoder: Any = load_encoder(name, machine.device)
    pairs = benchmark.made_up_pairs(machine.size(6000, 24), 384)
    batch_size = machine.size(256, 8)
    whole = [(0, range(batch_size))]
    batch = next(
        benchmark.decoded_batches(pairs, encoder.preprocess, encoder.tokenize, whole, batch_size, 0)
    )
    images, texts = encoder.encode_images(batch.images), encoder.encode_tokens(batch.tokens)
    model = encoder._model
    with torch.inference_mode():
        tokens = {name: tensor.to(machine.device) for name, tensor in batch.tokens.items()}
        exact_images = model.encode_image(encoder._pixels(batch.images))[1]
        exact_texts = model.encode_text(tokens["input_ids"], tokens["attention_mask"])[1]
    for what, rows, truth in (("image", images, exact_images), ("text", texts, exact_texts)):
        error = float((rows - functional.normalize(truth).cpu()).abs().max())
        yield machine.within(f"{what} features against float32, largest difference", error, 2e-3)
    rate = benchmark.model_rate(pairs, encoder, batch_size, machine.device)
    yield machine.aim("the model alone", rate, 3000, "pairs/s")
    workers = workers_for(machine.device)
    rate = benchmark.decoding_rate(pairs, encoder, batch_size, workers)
    yield machine.measured(f"decoding and tokenizing, {workers} workers", f"{rate:,.0f} pairs/s")


@check
def golden(machine: Machine) -> Iterator[Row]:
    """A pretraining step from the fixtures in each precision, with and without recomputation."""
    from infogrowth.blip import momentum
    from infogrowth.blip.pretrain import BlipPretrain
    from infogrowth.blip.pretrained import load_weights
    from infogrowth.training.options import Precision

    arrays = np.load(GOLDEN / "pretrain_arrays.npz")
    names = ("input_ids_0", "attention_mask_0")
    batch = [torch.from_numpy(arrays["images"][0]), *(torch.from_numpy(arrays[n]) for n in names)]
    float64 = json.loads((GOLDEN / "pretrain_float64.json").read_text())["loss_float64"][0]
    can_recompute = installed("fairscale")

    def step(device: torch.device, name: Any, recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses, and all gradients as one vector."""
        model = BlipPretrain(_golden_config(), queue_size=32, vit_grad_ckpt=recompute)
        load_weights(model, GOLDEN / "pretrain_init.safetensors")
        model.to(device).train()
        precision = Precision(name, device)
        hardest = mock.patch.object(momentum, "sample_negatives", lambda w, *_, **__: w.argmax(1))
        with hardest, precision.autocast():
            losses = model(*(tensor.to(device) for tensor in batch), 0.4)
        scale = 1024.0 if name == "fp16" else 1.0
        (sum(losses.values()) * scale).backward()
        gradients = [p.grad.flatten() / scale for p in model.parameters() if p.grad is not None]
        found = torch.stack([losses[name].detach().float() for name in ("ita", "itm", "lm")])
        return found.cpu(), torch.cat(gradients).cpu()

    _, truth = step(torch.device("cpu"), "fp32", False)
    for name, loss_bound, bound in (
        ("fp32", 2e-5, 1e-4),
        ("bf16", 5e-2, 5e-2),
        ("fp16", 1e-2, 2e-2),
    ):
        losses, gradients = step(machine.device, name, False)
        error = float((losses - torch.tensor(float64)).abs().max())
        yield machine.within(f"{name}: losses against float64", error, loss_bound)
        yield machine.within(f"{name}: gradients against the CPU, relative",
                             float((gradients - truth).norm() / truth.norm()), bound)  # fmt: skip
        if not can_recompute:
            yield machine.not_run(f"{name}: recomputed blocks", "fairscale is not installed")
            continue
        again = step(machine.device, name, True)[1]
        error = float((again - gradients).norm() / gradients.norm())
        yield machine.within(f"{name}: gradients with recomputed blocks, relative", error, 1e-4)


def _golden_config() -> Any:
    from infogrowth.blip.config import BlipConfig

    return BlipConfig(
        image_size=32, patch_size=8, vision_width=48, vision_depth=3, vision_heads=3,
        text_width=48, text_depth=3, text_heads=3, text_feedforward=96, text_positions=64,
        text_dropout=0.0, vocab_size=195, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=193, enc_token_id=194, embed_dim=16,
    )  # fmt: skip


@check
def resume(machine: Machine) -> Iterator[Row]:
    """A run that was interrupted is the uninterrupted one, and checkpoints change devices.

    To the bit where kernels are deterministic. Left free, those of a GPU round differently each
    time, and Adam makes steps of full length of what remains of a gradient that is zero (that of
    a key's bias): such runs drift apart, interrupted or not.
    """
    full, half = machine.size(20, 4), machine.size(10, 2)
    runs = TrainingRuns(machine)
    with deterministic(machine.device):
        whole = runs.train("whole", full, machine.device)
        runs.train("halves", half, machine.device)
        resumed = runs.train("halves", full, machine.device)
    error = float((whole - resumed).abs().max())
    yield machine.holds(f"{full} steps against {half} and a resume", error == 0, error, "0")
    if machine.device.type == "cuda":
        free = [runs.train(name, full, machine.device) for name in ("free", "again")]
        drift = float((free[0] - free[1]).abs().max())
        yield machine.measured(f"{full} steps twice, kernels free", f"{drift:.2e}")
    # Dropout and negatives are drawn by the device, so these steps do without both.
    cpu, alike = torch.device("cpu"), {"text_dropout": 0.0, "objectives": ["ita", "lm"]}
    with deterministic(cpu):
        runs.train("stayed", full, cpu, **alike)
        runs.train("moved", half, cpu, **alike)
        runs.train("moved", half + half // 2, machine.device, **alike)
        runs.train("moved", full, cpu, **alike)
    # Rounding moves a loss by 1e-6, an optimizer that lost its state by 0.2.
    error = float((runs.losses("stayed") - runs.losses("moved")).abs().max())
    yield machine.within("CPU, then the device, then CPU: losses", error, 1e-3)


class TrainingRuns:
    """Runs of pretraining on 24 images in the machine's folder."""

    def __init__(self, machine: Machine) -> None:
        from PIL import Image

        path = HERE.parent / "train" / "pretrain_gain.py"
        spec: Any = importlib.util.spec_from_file_location("pretrain_gain", path)
        self._program: Any = importlib.util.module_from_spec(spec)
        sys.modules["pretrain_gain"] = self._program
        spec.loader.exec_module(self._program)
        self._folder = machine.folder
        random = generator(0, "gpu check images")
        (self._folder / "images").mkdir()
        entries = []
        for n in range(24):
            colors = random.integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(colors).save(self._folder / "images" / f"{n}.png")
            gains = random.uniform(0.2, 1, 2).tolist()
            entries.append({"image": f"{n}.png", "caption": f"a red thing {n}", "gains": gains})
        atomic_write_json(self._folder / "pairs.json", entries)

    def train(self, name: str, steps: int, device: torch.device, **options: Any) -> torch.Tensor:
        """Begin or go on with run ``name``; all weights after ``steps`` steps of it."""
        values: dict[str, Any] = {
            "annotations": str(self._folder / "pairs.json"), "images": str(self._folder / "images"),
            "vocabulary": str(HERE.parent / "infogrowth" / "assets" / "tiny_blip"),
            "output_dir": str(self._folder / name), "device": str(device), "max_steps": steps,
            "vit": "tiny", "image_size": 64, "vision_init": "random", "text_init": "random",
            "queue_size": 16, "batch_size": 8, "max_epoch": 20, "warmup_steps": 4, "log_every": 1,
            "precision": "fp32", "num_workers": 0, "tensorboard": False, "keep_checkpoints": 9,
        }  # fmt: skip
        self._program.pretrain(self._program.PretrainConfig(**values | options))
        saved = self._folder / name / "checkpoints" / f"step_{steps:08d}.pth"
        weights = torch.load(saved, map_location="cpu", weights_only=True)["model"]
        return torch.cat([t.flatten().double() for t in weights.values() if t.is_floating_point()])

    def losses(self, name: str) -> torch.Tensor:
        """The loss of each step of run ``name``."""
        lines = (self._folder / name / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return torch.tensor([r["loss"] for r in records if r["kind"] == "step"])


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Sums in one order only: by the kernels chosen on a GPU, by one thread on a CPU."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@check
def evaluation(machine: Machine) -> Iterator[Row]:
    """Retrieval scores in bfloat16 against float32, and image-caption pairs per second."""
    import retrieval_evaluation as benchmark

    from infogrowth.blip.config import preset
    from infogrowth.blip.model import BlipDual
    from infogrowth.training.options import Precision

    images, k_test = machine.size(400, 12), machine.size(128, 4)
    side = machine.size(384, 64)
    size = preset("tiny" if machine.small else "base", image_size=side, vocab_size=30524)
    model = BlipDual(size).to(machine.device).eval()

    def scored(name: Any, images: int) -> tuple[Any, float]:
        """Scores of so many images, and pairs per second."""
        noise, texts = benchmark.NoiseImages(images, side), benchmark.captions(images * 5)
        scores, seconds = timed(
            lambda: benchmark.retrieval_scores(
                model, benchmark.WordsAsNumbers(), noise, texts, k_test=k_test,
                max_length=benchmark.MAX_LENGTH, autocast=Precision(name, machine.device).autocast,
            )
        )  # fmt: skip
        return scores, k_test * (len(texts) + images) / seconds

    few = machine.size(40, 12)  # float32 takes 10 times as long
    scores = {name: scored(name, few)[0] for name in ("fp32", "bf16")}
    exact, half = scores["fp32"], scores["bf16"]
    difference = float((exact.cosine - half.cosine).abs().max())
    yield machine.within("cosines, largest difference", difference, 2e-2)
    both = (exact.i2t > benchmark.NOT_RANKED) & (half.i2t > benchmark.NOT_RANKED)
    difference = float((exact.i2t - half.i2t)[both].abs().max())
    yield machine.within("re-ranked scores, largest difference", difference, 1e-1)
    type_name = str(half.cosine.dtype).removeprefix("torch.")
    yield machine.holds("the cosine is computed in", type_name == "float32", type_name, "float32")
    rate = scored("bf16", images)[1]
    yield machine.aim("bf16, encoding included", rate, 20_000, "pairs/s")


@check
def ranks(machine: Machine) -> Iterator[Row]:
    """One rank through every function of distributed.py, which then fails: it ends at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    command = [sys.executable, "-c", RANK_PROGRAM, machine.device.type]
    ran, seconds = timed(
        lambda: subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=180
        )
    )
    passed = ran.stdout.split()
    expected = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
    backend = passed[0] if passed else ran.stderr[-200:]
    yield machine.holds("backend", backend == expected, backend, expected)
    yield machine.holds("functions that gave what they should", passed[1:] == ["11"],
                        " ".join(passed[1:]) or ran.stderr[-200:], "11")  # fmt: skip
    last = (ran.stderr.strip().splitlines() or [""])[-1]
    ended = ran.returncode == 2 and last == "error: the end"
    yield machine.holds(
        "exit after an error", ended, f"status {ran.returncode}, {last}", "status 2"
    )
    yield machine.measured("start, work and exit", f"{seconds:.1f} s")


RANK_PROGRAM = """
import sys
from infogrowth import distributed as d
from infogrowth.cli import exit_status
from infogrowth.errors import UserError
import torch, torch.distributed as dist
try:
    with d.process_group(sys.argv[1]) as device:
        print(dist.get_backend_config() if device.type == "cuda" else dist.get_backend())
        t = torch.arange(6.0, device=device).reshape(3, 2)
        g = t.clone().requires_grad_()
        d.all_gather_with_grad(g).square().sum().backward()
        d.barrier()
        with d.main_first():
            pass
        print(sum([
            torch.equal(d.all_gather(t), t), torch.equal(g.grad, 2 * t),
            torch.equal(d.all_gather_ragged(t)[0], t), len(d.all_gather_ragged(t[:0])[0]) == 0,
            d.all_gather_objects({"a": 1}) == [{"a": 1}], d.on_main(lambda: "x") == "x",
            torch.equal(d.all_reduce_mean(t), t),
            torch.equal(d.all_gather(t.cpu()), t.cpu()), d.on_main(lambda: 5) == 5,
            [d.next_number("n") for _ in range(3)] == [0, 1, 2],
            (d.rank(), d.world_size(), d.local_world_size()) == (0, 1, 1) and dist.is_initialized(),
        ]))
        raise UserError("the end")
except UserError as error:
    sys.exit(exit_status(error))
"""


@check
def training(machine: Machine) -> Iterator[Row]:
    """A pretraining step: alone, its loader alone, both, compiled, and the straightforward one."""
    import train_step as benchmark

    small = {"vit": "tiny", "image_size": 64, "batch_size": 4, "queue_size": 16, "num_workers": 0,
             "precision": "fp32"}  # fmt: skip
    full = {"vit": "base", "image_size": 224, "batch_size": 75, "queue_size": 57600,
            "num_workers": 12, "precision": "bf16"}  # fmt: skip
    config = benchmark.Config(**(small if machine.small else full), device=str(machine.device))
    size = benchmark.preset(config.vit, image_size=config.image_size, vocab_size=30524)
    steps, images = machine.size(20, 1), machine.folder / "noise"
    benchmark.make_images(images)

    def rate(step: Callable[[], Any], warm_up: int = machine.size(4, 1)) -> float:
        benchmark.timed(step, warm_up, machine.device)
        return config.batch_size * steps / benchmark.timed(step, steps, machine.device)

    def model(kind: Any) -> Any:
        with machine.device:
            return kind(size, queue_size=config.queue_size)

    mine = benchmark.Ours(config, images, model(benchmark.BlipPretrain), machine.device)
    alone = rate(mine.step_alone)
    yield machine.aim("the step alone", alone, 1200, "pairs/s")
    figures, table = benchmark.profiled(mine.step_alone, machine.device)
    print(table, flush=True)
    for name, value in figures.items():
        yield machine.measured(f"a step's {name.replace('_', ' ')}, profiled", f"{value:,.4g}")
    loaders = {
        workers: benchmark.loader_rate(config, images, workers, machine.device)
        for workers in ((0,) if machine.small else (4, 8, 12, 16))
    }
    for workers, pairs in loaders.items():
        yield machine.measured(f"the loader alone, {workers} workers", f"{pairs:,.0f} pairs/s")
    eager = rate(mine.step, machine.size(config.num_workers, 1))
    yield machine.aim("eager", eager, 1200, "pairs/s")
    bound = benchmark.bound_by(alone, loaders[config.num_workers])
    yield machine.measured("eager, bound by", bound)
    flops = benchmark.flops_per_step(model(benchmark.BlipPretrain), config, machine.device)
    peak = next((p for name, p in benchmark.PEAKS.items() if name in machine.name), None)
    if peak:
        share = eager / config.batch_size * flops / peak
        yield machine.aim("eager, share of the bf16 peak", 100 * share, 25, "%")
    plain = rate(
        benchmark.straightforward(
            config, images, model(benchmark.StraightforwardBlip), machine.device
        )
    )
    yield machine.measured("straightforward", f"{plain:,.0f} pairs/s")
    yield machine.aim("eager against straightforward", eager / plain, 3, "x")
    if machine.device.type != "cuda":
        yield machine.not_run("synchronisations, compiled step", "only on a GPU")
        return
    count = synchronisations(mine.step)
    yield machine.holds("synchronisations of a step", count <= 1, count, "<= 1")
    compiled = benchmark.Config(**full, device=str(machine.device), compile=True)
    try:
        with at_most(COMPILE_SECONDS):
            fast = benchmark.Ours(compiled, images, model(benchmark.BlipPretrain), machine.device)
            _, seconds = timed(fast.step_alone)
            yield machine.measured("compiling, and the first step", f"{seconds:.0f} s")
            yield machine.measured(
                "compiled, the step alone", f"{rate(fast.step_alone):,.0f} pairs/s"
            )
    except TimeoutError as error:
        yield machine.not_run("compiled", str(error))


COMPILE_SECONDS = 120


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A block that is left with a TimeoutError after so many seconds."""

    def over(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def synchronisations(step: Callable[[], Any]) -> int:
    """How often the processor waits for the GPU in one step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# --- running and reporting ------------------------------------------------------------------------


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What ``action`` returns, and its seconds, the device's included."""
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def run_checks(
    device: torch.device, small: bool, names: list[str], seconds: float = float("inf")
) -> list[Row]:
    """The rows of all checks; one that fails to run is a row that says why."""
    rows: list[Row] = []
    begun = time.monotonic()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            machine = Machine(device, small, Path(folder), name)
            start = time.monotonic()
            if start - begun > seconds:
                rows.append(machine.not_run(name, f"{seconds:g} s are over"))
                continue
            try:
                for row in CHECKS[name](machine):
                    rows.append(row)
                    print(line(row), flush=True)
            except Exception as error:
                traceback.print_exc()
                message = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                rows.append(Row(name, "the check itself", message, "no error", FAIL))
                print(line(rows[-1]), flush=True)
            print(f"{'':12}{time.monotonic() - start:.1f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def line(row: Row) -> str:
    return f"{row.check:<12}{row.what:<48} {row.value:<32} {row.expected:<18} {row.verdict}"


def run(config: Config) -> int:
    """Check everything that must hold on a GPU."""
    device = distributed.choose_device(config.device)
    unknown = [name for name in config.only if name not in CHECKS]
    if unknown:
        from infogrowth.errors import UserError

        raise UserError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    logging.getLogger().setLevel(logging.WARNING)
    started = time.monotonic()
    rows = run_checks(device, config.small, config.only or list(CHECKS), config.seconds)
    counts = {v: sum(row.verdict == v for row in rows) for v in (PASS, FAIL, MEASURED, NOT_RUN)}
    took = time.monotonic() - started
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), f"in {took:.0f} s")
    content = {"device": str(device), "small": config.small, "seconds": round(took, 1),
               "counts": counts, "rows": [asdict(row) for row in rows]}  # fmt: skip
    atomic_write_json(config.json, content, indent=2)
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
