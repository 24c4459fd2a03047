"""One module a backend; `slab_kernels.dispatch` holds their order."""
