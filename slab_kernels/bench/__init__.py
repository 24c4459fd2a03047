"""Times one linear beside torch and other libraries, and chooses tiles by timing.

linear          `slab-kernels bench`: the rows of one linear
case            one linear and what to time on it
contestants     who is timed on it
random_weight   the weight that ours hold
clocks          how long a call takes, on a CPU and on a GPU
correctness     the gate that a result passes before it is timed
roofline        what this machine reaches at most, measured in the same run
peer            what another library's kernel is, and the check that it passes
peers           all of them; peers_cuda and peers_cpu by device
ggml            llama.cpp's products, by its shared library
layer_shapes    the linears of well-known models
tune            `slab-kernels tune`: tiles of the Triton kernels by timing
tune_problems   what is tuned, and the candidates
tune_rows       the user's file of rows, read and written
machine         what this machine is, for `slab-kernels info` and every report
"""
