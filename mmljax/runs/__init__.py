"""What a run writes, and how it is read, plotted and shown."""
