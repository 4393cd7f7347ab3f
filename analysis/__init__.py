"""Results of a run after training: its records, and what its model attends to."""
