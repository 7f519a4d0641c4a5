"""Towers: what makes of a picture's patches the rows that stand in tokens' places."""
