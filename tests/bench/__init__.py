"""`make bench`: measurements, printed with machine and date. Nothing here passes or fails."""
