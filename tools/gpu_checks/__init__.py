"""Checks of a card: what it computes, keeps, moves and waits for, in groups with a process each."""
