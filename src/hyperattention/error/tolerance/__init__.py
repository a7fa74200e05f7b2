"""Error as an argument: the cheapest method whose error is certified on fresh exact rows."""
