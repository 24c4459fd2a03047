"""Calibration and evaluation text.

source      text read from files, a dataset, the standard library or memory; windows of tokens
rows        files of JSON rows: documents, chats, prompts with completions
stdlib      the sources of Python's standard library, split into two sides
token_ids   token ids as people hold them
"""
