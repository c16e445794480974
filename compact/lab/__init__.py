"""Test beds with a known truth: teacher zoo, tiny students, planted errors."""
