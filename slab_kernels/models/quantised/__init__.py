"""Folders whose weights other libraries have quantised, read as the dense ones they stand for.

One file for each format finds the tensors in which a folder holds a weight, and multiplies them
out. `checkpoint.py` shows the whole as a folder of dense tensors.
"""
