"""Leaderboard, figures, HTML pages and the model card."""
