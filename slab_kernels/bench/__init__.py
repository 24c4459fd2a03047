"""Times one linear beside torch and other libraries, and chooses tiles by timing."""
