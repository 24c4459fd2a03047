"""The algorithms that several methods share.

masks       patterns, and the choice of kept positions by a score
states      all the ways to prune a group of n:m
levels      what a pruned entry may be, as a multiple of its magnitude
quantize    integer grids for kept values, and their scales
metric      the Gram matrix damped and factorised, which the error is measured with
lowrank     magnitudes U V^T under signs, and truncated SVDs
sweep       SparseGPT's way from left to right, with levels for pruned entries
refit       least squares over kept values, scales and factors, by conjugate gradients
descent     one group after another moved to a better state
finish      how methods with a plain adapter end: refit, descent, rounding
"""
