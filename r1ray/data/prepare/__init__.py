"""Raw files in, training data out: the job that joins parsing, cleaning, augmenting, balancing and mixing."""
