"""The command line `slab-kernels`: what the options mean, how a command ends, one file a group of commands."""
