"""One module or folder per backend; `dispatch` holds their order."""
