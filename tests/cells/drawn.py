"""Cells drawn at random from all that an author may write, as hypothesis strategies."""

from hypothesis import strategies as st

from fastlstm import cells
from fastlstm.cells import functions

FORMS = (  # bounded enough that a few dozen of them, over a few steps, stay within float64's digits
    "{a} + {b}",
    "{a} - {b}",
    "{a} * {b}",
    "-{a}",
    "2.5 * {a}",
    "{a} / (1.5 + sigmoid({b}))",
    "1.0 / (2.0 + {a} * {a})",
    "0.3 - {a}",
    "{a} + 0.75",
    "sigmoid({a})",
    "tanh({a})",
    "relu({a})",
    "exp(tanh({a}))",
    "exp(-relu({a}))",
    "log_sigmoid({a})",
    "maximum({a}, {b})",
    "maximum({a}, 0.1)",
    "where({a} > {b}, {b}, {c})",
    "where({a} <= 0.2, {b}, 1.0)",
    "where({a} >= {b}, 1.0, 0.5) * {c}",
    "where({a} < {b}, tanh({a}), relu({c}))",
    "{a} ** 2",
    "abs({a})",
    "log(1.5 + square({a}))",
    "sqrt(0.5 + {a} ** 2)",
    "rsqrt(1.0 + abs({a}))",
    "minimum({a}, {b})",
    "clamp({a}, -0.5, 0.75)",
    "softplus({a})",
    "hard_sigmoid({a})",
    "mean({a})",
    "{a} - mean({b})",
    "{a} * mean({a} * {b})",
    "where(mean({a}) > 0.1, {b}, {c})",
    "layer_norm({a}, eps=0.5)",
    "layer_norm({a}, {b}, weight={c}, bias=(0.5, {b}), eps=0.5)[1]",
    "rms_norm({a}, {b}, weight=(1.5, {c}), eps=0.5)[0]",
    "{a} - mean({b}, of='head')",  # a row, in layers of one head
    "layer_norm({a}, weight={c}, eps=0.5, of='head')",
    "stop_gradient({a})",
    "stop_gradient({a} * {b}) + {c}",
)
RESULTS = (
    "tanh({a})",
    "sigmoid({a})",
    "tanh(mean({a}))",
    "0.5 * tanh({a}) + 0.25 * {old}",
    "{old} + sigmoid({a}) * (tanh({b}) - {old})",
)


@st.composite
def sources(draw):
    """The declaration of a cell, and the body of its function."""
    gates = {f"gate_{k}": draw(st.sampled_from(("x", "h", "xh"))) for k in range(draw(st.integers(1, 4)))}
    states = ["h", "c", "n"][: draw(st.integers(1, 3))]
    params = ["p", "q"][: draw(st.integers(0, 2))]
    inputs = ["u"][: draw(st.integers(0, 1))]
    known, lines = [*gates, *states, *params, *inputs], []
    taken = ", ".join(known)

    def filled(form, **others):
        chosen = {name: draw(st.sampled_from(known)) for name in "abc" if f"{{{name}}}" in form}
        return form.format(**chosen, **others)

    for k in range(draw(st.integers(1, 9))):
        lines.append(f"    v{k} = {filled(draw(st.sampled_from(FORMS)))}")
        known += [f"v{k}"] * 3  # what was computed is used
    results = ", ".join(filled(draw(st.sampled_from(RESULTS)), old=state) for state in states)
    text = "\n".join([f"def drawn({taken}):", *lines, f"    return {results}"])
    return {"gates": gates, "states": states, "params": params, "inputs": inputs}, text


def declared(source):
    """The cell of what `sources` draws."""
    declaration, text = source
    names = dict(functions.FUNCTIONS)
    exec(text, names)
    return cells.cell(**declaration)(names["drawn"])
