"""An onnx-ir tensor that is converted while it is written. Imports onnx-ir: import it late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from .weights import convert_chunks, numpy_dtype, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..checkpoints.model import TensorRef


class StreamedTensor(ir.LazyTensor):
    """A stored tensor in another float dtype; written a few MiB at a time, held only if asked for.

    Attributes:
        ref: the stored bytes.
    """

    def __init__(self, ref: TensorRef, name: str, dtype: str) -> None:
        target = numpy_dtype(dtype)
        super().__init__(
            lambda: ir.Tensor(read(ref, dtype, name=name), name=name),
            dtype=ir.DataType.from_numpy(target),
            shape=ir.Shape(ref.shape),
            name=name,
        )
        self.ref = ref
        self._target = dtype

    def chunks(self) -> Iterator[memoryview]:
        """The converted bytes in order; each piece is valid until the next is asked for."""
        return convert_chunks(self.ref, self._target, name=self.name or "")

    def tofile(self, file: Any) -> None:
        """Write the converted bytes to a binary file."""
        for chunk in self.chunks():
            file.write(chunk)
