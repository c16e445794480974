"""Data for which the right answer is known: teacher zoo, tiny students, planted errors."""
