"""The command line `slab-kernels`: what the options mean, how a command ends, and one file per
group of commands."""
