"""The measured process of :mod:`.generation`: open one contestant, go through the shapes, exit.

    python -m modelport.runtimes.benchmark.generating JOB.json RESULT.json
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .cell import Company, follow, misplaced
from .environment import gpu_readings
from .generation import Contestant, Measured, Process, Sample, Shape, read_process
from .records import write_json

OPENER = "...pipeline", "open_generator"


class Clock:
    """A logits processor that changes nothing and notes when each token's logits were there.

    Whatever generates calls its processors once a token, beams and speech included.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._synchronize = synchronize

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._synchronize()
        self.times.append(time.perf_counter())
        return scores


def measure(
    job: Mapping[str, Any], keep: Callable[[Process], None] = lambda _: None,
    before: Process | None = None,
) -> Process:
    """Open the job's contestant and measure every shape; a shape that fails does not end it.

    Args:
        keep: told of the process as it stands once it is open, and after each shape.
        before: what an earlier process measured of the same round; kept beside what comes.
    """
    import torch

    torch.set_num_threads(job["threads"])
    contestant = Contestant(**job["contestant"])
    start = time.perf_counter()
    module, name = OPENER
    opener = getattr(importlib.import_module(module, __package__), name)
    model, sessions = opener(contestant.path, contestant.mode, device=job["device"],
                             options={"threads": job["threads"], **contestant.options})
    opened = time.perf_counter() - start
    resident = _status("VmRSS")
    shapes = before.shapes if before else ()
    peak = before.peak if before else 0

    def so_far() -> Process:
        return Process(contestant.name, job["round"], opened, resident,
                       max(peak, _status("VmHWM")), shapes)

    keep(so_far())
    for shape in job["shapes"]:
        measured = _shape(model, contestant, Shape(**shape), job)
        elsewhere = {fault for session in sessions for fault in misplaced(session, job["device"])}
        shapes = (*shapes, replace(measured, faults=tuple(sorted(elsewhere))))
        keep(so_far())
    return so_far()


def _shape(model: Any, contestant: Contestant, shape: Shape, job: Mapping[str, Any]) -> Measured:
    from ...errors import ModelportError

    try:
        return _timed(model, contestant, shape, job)
    except ModelportError as e:
        return Measured(shape, failure=str(e))
    except Exception as e:  # noqa: BLE001 - a runtime may fail in any way at one shape
        return Measured(shape, failure=f"{type(e).__name__}: {str(e)[:300]}")


def _timed(model: Any, contestant: Contestant, shape: Shape, job: Mapping[str, Any]) -> Measured:
    import torch

    prompt = _prompt(model, shape, job["seed"])
    synchronize: Callable[[], None] = (
        torch.cuda.synchronize if job["device"] == "cuda" else _nothing)
    settings = {
        "do_sample": False, "num_beams": 1, "max_new_tokens": shape.tokens,
        "min_new_tokens": shape.tokens, "return_dict_in_generate": True,
        **_mode(contestant.mode, job["device"]),
    }  # fmt: skip
    def read() -> list[dict[str, Any]]:
        return gpu_readings(os.getpid()) if job["device"] == "cuda" else []

    samples, found = [], None
    gc.collect()
    before = read()
    with Company() as company:
        for repeat in range(job["repeats"] + 1):
            clock = Clock(synchronize)
            start = time.perf_counter()
            found = model.generate(**prompt, **settings, logits_processor=[clock])
            end = time.perf_counter()
            if len(clock.times) != shape.tokens:
                raise RuntimeError(f"{len(clock.times)} tokens came instead of {shape.tokens}")
            if repeat:  # the first warms up
                steps = tuple(b - a for a, b in zip(clock.times, clock.times[1:], strict=False))
                samples.append(Sample(clock.times[0] - start, steps, end - start))
    assert found is not None
    ids = found.sequences.cpu().numpy()
    return Measured(shape, tuple(samples), cache_bytes(found.past_key_values),
                    hashlib.sha256(ids.tobytes()).hexdigest()[:16],
                    foreign=company.foreign, stolen=company.stolen, gpu=(*before, *read()))


def _nothing() -> None:
    return None


def _mode(mode: str, device: str) -> dict[str, Any]:
    """What ``generate`` is told beside the shape; compiled for a GPU, a step is one CUDA graph."""
    if mode == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    if mode == "compiled":
        from transformers import CompileConfig

        compiled = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
        compiled._compile_all_devices = True  # by itself it compiles on accelerators only
        return {"cache_implementation": "static", "compile_config": compiled}
    return {}


def _prompt(model: Any, shape: Shape, seed: int) -> dict[str, Any]:
    """Seeded ids without padding, or what else the model's generation starts from."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        features = torch.randn(shape.batch, config.num_mel_bins, frames, generator=generator)
        return {"input_features": features.to(model.device)}
    size = config.get_text_config().vocab_size
    ids = torch.randint(min(10, size // 2), size - size // 10, (shape.batch, shape.prompt),
                        generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cache_bytes(cache: Any) -> int | None:
    """Bytes that a cache holds; an encoder's keys and values count."""
    import torch

    if cache is None:
        return None
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    if hasattr(cache, "self_attention_cache"):
        parts = [cache_bytes(cache.self_attention_cache), cache_bytes(cache.cross_attention_cache)]
        return sum(p for p in parts if p is not None)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)
               if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _status(name: str) -> int:
    """Bytes of a line of ``/proc/self/status``; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith(f"{name}:")), 0)


def main(arguments: list[str]) -> int:
    given, place = map(Path, arguments)
    job = json.loads(given.read_text("utf-8"))
    follow(job["parent"])
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-job["threads"]:])
    measure(job, lambda process: write_json(place, asdict(process)), read_process(place))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
