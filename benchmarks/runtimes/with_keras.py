"""Keras on TensorFlow, compiled by XLA, and the same model converted to LiteRT. Their arrays have the batch first."""

from typing import Any

import numpy as np

from benchmarks.runtimes.cases import Contender, LayerCase, Unsupported

ORDERS = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}  # the gates of torch in the order of Keras: torch's own, and z r h
INVERSE = ORDERS  # each of these orders undoes itself


def _batch_first(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a.transpose(1, 0, 2))


def _model(case: LayerCase) -> Any:
    import keras

    s, is_step = case.shape, case.mode == "step"
    x = first = keras.Input((s.T, s.I), batch_size=s.B)
    states = [keras.Input((s.H,), batch_size=s.B) for _ in case.states]
    for layer in range(s.layers):
        made = getattr(keras.layers, s.cell)(s.H, return_sequences=True, return_state=is_step)
        if s.bidirectional:
            made = keras.layers.Bidirectional(made)
        x = made(x, initial_state=states) if is_step else made(x)
        made.set_weights([a for d in range(s.directions) for a in _weights(case, layer, d)])
    return keras.Model([first, *states] if is_step else first, x)


def _weights(case: LayerCase, layer: int, direction: int) -> list[np.ndarray]:
    weight_ih, weight_hh, bias_ih, bias_hh = case.weights(layer, direction, ORDERS[case.shape.cell])
    bias = bias_ih + bias_hh if case.shape.cell == "LSTM" else np.stack([bias_ih, bias_hh])
    return [weight_ih.T, weight_hh.T, bias]


def keras_layer(case: LayerCase, threads: int) -> Contender:
    import tensorflow as tf

    model, x = _model(case), tf.constant(_batch_first(case.arrays["x"]))
    if case.mode == "training":
        target, variables = tf.constant(_batch_first(case.arrays["target"])), model.trainable_variables

        @tf.function(jit_compile=True)
        def derive(x: Any, target: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - target) ** 2)
            return loss, tape.gradient(loss, variables)

        def results() -> list[np.ndarray]:
            loss, gradients = derive(x, target)
            return [loss.numpy(), case.reordered(gradients[1].numpy().T, INVERSE[case.shape.cell])]

        return Contender(lambda: derive(x, target)[0].numpy(), results)
    run = tf.function(lambda *inputs: model(list(inputs) if len(inputs) > 1 else inputs[0]), jit_compile=True)
    states = [tf.constant(a[0]) for a in case.states]

    def call() -> Any:
        output = run(x, *states)
        if case.mode != "step":
            return output
        output, *states[:] = output
        return output

    return Contender(call, lambda: [_batch_first(call().numpy())])


def litert_layer(case: LayerCase, threads: int) -> Contender:
    if case.mode == "training":
        raise Unsupported
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    converter = tf.lite.TFLiteConverter.from_keras_model(_model(case))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = Interpreter(model_content=converter.convert(), num_threads=threads)
    interpreter.allocate_tensors()
    (x_index,), state_indices = _indices(interpreter.get_input_details())
    (y_index, *_), new_indices = _indices(interpreter.get_output_details())
    x, states = _batch_first(case.arrays["x"]), [a[0] for a in case.states]

    def call() -> np.ndarray:
        interpreter.set_tensor(x_index, x)
        for index, a in zip(state_indices, states):
            interpreter.set_tensor(index, a)
        interpreter.invoke()
        states[:] = [interpreter.get_tensor(index) for index in new_indices]
        return interpreter.get_tensor(y_index)

    return Contender(call, lambda: [_batch_first(call())])


def _indices(details: list[Any]) -> tuple[list[int], list[int]]:
    """Return the indices of the sequences, and of the states in the order of the model."""
    ordered = sorted(details, key=lambda each: each["name"])
    return tuple([each["index"] for each in ordered if len(each["shape"]) == dims] for dims in (3, 2))
