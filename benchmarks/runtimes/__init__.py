"""Layers of other runtimes on the CPU, each in a process of its own."""
