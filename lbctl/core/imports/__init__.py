"""Other controllers' configurations, converted to ours. Pure: text in, text out.

One module per origin: it says which objects it reads (pydantic models, so that an unknown key is
an error at its place) and what becomes of each key. What has no counterpart here becomes a comment
that says what happens instead; nothing is dropped in silence. `convert.convert` is the entry.
"""
