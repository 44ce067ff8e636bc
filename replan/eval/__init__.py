"""The benchmark: generate edits for every item, score them, report, and browse them."""
