"""Writes to the weights of a module, in all ways known, and whether the next call computes with what was written.

A way is told a module before its first call, and a number by which it may choose a weight. It gives the write, which
may return the module that is to be called from then on.
"""
