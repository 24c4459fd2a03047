"""Counts the instructions of compiled CUDA kernels:

`counter` reads a disassembly, `instruction_budget` weighs it.
"""
