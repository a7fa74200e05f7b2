"""What is written to disk and read again: plans, methods, policies, records."""
