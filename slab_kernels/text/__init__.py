"""Calibration and evaluation text.

source      the reader: files, datasets, texts, chats, rows, token ids and batches from memory
rows        a row as text or token ids
row_files   files of rows: JSON and Parquet
token_ids   token ids as people hold them, without their padding
windows     windows of token ids, and how they are cut from a text
tokenizer   a model folder's tokenizer
stdlib      the sources of Python's standard library, split into two sides
"""
