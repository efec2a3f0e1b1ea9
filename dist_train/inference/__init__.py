"""A trained net: evaluated again, asked for predictions, exported."""
