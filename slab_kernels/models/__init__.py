"""A Hugging Face model as decoder blocks and as a folder on disk, dense or packed."""
