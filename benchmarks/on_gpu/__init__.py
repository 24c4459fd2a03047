"""What `benchmarks/on_gpu.sh` runs on a machine with a GPU; `__main__.py` is where it begins.

parts.py lists the parts, runner.py runs them, machine.py says what machine and which commit it is,
rows.py keeps results. Each other file is one part, or the verdict on it (verdicts.py).
"""
