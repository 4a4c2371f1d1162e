"""Spiking neurons: cells without products, whose input is the current (T, B, H) that another layer computes.

Each returns its spikes, 1 or 0, as the first state. Their params, such as decays, start from the same number for each
unit and are trained: ``module.requires_grad_(False)`` keeps them as they are.
"""

from typing import Any

from fastlstm.cells.functions import abs, clamp, relu, square, surrogate, where  # noqa: A004  # Python's own
from fastlstm.cells.spec import cell

PI = 3.141592653589793


def _spike(distance: Any) -> Any:
    """Return a spike above the threshold, at a distance of 0. Its slope is that of an arctangent."""
    return surrogate(distance, 1.0 / (1.0 + square(PI * distance)))


@cell(gates={}, states=("spike", "membrane"), inputs=("current",), params={"beta": 0.9, "threshold": 1.0})
def lif(membrane: Any, current: Any, beta: Any, threshold: Any) -> Any:
    """The leaky integrate-and-fire neuron: `snntorch.Leaky`. A step after a spike subtracts the threshold. ``beta`` is
    the decay of the membrane potential, clamped to 0 and 1. Eshraghian et al., Training spiking neural networks using
    lessons from deep learning, 2023; the surrogate gradient is that of an arctangent, as in Fang et al., Incorporating
    learnable membrane time constant to enhance learning of spiking neural networks, 2021.
    """
    reset = where(membrane > threshold, threshold, 0.0)
    membrane = clamp(beta, 0.0, 1.0) * membrane + current - reset
    return _spike(membrane - threshold), membrane


@cell(
    gates={},
    states=("spike", "synapse", "membrane"),
    inputs=("current",),
    params={"alpha": 0.8, "beta": 0.9, "threshold": 1.0},
)
def synaptic(synapse: Any, membrane: Any, current: Any, alpha: Any, beta: Any, threshold: Any) -> Any:
    """The `lif` neuron whose synapses have a current that decays as well, by ``alpha``: `snntorch.Synaptic`."""
    reset = where(membrane > threshold, threshold, 0.0)
    synapse = clamp(alpha, 0.0, 1.0) * synapse + current
    membrane = clamp(beta, 0.0, 1.0) * membrane + synapse - reset
    return _spike(membrane - threshold), synapse, membrane


@cell(
    gates={},
    states=("spike", "membrane", "adaptation"),
    inputs=("current",),
    params={"beta": 0.95, "rho": 0.99, "strength": 0.2, "threshold": 1.0},
)
def alif(
    spike: Any, membrane: Any, adaptation: Any, current: Any, beta: Any, rho: Any, strength: Any, threshold: Any
) -> Any:
    """The adaptive leaky integrate-and-fire neuron: each spike raises the threshold by ``strength``, which then decays
    by ``rho`` a step. The surrogate gradient is a triangle of height 0.3. Bellec et al., A solution to the learning
    dilemma for recurrent networks of spiking neurons, 2020.
    """
    adaptation = rho * adaptation + spike
    membrane = beta * membrane + current - spike * threshold
    distance = (membrane - threshold - strength * adaptation) / threshold
    return surrogate(distance, 0.3 * relu(1.0 - abs(distance))), membrane, adaptation
