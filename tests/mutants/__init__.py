"""Faults planted in copies of the library, one at a time: the tests named beside each must fail.

`python -m tests.mutants` (make test-mutants) plants all of them, which shows that the suite, lean
as it is, still sees what it is there for. `faults.py` lists them.
"""
