"""Files named by the user: texts, model folders, plans, records and outputs."""
