"""One module a backend; `slab_kernels.backends.dispatch` holds their order."""
