"""The backends, which run layers. `dispatch` chooses among them, and `base` has the records that they take and return.

Every backend is a module with `TRAITS` and these functions. `aten` has neither ``saved_shape`` nor ``backward``, since
autograd differentiates its operations, and its ``forward`` takes the layer alone.

* ``supports(device, dtype)`` returns None, or the reason why the backend cannot run. It is the text of the error.
* ``saved_shape(cell, T, B, H, dtype, stack_size)`` returns the shape of the buffer of saved values, in a layout of the
  backend's own. `stack_size` is the number of layers in a stack, or None.
* ``forward(layer, save)`` returns a `Run`, whose `saved` is empty unless `save` is true. It computes the product of x
  too, so that a kernel can fuse it.
* ``backward(grads, layer, run, needs)`` returns `Gradients`: None where `needs` is False.
* ``plan(layer, save, packed_weights, state_axes)`` returns a `Plan` for calls like that of `layer`, if the trait
  `plans` is true. `packed_weights` is a dictionary in which packed weights stay between calls, or None: each call
  then packs them. `state_axes` are the leading axes of the states: ``(1,)`` where they have an axis of layers, and else
  ``()``.

These rules hold for all of them:

* States, biases and incoming gradients may be None. Each bias has a gradient tensor of its own.
* Tensors may have any strides, and offsets have 64 bits. No kernel needs a flipped copy for `reverse`.
* T and B are values at run time, and are never compiled in.
* Every run gives the same bits.
* NaN and infinity travel as in `torch.nn.LSTM`, except that a state of zeros in all rows is not multiplied.
"""
