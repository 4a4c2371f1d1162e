"""How a layer is differentiated: autograd Functions, operators for compilers, and the rules of every transform."""
