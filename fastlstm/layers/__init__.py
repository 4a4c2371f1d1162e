"""What users hold: modules and functions with the arguments, results and errors of PyTorch's own."""
