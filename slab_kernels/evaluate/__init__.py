"""What a model is worth, dense or compressed.

inspect      what a folder holds, layer by layer, from the bytes on disk
perplexity   perplexity on a text
against      how far its predictions are from the dense model's
generation   what a model writes behind a prompt, and at what speed
decoding     the speed of decoding, and where the time of a step goes
lm_eval      benchmarks of the lm-evaluation-harness
crop         a corner of one weight and the parts that it was split into
running      failures of a model's own code, in one sentence
"""
