"""The source module replayed from CUDA graphs, one for each bucket of shapes.

A graph holds every kernel of a forward pass, so that a call costs one launch; sizes are rounded up
to a bucket, so that a new length records nothing once its bucket was met.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BackendUnavailable
from . import CHECKPOINT, Runtime, _padding, _torch
from .torch_eager import TorchSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..session import Session
    from ..spec import ModelSpec

WARM_UP = 3
"""Runs before recording: lazily created handles and workspaces must not be part of a graph."""


class TorchCudaGraphs(Runtime):
    formats = (CHECKPOINT,)
    options: ClassVar[Mapping[str, Any]] = {"threads": 0, "compiled": True}

    def unavailable(self, device: str = "cpu") -> str | None:
        if device != "cuda":
            return "CUDA graphs run on cuda only; add --device cuda"
        return _torch.unavailable(device)

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads``; ``compiled`` (record what ``torch.compile`` makes of the module,
        compiled once for all shapes, instead of its own kernels)."""
        chosen = self.resolve_options(options)
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        if chosen["compiled"] and (reason := _torch.no_compiler(device)):
            raise BackendUnavailable(reason)
        from ..checkpoints import LoadedModel

        assert isinstance(artifact, LoadedModel)
        return CudaGraphSession(artifact, device, chosen)


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded forward pass.

    Attributes:
        inputs: read from at each replay; copy feeds into them.
        outputs: written by each replay.
        replay: runs it on the current stream.
    """

    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    replay: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Launch:
    """A replay; ``sizes`` are those that were asked for, without what fills up the bucket."""

    spec: ModelSpec
    sizes: Mapping[str, int]
    recording: Recording

    def __call__(self) -> None:
        self.recording.replay()

    def download(self) -> dict[str, np.ndarray]:
        """What the last replay left, by name."""
        outputs = {
            name: _torch.to_numpy(value.clone())  # the next replay overwrites it
            for name, value in zip(self.spec.output_names, self.recording.outputs, strict=True)
        }
        return _padding.cut(self.spec, outputs, self.sizes)


class CudaGraphSession(TorchSession):
    """Attributes:
        warm_up_seconds: spent so far on compiling and recording, by the sizes it was for.
    """

    runtime = "torch_cudagraphs"

    def __init__(self, model: LoadedModel, device: str, options: Mapping[str, Any]) -> None:
        super().__init__(model, device, options["threads"])
        self._forward: Any = (
            _torch.compiled(self._module, dynamic=True) if options["compiled"] else self._module
        )
        self._recordings: dict[tuple[tuple[str, int], ...], Recording] = {}
        self.warm_up_seconds: dict[tuple[tuple[str, int], ...], float] = {}

    def close(self) -> None:
        super().close()
        self._recordings.clear()
        self.__dict__.pop("_forward", None)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        sizes = self.spec.check(feeds)
        wanted = _padding.rounded(self.spec, sizes)
        key = tuple(sorted(wanted.items()))
        padded = _padding.pad(self.spec, feeds, wanted)
        if key not in self._recordings:
            self._recordings[key] = self._recorded(padded, key)
        recording = self._recordings[key]
        with torch.inference_mode():
            for held, value in zip(recording.inputs, self._tensors(padded), strict=True):
                held.copy_(value)
        launch = Launch(self.spec, sizes, recording)
        launch()
        return launch.download()

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Launch:
        """A recording of its own, since another launch's inputs must not get into it."""
        sizes = self.spec.check(feeds)
        wanted = _padding.rounded(self.spec, sizes)
        padded = _padding.pad(self.spec, feeds, wanted)
        return Launch(self.spec, sizes, self._recorded(padded, tuple(sorted(wanted.items()))))

    def _recorded(
        self, feeds: Mapping[str, np.ndarray], key: tuple[tuple[str, int], ...]
    ) -> Recording:
        start = time.perf_counter()
        made = record(self._forward, self._tensors(feeds))
        self.synchronize()
        self.warm_up_seconds[key] = (
            self.warm_up_seconds.get(key, 0.0) + time.perf_counter() - start
        )
        return made


def record(forward: Any, inputs: Sequence[torch.Tensor]) -> Recording:
    """Record one forward pass on these tensors (whole-network capture of PyTorch's CUDA notes)."""
    import torch

    new_stream: Any = torch.cuda.Stream
    new_graph: Any = torch.cuda.CUDAGraph
    side, graph = new_stream(), new_graph()
    with torch.inference_mode():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                forward(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = tuple(forward(*inputs))
    return Recording(inputs, outputs, graph.replay)


RUNTIME = TorchCudaGraphs()
