"""The scores of a rationale, one file a metric."""
