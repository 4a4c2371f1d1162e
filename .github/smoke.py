"""Tries the fastlstm that is installed, beside torch: `python smoke.py`.

The backend native has to run, except with the option `--pure`: the package was then built without a compiler.
"""

import subprocess
import sys
import tempfile
from importlib import metadata, resources

import torch

import fastlstm

pure = sys.argv[1:] == ["--pure"]
found = fastlstm.info()
print(*found["notes"], sep="\n")
assert fastlstm.__version__ == metadata.version("fastlstm")
assert resources.files("fastlstm").joinpath("py.typed").is_file()
assert found["backends"]["numba"] is None, found["backends"]["numba"]
assert (found["backends"]["native"] is None) != pure, found["backends"]["native"]

x = torch.randn(7, 3, 5)
for backend in ("numba", "aten", "reference", *["native"] * (not pure)):
    for name in ("LSTM", "GRU"):
        theirs, ours = getattr(torch.nn, name)(5, 11), getattr(fastlstm, name)(5, 11, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        results = []
        for module in (theirs, ours):
            output, _ = module(x)
            output.square().sum().backward()
            results.append([output, *(parameter.grad for parameter in module.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # float32, whose sums of 21 rows have another order
        print(f"{name} on {backend} computes what torch.nn.{name} does")

# A wheel of a release has no images to train with.
has_images = resources.files("fastlstm").joinpath("mnist", "train-images-idx3-ubyte.gz").is_file()
training = ["fastlstm.train", *(["--iterations", "2"] if has_images else ["--help"])]
for command in (["fastlstm"], training, ["fastlstm.predict", "--help"]):
    with tempfile.TemporaryDirectory() as folder:  # in which the training leaves its run
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    print("python -m", *command, "runs")
