"""What the machine itself can do, measured in the same run; what a cell asks of it.

    python -m modelport.runtimes.benchmark.ceilings THREADS DEVICE RESULT.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from .records import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

SIZES: Mapping[str, tuple[int, ...]] = {"cpu": (1024, 2048), "cuda": (2048, 4096, 8192)}
"""Of square matrices: a GPU's rate still rises where a CPU's has settled."""

REPEATS = 5
SECONDS = 0.4
"""Time for each size of a product, at least: on a shared machine the best shows up seldom. A sweep
measures anew in each of its rounds."""

STREAM_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Attributes:
        gemm: operations per second of the best square matrix product of any library here, by
            dtype; a multiply and an add are two. Integer operations for int8.
        bandwidth: bytes per second of a large copy, read and written bytes both counted and no
            write-allocate traffic (STREAM's convention; McCalpin, 1995).
        absent: why a dtype has no figure.
        libraries: whose product was the best, by dtype.
        ranges: of ``gemm`` over the rounds of a sweep, of which it then is the geometric mean.
    """

    device: str
    threads: int
    gemm: Mapping[str, float]
    bandwidth: float
    absent: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of a cell must compute and move at least.

    Attributes:
        flops: floating-point operations, a multiply-add counting two.
        bytes: weights read once, inputs read, outputs written; a lower bound.
    """

    flops: float
    bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """Achieved rates, and their share of the ceilings (None without a ceiling for the dtype)."""

    flops_per_second: float
    bytes_per_second: float
    of_gemm: float | None
    of_bandwidth: float | None


def over_rounds(found: Sequence[Ceilings]) -> Ceilings:
    """Ceilings of a sweep from those of its rounds, on one device with one number of threads.

    A cell's pace is a geometric mean over rounds, too. Measured once, a ceiling is that of one
    moment: on a shared machine it came out 1.7 times as high in one sweep as in the next.
    """
    if len(found) == 1:
        return found[0]
    rates = {dtype: [c.gemm[dtype] for c in found if dtype in c.gemm]
             for c in found for dtype in c.gemm}
    best = {dtype: max((c for c in found if dtype in c.gemm), key=lambda c: c.gemm[dtype])
            for dtype in rates}
    return replace(
        found[0],
        gemm={dtype: geometric_mean(values) for dtype, values in rates.items()},
        bandwidth=geometric_mean([c.bandwidth for c in found]),
        absent={dtype: why for c in found for dtype, why in c.absent.items()
                if dtype not in rates},
        libraries={dtype: c.libraries[dtype] for dtype, c in best.items() if dtype in c.libraries},
        ranges={dtype: (min(values), max(values)) for dtype, values in rates.items()},
    )


def share(work: Work, seconds: float, dtype: str, ceilings: Ceilings | None) -> Share:
    """Rates of a call that took ``seconds``, against the ceiling of its dtype."""
    flops, moved = work.flops / seconds, work.bytes / seconds
    top = ceilings.gemm.get(dtype) if ceilings else None
    wide = ceilings.bandwidth if ceilings else None
    return Share(flops, moved, flops / top if top else None, moved / wide if wide else None)


def count_flops(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Operations of one forward pass, counted on meta tensors: nothing is computed.

    Counts matrix products, convolutions and attention (``torch.utils.flop_counter``), a
    multiply-add as two; element-wise operations are left out, as they are from the GEMM ceiling.
    The module itself is not changed: a copy of its structure on the meta device is called.
    """
    import torch
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    empty = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    shapes = tuple(torch.empty_like(value, device="meta") for value in inputs)
    counter = FlopCounterMode(display=False)
    with counter, _undecided(), torch.no_grad():
        functional_call(module, empty, shapes)
    return int(counter.get_total_flops())


