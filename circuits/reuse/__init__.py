"""What circuits of several tasks share, by chance or not, and whether the same head plays the same role."""
