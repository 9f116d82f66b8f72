"""Device memory, one stream and CUDA graphs, all through torch: what a TensorRT session needs.

The session speaks to the GPU through this class alone, so that its whole path can be driven with a
stand-in on a machine without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

ALIGNMENT = 256
"""Bytes. TensorRT wants activation memory aligned to 256; torch's allocator gives 512."""


class Device:
    """The current CUDA device and a stream of its own on it.

    The stream is not the default one: on that, TensorRT synchronises at every launch. Buffers are
    allocated on it too, so the allocator hands memory on only in the stream's order.
    """

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream = self._torch.cuda.Stream()

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialised row-major buffer of a NumPy dtype (``bfloat16`` included)."""
        with self._torch.cuda.stream(self._stream):
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device="cuda")

    def upload(self, value: np.ndarray, buffer: Any) -> None:
        """Copy an array into a buffer, in the stream's order; the host does not wait for the GPU.

        The array may be reused afterwards: CUDA stages what is not page-locked before it returns.
        """
        with self._torch.cuda.stream(self._stream):
            buffer.copy_(_torch.to_tensor(value), non_blocking=True)

    def download(self, buffer: Any) -> np.ndarray:
        """A buffer's contents as an array of the caller's own; waits for the stream."""
        with self._torch.cuda.stream(self._stream):
            return _torch.to_numpy(buffer)

    def address(self, buffer: Any) -> int:
        """Where a buffer lies on the device."""
        return int(buffer.data_ptr())

    def fits(self, value: Any, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a torch tensor can be read in place: on this device, row-major, of the type."""
        return bool(
            value.is_cuda
            and value.is_contiguous()
            and tuple(value.shape) == shape
            and str(value.dtype) == f"torch.{dtype}"
        )

    def synchronize(self) -> None:
        """Wait for everything launched on the stream."""
        self._stream.synchronize()

    def wait_for_caller(self, reads: Sequence[Any]) -> None:
        """Let the stream wait for torch's current one, whose tensors it is going to read."""
        self._stream.wait_stream(self._torch.cuda.current_stream())
        for tensor in reads:
            tensor.record_stream(self._stream)  # else freed memory is handed on too early

    def let_caller_wait(self, written: Sequence[Any]) -> None:
        """Let torch's current stream, which is going to read what was written, wait for this."""
        current = self._torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for buffer in written:
            buffer.record_stream(current)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what ``enqueue`` launches on the stream; the result launches it again at once.

        Waits for the device first, as capturing must not begin while work is in flight.
        """
        graph = self._torch.cuda.CUDAGraph()
        # thread_local: other threads' calls, such as a data loader's, do not spoil the capture.
        with self._torch.cuda.graph(
            graph, stream=self._stream, capture_error_mode="thread_local"
        ):
            enqueue()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def seconds(self, launch: Callable[[], None]) -> float:
        """Device time of ``launch``, between two events on the stream."""
        start = self._torch.cuda.Event(enable_timing=True)
        end = self._torch.cuda.Event(enable_timing=True)
        start.record(self._stream)
        launch()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def memory(self) -> tuple[int, int]:
        """Peak bytes that torch allocated and reserved on the device."""
        return (self._torch.cuda.max_memory_allocated(), self._torch.cuda.max_memory_reserved())