def _undecided() -> TorchDispatchMode:
    """Answers every question about a value with zero, since a tensor without data has none.

    Masks ask whether nothing is padded; "no" takes the path that computes with the mask.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Undecided(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0
            return func(*args, **(kwargs or {}))

    made: TorchDispatchMode = Undecided()  # type: ignore[no-untyped-call]
    return made


def measure(threads: int, device: str = "cpu") -> Ceilings:
    """Measure; the best of several libraries, sizes and repetitions, a ceiling being a best."""
    gemm: dict[str, float] = {}
    absent: dict[str, str] = {}
    libraries: dict[str, str] = {}
    for (dtype, library), product in products(threads, device).items():
        try:
            rate = max(2 * n**3 / _best(product(n), device) for n in SIZES[device])
        except (ImportError, RuntimeError, NotImplementedError, AttributeError) as e:
            absent[dtype] = str(e).splitlines()[0][:200]
            continue
        if rate > gemm.get(dtype, 0.0):
            gemm[dtype], libraries[dtype] = rate, library
    missing = {dtype: why for dtype, why in absent.items() if dtype not in gemm}
    return Ceilings(device, threads, gemm, _bandwidth(device), missing, libraries)


def products(
    threads: int, device: str = "cpu"
) -> dict[tuple[str, str], Callable[[int], Callable[[], Any]]]:
    """By dtype and library, what makes the product of two matrices of a size, ready to call.

    On a CPU ONNX Runtime's product counts beside torch's in float32: which kernels a library picks
    depends on who made the processor, and some reach half of what others do.
    """
    import torch

    torch.set_num_threads(threads)
    found: dict[tuple[str, str], Callable[[int], Callable[[], Any]]] = {}
    if device == "cpu":  # first: torch's threads, once there, spin on beside another library's
        found["float32", "onnxruntime"] = _session_product(threads)
    found |= {
        ("float32", "torch"): _float_product(torch.float32, device),
        ("bfloat16", "torch"): _float_product(torch.bfloat16, device),
        ("int8", "torch"): _int_product(device),
    }
    if device == "cuda":
        found["float16", "torch"] = _float_product(torch.float16, device)
        found["tf32", "torch"] = _tf32_product(device)
    return found


def _float_product(dtype: torch.dtype, device: str) -> Callable[[int], Callable[[], Any]]:
    import torch

    def make(n: int) -> Callable[[], Any]:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in "ab")
        out = torch.empty(n, n, dtype=dtype, device=device)
        return lambda: torch.mm(a, b, out=out)

    return make


def _tf32_product(device: str) -> Callable[[int], Callable[[], Any]]:
    """Of float32 matrices whose mantissas are cut to 10 bits on the way to the tensor cores."""
    import torch

    def make(n: int) -> Callable[[], Any]:
        exact = _float_product(torch.float32, device)(n)

        def product() -> None:
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                exact()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = False

        return product

    return make


def _int_product(device: str) -> Callable[[int], Callable[[], Any]]:
    import torch

    def make(n: int) -> Callable[[], Any]:
        a, b = (torch.randint(-127, 127, (n, n), dtype=torch.int8, device=device) for _ in "ab")
        return lambda: torch._int_mm(a, b)

    return make


def _session_product(threads: int) -> Callable[[int], Callable[[], Any]]:
    """Of a matrix that is fed with one that the graph holds, as an artifact holds its weights."""

    def make(n: int) -> Callable[[], Any]:
        import numpy as np
        import onnx_ir as ir
        import onnxruntime

        drawn = np.random.default_rng(0).standard_normal((n, n), np.float32)
        x, y = (ir.Value(name=name, shape=ir.Shape([n, n]), type=ir.TensorType(ir.DataType.FLOAT))
                for name in "xy")
        weight = ir.Value(name="weight", const_value=ir.tensor(drawn))
        node = ir.node("MatMul", [x, weight], outputs=[y])
        graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 17})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString(), options,
            providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_cpu_input("x", drawn)
        binding.bind_ortvalue_output(
            "y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((n, n), np.float32)))
        return lambda: session.run_with_iobinding(binding)

    return make


def _bandwidth(device: str) -> float:
    import torch

    count = STREAM_BYTES // 4
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * STREAM_BYTES / _best(lambda: target.copy_(source), device)


def _best(call: Callable[[], Any], device: str) -> float:
    import torch

    best, done = float("inf"), 0
    end = time.perf_counter() + SECONDS
    while done <= REPEATS or time.perf_counter() < end:
        done += 1
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process that measures: threads, device and the result's path."""
    threads, device, path = sys.argv[1:] if arguments is None else arguments
    write_json(Path(path), asdict(measure(int(threads), device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
