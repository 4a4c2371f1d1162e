"""An emulator of the PTX that Triton emits: each instruction for all threads of a CTA at once, in numpy.

Names are those of NVIDIA's "Parallel Thread Execution ISA", which is cited as "PTX ISA" with the title of a section.
"""
