"""The ways to run a packed linear, one file or folder for each; `dispatch` holds their order.

base            `Backend`, what a backend is, and `LinearProblem`, what it is asked
dispatch        which backend runs a problem, and why the others do not
support         the support table, asked of every backend's own rules
factors         U, V, P and Q scaled so that products with them fit the activations' type
one_launch      what the CUDA and the Triton backend share

cuda/           csrc/cuda through the CUDA driver
cpu             csrc/cpu through torch's dispatcher
triton/         kernels in Triton's language
reference       the definition of the operation, in plain torch
"""
