"""What one layer of a compressed cache holds while a model generates: stores that grow, compress, select and are read."""
