"""The algorithms that several methods share."""
