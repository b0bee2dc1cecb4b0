"""A failing task put right by editing where a few heads look, and the search for these heads."""
