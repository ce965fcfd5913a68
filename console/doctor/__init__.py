"""nightsplit doctor: checks of files, data, model, broker, store, disk and clock, with the fix of each problem."""
