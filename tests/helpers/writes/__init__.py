"""Writes to the weights of a module, and whether the next call computes with what was written.

PyTorch cannot know of a write through numpy, so whoever sees all forms of those sees writes to this memory by any
route. The other ways give a weight another memory, another tensor or another type, or count no write where one is.

A way is told a module before its first call, and a number by which it may choose a weight. It gives the write, which
may return the module that is to be called from then on.
"""
