"""A session that speaks: the number of a prompt in, its audio out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ..session import Placement, Session
from ..spec import Dim, ModelSpec, TensorSpec
from .setting import Setting, prompts, voice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from .optimisations import Optimisations


class Speaker(Session):
    """Bark with a combination of optimisations and a list of prompts.

    Attributes:
        model: the transformers model.
        count: of prompts; a larger number begins again.
    """

    runtime = "torch"

    def __init__(self, model: Any, root: Path, setting: Setting, device: str) -> None:
        import torch

        setting.configure(model)
        self.model = model
        self._device = device
        self._setting = setting
        self._inputs = {k: v.to(device) for k, v in prompts(root, setting, model).items()}
        found = voice(root, setting, model)
        self._voice = found and {k: v.to(device) for k, v in found.items()}
        self.count = len(self._inputs["input_ids"])
        if device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        super().__init__(ModelSpec(
            (TensorSpec("prompt", "int64", ("batch",), "tokens", high=self.count),),
            (TensorSpec("audio", "float32", ("batch", "samples")),),
            {"batch": Dim(1, 1, 1 << 16), "samples": Dim(1, 24_000, 1 << 30)}))

    def speak(self, numbers: Sequence[int], *, cut: bool = False) -> torch.Tensor:
        """The audio of these prompts, padded to the longest.

        Args:
            cut: decode each row at its own length, as one would alone.
        """
        import torch

        rows = torch.tensor([n % self.count for n in numbers], device=self._device)
        inputs = {name: value[rows] for name, value in self._inputs.items()}
        history = self._voice and {k: v.clone() for k, v in self._voice.items()}
        if self._setting.sample:
            torch.manual_seed(self._setting.seed)
        with torch.inference_mode(), _quiet():
            audio = self.model.generate(
                **inputs, history_prompt=history, do_sample=self._setting.sample,
                **({"return_output_lengths": True} if cut else {}))
        return audio[0] if cut else audio  # type: ignore[no-any-return]

    def placement(self) -> Placement:
        return Placement(self.model.device.type, ("torch",))

    def synchronize(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()

    def device_memory(self) -> tuple[int, int]:
        """Peak bytes that torch allocated and reserved on the device since :meth:`reset_memory`."""
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def reset_memory(self) -> None:
        """Begin the device's peak again, as the article does before each measurement."""
        if self._device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def close(self) -> None:
        super().close()
        self.__dict__.pop("model", None)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        audio = self.speak(feeds["prompt"].tolist())
        return {"audio": np.asarray(audio.float().cpu())}

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        numbers = np.array(feeds["prompt"])

        def launch() -> None:
            """Each call goes on in the list, so that free lengths are not one prompt's."""
            self.speak(numbers.tolist())
            numbers[...] += len(numbers)

        return launch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what Bark's own ``generate`` is told about how it calls itself."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def open_speaker(
    root: Path, optimisations: Optimisations, setting: Setting, *, device: str
) -> Speaker:
    """Load the model from a checkpoint's directory.

    Raises:
        BackendUnavailable: the combination can't be had here.
        UsageError: a setting that the checkpoint can't do, or no such voice.
    """
    return Speaker(optimisations.load(root, device), root, setting, device)
