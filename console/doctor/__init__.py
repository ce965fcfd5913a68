"""nightsplit doctor: files, data, model, broker, store, disk, clock; what is wrong, and its remedy."""
