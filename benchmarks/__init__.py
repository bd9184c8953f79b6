"""Speed, always as a ratio against a peer in the same run. ``RESULTS.rst`` says how to run it."""
