"""Tools for those who work on ddpo itself: speed and memory beside trl, and runs killed at random moments."""
