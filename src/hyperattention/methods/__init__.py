"""What attends: the contract, lists of stages, exact attention, and what runs when no method is named."""
