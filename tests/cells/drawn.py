"""Cells drawn at random from all that an author may write, as hypothesis strategies."""

import re

from hypothesis import HealthCheck, assume
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
def sources(draw, least_products=0, most_products=4):
    """The declaration of a cell, and the body of its function. Its states come in any order."""
    gates = {f"gate_{k}": draw(st.sampled_from(("x", "h", "xh"))) for k in range(draw(st.integers(1, 4)))}
    states = draw(st.permutations(["h", "c", "n"][: draw(st.integers(1, 3))]))
    params = ["p", "q"][: draw(st.integers(0, 2))]
    inputs = ["u"][: draw(st.integers(0, 1))]
    known, lines = [*gates, *states, *params, *inputs], []
    taken = ", ".join(known)

    def filled(form, **others):
        chosen = {name: draw(st.sampled_from(known)) for name in "abc" if f"{{{name}}}" in form}
        return form.format(**chosen, **others)

    count, multiplied = draw(st.integers(1, 9)), []
    multiplying = draw(st.permutations(range(count)))[: draw(st.integers(least_products, most_products))]
    for k in range(count):
        value = filled(draw(st.sampled_from(FORMS)))
        if k in multiplying:  # a value of each unit, whatever is drawn, or one that a product multiplies already
            multiplied.append(f"{value} + {draw(st.sampled_from([*gates, *states, *params, *inputs]))}")
            value = f"0.5 * w{k}({draw(st.sampled_from(multiplied))})"
        lines.append(f"    v{k} = {value}")
        known += [f"v{k}"] * 3  # what was computed is used
    body = f"    return {', '.join(filled(draw(st.sampled_from(RESULTS)), old=state) for state in states)}"
    # a cell may not declare what no new state depends on
    body += "".join(f" + 0.1 * tanh({name})" for name in (*gates, *params, *inputs))
    for k in reversed(range(count)):
        needed = re.search(rf"\bv{k}\b", body)
        if needed or k in multiplying:
            body = f"{lines[k]}\n{body}" + f" + 0.1 * tanh(v{k})" * (not needed)
    products = [f"w{k}" for k in draw(st.permutations(multiplying))]
    text = f"def drawn({', '.join([taken, *products])}):\n{body}"
    return {"gates": gates, "states": states, "params": params, "inputs": inputs, "products": products}, text


def declared(source):
    """The cell of what `sources` draws, which is rejected if it simplifies to one that does without a part of it."""
    declaration, text = source
    names = dict(functions.FUNCTIONS)
    exec(text, names)
    try:
        return cells.cell(**declaration)(names["drawn"])
    except TypeError as error:
        assume("no new state depends on" not in str(error))
        raise


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
