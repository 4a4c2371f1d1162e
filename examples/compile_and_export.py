"""A model with a fastlstm layer as one graph: `torch.compile(fullgraph=True)`, and `torch.export` with open sizes.

python examples/compile_and_export.py

The model tags words: an embedding, an LSTM in both directions, and a linear layer. The script compiles it as one graph,
and prints how far its outputs and gradients are from those of the model itself. Then it exports the model with open
numbers of words and sentences, saves the program, and runs it in a new process on another size than it was exported
with. That process knows nothing of the model's class. torch.compile needs a C++ compiler to make code of its graph.
Without one the script says so, and runs the graph as it is.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import fastlstm

WORDS, TAGS = 1000, 12
LOADS = """
import sys, torch, fastlstm  # fastlstm has the operators that the program calls
folder = sys.argv[1]
program = torch.export.load(f"{folder}/tagger.pt2").module()
torch.save(program(torch.load(f"{folder}/sentences.pt")), f"{folder}/tags.pt")
"""


class Tagger(nn.Module):
    """Logits (T, B, TAGS) of the tags of sentences (T, B) of word numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 64), nn.Linear(256, TAGS)
        self.lstm = fastlstm.LSTM(64, 128, bidirectional=True)

    def forward(self, sentences: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(sentences))[0])


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call, if it is there."""
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", usual))


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected))


def main(backend: str = "inductor") -> tuple[float, float]:
    """Return the largest differences of the compiled model and of the loaded program."""
    torch.manual_seed(0)
    model = Tagger()
    if backend == "inductor" and compiler() is None:
        print("no C++ compiler: the graph runs as it is, and the code that torch.compile makes of it is left out")
        backend = "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    differences = []
    for T, B in ((20, 8), (35, 3)):  # the second size compiles nothing
        sentences, tags = torch.randint(WORDS, (T, B)), torch.randint(TAGS, (T * B,))
        results = []
        for way in (model, compiled):
            logits = way(sentences)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tags)
            results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
        differences.append(largest(*results))
    print(f"outputs and gradients of the compiled model differ by {max(differences):.1e} at most")

    sizes = {"sentences": {0: Dim("T", max=10_000), 1: Dim("B", max=10_000)}}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randint(WORDS, (20, 8)),), dynamic_shapes=sizes)
    operators = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastlstm.")]
    print("operators of fastlstm in the exported graph:", *operators)
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder, "tagger.pt2"))
        torch.save(sentences, Path(folder, "sentences.pt"))
        subprocess.run([sys.executable, "-c", LOADS, folder], check=True)
        difference = largest([torch.load(Path(folder, "tags.pt"))], [model(sentences)])
    print(f"outputs of the program in a new process differ by {difference:.1e} at most")
    return max(differences), difference


if __name__ == "__main__":
    main()
