"""What a person sees: the rows compared, tables, plots and records of measurements."""
