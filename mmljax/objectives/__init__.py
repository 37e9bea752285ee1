"""Pure objectives on similarity blocks."""
