"""Labels of a batch: counts by signs and sizes, by every published way, and by simulated clients."""
