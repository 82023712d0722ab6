"""Ranks as processes: how they come together, watch one another, agree, and end."""
