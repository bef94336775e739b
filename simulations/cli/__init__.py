"""The command's parts."""
