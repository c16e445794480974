"""The bench of metrics: which score orders right rationales above wrong ones, on labelled data."""
