"""Statistics of a curious server on each client's update: a file each."""
