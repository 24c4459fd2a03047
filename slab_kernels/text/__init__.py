"""Calibration and evaluation text: files, rows of JSON, the standard library, token ids."""
