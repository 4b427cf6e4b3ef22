"""Pages about runs: what training recorded, as charts and tables in one file."""
