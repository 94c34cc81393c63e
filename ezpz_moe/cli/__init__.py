"""One module for each command of ``ezpz-moe``: its arguments, and what it prints."""
