"""What a model is worth: perplexity, benchmarks of lm-eval, and what its layers hold."""
