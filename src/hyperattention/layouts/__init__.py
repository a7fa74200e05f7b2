"""Keys in other layouts than one row a token: pages, and sequences end to end."""
