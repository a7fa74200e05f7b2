"""Output of the commands: tables, plots, pages and records of measurements."""
