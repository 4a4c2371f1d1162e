"""A language model of characters, whose state goes from batch to batch: it learns from Python's own documentation.

python examples/characters.py

The text is what `help()` says of Python's topics. It ships with Python and has half a million characters. It is cut
into 32 rows, and a batch is the next 64 characters of each row. A batch begins with the state after the one before,
without its graph. So the model remembers more than it is trained through. The script prints the perplexity of the last
tenth of the text, which is held back, both with states that are carried on and with states that begin anew in each
batch. Then it writes a text, one character a step of a stream.
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import fastlstm

T, B = 64, 32  # characters of a batch's rows, rows


class Model(nn.Module):
    def __init__(self, characters: int, H: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(characters, 32), nn.Linear(H, characters)
        self.lstm = fastlstm.LSTM(32, H)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (T, B, characters) of the characters after each of text (T, B), and the state after the last."""
        output, state = self.lstm(self.embedding(text), state)
        return self.head(output), state


def rows(text: Tensor, B: int) -> Tensor:
    """Cut a text into B rows: (characters of a row, B)."""
    return text[: len(text) // B * B].view(B, -1).T


def perplexity(model: Model, text: Tensor, carry: bool) -> float:
    """The perplexity of a text in rows, whose states go from batch to batch if `carry` is true."""
    losses, state = [], None
    with torch.no_grad():
        for now, after in zip(text[:-1].split(T), text[1:].split(T)):
            logits, state = model(now, state if carry else None)
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="sum"))
    return (sum(losses) / text[1:].numel()).exp().item()


def write(model: Model, characters: str, count: int) -> str:
    """Draw one character after the other."""
    stream, text = model.lstm.stream(), [characters.index("\n")]
    with torch.no_grad():
        for _ in range(count):
            h = stream(model.embedding(torch.tensor(text[-1:])))
            text.append(torch.multinomial((model.head(h[0]) / 0.7).softmax(-1), 1).item())
    return "".join(characters[k] for k in text)


def main(epochs: int = 3, H: int = 256, size: int = 1_000_000) -> tuple[float, float, str]:
    """Return the perplexity of the text held back, with states carried on and begun anew, and a text by the model."""
    torch.manual_seed(0)
    text = "\n".join(topics[name] for name in sorted(topics))[:size]
    characters = "".join(sorted(set(text)))
    numbers = torch.tensor([characters.index(c) for c in text])
    begin = 9 * len(text) // 10
    training, held_back = rows(numbers[:begin], B), rows(numbers[begin:], B)
    model = Model(len(characters), H)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        state = None
        for now, after in zip(training[:-1].split(T), training[1:].split(T)):
            logits, state = model(now, state)
            state = tuple(s.detach() for s in state)  # The graph ends here, and the values go on.
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), after.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: perplexity {perplexity(model, held_back, True):.2f} of {len(characters)} characters")
    carried, anew = (perplexity(model, held_back, carry) for carry in (True, False))
    print(f"with states carried on {carried:.2f}, with states begun anew {anew:.2f}; a text by the model:")
    text = write(model, characters, 400)
    print(text.strip())
    return carried, anew, text


if __name__ == "__main__":
    main()
