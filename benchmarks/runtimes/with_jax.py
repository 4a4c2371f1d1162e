"""JAX: the formulas of a layer in a `lax.scan`, compiled by XLA. It chooses its threads itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.runtimes.cases import Contender, LayerCase


def _lstm(states: Any, of_x: Any, weight_hh: Any, bias_hh: Any) -> Any:
    h, c = states
    i, f, g, o = jnp.split(of_x + h @ weight_hh + bias_hh, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _gru(states: Any, of_x: Any, weight_hh: Any, bias_hh: Any) -> Any:
    (h,) = states
    r_x, z_x, n_x = jnp.split(of_x, 3, -1)
    r_h, z_h, n_h = jnp.split(h @ weight_hh + bias_hh, 3, -1)
    r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + r * n_h)
    h = n + z * (h - n)
    return (h,), h


STEPS = {"LSTM": _lstm, "GRU": _gru}


def jax_layer(case: LayerCase, threads: int) -> Contender:
    s, step = case.shape, STEPS[case.shape.cell]

    def direction(x: Any, weights: Any, states: Any, reverse: bool) -> Any:
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        return jax.lax.scan(
            lambda states, of_x: step(states, of_x, weight_hh, bias_hh),
            states,
            x @ weight_ih + bias_ih,
            reverse=reverse,
        )

    def forward(weights: Any, x: Any, states: Any) -> Any:
        for of_layer in weights:
            runs = [direction(x, of, states, d == 1) for d, of in enumerate(of_layer)]
            x = jnp.concatenate([output for _, output in runs], -1)
        return x, runs[0][0]

    def loss_of(weights: Any, x: Any, states: Any, target: Any) -> Any:
        return ((forward(weights, x, states)[0] - target) ** 2).mean()

    weights = [
        [tuple(jnp.asarray(a.T) for a in case.weights(layer, d)) for d in range(s.directions)]
        for layer in range(s.layers)
    ]
    x, zeros = jnp.asarray(case.arrays["x"]), tuple([jnp.zeros((s.B, s.H))] * (case.gates - 2))
    states = tuple(jnp.asarray(a[0]) for a in case.states) or zeros
    if case.mode == "training":
        derive, target = jax.jit(jax.value_and_grad(loss_of)), jnp.asarray(case.arrays["target"])

        def train() -> Any:
            return jax.block_until_ready(derive(weights, x, states, target))

        def results() -> list[np.ndarray]:
            loss, gradients = train()
            return [np.asarray(loss), np.asarray(gradients[0][0][1]).T]

        return Contender(train, results)
    run = jax.jit(forward)

    def call() -> Any:
        nonlocal states
        output, new = jax.block_until_ready(run(weights, x, states))
        if case.mode == "step":
            states = new
        return output

    return Contender(call, lambda: [np.asarray(call())])
