"""Damaged model folders against everything that opens one: `python -m tests.fuzz --help`.

A case is a number. It decides the folder, the damage, and the program that is given the damaged
folder, so a case that failed is run again by its number alone. A case is right if the program gives
the model's own weights (every tensor equals the one that the folder holds under its name) or
refuses the folder by a named error, within five seconds and 2 GB.
"""
