"""One module a machine, each with ``supports``, ``saved_shape``, ``forward`` and ``backward``: see CONTRIBUTING.md."""
