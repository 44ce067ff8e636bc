"""`replan bench`: our steps and whole edits beside the stock editor's, in one process, with random weights."""
