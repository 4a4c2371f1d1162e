"""A model of Keras before and after one line: the same losses and predictions, in less time.

python examples/keras_row_lstm.py    # needs `pip install keras`

The rows of an image of a digit are the 28 steps of a sequence. Two models that start from the same weights learn to
name the digit, one with Keras's own code and one with fastlstm. The script prints what they reach and how long they
take. The second model is then saved, and loaded for Keras's own code.
"""

import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import fastlstm.integrations.keras
from fastlstm.mnist.data import load

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported


def build() -> object:
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.Input((28, 28)), keras.layers.LSTM(128), keras.layers.Dense(10, activation="softmax")
    model = keras.Sequential(layers)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def main(images: int = 20_000) -> tuple[float, float]:
    """Return how far the losses of the two models differ, and how far their predictions do after a file."""
    if find_spec("keras") is None:
        raise SystemExit("this example needs keras: pip install keras")
    import keras

    train, _, test = load()
    x, y, tests, truth = (a.numpy() for a in (train.images[:images], train.labels[:images], *test))
    losses = []
    for name in ("Keras", "fastlstm"):
        if name == "fastlstm":
            fastlstm.integrations.keras.enable()
        build().fit(x[:256], y[:256], batch_size=128, verbose=0)  # compiles kernels
        model = build()
        start = time.perf_counter()
        history = model.fit(x, y, batch_size=128, verbose=0).history
        middle = time.perf_counter()
        predictions = model.predict(tests, batch_size=128, verbose=0)
        end = time.perf_counter()
        right = 100 * (predictions.argmax(1) == truth).mean()
        print(f"{name}: loss {history['loss'][0]:.4f}, {right:.1f}% of the test images", end="")
        print(f", fit {middle - start:.1f} s, predict {end - middle:.2f} s")
        losses.append(history["loss"][0])
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        loaded = keras.saving.load_model(Path(folder) / "model.keras")
    fastlstm.integrations.keras.disable()
    error = np.abs(loaded.predict(tests, batch_size=128, verbose=0) - predictions).max()
    print(f"losses differ by {abs(losses[0] - losses[1]):.1e}, predictions of the loaded model by {error:.1e} at most")
    return abs(losses[0] - losses[1]), float(error)


if __name__ == "__main__":
    main()
