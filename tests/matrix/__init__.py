"""Every causal language model that the installed transformers builds, in a few thousand weights, through every road of the library."""
