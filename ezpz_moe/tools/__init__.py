"""What the commands do. Tools return data; ``ezpz_moe.cli`` prints it."""
