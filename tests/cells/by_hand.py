"""The LSTM's arithmetic as it was written by hand, with its derivatives: results are to have these bits."""


def forward(i_pre, f_pre, g_pre, o_pre, c_prev, sigmoid, tanh):
    i, f, g, o = sigmoid(i_pre), sigmoid(f_pre), tanh(g_pre), sigmoid(o_pre)
    c = f * c_prev + i * g
    return o * tanh(c), c, i, f, g, o


def backward(dh, dc, i, f, g, o, c_prev, tanh):
    tanh_c = tanh(f * c_prev + i * g)
    dc = dh * o * (1.0 - tanh_c * tanh_c) + dc
    di, df, dg, do = dc * g, dc * c_prev, dc * i, dh * tanh_c
    return di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do * o * (1.0 - o), dc * f


class Fused:
    """A number on a machine that fuses products into sums, as text: equal texts have equal bits. As the vectors of the
    kernels do, a product stays open until it is used as anything but a term of a sum.
    """

    def __init__(self, text=None, factors=None):
        self._text, self.factors = text, factors

    @property
    def text(self):
        if self._text is None:
            self._text = f"({' * '.join(sorted(self.factors))})"
        return self._text

    @property
    def is_open(self):
        return self.factors is not None and self._text is None

    @staticmethod
    def of(other):
        return other.text if isinstance(other, Fused) else repr(other)

    def _plus(self, other, sign=""):
        return Fused(f"fma({sign}{', '.join(sorted(self.factors))}, {self.of(other)})")

    def __mul__(self, other):
        return Fused(factors=(self.text, self.of(other)))

    def __add__(self, other):
        if self.is_open:
            return self._plus(other)
        if isinstance(other, Fused) and other.is_open:
            return other._plus(self)
        return Fused(f"({' + '.join(sorted([self.text, self.of(other)]))})")

    def __sub__(self, other):
        return Fused(f"({self.text} - {self.of(other)})")

    def __rsub__(self, other):
        return self._plus(other, "-") if self.is_open else Fused(f"({other!r} - {self.text})")

    __radd__, __rmul__ = __add__, __mul__


def fused(name):
    """A function of one number."""
    return lambda x: Fused(f"{name}({x.text})")
