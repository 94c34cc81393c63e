"""The work behind the commands. Tools return data; ``ezpz_moe.cli`` prints it."""
