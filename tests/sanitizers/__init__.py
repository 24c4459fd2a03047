"""The compiled library under AddressSanitizer and UndefinedBehaviorSanitizer.

`python -m tests.sanitizers` (make test-sanitizers) builds it with both into a copy of the tree and
runs the tests of the CPU kernels and of the compiled solver there.
"""
