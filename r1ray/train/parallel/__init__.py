"""Models that do not fit one worker: the model itself is split, by columns, by layers or by positions."""
