"""Reading text without torch: reasoning steps, numbers, equations."""
