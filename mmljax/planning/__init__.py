"""Plans of a run: its programs compiled for chips that need not be present, and read."""
