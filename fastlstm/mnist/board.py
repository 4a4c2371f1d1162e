"""A run as TensorBoard shows it while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlstm.files import FileError
from fastlstm.mnist.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Board:
    """Writes loss, accuracy, time, validation accuracy and pictures to `directory`, for `tensorboard --logdir`.

    Raises:
        ImportError: where the package tensorboard is not installed.
        FileError: by the methods, when the directory cannot be written.
    """

    def __init__(self, directory: Path):
        # slow to import, and an extra of this package
        from torch.utils.tensorboard import SummaryWriter

        self._class, self._directory = SummaryWriter, directory
        self._writer: Any = None

    def start(self, done: int) -> None:
        """Open the log; what an earlier run logged beyond `done` iterations is hidden."""
        with self._writing():
            self._writer = self._class(str(self._directory), purge_step=done + 1)

    def tell(self, history: History, new: int) -> None:
        """Log the last `new` iterations of `history`."""
        done = len(history.loss)
        with self._writing():
            for k in range(done - new, done):
                self._writer.add_scalar("training/loss", history.loss[k], k + 1)
                self._writer.add_scalar("training/accuracy", history.accuracy[k], k + 1)
                self._writer.add_scalar("training/ms per iteration", 1000 * history.seconds[k], k + 1)

    def tell_validation(self, iteration: int, accuracy: float) -> None:
        with self._writing():
            self._writer.add_scalar("validation/accuracy", accuracy, iteration)

    def close(self, iteration: int, pictures: dict[str, Figure]) -> None:
        """Add the pictures, and write what is still held back."""
        with self._writing():
            for name, picture in pictures.items():
                self._writer.add_figure(name, picture, iteration, close=False)
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"{self._directory}: cannot be written ({error.strerror})") from error
