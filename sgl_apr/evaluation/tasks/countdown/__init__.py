"""Countdown: problems, search, demonstrations, and the task."""
