"""What a model is worth, dense or compressed.

inspect      what a folder holds, layer by layer, from the bytes on disk
perplexity   perplexity on a text
generation   what a model writes behind a prompt, and at what speed
lm_eval      benchmarks of the lm-evaluation-harness
crop         a corner of one weight and the parts that it was split into
running      failures of a model's own code, in one sentence
"""
