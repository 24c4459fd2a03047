"""README.md, its neighbours and docs/ against the code and the results that they speak of."""
