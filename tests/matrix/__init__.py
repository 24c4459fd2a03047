"""Every causal language model of the installed transformers, tiny, on every road of the library."""
