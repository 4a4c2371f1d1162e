"""What runs in Python before a kernel: sizes, buffers, packed weights, argument structs, plans and compiling."""
