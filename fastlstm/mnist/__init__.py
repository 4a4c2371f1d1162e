"""The demonstration: an MNIST image read row by row by an LSTM. Nothing of the kernels lives here."""
