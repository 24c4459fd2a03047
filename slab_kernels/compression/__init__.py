"""A whole model compressed block after block: plan, run, resume, train."""
