"""New rows out of kept ones, each with the operations that made it."""
