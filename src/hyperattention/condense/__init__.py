"""Which keys a cache keeps when it is full, and with what weights: one policy a file."""
