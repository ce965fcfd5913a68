"""The files a user writes, as frozen objects."""
